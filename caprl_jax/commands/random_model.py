"""Writes a model directory of a published size with random weights; downloads nothing.

    python -m caprl_jax.random_model --size=qwen2.5-vl-3b --out=DIR [--set=num_hidden_layers=2 ...]

Use it for measurements and tests that need real shapes, not real weights. --set changes numbers of
config.json (vision_config.depth=2 for the tower's). The tokenizer is the small one of the shipped
tiny models, whose ids lie within every published vocabulary.
"""

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import flax.traverse_util
import ml_dtypes
import numpy as np
from absl import flags

from caprl_jax.commands import cli
from caprl_jax.commands.cli import in_one_paragraph
from caprl_jax.data.questions import PROMPT_FILE
from caprl_jax.errors import ConfigError
from caprl_jax.models import families
from caprl_jax.models.hf import download as sources
from caprl_jax.models.hf import files as hf
from caprl_jax.models.hf import sizes
from caprl_jax.models.hf.save import Target, copy_companions, save


class _Random:
    """A tensor that is made when it is written, so that only one is in memory at a time."""

    def __init__(self, path: tuple[str, ...], shape: tuple[int, ...], seed: int, dtype: Any):
        self.path, self.shape, self._seed, self._dtype = path, shape, seed, dtype

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        """Returns normal values of a scale that keeps the scale of activations."""
        name, inputs = self.path[-1], 2 if self.path[-2] == "o" else 1
        rng = np.random.default_rng([self._seed, *map(ord, "/".join(self.path))])
        stacked = "layers" in self.path or "blocks" in self.path
        fan_in = math.prod(self.shape[stacked : stacked + inputs])
        scale = {"kernel": 1 / math.sqrt(fan_in), "bias": 0.02, "scale": 0.1}.get(name, 0.02)
        out = np.empty(self.shape, self._dtype)
        for i in range(self.shape[0]):
            part = rng.standard_normal(self.shape[1:], np.float32) * np.float32(scale)
            out[i] = part + 1 if name == "scale" else part
        return out


def make(out: Path, config: dict[str, Any], seed: int = 0, dtype: Any = ml_dtypes.bfloat16) -> None:
    """Writes a directory with random weights.

    Args:
      out: the directory to be made; must not exist.
      config: as in config.json.
      seed: seed of the weights.
      dtype: dtype of the weights in the files.
    """
    policy, tiny = families.build(config), "policy" if "vision_config" in config else "judge"
    flat = flax.traverse_util.flatten_dict(hf.abstract_params(policy))
    lazy = {path: _Random(path, a.shape, seed, dtype) for path, a in flat.items()}
    with tempfile.TemporaryDirectory() as folder:
        companions = Path(folder)
        copy_companions(sources.fetch(f"asset:tiny/{tiny}"), companions)
        # The tiny judge was trained with its own prompt; this model was not.
        (companions / PROMPT_FILE).unlink(missing_ok=True)
        ids = json.loads((companions / "config.json").read_text())
        files = {
            "config.json": config | {k: v for k, v in ids.items() if k.endswith("token_id")},
            "preprocessor_config.json": sizes.preprocessor(config),
        }
        for name, content in files.items():
            if content is not None:
                (companions / name).write_text(json.dumps(content, indent=2) + "\n")
        save(Target(out, dtype), policy, flax.traverse_util.unflatten_dict(lazy), companions)


def changed(config: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """Returns a copy of config with NAME=NUMBER settings applied.

    Raises:
      ConfigError: config lacks a name, or a value is not JSON.
    """
    config = json.loads(json.dumps(config))
    for setting in settings:
        name, _, value = setting.partition("=")
        *parents, last = name.split(".")
        part = config
        for parent in parents:
            part = part.get(parent, {})
            if not isinstance(part, dict):
                raise ConfigError(f"--set={setting}: {parent} is {part!r}, which has no parts")
        if last not in part and last in config.get("text_config", {}):
            part = config["text_config"]
        try:
            if last not in part:
                raise KeyError(name)
            part[last] = json.loads(value)
        except (KeyError, ValueError, TypeError) as e:
            raise ConfigError(f"--set={setting}: {type(e).__name__}: {e}") from e
    return config


def main(_: list[str]) -> None:
    """Makes the directory that the flags describe."""
    dtype = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}[flags.FLAGS.dtype]
    with in_one_paragraph():
        config = changed(sizes.CONFIGS[flags.FLAGS.size], flags.FLAGS.set)
        make(Path(flags.FLAGS.out), config, flags.FLAGS.seed, dtype)
    print(f"made {flags.FLAGS.out}")


def define_flags() -> None:
    """Defines the flags, in the program only: other modules have flags of the same names."""
    flags.DEFINE_enum(
        "size", None, sorted(sizes.CONFIGS), "The model whose shapes to take.", required=True
    )
    flags.DEFINE_string("out", None, "Directory to make.", required=True)
    flags.DEFINE_multi_string("set", [], "NAME=NUMBER in config.json; may be repeated.")
    flags.DEFINE_integer("seed", 0, "Seed of the weights.", lower_bound=0)
    flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Dtype of the weights.")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
