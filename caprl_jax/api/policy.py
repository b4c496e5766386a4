"""A policy as an object: images in, captions out."""

import dataclasses
import functools
import os
import reprlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from caprl_jax.api import loading
from caprl_jax.api.loading import Loaded
from caprl_jax.data.images import ImageProcessor, decode_image, read_image, to_rgb
from caprl_jax.data.tokens import PolicyPrompt, pad
from caprl_jax.decode.lengths import bucket
from caprl_jax.decode.sampling import Sampling
from caprl_jax.errors import ModelDirectoryError, UserError
from caprl_jax.models.vision import Images, batch_images, pad_to_windows, window_count
from caprl_jax.models.vlm import Prompt
from caprl_jax.parallel import axes
from caprl_jax.rl.rollout import rollout
from caprl_jax.rl.types import Batch, Decoding, Rollout
from caprl_jax.run import load
from caprl_jax.settings import make

PROMPT = "Describe the image in detail."
Picture = Image.Image | np.ndarray | bytes | str | Path


def _picture(image: Picture) -> Image.Image:
    """Returns RGB from a Pillow image, uint8 [height, width, 3], encoded bytes or a file's path."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
            raise UserError(
                f"an array of {image.dtype} {list(image.shape)} is no image: uint8 "
                "[height, width, 3] is"
            )
        return Image.fromarray(image)
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if isinstance(image, bytes):
        return decode_image(image)
    if not isinstance(image, str | os.PathLike):
        raise UserError(
            f"{reprlib.repr(image)} is no image: give a Pillow image, a uint8 array "
            "[height, width, 3], encoded bytes or a file's path"
        )
    return decode_image(read_image(Path(image)))


@dataclasses.dataclass(frozen=True)
class LoadedPolicy(Loaded):
    """A policy with its parameters on a mesh; made by load_policy.

    Attributes:
      processor: the directory's image processor; for the others see Loaded.
    """

    processor: ImageProcessor

    def inputs(
        self, images: Sequence[Picture], prompt: str | Sequence[str] = PROMPT
    ) -> tuple[Images, Prompt]:
        """Returns images and prompts as arrays, padded to a bucket that holds the largest.

        Args:
          images: Pillow images, uint8 arrays [height, width, 3], encoded bytes or paths.
          prompt: the user's text after the image, for all or one for each.

        Returns:
          (Images [b, m, ..], Prompt [b, p]), numpy.

        Raises:
          UnreadableImage, UserError: an image can't be used, or there is none.
        """
        if not len(images):
            raise UserError("images is empty: give at least one image")
        texts = [prompt] * len(images) if isinstance(prompt, str) else prompt
        if len(texts) != len(images):
            raise UserError(f"{len(texts)} prompts for {len(images)} images: one each is needed")
        vision, fillers = self.modules.vision.config, [self._filler(text) for text in texts]
        found = [self.processor(_picture(image)) for image in images]
        windows = bucket(max(window_count(grid, vision) for _, grid in found))
        laid = batch_images([pad_to_windows(p, grid, vision, windows) for p, grid in found])
        both = [(filler, grid) for filler, (_, grid) in zip(fillers, found, strict=True)]
        length = bucket(max(f.length(r * c // vision.merge**2) for f, (r, c) in both))
        prompts = [filler.fill(grid, length) for filler, grid in both]
        return laid, jax.tree.map(lambda *a: np.stack(a), *prompts)

    def padded_size(self, image: Picture, prompt: str = PROMPT) -> tuple[int, int]:
        """Returns the (windows, prompt tokens) to which `inputs` pads an image alone.

        Raises:
          UnreadableImage, UserError: the image can't be used.
        """
        vision = self.modules.vision.config
        picture = _picture(image)
        rows, columns = grid = self.processor.grid(picture.height, picture.width)
        length = self._filler(prompt).length(rows * columns // vision.merge**2)
        return bucket(window_count(grid, vision)), bucket(length)

    @functools.cached_property
    def _filler(self) -> Callable[[str], PolicyPrompt]:
        """Maps a prompt's text to its ids; keeps the last ones, as rendering a template is slow."""
        vision, config = self.modules.vision.config, self.modules.decoder.config
        mrope = config.mrope_section is not None

        @functools.lru_cache(64)
        def filler(prompt: str) -> PolicyPrompt:
            return PolicyPrompt.create(self.tokenizer, prompt, vision, mrope)

        return filler

    def caption(
        self,
        images: Sequence[Picture],
        prompt: str = PROMPT,
        *,
        group: int = 1,
        seed: int = 0,
        **sampling: Any,
    ) -> list[list[str]]:
        """Writes `group` captions for each image: [b][group] texts.

        Args:
          images: as for inputs.
          prompt: the user's text after the image.
          group: captions per image; they share one reading of it.
          seed: seed of the draws.
          **sampling: fields of decode.sampling.Sampling: max_tokens (512; longer captions are cut),
            temperature (here 0, greedy), top_k, top_p.

        Raises:
          ConfigError: a field of sampling is unknown or out of range.
        """
        how = make(Sampling, {"temperature": 0.0} | sampling)
        key = jax.random.key(seed)
        found = self.sample(*self.inputs(images, prompt), group=group, sampling=how, key=key)
        tokens, mask = jax.device_get((found.tokens, found.mask))
        return [
            [self.tokenizer.decode(ids[real]) for ids, real in zip(*image, strict=True)]
            for image in zip(tokens, mask, strict=True)
        ]

    def sample(
        self,
        images: Images,
        prompt: Prompt,
        *,
        group: int,
        sampling: Sampling,
        key: jax.Array,
    ) -> Rollout:
        """Runs rl.rollout on arrays from `inputs`: Rollout [b, group, t], first b rows.

        `key` is one for all, or [b], one for each image, whose captions depend on no other's.
        """
        count = prompt.tokens.shape[0]
        inputs = loading.put((images, prompt), self.rules)
        if key.ndim:
            key = key[np.resize(np.arange(count), inputs[1].tokens.shape[0])]
        decoding = Decoding(group, self.tokenizer.stop, sampling)
        found = _sample(self.rules, self.modules, decoding, self.params, inputs, key)
        return jax.tree.map(lambda a: a[:count], found)

    def logits(self, images: Sequence[Picture], texts: Sequence[str], prompt: str = PROMPT):
        """Returns the policy's logits at each token of a given caption of each image.

        Args:
          images: as for inputs, b of them.
          texts: one caption per image.
          prompt: the user's text after the image.

        Returns:
          (float32 [b, t, vocab]: entry i predicts token i; int32 [b, t] tokens, padded with 0;
           bool [b, t], False for padding). All logits at once: for looking, not for training.
        """
        if len(texts) != len(images):
            raise UserError(f"{len(texts)} texts for {len(images)} images: one each is needed")
        inputs = self.inputs(images, prompt)
        ids = [self.tokenizer.encode_caption(text) for text in texts]
        length = bucket(max(map(len, ids)))
        tokens = np.stack([pad(i, length) for i in ids])
        mask = np.arange(length) < np.asarray([[len(i)] for i in ids])
        arrays = loading.put((inputs, tokens[:, None], mask[:, None]), self.rules)
        found = _logits(self.rules, self.modules, self.params, *arrays)
        return found[: len(texts), 0], tokens, mask


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _sample(rules, modules, decoding, params, inputs, key):
    images, prompt = inputs
    valid = jnp.ones(prompt.tokens.shape[0], bool)
    batch = Batch(images, prompt, questions=None, valid=valid)
    with axes.using(rules):
        return rollout(modules, params, batch, decoding=decoding, key=key)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logits(rules, modules, params, inputs, tokens, mask):
    with axes.using(rules):
        trunk = modules.trunk(params, *inputs)
        return modules.logits(params, modules.branches(params, trunk, tokens, mask))


def load_policy(
    path: str | Path,
    dtype: Any = None,
    mesh: Mesh | None = None,
    *,
    revision: str = "",
    param_dtype: Any = None,
) -> LoadedPolicy:
    """Reads a policy: Qwen2.5-VL or Qwen3-VL.

    Args:
      path: a directory in Hugging Face format, a gs:// URL of one, a hub id, or
        "asset:tiny/policy", the one that ships.
      dtype: dtype of computation; default bfloat16 on accelerators, float32 on CPU.
      mesh: where the parameters go, as caprl_jax.parallel.mesh.make_mesh makes it; default all
        devices on the axis fsdp.
      revision: revision of a hub id.
      param_dtype: dtype of the parameters; default the dtype of computation.

    Raises:
      ModelDirectoryError: there is no such model, or it is not supported.
    """
    loaded = loading.read(path, revision, mesh, dtype, param_dtype)
    if loaded.modules.vision is None:
        raise ModelDirectoryError(f"{path} holds a model without vision: load_judge reads it")
    processor = load.image_processor(loaded.directory, loaded.modules.vision.config)
    return LoadedPolicy(**vars(loaded), processor=processor)
