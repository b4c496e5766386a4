"""CLIP's two towers on all devices, for any number of images and texts."""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from caprl_jax.models.clip import Clip
from caprl_jax.parallel import mesh
from caprl_jax.parallel.jit import jit
from caprl_jax.run.clip import ClipReader


class Towers:
    """Both towers with their parameters; each is one program, over a batch on the mesh's devices.

    They compute in float32 on all devices, so that a threshold means the same everywhere.

    Attributes:
      batch: images, or texts, that a program takes.
    """

    def __init__(self, reader: ClipReader, batch: int):
        """Loads the parameters, whole on each device.

        Args:
          reader: CLIP without parameters.
          batch: images, or texts, of a batch; raised to a multiple of the devices.
        """
        self._rules = mesh.shard_rules(mesh.make_mesh({"data": -1}))
        multiple = mesh.batch_multiple(self._rules)
        self.batch = -(-batch // multiple) * multiple
        clip = reader.load(self._rules, np.float32)
        self._params, module = clip.params, clip.module

        def texts(params, tokens, mask):
            return module.apply({"params": params}, tokens, mask, method=Clip.texts)

        def images(params, pixels):
            return module.apply({"params": params}, pixels, method=Clip.images)

        self._texts, self._images = jit(texts, self._rules), jit(images, self._rules)

    def texts(self, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Returns features of texts, float32 [n, out] of length 1; arguments as Clip.texts'."""
        return self._run(self._texts, (tokens, mask))

    def images(self, pixels: np.ndarray) -> np.ndarray:
        """Returns features of images, float32 [n, out] of length 1; pixels [n, side, side, 3]."""
        return self._run(self._images, (pixels,))

    def _run(self, program: Callable, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """Runs a program on n rows, n at least 1; copies of rows fill the last batch."""
        count, out = len(arrays[0]), []
        for start in range(0, count, self.batch):
            part = [a[start : start + self.batch] for a in arrays]
            part = [np.resize(a, (self.batch, *a.shape[1:])) for a in part]
            with jax.default_matmul_precision("highest"):
                found = program(self._params, *mesh.put_batch(part, self._rules))
            out.append(jax.device_get(found))
        return np.concatenate(out)[:count]
