"""TRL's turn of a comparison: steps of its GRPOTrainer, with the judge as its reward."""

import math
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import ml_collections
import numpy as np
import transformers
import trl

from caprl_jax.bench import peers, torch_models
from caprl_jax.bench import work as work_lib
from caprl_jax.bench.machine import facts
from caprl_jax.bench.peers import Checked
from caprl_jax.bench.turns import STEPS, Turn, moved, stride
from caprl_jax.bench.work import Work
from caprl_jax.run.choices import choice

# Captions that TRL learns from at once; for 16 captions, 4 were quicker than 2 and than all.
_PIECE = 4


def turn(config: ml_collections.ConfigDict, folder: Path, check: bool) -> Turn:
    """Runs STEPS of TRL's trainer; the first is checked if asked for.

    Raises:
      WorkDiffers: TRL did other work than asked for.
    """
    peers.keep_memory()
    work = work_lib.make(config, folder)
    reward = Reward(work)
    watch = Watch(work, reward, check)
    with tempfile.TemporaryDirectory() as scratch:
        trainer(work, reward, watch, scratch).train()
    if check:
        watch.turn.facts = facts(work) | {"trl": trl.__version__}
    return watch.turn


class Reward:
    """TRL's reward function: the judge's accuracy of each caption, one batched forward pass."""

    __name__ = "caprl"

    def __init__(self, work: Work):
        """Reads the judge."""
        self.letters = torch_models.Letters(torch_models.judge(work), work)
        self.captions: list[list[int]] = []
        self.images: list[int] = []

    def __call__(self, completion_ids, index, **_) -> list[float]:
        """Rewards completions' ids, each with its picture's index."""
        self.captions, self.images = completion_ids, index
        return self.letters.rewards(completion_ids, index).tolist()


class Watch(transformers.TrainerCallback):
    """Callback that times TRL's steps, and checks the first of them if asked for."""

    def __init__(self, work: Work, reward: Reward, check: bool):
        """Starts with no step timed."""
        self._work, self._reward, self._check, self._began = work, reward, check, 0.0
        self._before: list[np.ndarray] = []
        self._seen: dict[str, int] = {}
        self.turn = Turn()

    def begin(self, model: Any) -> None:
        """Records the model's state, and adds hooks that record its input sizes."""
        if not self._check:
            return
        self._before = samples(model)
        self.turn.logits = torch_models.first_logits(model, torch_models.inputs(self._work))

        def prompts(_, args, kwargs):
            self._seen.setdefault("prompt", kwargs["input_ids"].shape[1])

        def images(_, args, kwargs):
            self._seen.setdefault("patches", args[0].shape[0] // len(kwargs["grid_thw"]))

        model.register_forward_pre_hook(prompts, with_kwargs=True)
        model.model.visual.register_forward_pre_hook(images, with_kwargs=True)

    def on_step_begin(self, args, state, control, **_):
        """Records the start of a step."""
        self._began = time.perf_counter()

    def on_step_end(self, args, state, control, model=None, **_):
        """Records the end of a step."""
        self.turn.seconds = time.perf_counter() - self._began
        if self._check and state.global_step == 1:
            self.turn.checks = checks(self._work, self._reward, self._seen)
            peers.require_same(self.turn.checks)
            self.turn.moved = moved(self._before, samples(model))
            self.turn.parameters = torch_models.weights(model)
            self.turn.captions, self.turn.letters = answered(self._work, self._reward)


def samples(model: Any) -> list[np.ndarray]:
    """Copies a few numbers of each parameter."""
    return [p.detach().reshape(-1)[:: stride(p.numel())].numpy().copy() for p in model.parameters()]


def checks(work: Work, reward: Reward, seen: dict[str, int]) -> list[Checked]:
    """Returns checks of TRL's first step against the work; `seen` holds the model's inputs."""
    config, captions, b = work.config, reward.captions, work.config.data.batch
    images, lengths = sorted(reward.images), {len(c) for c in captions}
    expected = np.repeat(np.arange(b), config.caprl.group).tolist()
    return [
        Checked("captions", work.captions, len(captions)),
        Checked("images of the captions", images == expected, True),
        Checked("tokens of each caption", str({config.sampling.max_tokens}), str(lengths)),
        Checked("prompt tokens of each image", int(work.prompt.mask[0].sum()), seen["prompt"]),
        Checked("patches of each image", int(work.images.mask[0].sum()), seen["patches"]),
        Checked("questions of each caption", config.caprl.questions, len(reward.letters.tails[0])),
    ]


def answered(work: Work, reward: Reward) -> tuple[np.ndarray, np.ndarray]:
    """Returns (captions [b, g, t] in image order, judge's probabilities [b, g, n, letters])."""
    order = np.argsort(reward.images, kind="stable")
    letters = reward.letters(reward.captions, reward.images)[order]
    of_each = (work.config.data.batch, work.config.caprl.group)
    tokens = np.asarray(reward.captions)[order]
    return tokens.reshape(*of_each, -1), letters.reshape(*of_each, *letters.shape[1:])


def settings(work: Work, folder: str) -> Any:
    """Returns TRL's quickest settings: no recomputation, static cache, summed gradients."""
    c, o = work.config, work.config.optimizer
    piece = math.gcd(work.captions, _PIECE)
    # Chat tokens are never drawn, so none ends a caption, and none is mistaken for an image.
    special = np.asarray(work.instruction.special).tolist()
    return trl.GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        fp16=False,
        report_to="none",
        seed=c.seed,
        max_steps=STEPS,
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        per_device_train_batch_size=piece,
        gradient_accumulation_steps=work.captions // piece,
        num_generations=c.caprl.group,
        max_completion_length=c.sampling.max_tokens,
        shuffle_dataset=False,
        gradient_checkpointing=False,
        temperature=c.sampling.temperature,
        generation_kwargs={"suppress_tokens": special},
        cache_implementation="static",
        beta=0.0,
        loss_type="grpo",
        epsilon=choice(c, "loss").options.clip,
        epsilon_high=choice(c, "loss").options.high,
        num_iterations=c.caprl.updates,
        learning_rate=o.learning_rate,
        lr_scheduler_type="constant",
        adam_beta1=o.b1,
        adam_beta2=o.b2,
        weight_decay=o.weight_decay,
        max_grad_norm=o.clip_norm,
        dataloader_pin_memory=False,
    )


class _ImagesOnly(transformers.Qwen2_5_VLProcessor):
    """Processor without its video half, which needs torchvision."""

    video_processor = None

    @classmethod
    def get_attributes(cls) -> list[str]:
        """Returns the processor's parts."""
        return ["image_processor", "tokenizer"]


def trainer(work: Work, reward: Reward, watch: Watch, folder: str) -> Any:
    """Makes TRL's trainer on the work's pictures."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(work.policy_path, padding_side="left")
    images = transformers.Qwen2VLImageProcessorPil.from_pretrained(work.policy_path)
    processor = _ImagesOnly(images, tokenizer, chat_template=tokenizer.chat_template)
    asked = [{"role": "user", "content": work.config.policy.prompt}]
    rows = [
        {"prompt": asked, "image": picture, "index": i} for i, picture in enumerate(work.pictures)
    ]
    model = torch_models.policy(work)
    watch.begin(model)
    return trl.GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=settings(work, folder),
        train_dataset=datasets.Dataset.from_list(rows * STEPS),
        processing_class=processor,
        callbacks=[watch],
    )
