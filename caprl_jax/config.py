"""Every key that a config may set, its default, and the checks that need nothing else."""

import contextlib
import difflib
from collections.abc import Iterator
from typing import Any

import ml_collections

from caprl_jax.decode.sampling import Sampling
from caprl_jax.errors import UserError
from caprl_jax.models.layers import REMAT
from caprl_jax.parallel import mesh
from caprl_jax.rl.judge import MODES
from caprl_jax.rl.policy_gradient import ADVANTAGES
from caprl_jax.rl.types import REUSE, Settings


class ConfigError(UserError):
    """A config that can't run; the message names the key and the way out."""


@contextlib.contextmanager
def about(key: str) -> Iterator[None]:
    """Turns a ValueError into a ConfigError that names the key, or section, it is about."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as e:
        raise ConfigError(f"config.{key}: {e}") from e


def default() -> ml_collections.ConfigDict:
    """All keys with their defaults; a file in configs/ changes what its run needs."""
    c = ml_collections.ConfigDict()
    c.seed = 0
    c.objective = "caprl"  # or "sft"
    c.steps = 100
    c.log_every = 1
    c.dtype = "auto"  # of the computation: bfloat16 on accelerators, float32 on CPU

    c.policy = ml_collections.ConfigDict()
    # A directory in Hugging Face format, a gs:// URL of one, a hub id, or asset: (shipped).
    c.policy.path = "asset:tiny/policy"
    c.policy.revision = ""  # of a hub id: branch, tag or commit
    c.policy.init = "pretrained"  # or "random": only config.json, tokenizer and processor are read
    c.policy.prompt = "Describe the image in detail."
    c.policy.freeze_vision = False
    # What the gradient of each layer computes again: "none" but attention's scores; all but
    # products with weights, "products"; or all that is inside a layer, "full".
    c.policy.remat = "none"

    c.judge = ml_collections.ConfigDict()
    c.judge.path = "asset:tiny/judge"
    c.judge.revision = ""
    c.judge.prompt = ""  # user turn with {caption} and {question}; empty: data/questions.py's own
    c.judge.mode = "expected"  # or "sampled", "greedy"
    c.judge.temperature = 0.6
    # Bucket of a caption in the judge's tokens, where its tokenizer is not the policy's; 0 is twice
    # sampling.max_tokens.
    c.judge.max_caption = 0

    c.sampling = ml_collections.ConfigDict()
    c.sampling.max_tokens = 512
    c.sampling.temperature = 1.0
    c.sampling.top_k = 0
    c.sampling.top_p = 1.0

    c.caprl = ml_collections.ConfigDict()
    c.caprl.group = 8  # captions per image, G
    # Captions of an image drawn at once; the next begins as one ends, so that few wait for the
    # longest. 0: all. Quicker where decoding is bound by FLOPs and lengths differ.
    c.caprl.slots = 0
    c.caprl.questions = 4  # per caption, N
    c.caprl.advantage = "grpo"  # or "rloo"
    c.caprl.clip = 0.2
    c.caprl.kl = 0.0  # coefficient of the KL to the initial policy; 0 holds no reference
    c.caprl.updates = 1  # per rollout
    c.caprl.micro_batches = 1  # pieces of the batch for the update's gradients,
    c.caprl.rollout_batches = 1  # for captioning, where caches for all don't fit,
    c.caprl.prefill_batches = 0  # for reading images and prompts; 0: as many,
    c.caprl.score_batches = 0  # and for the judge; 0: as many
    # Lengths for which judge and update are compiled, in even steps up to the longest a caption may
    # have: a piece of the batch is cut to the shortest that holds its captions.
    c.caprl.buckets = 1
    # Of what the update computes gradients alone, since captioning has computed the rest: "none",
    # "prefill" (images and prompts) or "rollout" (captions too: a token then takes every product of
    # the decoder in memory). Needs updates = 1 and a batch in one piece.
    c.caprl.reuse = "none"
    c.caprl.accuracy_weight = 1.0
    c.caprl.length_weight = 0.0
    c.caprl.length_full = 2048  # tokens up to which the length reward is 1
    c.caprl.length_none = 3072  # tokens from which it is 0

    c.optimizer = ml_collections.ConfigDict()
    c.optimizer.learning_rate = 1e-6
    c.optimizer.schedule = "cosine"  # or "constant"; both after the warm-up
    c.optimizer.warmup_steps = 20
    c.optimizer.final = 0.1  # of the learning rate, at the end of the cosine
    c.optimizer.b1 = 0.9
    c.optimizer.b2 = 0.95
    c.optimizer.weight_decay = 0.0
    c.optimizer.clip_norm = 1.0

    c.data = ml_collections.ConfigDict()
    c.data.source = "digits"  # or "files": parquet or JSON lines, see data/files.py
    c.data.path = ""  # of files: one, a pattern, or a directory
    c.data.data_dir = ""  # where datasets lie; empty: tensorflow-datasets' default
    c.data.rows = 3
    c.data.columns = 3
    c.data.digits = (2, 5)  # least and most per scene
    c.data.train = 4096  # scenes
    c.data.heldout = 128  # scenes, or rows of the files
    c.data.task = "caption"  # what sft learns: "caption" (a policy) or "judge"
    c.data.batch = 128  # images per step, over all processes
    c.data.epochs = 0  # passes over the data; 0: as many as the steps need
    c.data.replacement = True  # draw questions with replacement
    c.data.shuffle_options = True
    c.data.per_caption = False  # each caption its own questions, instead of one set per image
    c.data.min_pixels = 0  # least area of an image; 0: as preprocessor_config.json says
    c.data.max_pixels = 0  # and largest; larger ones are scaled down
    c.data.max_windows = 16  # buckets: an image's windows (of Qwen3-VL: its features),
    c.data.max_prompt = 1280  # a prompt's tokens, image included,
    c.data.max_question = 256  # a question's tokens
    c.data.threads = 4

    c.sft = ml_collections.ConfigDict()
    c.sft.max_tokens = 48  # bucket of a branch
    c.sft.questions = 4  # per caption, for the judge: answered by letter
    c.sft.open_questions = 4  # per caption, for the judge: answered in words
    c.sft.probes = 5  # cells asked per image, for the policy
    c.sft.captions = 3  # per image, for the policy
    c.sft.stated = (0.55, 0.35, 0.1)  # probability of stating 1, 2, .. facts
    c.sft.count = 0.2  # probability of stating the count

    c.eval = ml_collections.ConfigDict()
    c.eval.every = 100  # steps; 0: only before and after
    c.eval.images = 64
    c.eval.batch = 32
    c.eval.group = 4  # sampled captions per image
    c.eval.shown = 8  # images in the report

    c.checkpoint = ml_collections.ConfigDict()
    c.checkpoint.every = 100  # steps; one is always written at the end
    c.checkpoint.keep = 2

    c.export = ml_collections.ConfigDict()
    c.export.when = "end"  # write the trained model to WORKDIR/export; or "checkpoints", "never"
    c.export.dtype = "float32"  # of its weights; or "bfloat16"

    c.mesh = ml_collections.ConfigDict()
    c.mesh.data = 1
    c.mesh.fsdp = -1  # what is left
    c.mesh.tensor = 1
    # Which mesh axes each logical axis is cut over (mesh.py), in training and scoring,
    c.mesh.rules = ml_collections.ConfigDict(mesh.RULES)
    # and while captions are decoded: weights are cast and moved there once before.
    c.mesh.decode_rules = ml_collections.ConfigDict(mesh.DECODE_RULES)
    return c.lock()


_ONE_OF = {
    "objective": ("caprl", "sft"),
    "dtype": ("auto", "float32", "bfloat16"),
    "policy.init": ("pretrained", "random"),
    "policy.remat": tuple(REMAT),
    "judge.mode": MODES,
    "caprl.advantage": tuple(ADVANTAGES),
    "caprl.reuse": REUSE,
    "optimizer.schedule": ("cosine", "constant"),
    "export.when": ("end", "checkpoints", "never"),
    "export.dtype": ("float32", "bfloat16"),
    "data.source": ("digits", "files"),
    "data.task": ("caption", "judge"),
}
_POSITIVE = (
    "steps", "sampling.max_tokens", "caprl.group", "caprl.questions", "caprl.updates",
    "caprl.micro_batches", "data.batch", "eval.images", "eval.batch", "eval.group", "log_every",
    "checkpoint.every", "checkpoint.keep", "data.max_windows", "data.max_prompt",
    "data.max_question", "data.rows", "data.columns", "judge.temperature",
)  # fmt: skip


def get(config: ml_collections.ConfigDict, key: str) -> Any:
    """The value of a dotted key."""
    for part in key.split("."):
        config = config[part]
    return config


PIECES = ("micro_batches", "prefill_batches", "score_batches", "rollout_batches")


def pieces(config: ml_collections.ConfigDict, name: str) -> int:
    """In how many pieces a phase reads the batch; 0 is as many as micro_batches."""
    return config.caprl[name] or config.caprl.micro_batches


def validate(config: ml_collections.ConfigDict) -> None:
    """Checks what can be checked without reading a file.

    Raises:
      ConfigError: naming the key, its value and what it may be.
    """
    for key, allowed in _ONE_OF.items():
        if get(config, key) not in allowed:
            near = difflib.get_close_matches(str(get(config, key)), allowed, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"config.{key}={get(config, key)!r} is not one of {allowed}{hint}")
    for key in _POSITIVE:
        if get(config, key) <= 0:
            raise ConfigError(f"config.{key}={get(config, key)} must be positive")
    if config.caprl.group < 2 and config.objective == "caprl":
        raise ConfigError(
            "config.caprl.group=1: advantages compare captions, so it must be 2 or more"
        )
    for axis in mesh.AXES:
        if config.mesh[axis] != -1 and config.mesh[axis] < 1:
            raise ConfigError(f"config.mesh.{axis}={config.mesh[axis]} is neither positive nor -1")
    for name in PIECES:
        if config.caprl[name] < 0:
            raise ConfigError(f"config.caprl.{name}={config.caprl[name]} must not be negative")
        if config.data.batch % pieces(config, name):
            raise ConfigError(
                f"config.data.batch={config.data.batch} is not a multiple of "
                f"config.caprl.{name}={pieces(config, name)}"
            )
    with about("caprl"):
        asked = {name: pieces(config, name) for name in PIECES}
        names = ("group", "slots", "buckets", "updates", "reuse")
        Settings(**asked, **{name: config.caprl[name] for name in names})
    with about("sampling"):
        Sampling(**config.sampling)
    if config.caprl.length_none <= config.caprl.length_full:
        raise ConfigError("config.caprl.length_none must be larger than config.caprl.length_full")
