"""A run's CLIP: its model, its images in the batch, and captions in its ids."""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from caprl_jax.data.clip_inputs import ClipImages, ClipTexts
from caprl_jax.data.records import Record
from caprl_jax.data.tokens import Tokenizer, vocabulary_difference
from caprl_jax.errors import ConfigError
from caprl_jax.models.hf import clip as hf
from caprl_jax.models.hf import download
from caprl_jax.parallel import mesh
from caprl_jax.parallel.axes import ShardRules
from caprl_jax.rl.similarity import PIXELS, Clip
from caprl_jax.run import compile as compile_lib


@dataclasses.dataclass(frozen=True)
class ClipReader:
    """CLIP, read without parameters.

    Attributes:
      clip: module and ids, no parameters.
      directory: the directory they came from.
      images: makes its pixels.
      texts: makes its ids.
      policy: the policy's tokenizer, if its captions must pass to CLIP as text; else None.
    """

    clip: Clip
    directory: Path
    images: ClipImages
    texts: ClipTexts
    policy: Tokenizer | None = None

    def arrays(self, record: Record) -> Mapping[str, np.ndarray]:
        """Returns a record's image as CLIP takes it, for batch.extras."""
        return {PIXELS: self.images(record.image)}

    def load(self, rules: ShardRules, dtype: Any) -> Clip:
        """Returns CLIP with its parameters on the mesh."""
        logging.info("loading CLIP, %s", self.directory)
        boxed = jax.eval_shape(self.clip.module.init_params, jax.random.key(0))
        shardings = mesh.param_shardings(boxed, rules)
        params = hf.load(self.directory, self.clip.module, dtype, shardings)
        special = jax.device_put(self.clip.special, mesh.replicated(rules))
        return self.clip.replace(params=params, special=special)

    def read(self, tokens: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Converts the policy's captions [b, g, t], through text, to CLIP's ids and their mask."""
        flat = (a.reshape(-1, a.shape[-1]) for a in (tokens, mask))
        texts = [self.policy.decode(own[real]) for own, real in zip(*flat, strict=True)]
        ids, real = self.texts(texts)
        return tuple(a.reshape(*tokens.shape[:2], -1) for a in (ids, real))


def from_directory(path: str, revision: str, dtype: Any) -> ClipReader:
    """Reads a CLIP whose captions are texts.

    Args:
      path: a directory, gs:// URL, hub id or asset, as download.fetch takes it.
      revision: revision of a hub id.
      dtype: dtype of the computation.

    Raises:
      ModelDirectoryError: it can't be used.
    """
    directory = download.fetch(path, revision)
    module = hf.read(directory, dtype)
    c = module.config
    images = ClipImages.from_pretrained(directory, c.image)
    texts = ClipTexts.from_pretrained(directory, c.positions, c.vocab)
    clip = Clip(module, {}, np.zeros(0, np.int32), texts.start, texts.end)
    return ClipReader(clip, directory, images, texts)


def read(config: ml_collections.ConfigDict, policy: Tokenizer) -> ClipReader:
    """Reads the config's CLIP.

    Args:
      config: the run's config.
      policy: the policy's tokenizer.

    Raises:
      ConfigError: no model is named.
      ModelDirectoryError: it can't be used.
    """
    own = config.clip
    if not own.path:
        raise ConfigError(
            "config.clip.path is empty, and a reward term needs CLIP: name a directory or hub id "
            "of transformers' CLIPModel, openai/clip-vit-base-patch32 for one"
        )
    found = from_directory(own.path, own.revision, compile_lib.compute_dtype(config))
    difference = vocabulary_difference(policy, found.texts)
    if difference is not None:
        logging.warning(
            "policy and CLIP tokenizers differ (%s): captions pass to CLIP as text, and a step is "
            "two programs",
            difference.replace("the judge", "CLIP"),
        )
    clip = found.clip.replace(special=np.asarray(policy.special, np.int32))
    return dataclasses.replace(found, clip=clip, policy=None if difference is None else policy)
