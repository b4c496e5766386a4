"""A whole CapRL step of this project, and of TRL's GRPOTrainer with the same judge as its reward.

TRL's steps are timed by its own callbacks, which also take our turn after each of TRL's.
"""

import math
import tempfile
import time
from typing import Any

import datasets
import jax
import numpy as np
import transformers
import trl

from caprl_jax import mesh, programs, startup, step
from caprl_jax.bench import peers, torch_models
from caprl_jax.bench import work as work_lib
from caprl_jax.bench.generate_peer import facts, parameters
from caprl_jax.bench.peers import Checked, Comparison, Pairs
from caprl_jax.bench.work import Work, laid_out

STEP = "a whole step"
# Captions that TRL learns from at once; of 16 they are the quickest count (2, 4 and 16 were tried),
# for what one pass holds is then small enough to be had again and again.
_PIECE = 4


class Ours:
    """This project's step, with weights read from the same directories."""

    def __init__(self, work: Work):
        """Reads the weights."""
        config, self._work = work.config, work
        self._on = programs.layout(config)
        optimizer = programs.optimizer(config, config.caprl.updates)
        self.state = startup.initial_state(
            config, work.policy, work.policy_path, optimizer, self._on
        )
        model, _ = startup.read_model(str(work.judge_path), "", programs.compute_dtype(config))
        params = startup.load_frozen(
            model, work.judge_path, self._on, programs.compute_dtype(config)
        )
        put = jax.device_put(work.instruction, mesh.replicated(self._on))
        read = programs.read_instruction(work.judge, params["decoder"], put, self._on)
        self.frozen = step.Frozen(params["decoder"], read)
        # No token ends a caption: TRL's are as long as they may be too.
        parts = programs.Parts(work.policy, work.judge, optimizer, self._on, (work.vocab,))
        self._run, _ = programs.one_program(config, parts, self.state)
        self._key = jax.random.key(config.seed)

    def __call__(self) -> step.Metrics:
        """A step from pictures to new weights."""
        w = self._work
        laid = laid_out(w.config, w.processor, w.filler, w.pictures)
        batch = step.Batch(*laid, w.questions, np.ones(len(w.pictures), bool))
        batch = mesh.put_whole(batch, self._on)
        self.state, metrics = self._run(self.state, self.frozen, batch, self._key)
        return jax.block_until_ready(jax.device_get(metrics))


class Reward:
    """TRL's reward function: the judge's accuracy of each caption, one batched forward pass."""

    __name__ = "caprl"

    def __init__(self, work: Work):
        """Reads the judge."""
        self.letters = torch_models.Letters(torch_models.judge(work), work)
        self.captions: list[list[int]] = []
        self.images: list[int] = []

    def __call__(self, completion_ids, index, **_) -> list[float]:
        """Completions' ids, and which picture each is of -> rewards."""
        self.captions, self.images = completion_ids, index
        return self.letters.rewards(completion_ids, index).tolist()


class InTurns(transformers.TrainerCallback):
    """Times TRL's turns and ours; checks the first step of both, which isn't timed."""

    def __init__(self, work: Work, ours: Ours, reward: Reward):
        """Nothing runs yet."""
        self._work, self._ours, self._reward = work, ours, reward
        self.checks: list[Checked] = []
        self.pairs, self._began, self._before = Pairs(), 0.0, []
        self.seen: dict[str, int] = {}

    def watch(self, model: Any) -> None:
        """Notes how much of each image and prompt it reads first, and its weights as they are."""

        def prompts(_, args, kwargs):
            self.seen.setdefault("prompt", kwargs["input_ids"].shape[1])

        def images(_, args, kwargs):
            self.seen.setdefault("patches", args[0].shape[0] // len(kwargs["grid_thw"]))

        model.register_forward_pre_hook(prompts, with_kwargs=True)
        model.model.visual.register_forward_pre_hook(images, with_kwargs=True)
        self._before = samples(p.detach().numpy() for p in model.parameters())

    def on_step_begin(self, args, state, control, **_):
        """TRL's step begins."""
        self._began = time.perf_counter()

    def on_step_end(self, args, state, control, model=None, **_):
        """It has ended."""
        took = time.perf_counter() - self._began
        if state.global_step == 1:
            before = samples(jax.tree.leaves(self._ours.state.params))
            self._ours()
            after = samples(jax.tree.leaves(self._ours.state.params))
            self.checks = checks(self._work, self._ours, self._reward, self.seen, model)
            theirs = samples(p.detach().numpy() for p in model.parameters())
            self.checks.append(
                Checked("weights moved", moved(before, after), moved(self._before, theirs))
            )
            peers.require_same(self.checks)
            return
        if state.global_step % 2:  # the second of TRL's turn
            self.pairs.theirs.append(took)
            self.pairs.ours.append(peers.turn(self._ours))


def samples(arrays: Any, count: int = 256) -> list[np.ndarray]:
    """A few numbers of each array, copied."""
    return [np.array(np.asarray(a).reshape(-1)[:count]) for a in arrays]


def moved(before: list[np.ndarray], after: list[np.ndarray]) -> str:
    """Whether an update has changed each array, none, or some."""
    changed = [bool((a != b).any()) for a, b in zip(before, after, strict=True)]
    return "all" if all(changed) else "some" if any(changed) else "none"


def checks(
    work: Work, ours: Ours, reward: Reward, seen: dict[str, int], model: Any
) -> list[Checked]:
    """In what the first step of TRL agrees with ours; seen is what its model read."""
    config, t, captions = work.config, work.config.sampling.max_tokens, reward.captions
    b, g = config.data.batch, config.caprl.group
    order, each = np.argsort(reward.images, kind="stable"), sorted(reward.images)
    lengths = {len(c) for c in captions}
    found = [
        Checked("parameters", parameters(ours.state.params), torch_models.weights(model)),
        Checked("captions", b * g, len(captions)),
        Checked("images of the captions", np.repeat(np.arange(b), g).tolist() == each, True),
        Checked("tokens of each caption", str({t}), str(lengths)),
        Checked("prompt tokens of each image", int(work.prompt.mask[0].sum()),
                seen["prompt"]),
        Checked("patches of each image", int(work.images.mask[0].sum()),
                seen["patches"]),
        Checked("questions of each caption", config.caprl.questions, len(reward.letters.tails[0])),
    ]  # fmt: skip
    peers.require_same(found)
    tokens = np.asarray(captions)[order].reshape(b, g, t)
    theirs = reward.letters(captions, reward.images)[order]
    letters = work_lib.letters(work, ours.frozen.judge, tokens)
    found.append(
        peers.difference(
            "the judge's letters, probability", letters.reshape(theirs.shape), theirs, 1e-4
        )
    )
    return found


def settings(work: Work, folder: str, steps: int) -> Any:
    """TRL's, as quick as they go: no recomputation, a static cache, gradients summed in pieces."""
    c, o = work.config, work.config.optimizer
    piece = math.gcd(work.captions, _PIECE)
    # Chat tokens are never drawn: none then ends a caption, and none is taken for an image.
    special = np.asarray(work.instruction.special).tolist()
    return trl.GRPOConfig(
        output_dir=folder, use_cpu=True, bf16=False, fp16=False, report_to="none", seed=c.seed,
        max_steps=steps, logging_strategy="no", save_strategy="no", disable_tqdm=True,
        per_device_train_batch_size=piece, gradient_accumulation_steps=work.captions // piece,
        num_generations=c.caprl.group,
        max_completion_length=c.sampling.max_tokens, shuffle_dataset=False,
        gradient_checkpointing=False, temperature=c.sampling.temperature,
        generation_kwargs={"suppress_tokens": special}, cache_implementation="static",
        beta=0.0, loss_type="grpo", epsilon=c.caprl.clip, num_iterations=c.caprl.updates,
        learning_rate=o.learning_rate, lr_scheduler_type="constant", adam_beta1=o.b1,
        adam_beta2=o.b2, weight_decay=o.weight_decay, max_grad_norm=o.clip_norm,
        dataloader_pin_memory=False,
    )  # fmt: skip


class _ImagesOnly(transformers.Qwen2_5_VLProcessor):
    """Without its video half, which needs torchvision."""

    video_processor = None

    @classmethod
    def get_attributes(cls) -> list[str]:
        """What it is made of."""
        return ["image_processor", "tokenizer"]


def trainer(work: Work, reward: Reward, callback: InTurns, folder: str, steps: int) -> Any:
    """TRL's trainer on the work's pictures."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(work.policy_path, padding_side="left")
    images = transformers.Qwen2VLImageProcessorPil.from_pretrained(work.policy_path)
    processor = _ImagesOnly(images, tokenizer, chat_template=tokenizer.chat_template)
    asked = [{"role": "user", "content": work.config.policy.prompt}]
    rows = [
        {"prompt": asked, "image": picture, "index": i} for i, picture in enumerate(work.pictures)
    ]
    model = torch_models.policy(work)
    callback.watch(model)
    return trl.GRPOTrainer(
        model=model, reward_funcs=reward, args=settings(work, folder, steps),
        train_dataset=datasets.Dataset.from_list(rows * steps), processing_class=processor,
        callbacks=[callback],
    )  # fmt: skip


def compare(work: Work, repeats: int) -> Comparison:
    """Checks the first step of both, then times in turns.

    Raises:
      WorkDiffers: the two sides don't do the same.
    """
    peers.keep_memory()
    reward = Reward(work)
    callback = InTurns(work, Ours(work), reward)
    with tempfile.TemporaryDirectory() as folder:
        trainer(work, reward, callback, folder, 1 + 2 * repeats).train()
    told = facts(work) | {"trl": trl.__version__}
    return Comparison(told, callback.checks, {}, {STEP: callback.pairs})
