"""What the configs of real-size runs share: their arguments, the released recipe, the mesh."""

import ml_collections

from caprl_jax.config import default
from caprl_jax.errors import ConfigError


def choose(argument: str, *groups: tuple[str, ...]) -> list[str]:
    """One word of each group from a config file's argument, "released,v5e_16" say.

    Args:
      argument: words joined by commas, in any order; a group that none is of takes its first.
      groups: words to choose from.

    Raises:
      ConfigError: a word is of no group, or two are of one.
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


def decode_over_tensor(c: ml_collections.ConfigDict, tensor: int, heads: bool) -> None:
    """A mesh whose tensor axis trains like fsdp and cuts the weights, not the images, in decoding.

    Training moves weights, which pays for the many tokens of a piece; decoding, with one token a
    caption, moves activations instead and so reads only its part of the weights.

    Args:
      c: to be changed.
      tensor: size of the axis.
      heads: whether caches are cut over it by key-value heads, of which there must be enough; else
        by images, so that queries move to where training's images lie, and nothing is held twice.
    """
    c.mesh.tensor = tensor
    everywhere = "data,fsdp,tensor"
    training = dict.fromkeys(("images", "caches"), everywhere)
    training |= dict.fromkeys(("embed", "merged"), "fsdp,tensor")
    c.mesh.rules.update(training | dict.fromkeys(("heads", "kv_heads", "mlp", "vocab"), ""))
    c.mesh.decode_rules.caches = "data,fsdp" if heads else everywhere


def released(policy: str, judge: str, side: int, windows: int) -> ml_collections.ConfigDict:
    """The released code's recipe on CapRL-QA-75K: RLOO, no KL, 8 questions with replacement.

    Args:
      policy: hub id or directory.
      judge: likewise.
      side: pixels on a feature's side; images have at most 1024 features.
      windows: data.max_windows for them.
    """
    c = default(source="files")
    c.policy.path, c.policy.remat = policy, "full"
    c.judge.path, c.judge.mode = judge, "sampled"
    c.steps = 1800  # where the shipped checkpoint was taken; a pass over the data is about 588
    c.sampling.max_tokens = 1024
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
