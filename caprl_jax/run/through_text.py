"""A CapRL step in two programs, for a policy and a judge whose tokenizers differ.

Captions leave the first program as the policy's ids, become text and the judge's ids on the host,
and enter the second. Results and metrics are those of step.caprl_step.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from caprl_jax.data.tokens import Tokenizer, pad
from caprl_jax.parallel import mesh
from caprl_jax.parallel.axes import Layout
from caprl_jax.rl.step import Batch, Frozen, Metrics, State


class Retokeniser:
    """The policy's ids -> the judge's, through text."""

    def __init__(self, policy: Tokenizer, judge: Tokenizer, length: int):
        """length is the bucket of the judge's ids; what is longer is cut."""
        self._policy, self._judge, self._length = policy, judge, length

    def __call__(self, tokens: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, Any]:
        """Captions int [b, g, t], bool mask -> (the judge's ids, their mask, bool [b, g] cut)."""
        ids = [
            self._judge.encode_caption(self._policy.decode(own[real]))
            for own, real in zip(_flat(tokens), _flat(mask), strict=True)
        ]
        shape = (*tokens.shape[:2], self._length)
        out = np.stack([pad(i[: self._length], self._length) for i in ids])
        lengths = np.asarray([len(i) for i in ids])
        real = np.arange(self._length) < lengths[:, None]
        cut = (lengths > self._length).reshape(shape[:2])
        return out.reshape(shape), real.reshape(shape), cut


def _flat(a: np.ndarray) -> np.ndarray:
    return a.reshape(-1, a.shape[-1])


def in_two_programs(
    roll_out: Callable, finish: Callable, retokenise: Retokeniser, on: Layout
) -> Callable[[State, Frozen, Batch, jax.Array], tuple[State, Metrics]]:
    """(state, frozen, batch, key) -> (state, metrics), like the one program.

    Args:
      roll_out: jitted (params, batch, key) -> Rollout.
      finish: jitted (state, frozen, batch, rollout, (tokens, mask, cut), key) -> (state, metrics);
        tokens are the judge's.
      retokenise: between the two, on the host.
      on: the mesh of the batch.
    """

    def step(state: State, frozen: Frozen, batch: Batch, key: jax.Array):
        sample_key, judge_key = _split(key, state.step)
        captions = roll_out(state.params, batch, sample_key)
        host = mesh.fetch_batch((captions.tokens, captions.mask), on)
        passed = mesh.put_batch(retokenise(*host), on)
        return finish(state, frozen, batch, captions, passed, judge_key)

    return step


@jax.jit
def _split(key: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The keys of step.caprl_step, whose caller folds the step in."""
    sample_key, judge_key = jax.random.split(jax.random.fold_in(key, step))
    return sample_key, judge_key
