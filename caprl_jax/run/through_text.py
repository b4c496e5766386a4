"""The CapRL step in two programs, for captions that become text on the host between them.

They do so for a policy whose tokenizer isn't the judge's, or CLIP's, and for reward terms on text.
Captions leave the first program as the policy's ids; ids of the other models and the terms' values
enter the second.
Results and metrics are those of rl.step.caprl_step.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import numpy as np

from caprl_jax.data.tokens import Tokenizer, pad
from caprl_jax.parallel import mesh
from caprl_jax.parallel.axes import ShardRules
from caprl_jax.rl.step import Run, step_keys
from caprl_jax.rl.types import Batch, Metrics, State
from caprl_jax.run.text_terms import TextTerms, Told


class Retokeniser:
    """Converter of the policy's ids to the judge's, through text."""

    def __init__(self, policy: Tokenizer, judge: Tokenizer, length: int):
        """Stores the tokenizers; `length` is the judge's bucket, and longer captions are cut."""
        self._policy, self._judge, self._length = policy, judge, length

    def __call__(self, tokens: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, Any]:
        """Converts captions int [b, g, t], bool mask -> (judge's ids, mask, bool [b, g] cut)."""
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


@dataclasses.dataclass(frozen=True)
class Between:
    """Readers of captions on the host, between the two programs; None where one isn't needed.

    Attributes:
      judge: (tokens, mask) -> (the judge's ids, mask, bool [b, g] cut).
      clip: (tokens, mask) -> (CLIP's ids, mask).
      texts: the run's reward terms on text.
    """

    judge: Retokeniser | None = None
    clip: Callable | None = None
    texts: TextTerms | None = None

    def __bool__(self) -> bool:
        """Tells whether captions pass to any of them."""
        return any(reader is not None for reader in (self.judge, self.clip, self.texts))


@flax.struct.dataclass
class Passed:
    """Results of the readers of Between; () and {} where there was none."""

    judge: tuple
    clip: tuple
    told: Told


def _flat(a: np.ndarray) -> np.ndarray:
    return a.reshape(-1, a.shape[-1])


def in_two_programs(
    rollout: Callable,
    finish: Callable,
    rules: ShardRules,
    between: Between,
) -> Callable[[Run, State, Batch, jax.Array], tuple[State, Metrics]]:
    """Returns (run, state, batch, key) -> (state, metrics), like the one program.

    Args:
      rollout: jitted (run, state, batch, key) -> Rollout.
      finish: jitted (run, state, batch, rollout, Passed, key) -> (state, metrics).
      rules: mesh of the batch.
      between: runs between the two, on the host.
    """

    def step(run: Run, state: State, batch: Batch, key: jax.Array):
        rollout_key, judge_key = keys(key, state.step)
        captions = rollout(run, state, batch, rollout_key)
        host = mesh.fetch_batch((captions.tokens, captions.mask), rules)
        judge, clip = (
            mesh.put_batch(read(*host), rules) if read else ()
            for read in (between.judge, between.clip)
        )
        passed = Passed(judge, clip, told(between.texts, batch, host, rules))
        return finish(run, state, batch, captions, passed, judge_key)

    return step


def told(
    texts: TextTerms | None, batch: Batch, captions: tuple[Any, Any], rules: ShardRules
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Returns the values of a run's reward terms on text on the mesh; {} without any.

    Args:
      texts: the terms.
      batch: on the mesh.
      captions: tokens and mask of this process, numpy.
      rules: mesh of the batch.
    """
    if texts is None:
        return {}
    number, valid = mesh.fetch_batch((batch.number, batch.valid), rules)
    return mesh.put_batch(texts(batch.replace(number=number, valid=valid), captions), rules)


@jax.jit
def keys(key: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the keys of rl.step.caprl_step, whose caller folds the step in."""
    return step_keys(jax.random.fold_in(key, step))
