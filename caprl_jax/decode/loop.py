"""The decode loop: it draws captions of images token by token after their prompts."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from caprl_jax.decode import caches, lengths, scheduling
from caprl_jax.decode.sampling import Sampling, draw, only_known
from caprl_jax.models.decoder import Decoder
from caprl_jax.models.vlm import Params, Policy, Trunk
from caprl_jax.parallel import axes
from caprl_jax.parallel.axes import constrain

STAGE = 128  # a cache shorter than two stages of this many tokens is read whole


@dataclasses.dataclass(frozen=True)
class Decoding:
    """Settings for drawing captions.

    Attributes:
      group: g, captions per image.
      stop: ids that end a caption.
      sampling: length limit, temperature and filters.
      slots: captions of an image that are drawn at the same time; each of the others begins when
        one of these ends. 0 means all of them. The draws depend on it.
    """

    group: int
    stop: tuple[int, ...]
    sampling: Sampling
    slots: int = 0


@flax.struct.dataclass
class Rollout:
    """Captions that a policy has drawn.

    Attributes:
      tokens: int32 [b, g, t], 0 after the end.
      mask: bool [b, g, t], True up to and including the stop token.
      logp: float32 [b, g, t], log-probability at temperature 1 over all tokens; 0 outside the mask.
      sample_logp: float32 [b, g, t], log-probability under the distribution that was sampled from.
      length: int32 [b, g], number of tokens in the mask.
      truncated: bool [b, g], True where no stop token was drawn within the limit.
    """

    tokens: jax.Array
    mask: jax.Array
    logp: jax.Array
    sample_logp: jax.Array
    length: jax.Array
    truncated: jax.Array

    def cut(self, tokens: int) -> "Rollout":
        """Truncates every field to the first `tokens` tokens; no caption may be longer."""
        own = {name: getattr(self, name) for name in ("tokens", "mask", "logp", "sample_logp")}
        return self.replace(**{name: a[..., :tokens] for name, a in own.items()})


def decode(
    policy: Policy,
    params: Params,
    trunk: Trunk,
    *,
    decoding: Decoding,
    valid: jax.Array,
    key: jax.Array,
) -> Rollout:
    """Draws decoding.group captions after each image's prompt.

    Args:
      policy: modules.
      params: the policy's parameters, in any dtype.
      trunk: prompts that have been read, batch axes (b,).
      decoding: group size, stop tokens, sampling and slots.
      valid: bool [b], False for rows that only fill up the batch. Their captions are empty, and no
        other caption waits for them. Or int32 [b, g], the most tokens of each caption, all 0 in
        such rows: a caption ends there as if it had met the limit (benchmarks draw given lengths).
      key: iteration i of the loop draws with fold_in(key, i); or keys [b], one for each image.

    Returns:
      Rollout [b, g, t], where t is decoding.sampling.max_tokens.
    """
    with axes.decoding(), jax.named_scope("decode"):
        weights = caches.weights(policy, params)
        out = decode_with(policy, weights, trunk, decoding=decoding, valid=valid, key=key)
    batch = axes.BATCH[:2]
    return jax.tree.map(lambda a: constrain(a, *batch, *[None] * (a.ndim - 2)), out)


def decode_with(
    policy: Policy,
    weights: Params,
    trunk: Trunk,
    *,
    decoding: Decoding,
    valid: jax.Array,
    key: jax.Array,
) -> Rollout:
    """Does the same as `decode`, with weights as caches.weights prepares them."""
    variant = caches.variant(policy, weights)
    loop = _Loop(policy, weights, trunk, key, decoding, variant, variant.prompt(trunk.kv))
    slots = scheduling.number_of_slots(decoding.group, decoding.slots)
    if valid.ndim == 1:
        limit = jnp.where(valid[:, None], decoding.sampling.max_tokens, 0)
        valid = jnp.broadcast_to(limit, (len(valid), decoding.group))
    drawn = (
        _draw_in_slots(loop, slots, valid)
        if slots < decoding.group
        else _draw_together(loop, valid)
    )
    stopped = jnp.isin(drawn.tokens, jnp.asarray(decoding.stop, jnp.int32)) & drawn.mask
    return drawn.replace(truncated=(valid > 0) & ~jnp.any(stopped, axis=-1))


_fold_each = jax.vmap(jax.random.fold_in, in_axes=(0, None))


@dataclasses.dataclass(frozen=True)
class _Loop:
    """Everything that stays the same in every iteration of a decode loop."""

    policy: Policy
    weights: Params
    trunk: Trunk
    key: jax.Array
    decoding: Decoding
    variant: caches.Stacked | caches.PerLayer
    prompt: Any

    def draw(self, hidden: jax.Array, i: jax.Array) -> tuple[Rollout, jax.Array]:
        """Draws one token each: hidden states [b, s, e] -> (Rollout [b, s], bool [b, s] stops)."""
        logits = constrain(self.variant.logits(self.weights, hidden), *axes.BATCH[:2], "vocab")
        logits = only_known(logits, self.policy.decoder.config.known)
        sampling, stop = self.decoding.sampling, self.decoding.stop
        fold = jax.random.fold_in if self.key.ndim == 0 else _fold_each
        token, logp, drawn = draw(fold(self.key, i), logits, sampling)
        ends = jnp.isin(token, jnp.asarray(stop, jnp.int32))
        return Rollout(token, None, logp, drawn, None, None), ends

    def read(self, token: jax.Array, at: jax.Array, *cache: Any) -> tuple[jax.Array, Any]:
        """Runs tokens [b, s], at place `at` of their captions, through the decoder."""
        decoder = {"params": self.weights["decoder"]}
        x = self.policy.decoder.apply(decoder, token[..., None], method=Decoder.embed)
        start = jnp.broadcast_to(self.trunk.next_position[:, None], token.shape)
        positions = self.policy.positions(start + at, 1)
        hidden, cache = self.variant.token(self.weights, x, positions, self.prompt, *cache)
        return hidden[..., 0, :], cache

    def empty(self, slots: int, iterations: int) -> tuple[jax.Array, Rollout]:
        """Returns (hidden states before the first token [b, slots, e], an empty Rollout)."""
        b, width = self.trunk.last.shape
        zeros = jnp.zeros((b, slots, iterations), jnp.float32)
        out = Rollout(zeros.astype(jnp.int32), zeros.astype(bool), zeros, zeros, None, None)
        return jnp.broadcast_to(self.trunk.last[:, None], (b, slots, width)), out


def _draw_together(loop: _Loop, most: jax.Array) -> Rollout:
    """Draws all captions, of `most` tokens [b, g], at the same time: iteration i draws token i."""
    t, group = loop.decoding.sampling.max_tokens, loop.decoding.group

    def step(carry, i, stage):
        done, hidden, out, cache = carry
        new, ends = loop.draw(hidden, i)
        new = new.replace(mask=~done)
        out = jax.tree.map(lambda a, x: a.at[:, :, i].set(jnp.where(done, a[:, :, i], x)), out, new)
        hidden, cache = loop.read(new.tokens, i, cache, caches.Write(i, stage))
        return done | ends | (i + 1 >= most), hidden, out, cache

    hidden, out = loop.empty(group, t)
    done = most <= 0
    cache = loop.variant.empty(loop.prompt, group, t)
    for stage in stages(t):
        carry = done, hidden, out, loop.variant.opened(cache, loop.prompt, group, stage)
        step_of_stage = functools.partial(step, stage=stage)
        done, hidden, out, cache = _while_any_is_open(step_of_stage, carry, *stage)
    return out.replace(length=jnp.sum(out.mask, axis=-1))


def _draw_in_slots(loop: _Loop, slots: int, most: jax.Array) -> Rollout:
    """Draws captions, of `most` tokens [b, g], one after another in fewer slots than captions.

    A slot's cache is a ring: iteration i writes at i modulo the longest caption's tokens. When a
    new caption begins, the tokens left by the caption before are masked. Until the ring is full,
    it is read in stages.
    """
    t, group = loop.decoding.sampling.max_tokens, loop.decoding.group
    iterations = scheduling.most_iterations(group, slots, t)

    def step(carry, i, stage):
        _, state, hidden, out, cache = carry
        new, ends = loop.draw(hidden, i)
        new = new.replace(mask=state.busy)
        out = jax.tree.map(lambda a, x: a.at[:, :, i].set(x), out, new)
        write = caches.Write(i % t, stage, fresh=state.at == 0)
        hidden, cache = loop.read(new.tokens, state.at, cache, write)
        last = jnp.take_along_axis(most, jnp.minimum(state.caption, group - 1), axis=1)
        ends = state.busy & (ends | (state.at + 1 >= last))
        hidden = jnp.where(ends[..., None], loop.trunk.last[:, None], hidden)
        state = state.after(ends, i)
        return ~state.busy, state, hidden, out, cache

    hidden, out = loop.empty(slots, iterations)
    state = scheduling.filled(jnp.any(most > 0, axis=1), slots, group)
    *carry, cache = ~state.busy, state, hidden, out, loop.variant.empty(loop.prompt, slots, t)
    parts = stages(t)
    for stage in parts:
        cache = loop.variant.opened(cache, loop.prompt, slots, stage)
        end = iterations if len(parts) == 1 else stage[1]
        *carry, cache = _while_any_is_open(
            functools.partial(step, stage=stage), (*carry, cache), stage[0], end
        )
    if len(parts) > 1:
        whole = functools.partial(step, stage=(0, t))
        carry = (*carry, loop.variant.joined(cache))
        *carry, _ = _while_any_is_open(whole, carry, t, iterations)
    _, state, _, out = carry
    found = jax.tree.map(lambda a: state.by_caption(a, t), out)
    return found.replace(length=state.length)


def stages(tokens: int) -> list[tuple[int, int]]:
    """Returns runs of (first, end) tokens; during each, the cache is read only up to its end.

    Each run is a loop of its own in the program, so there are at most four, and one for a short
    limit.
    """
    ends = lengths.even_buckets(tokens, min(4, max(tokens // STAGE, 1)))
    return list(zip([0, *ends], ends, strict=False))


def _while_any_is_open(step: Callable, carry: tuple, first: int, end: int) -> tuple:
    """Iterates carry = step(carry, i) from first to end, or until all captions (carry[0]) end."""

    def is_open(counted):
        # The count starts at 0, so that the program states the largest number of iterations.
        i, (done, *_) = counted
        return (i < end - first) & ~jnp.all(done)

    def one(counted):
        i, carry = counted
        return i + 1, step(carry, first + i)

    return jax.lax.while_loop(is_open, one, (0, carry))[1]
