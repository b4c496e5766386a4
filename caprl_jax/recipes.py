"""Parts that configs of real-size runs share: arguments, the released recipe and the mesh."""

from collections.abc import Mapping
from typing import Any

import ml_collections

from caprl_jax.config import OPEN, default, get
from caprl_jax.errors import ConfigError
from caprl_jax.parallel import mesh


def choose(argument: str, *groups: tuple[str, ...]) -> list[str]:
    """Chooses one word of each group from a config file's argument, like "released,v5e_16".

    Args:
      argument: words joined by commas, in any order; a group without a word takes its first.
      groups: words to choose from.

    Raises:
      ConfigError: a word is in no group, or two are in one group.
    """
    words = [w for w in argument.split(",") if w]
    chosen = []
    for group in groups:
        found = [w for w in words if w in group]
        if len(found) > 1:
            raise ConfigError(
                f"config argument {argument!r}: {' and '.join(found)} exclude another"
            )
        chosen.append(found[0] if found else group[0])
        words = [w for w in words if w not in group]
    if words:
        known = "; ".join(", ".join(group) for group in groups)
        raise ConfigError(f"config argument {argument!r}: {words[0]!r} is none of {known}")
    return chosen


def update(c: ml_collections.ConfigDict, values: Mapping[str, Any]) -> None:
    """Sets dotted keys, and adds reward terms and sinks that the config lacks.

    Args:
      c: the config to be changed.
      values: by key, like {"steps": 8, "caprl.rewards.kl": {"term": "kl", "weight": 0.1}}.
    """
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (get(c, section) if section else c)[name] = value


def decode_over_tensor(c: ml_collections.ConfigDict, tensor: int, heads: bool) -> None:
    """Sets a mesh whose tensor axis trains like fsdp and cuts the weights in decoding.

    Args:
      c: the config to be changed.
      tensor: size of the axis.
      heads: as for mesh.decode_over_tensor, which makes the tables.
    """
    c.mesh.tensor = tensor
    rules, decode_rules = mesh.decode_over_tensor(heads)
    c.mesh.rules.update(rules)
    c.mesh.decode_rules.update(decode_rules)


def lora(c: ml_collections.ConfigDict, rank: int = 32) -> None:
    """Sets LoRA on all projections of the decoder, with ten times the learning rate.

    A low-rank update needs about ten times the rate of whole weights (Schulman et al., "LoRA
    Without Regret", 2025).

    Args:
      c: the config to be changed.
      rank: rank of each update, and its alpha.
    """
    c.lora.rank, c.lora.alpha = rank, float(rank)
    c.optimizer.learning_rate = 10 * c.optimizer.learning_rate


def fix_slices(c: ml_collections.ConfigDict, count: int) -> None:
    """Sets the keys that `released` leaves open, as real-size runs on named hardware have them.

    Args:
      c: the config to be changed.
      count: slices of the batch, caprl.micro_batches; captions are drawn in one slice.
    """
    c.policy.remat = "full"
    c.caprl.micro_batches, c.caprl.rollout_batches = count, 1
    c.mesh.data, c.mesh.fsdp, c.mesh.tensor = 1, -1, 1


def released(policy: str, judge: str, side: int, windows: int) -> ml_collections.ConfigDict:
    """Returns the released recipe on CapRL-QA-75K: RLOO, no KL, 8 questions with replacement.

    Mesh, slices and rematerialisation are left open: run.fit chooses them for the devices.

    Args:
      policy: hub id or directory.
      judge: likewise.
      side: pixels on a feature's side; images have at most 1024 features.
      windows: data.max_windows for them.
    """
    c = default(source="files")
    c.update_from_flattened_dict(OPEN)
    c.policy.path = policy
    c.judge.path, c.judge.mode = judge, "sampled"
    c.steps = 1800  # the shipped checkpoint's step; a pass over the data is about 588 steps
    c.sampling.max_tokens, c.caprl.usual_tokens = 4096, 512  # captions have about 500 on average
    c.caprl.group = 8
    c.caprl.advantage = "rloo"
    c.caprl.questions = 8
    c.data.batch = 128
    c.data.shuffle_options = False
    c.data.max_pixels = 1024 * side * side
    c.data.max_prompt = 1088  # the image's features and the words around them
    c.data.max_windows = windows
    c.data.max_question = 192
    c.eval.every = 200
    c.eval.images = 128
    c.eval.batch = 64
    c.checkpoint.every = 100
    c.export.dtype = "bfloat16"
    return c


def embedded_arm(objective: str = "caprl") -> ml_collections.ConfigDict:
    """Returns a short run on the embedded world, for comparisons over seeds.

    It has 32 steps of 8 images, about 40 CPU seconds (of 64 runs of tiny_ablations.py).

    Args:
      objective: "caprl" or "sft".
    """
    c = default(objective=objective)
    c.steps = 32
    c.sampling.max_tokens = 32
    c.caprl.group = 8
    c.caprl.questions = 4
    c.caprl.updates = 2
    c.caprl.kl = 0.01
    c.optimizer.learning_rate = 2e-4
    c.optimizer.warmup_steps = 5
    c.data.batch = 8
    c.data.train = 512
    c.data.max_windows = 4
    c.data.max_prompt = 32
    c.data.max_question = 46  # a leaky question is longer
    c.eval.every = 0
    c.eval.images = 64
    c.eval.batch = 32
    c.eval.group = 1
    c.checkpoint.every = 16
    c.export.when = "never"
    return c


def embedded_verifier(c: ml_collections.ConfigDict) -> None:
    """Sets the shipped verifier, asked as configs/tiny_verifier.py has trained it.

    Args:
      c: the config to be changed.
    """
    c.verifier.path = "asset:tiny/verifier"
    c.verifier.question, c.verifier.yes, c.verifier.no = "?", " A", " B"
    c.verifier.ends = ","  # statements of the embedded world's captions
    c.verifier.sentences, c.verifier.max_sentence = 12, 8


def embedded_clip(c: ml_collections.ConfigDict) -> None:
    """Sets the shipped CLIP, which caprl_jax.tiny_clip has trained; it reads captions by their ids.

    Args:
      c: the config to be changed.
    """
    c.clip.path = "asset:tiny/clip"
