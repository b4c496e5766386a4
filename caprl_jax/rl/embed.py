"""The judge's reward as one pure function of arrays, for training loops of other projects."""

import dataclasses
import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp

from caprl_jax.parallel import axes
from caprl_jax.parallel.axes import ShardRules
from caprl_jax.rl.judge import Judge, Judging, Mode, judge
from caprl_jax.rl.types import Captions, Questions, Verdicts
from caprl_jax.settings import make

_CONSTANT = 256 << 20  # bytes of parameters that a program may hold as constants without a warning


@dataclasses.dataclass(frozen=True, eq=False)
class Reward:
    """The reward of captions: the judge's mean score over their questions; made by make_reward.

    Calling it is pure: it may be jitted, mapped and scanned, and calls nothing on the host. Under
    the caller's jit the parameters become constants of the program, which suits small judges. For
    large ones, and under shard_map, pass `params` to `apply` as an argument.

    Attributes:
      params: the judge with its parameters and its prompt, a pytree that the caller may shard and
        donate.
      judging: mode and temperature.
    """

    params: Judge
    judging: Judging

    def __call__(
        self, tokens: jax.Array, mask: jax.Array, questions: Questions, key: jax.Array | None = None
    ) -> tuple[jax.Array, Verdicts]:
        """Judges captions; see apply."""
        if isinstance(tokens, jax.core.Tracer):
            _warn_of_constants(self.params)
        return self.apply(self.params, tokens, mask, questions, key)

    def apply(
        self,
        params: Judge,
        tokens: jax.Array,
        mask: jax.Array,
        questions: Questions,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, Verdicts]:
        """Judges captions with the given parameters.

        Args:
          params: as the attribute.
          tokens: int32 [b, g, t], captions in the judge's ids. Ids have no gradient: soft captions,
            which are floats, are refused.
          mask: bool [b, g, t], False for padding; it may have holes.
          questions: [b, n, ..] shared by an image's captions, or [b, g, n, ..] one set for each.
          key: typed PRNG key; needed by mode "sampled" only.

        Returns:
          (float32 [b, g] rewards in [0, 1]; the mean over valid questions, 0 without any.
           Verdicts [b, g, n]).

        Raises:
          TypeError: tokens aren't integers, or the mask isn't bool.
          ValueError: shapes don't fit, or mode "sampled" has no key.
        """
        _check(tokens, mask, questions)
        if self.judging.mode == "sampled" and key is None:
            raise ValueError('mode "sampled" draws letters: give a key')
        # No rules: arrays lie where the caller has put them.
        verdicts = score(None, self.judging, params, Captions(tokens, mask), questions, key)
        return verdicts.reward, verdicts


def make_reward(judge: Any, mode: Mode = "expected", temperature: float = 0.6) -> Reward:
    """Returns the reward of a judge as a pure function.

    Args:
      judge: what caprl_jax.load_judge returns, or an rl.judge.Judge.
      mode: "expected" scores p(truth), "greedy" and "sampled" 1 for a right letter.
      temperature: temperature of the letters' softmax.

    Raises:
      ConfigError: the mode is unknown, or the temperature isn't above 0.
    """
    params = judge if isinstance(judge, Judge) else judge.model
    return Reward(params, make(Judging, {"mode": mode, "temperature": temperature}))


@functools.partial(jax.jit, static_argnums=(0, 1))
def score(
    rules: ShardRules | None,
    judging: Judging,
    model: Judge,
    captions: Captions,
    questions: Questions,
    key: jax.Array | None,
) -> Verdicts:
    """Returns judge's verdicts [b, g, n], compiled once for each shape, under the shard rules."""
    with axes.using(rules):
        return judge(model, captions, questions, judging=judging, key=key)


def _check(tokens: jax.Array, mask: jax.Array, questions: Questions) -> None:
    tokens_type, mask_type = jnp.result_type(tokens), jnp.result_type(mask)
    if not jnp.issubdtype(tokens_type, jnp.integer):
        raise TypeError(
            f"tokens are {tokens_type}: the judge reads ids, int32 [b, g, t]. Soft captions have "
            "no reward; take the policy gradient of drawn ids instead"
        )
    if mask_type != jnp.bool_:
        raise TypeError(f"the mask is {mask_type}: it must be bool, False for padding")
    if jnp.ndim(tokens) != 3 or jnp.shape(tokens) != jnp.shape(mask):
        raise ValueError(
            f"tokens {jnp.shape(tokens)} and mask {jnp.shape(mask)} must have one shape [b, g, t]"
        )
    leading = jnp.shape(tokens)[: jnp.ndim(questions.truth) - 1]
    if jnp.shape(questions.truth)[:-1] != leading:
        raise ValueError(
            f"questions of shape {jnp.shape(questions.truth)} don't fit captions of shape "
            f"{jnp.shape(tokens)}: they are [b, n], or [b, g, n] with a set for each caption"
        )


def _warn_of_constants(params: Any) -> None:
    size = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(params))
    if size > _CONSTANT:
        logging.warning(
            "the judge's %.1f GB become constants of your program, which takes long to compile: "
            "pass reward.params through your jitted function to reward.apply(params, ..)",
            size / 1e9,
        )
