"""This project's side of comparisons of drawing captions."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from caprl_jax.bench.work import Work, laid_out
from caprl_jax.decode.sampling import Sampling
from caprl_jax.parallel import mesh
from caprl_jax.parallel.jit import jit
from caprl_jax.rl.rollout import rollout
from caprl_jax.rl.types import Batch, Decoding, Rollout
from caprl_jax.run import compile as compile_lib
from caprl_jax.run import load


class Ours:
    """This project's rollout, jitted, with weights read from the policy's directory."""

    def __init__(self, work: Work):
        """Reads the weights."""
        config, self._work = work.config, work
        self._rules, dtype = compile_lib.shard_rules(config), compile_lib.compute_dtype(config)
        self.params = load.load_frozen(work.policy, work.policy_path, self._rules, dtype)
        self._shape = config.data.batch, config.caprl.group
        self._batch = self._put(work.images, work.prompt)
        self._key, self._draws = jax.random.key(config.seed), 0
        self._jitted = functools.lru_cache(self._jit)

    def _put(self, images: Any, prompt: Any) -> Batch:
        batch = Batch(images, prompt, None, np.ones(self._shape[0], bool))
        return mesh.put_whole(batch, self._rules)

    def _jit(self, tokens: int, temperature: float) -> Callable:
        policy, group = self._work.policy, self._work.config.caprl.group
        # No token ends a caption, so exactly the numbers asked for are drawn.
        decoding = Decoding(group, (self._work.vocab,), Sampling(tokens, temperature))

        def draw(params, batch, key):
            return rollout(policy, params, batch, decoding=decoding, key=key)

        return jit(draw, self._rules)

    def __call__(self, tokens: int, temperature: float = 1.0) -> Rollout:
        """Draws this many tokens of each caption."""
        return self._draw(self._batch, tokens, temperature)

    def batch(self) -> Batch:
        """Processes the pictures anew: Batch [b, ..], without questions."""
        w = self._work
        return self._put(*laid_out(w.config, w.processor, w.filler, w.pictures))

    def from_pictures(self, lengths: np.ndarray, limit: int) -> Rollout:
        """Draws captions of lengths [b, g], up to a limit; the pictures are processed anew."""
        limits = jnp.asarray(lengths, jnp.int32)
        return self._draw(self.batch().replace(valid=limits), limit, 1.0)

    def _draw(self, batch: Batch, tokens: int, temperature: float) -> Rollout:
        self._draws += 1
        key = jax.random.fold_in(self._key, self._draws)
        return self._jitted(tokens, temperature)(self.params, batch, key)


def parameters(params: Any) -> int:
    """Counts parameters."""
    return sum(a.size for a in jax.tree.leaves(params))
