"""Trains the embedded world's tiny CLIP, which finds the scene of a caption.

    python -m caprl_jax.tiny_clip --out=DIR [--policy=asset:tiny/policy] [--steps=1500]

DIR gets the format of transformers' CLIPModel, with the policy's tokenizer and pixels. Captions
state some of a scene's facts, in any order, so that short and long ones both find it.

Measured: 4.3 CPU minutes (12 min on two cores that other work shared). R@1 among 128 held-out
scenes: 0.914 of captions with all facts, 0.430 with two, 0.117 with one, which is true of 1.8
scenes on average. The loss was still falling. This model ships.
"""

import functools
import json
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from caprl_jax.commands import cli
from caprl_jax.data.clip_inputs import ClipImages, ClipTexts
from caprl_jax.data.digits import DIGITS, GRID, sft, world
from caprl_jax.data.records import Record
from caprl_jax.errors import ConfigError, ModelDirectoryError
from caprl_jax.models.clip import Clip
from caprl_jax.models.hf import clip as hf
from caprl_jax.models.hf import download
from caprl_jax.models.hf.files import read_json
from caprl_jax.run import clip as clip_lib
from caprl_jax.run import workdir as workdir_lib

GROUPS, ALIKE, BATCH, FALSE, HELD_OUT = 2048, 4, 128, 32, 128
START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
POSITIONS = 26  # a caption of five facts and their count, with start and end
_COUNTED = 0.3  # share of the captions that state the number of digits
_LARGEST_SCALE = 100.0  # of similarities, as in the paper
_TOWER = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}


def untrained(policy: Path) -> dict[str, dict[str, Any]]:
    """Returns the files that tokenizer.json and the weights need beside them, by name.

    They hold sizes, and the policy's pixels and special tokens.

    Args:
      policy: directory of the tiny policy.

    Raises:
      ModelDirectoryError: the policy's directory lacks a file or a key, or it can't be read.
    """
    sizes, pixels, tokens, tokenizer = (
        read_json(policy / f"{name}.json")
        for name in ("config", "preprocessor_config", "tokenizer_config", "tokenizer")
    )
    if "vocab_size" not in sizes:
        raise ModelDirectoryError(
            f"{policy / 'config.json'} has no vocab_size: give the tiny policy as --policy"
        )
    ids = tokenizer.get("added_tokens", [])
    ids = {token["content"]: token["id"] for token in ids}
    if missing := {START, END, PAD} - ids.keys():
        raise ModelDirectoryError(
            f"{policy}: its tokenizer lacks {min(missing)!r}: give the tiny policy as --policy"
        )
    side = world.CELL * GRID[0]
    names = {"bos_token_id": START, "eos_token_id": END, "pad_token_id": PAD}
    text = {"vocab_size": sizes["vocab_size"], "max_position_embeddings": POSITIONS}
    text |= {name: ids[token] for name, token in names.items()}
    # A patch is a cell: smaller ones would have to find out which of them belong together.
    vision = {"image_size": side, "patch_size": world.CELL, "num_channels": 3}
    config = {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "projection_dim": 64,
        "text_config": _TOWER | {"model_type": "clip_text_model"} | text,
        "vision_config": _TOWER | {"model_type": "clip_vision_model"} | vision,
        "dtype": "float16",
    }
    kept = ("do_convert_rgb", "rescale_factor", "resample", "image_mean", "image_std")
    steps = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
    processor = {"image_processor_type": "CLIPImageProcessor"} | dict.fromkeys(steps, True)
    processor |= {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    return {
        "config.json": config,
        "preprocessor_config.json": processor | {k: pixels[k] for k in kept if k in pixels},
        # The first token must differ from the last, at which transformers takes a text's features.
        "tokenizer_config.json": tokens | {"bos_token": START},
    }


def describe(record: Record, rng: np.random.Generator, stated: int = 0) -> tuple[str, str]:
    """Draws a caption of some of a scene's facts, and the same with a false statement in it.

    Args:
      record: the scene.
      rng: draws the facts, their order and the false statement.
      stated: number of facts; 0: any number of them, and sometimes their count.

    Returns:
      (true caption, false caption).
    """
    facts = [tuple(f) for f in record.facts]
    count = stated or int(rng.integers(1, len(facts) + 1))
    said = [world.statement(facts[i]) for i in rng.permutation(len(facts))[:count]]
    if not stated and rng.random() < _COUNTED:
        said.append(f"total {world.NUMBERS[len(facts)]}")
    wrong = list(said)
    wrong[rng.integers(len(said))] = sft.false_statement(facts, GRID, rng)
    return tuple("digits: " + ", ".join(statements) for statements in (said, wrong))


def scenes(groups: int) -> Iterator[list[Record]]:
    """Yields groups of training scenes, without questions, that share places and colours.

    Places and colours mostly tell scenes apart, so that digits would be learned late. Each scene
    draws its own digits; in 32 of 2048 groups two scenes draw the same ones.
    """
    for i in range(groups):
        rng = np.random.default_rng([i, *GRID])
        facts, group = world.random_facts(rng, GRID, DIGITS), []
        for j in range(ALIKE):
            drawn = [(place, color, int(rng.integers(10))) for place, color, _ in facts]
            image = world.draw(drawn, rng, GRID, "train")
            group.append(Record(f"{i}-{j}", image, (), drawn))
        yield group


def loss(logits: jax.Array) -> jax.Array:
    """Returns CLIP's symmetric cross-entropy (arXiv 2103.00020, section 2.3, figure 3).

    Args:
      logits: [n, b], scaled similarities of texts and images, n >= b; text i < b is of image i,
        and the texts beyond are of none.

    Returns:
      float32 [], nats.
    """
    chex.assert_rank(logits, 2)
    own = jnp.arange(logits.shape[1])
    logits = logits.astype(jnp.float32)
    entropy = optax.softmax_cross_entropy_with_integer_labels
    return (jnp.mean(entropy(logits[: len(own)], own)) + jnp.mean(entropy(logits.T, own))) / 2


def batches(
    groups: Sequence[list[Record]], images: ClipImages, texts: ClipTexts, steps: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields (tokens, mask, pixels) of each step: true texts of b images, then false ones."""
    for step in range(steps):
        rng = np.random.default_rng([step, len(groups)])
        drawn = rng.choice(len(groups), BATCH // ALIKE, replace=False)
        chosen = [record for i in drawn for record in groups[i]]
        true, false = zip(*(describe(record, rng) for record in chosen), strict=True)
        said = texts(true + false[:FALSE])
        yield *said, np.stack([images(record.image) for record in chosen])


def similarities(clip: Clip, params: Any, tokens, mask, pixels) -> jax.Array:
    """Returns scaled similarities of texts [n, t] and images [b, side, side, 3], [n, b]."""
    run = functools.partial(clip.apply, {"params": params})
    said, seen = run(tokens, mask, method=Clip.texts), run(pixels, method=Clip.images)
    return run(method=Clip.scale) * said @ seen.T


def train(clip: Clip, steps: int, made: Iterator[tuple[np.ndarray, ...]]) -> dict:
    """Returns parameters after AdamW on `steps` batches, from random ones.

    Args:
      clip: the module.
      steps: number of batches; the learning rate falls to 0 over them.
      made: yields what `similarities` takes.
    """
    params = nn.meta.unbox(clip.init_params(jax.random.key(0)))
    rate = optax.warmup_cosine_decay_schedule(0, 2e-3, min(200, steps // 2), steps)
    optimizer = optax.adamw(rate, b2=0.98, weight_decay=0.1)

    @jax.jit
    def step(params, state, batch):
        value, gradients = jax.value_and_grad(lambda p: loss(similarities(clip, p, *batch)))(params)
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        params["log_scale"] = jnp.minimum(params["log_scale"], np.log(_LARGEST_SCALE))
        return params, state, value

    state, began = optimizer.init(params), time.monotonic()
    for number, batch in enumerate(made, 1):
        params, state, value = step(params, state, batch)
        if number % 100 == 0 or number == steps:
            seconds = (time.monotonic() - began) / number
            logging.info("step %d: loss %.3f, %.2f s a step", number, value, seconds)
    return jax.device_get(params)


def held_out(directory: Path) -> dict[str, float]:
    """Returns the shares of captions whose own scene is the nearest of 128 held-out ones (R@1).

    Args:
      directory: a CLIP directory.

    Returns:
      R@1 of captions with all facts, with two and with one, by name.
    """
    reader = clip_lib.from_directory(str(directory), "", np.float32)
    clip = reader.clip.module
    params = hf.load(directory, clip)
    records = list(world.scenes("heldout", HELD_OUT, GRID, DIGITS))
    pixels = np.stack([reader.images(record.image) for record in records])
    run = jax.jit(functools.partial(similarities, clip))
    rng, found = np.random.default_rng(0), {}
    for name, stated in {"all facts": max(DIGITS), "two facts": 2, "one fact": 1}.items():
        tokens = reader.texts([describe(record, rng, stated)[0] for record in records])
        nearest = np.argmax(run(params, *tokens, pixels), axis=1)
        found[name] = float(np.mean(nearest == np.arange(len(records))))
    return found


def make(out: Path, policy: str, steps: int) -> None:
    """Trains the model and writes it.

    Args:
      out: directory to write.
      policy: the tiny policy.
      steps: of training.

    Raises:
      ConfigError: a model lies there, or it can't be written to.
      ModelDirectoryError: there is no such policy.
    """
    if (out / "model.safetensors").exists():
        raise ConfigError(f"--out={out} holds a model already: give another --out")
    source = download.fetch(policy)
    files = untrained(source)
    try:
        workdir_lib.try_out(out)
        shutil.copy(source / "tokenizer.json", out)
        for name, content in files.items():
            (out / name).write_text(json.dumps(content, indent=2) + "\n")
    except OSError as e:
        raise ConfigError(f"can't write --out={out}: {e.strerror or e}; give another") from e
    reader = clip_lib.from_directory(str(out), "", np.float32)
    clip = reader.clip.module
    logging.info("drawing %d scenes", GROUPS * ALIKE)
    groups = list(scenes(GROUPS))
    params = train(clip, steps, batches(groups, reader.images, reader.texts, steps))
    hf.save(out, clip, params, np.float16)
    for name, share in held_out(out).items():
        logging.info("held-out R@1, %s: %.3f", name, share)


def main(_: list[str]) -> None:
    """Makes what the flags name, or prints the error in one paragraph."""
    cli.set_up_logging()
    given = flags.FLAGS
    with cli.in_one_paragraph():
        make(Path(given.out), given.policy, given.steps)
        print(f"made {given.out}")


def define_flags() -> None:
    """Defines the flags, in the program only: other modules have flags of the same names."""
    flags.DEFINE_string("out", None, "Directory to write.", required=True)
    flags.DEFINE_string("policy", "asset:tiny/policy", "Model whose tokenizer it takes.")
    flags.DEFINE_integer("steps", 1500, "Training steps.", lower_bound=1)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
