"""Keys of draws that depend on a seed and a text alone, not on what is drawn beside it."""

import hashlib
from collections.abc import Sequence

import jax
import numpy as np


def digests(texts: Sequence[str]) -> np.ndarray:
    """Returns the digests of texts, uint32 [b, 2]."""
    whole = [hashlib.sha256(text.encode(errors="replace")).digest()[:8] for text in texts]
    return np.stack([np.frombuffer(digest, np.uint32) for digest in whole])


@jax.jit
def keys(seed: int, digests: jax.Array) -> jax.Array:
    """Returns the keys [b] of a seed and digests [b, 2]."""

    def key(words):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), words[0]), words[1])

    return jax.vmap(key)(digests)
