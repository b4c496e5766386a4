"""Sampling captions: one prefill per image, then a group decodes against that one prompt."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from caprl_jax.decode import caches as decoding
from caprl_jax.decode import known as known_lib
from caprl_jax.decode import scheduling as slots_lib
from caprl_jax.decode.known import Known
from caprl_jax.decode.sampling import Sampling, draw
from caprl_jax.models.attention import KV
from caprl_jax.models.decoder import Decoder
from caprl_jax.models.vision import Images
from caprl_jax.models.vlm import Params, Policy, Prompt, Trunk
from caprl_jax.parallel import axes as logical
from caprl_jax.parallel.axes import Layout, constrain

STAGE = 128  # tokens of a caption's cache, at least, that are read before some are left out


@flax.struct.dataclass
class Rollout:
    """Captions.

    Attributes:
      tokens: int32 [b, g, t], 0 after the end.
      mask: bool [b, g, t], True up to and with the stop token.
      logp: float32 [b, g, t], log-probability at temperature 1 of the whole vocabulary; 0 outside.
      sample_logp: float32 [b, g, t], under the distribution that was sampled from.
      length: int32 [b, g], tokens of the mask.
      truncated: bool [b, g], no stop token within the bucket.
    """

    tokens: jax.Array
    mask: jax.Array
    logp: jax.Array
    sample_logp: jax.Array
    length: jax.Array
    truncated: jax.Array

    def cut(self, tokens: int) -> "Rollout":
        """The first so many tokens, for captions that have no more."""
        own = {name: getattr(self, name) for name in ("tokens", "mask", "logp", "sample_logp")}
        return self.replace(**{name: a[..., :tokens] for name, a in own.items()})


@flax.struct.dataclass
class Reading:
    """Images and prompts read with their gradient in mind, and what was computed of captions.

    Attributes:
      trunk: what captions need of images and prompts.
      pull: gradients of (trunk.last, trunk.kv.k, trunk.kv.v) -> (gradients of the parameters,).
      known: what was computed of the captions; None where that isn't kept.
    """

    trunk: Trunk
    pull: Callable
    known: Known | None = None


def prefill(policy: Policy, params: Params, images: Images, prompt: Prompt, pieces: int) -> Trunk:
    """Encodes images and prompts piece by piece; Images [b, ..], Prompt [b, p] -> Trunk."""

    def one(piece):
        last, *kv = _read(policy, params, *piece)
        # Layers come first in the result again; pieces are joined along the first axis.
        return last, *(jnp.moveaxis(a, 1, 0) for a in kv)

    last, *kv = logical.in_pieces(one, (images, prompt), pieces)
    return _trunk(last, *(jnp.moveaxis(a, 0, 1) for a in kv), prompt)


def read(policy: Policy, params: Params, images: Images, prompt: Prompt) -> Reading:
    """As prefill in one piece, keeping what the backward pass needs."""
    found, pull = jax.vjp(lambda params: _read(policy, params, images, prompt), params)
    return Reading(_trunk(*found, prompt), pull)


def _read(policy, params, images, prompt) -> tuple[jax.Array, jax.Array, jax.Array]:
    trunk = policy.trunk(params, images, prompt)
    return trunk.last, trunk.kv.k, trunk.kv.v


def _trunk(last, k, v, prompt: Prompt) -> Trunk:
    return Trunk(None, last, KV(k, v, prompt.mask), prompt.next_position)


def sample(
    policy: Policy,
    params: Params,
    images: Images,
    prompt: Prompt,
    key: jax.Array,
    group: int,
    stop: tuple[int, ...],
    sampling: Sampling,
    pieces: int = 1,
    layout: Layout | None = None,
    valid: jax.Array | None = None,
    slots: int = 0,
) -> Rollout:
    """Draws `group` captions per image.

    The image and its prompt are read once; the captions' own keys and values are one more segment
    of the tree. Stops when every caption has met a stop token.

    Args:
      policy: modules.
      params: its parameters.
      images: Images [b, ..].
      prompt: Prompt [b, p].
      key: for the draws; turn i of the loop, token i of captions drawn at once, uses
        fold_in(key, i).
      group: g, captions per image.
      stop: ids that end a caption.
      sampling: lengths and temperature.
      pieces: in which images and prompts are read; a divisor of b.
      layout: where weights, caches and captions lie; None leaves that to the compiler.
      valid: bool [b], False for rows that only fill up a batch: nobody waits for their captions,
        which are empty. None is all True.
      slots: captions of an image that are drawn at once, the others as these end; 0 is all. The
        draws differ with it.

    Returns:
      Rollout [b, g, t].
    """
    if valid is None:
        valid = jnp.ones(prompt.tokens.shape[0], bool)
    with logical.using(layout), jax.named_scope("prefill"):
        trunk = prefill(policy, params, images, prompt, pieces)
    return sample_after(
        policy, params, trunk, key, group, stop, sampling, layout, valid, slots=slots
    )[0]


def sample_after(
    policy: Policy,
    params: Params,
    trunk: Trunk,
    key: jax.Array,
    group: int,
    stop: tuple[int, ...],
    sampling: Sampling,
    layout: Layout | None,
    valid: jax.Array,
    keep: bool = False,
    slots: int = 0,
) -> tuple[Rollout, Known | None]:
    """As sample, of images and prompts that have been read; Known to keep, else None."""
    with logical.using(layout and layout.decoding), jax.named_scope("decode"):
        weights = decoding.weights(policy, params, layout)
        known = None
        if keep:
            known = known_lib.empty(policy, params, trunk, group, sampling.max_tokens)
        out, known = decode(policy, weights, trunk, key, group, stop, sampling, valid, known, slots)
    with logical.using(layout):
        out = jax.tree.map(lambda a: constrain(a, *logical.BATCH[:2], *[None] * (a.ndim - 2)), out)
        return out, known and known_lib.in_order(known)


def decode(
    policy: Policy,
    params: Params,
    trunk: Trunk,
    key: jax.Array,
    group: int,
    stop: tuple[int, ...],
    sampling: Sampling,
    valid: jax.Array,
    known: Known | None = None,
    slots: int = 0,
) -> tuple[Rollout, Known | None]:
    """Draws captions after a trunk, and fills what is to be known of them.

    Params are as decoding.weights gives them, the rest as sample's; captions that share slots are
    not known.
    """
    way = decoding.way(policy, params, tells=known is not None)
    loop = _Loop(policy, params, trunk, key, stop, sampling, way, way.prompt(trunk.kv))
    count = slots_lib.count(group, slots)
    if count < group:
        if known is not None:
            raise ValueError("what is known of captions needs a slot for each: slots must be 0")
        return _in_slots(loop, count, group, valid), None
    return _all_at_once(loop, group, valid, known)


@dataclasses.dataclass(frozen=True)
class _Loop:
    """What is the same in every turn of a decoding loop; fields as decode's arguments."""

    policy: Policy
    params: Params
    trunk: Trunk
    key: jax.Array
    stop: tuple[int, ...]
    sampling: Sampling
    way: decoding.Stacked | decoding.Apart
    prompt: Any

    def draw(self, hidden: jax.Array, i: jax.Array) -> tuple[jax.Array, Rollout, jax.Array]:
        """Hidden [b, s, e] -> (logits, Rollout of a token each [b, s], whether it ends)."""
        logits = constrain(self.way.logits(self.params, hidden), *logical.BATCH[:2], "vocab")
        token, logp, drawn = draw(jax.random.fold_in(self.key, i), logits, self.sampling)
        ends = jnp.isin(token, jnp.asarray(self.stop, jnp.int32))
        return logits, Rollout(token, None, logp, drawn, None, None), ends

    def read(self, token: jax.Array, at: jax.Array, *cache: Any) -> tuple[jax.Array, Any, Any]:
        """Tokens [b, s], in place `at` of their captions, go through the decoder (way.token)."""
        decoder = {"params": self.params["decoder"]}
        x = self.policy.decoder.apply(decoder, token[..., None], method=Decoder.embed)
        start = jnp.broadcast_to(self.trunk.next_position[:, None], token.shape)
        positions = self.policy.positions(start + at, 1)
        hidden, cache, told = self.way.token(self.params, x, positions, self.prompt, *cache)
        return hidden[..., 0, :], cache, told

    def empty(self, slots: int, turns: int) -> tuple[jax.Array, Rollout]:
        """(hidden states before the first token [b, slots, e], nothing drawn [b, slots, turns])."""
        b, width = self.trunk.last.shape
        zeros = jnp.zeros((b, slots, turns), jnp.float32)
        out = Rollout(zeros.astype(jnp.int32), zeros.astype(bool), zeros, zeros, None, None)
        return jnp.broadcast_to(self.trunk.last[:, None], (b, slots, width)), out


def _all_at_once(
    loop: _Loop, group: int, valid: jax.Array, known: Known | None
) -> tuple[Rollout, Known | None]:
    """Every caption in a slot of its own: turn i draws token i of each."""
    t = loop.sampling.max_tokens

    def step(carry, i, stage):
        done, hidden, out, cache, known = carry
        logits, new, ends = loop.draw(hidden, i)
        new = new.replace(mask=~done)
        out = jax.tree.map(lambda a, x: a.at[:, :, i].set(jnp.where(done, a[:, :, i], x)), out, new)
        hidden, cache, told = loop.read(new.tokens, i, cache, i, stage)
        return done | ends, hidden, out, cache, known_lib.filled(known, told, logits, i)

    hidden, out = loop.empty(group, t)
    done = jnp.broadcast_to(~valid[:, None], out.mask.shape[:2])
    cache = loop.way.empty(loop.prompt, group, t)
    for stage in stages(t):
        carry = done, hidden, out, loop.way.opened(cache, loop.prompt, group, stage), known
        done, hidden, out, cache, known = _while_any_is_open(
            functools.partial(step, stage=stage), carry, *stage
        )
    return out.replace(length=jnp.sum(out.mask, axis=-1), truncated=~done), known


def _in_slots(loop: _Loop, count: int, group: int, valid: jax.Array) -> Rollout:
    """Captions follow one another in fewer slots.

    A slot's cache is a ring: turn i writes at i modulo the longest caption's tokens, and what is
    there of the caption before is masked once another begins. Until full it is read in stages.
    """
    t = loop.sampling.max_tokens
    turns = slots_lib.most_turns(group, count, t)

    def step(carry, i, stage):
        _, slots, hidden, out, cache = carry
        _, new, ends = loop.draw(hidden, i)
        new = new.replace(mask=slots.busy)
        out = jax.tree.map(lambda a, x: a.at[:, :, i].set(x), out, new)
        hidden, cache, _ = loop.read(new.tokens, slots.at, cache, i % t, stage, slots.at == 0)
        ends = slots.busy & (ends | (slots.at + 1 == t))
        hidden = jnp.where(ends[..., None], loop.trunk.last[:, None], hidden)
        slots = slots.after(ends, i)
        return ~slots.busy, slots, hidden, out, cache

    hidden, out = loop.empty(count, turns)
    slots = slots_lib.filled(valid, count, group)
    *carry, cache = ~slots.busy, slots, hidden, out, loop.way.empty(loop.prompt, count, t)
    parts = stages(t)
    for stage in parts:
        cache = loop.way.opened(cache, loop.prompt, count, stage)
        end = turns if len(parts) == 1 else stage[1]
        *carry, cache = _while_any_is_open(
            functools.partial(step, stage=stage), (*carry, cache), stage[0], end
        )
    if len(parts) > 1:
        *carry, _ = _while_any_is_open(
            functools.partial(step, stage=(0, t)), (*carry, loop.way.joined(cache)), t, turns
        )
    _, slots, _, out = carry
    found = jax.tree.map(lambda a: slots.by_caption(a, t), out)
    stopped = jnp.isin(found.tokens, jnp.asarray(loop.stop, jnp.int32)) & found.mask
    truncated = valid[:, None] & ~jnp.any(stopped, axis=-1)
    return found.replace(length=slots.length, truncated=truncated)


def stages(tokens: int) -> list[tuple[int, int]]:
    """Runs of (first, end) tokens; in each, only the cache up to its end is read.

    Each is a loop of its own in the program, so there are few, and none for a short bucket.
    """
    count = min(4, max(tokens // STAGE, 1))
    ends = [tokens * (i + 1) // count for i in range(count)]
    return list(zip([0, *ends], ends, strict=False))


def _while_any_is_open(step: Callable, carry: tuple, first: int, end: int) -> tuple:
    """carry = step(carry, i) for i from first to end, or until all captions, carry[0], are done."""

    def is_open(counted):
        # Counted from 0, so that the program says how often it runs at most.
        i, (done, *_) = counted
        return (i < end - first) & ~jnp.all(done)

    def one(counted):
        i, carry = counted
        return i + 1, step(carry, first + i)

    return jax.lax.while_loop(is_open, one, (0, carry))[1]
