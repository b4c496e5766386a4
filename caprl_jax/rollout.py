"""Sampling captions: one prefill per image, then a group decodes against that one prompt."""

import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from caprl_jax import decoding
from caprl_jax import known as known_lib
from caprl_jax.known import Known
from caprl_jax.models import logical
from caprl_jax.models.attention import KV
from caprl_jax.models.decoder import Decoder
from caprl_jax.models.logical import Layout, constrain
from caprl_jax.models.policy import Params, Policy, Prompt, Trunk
from caprl_jax.models.vision import Images
from caprl_jax.sampling import Sampling, draw

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
) -> Rollout:
    """Draws `group` captions per image.

    The image and its prompt are read once; the captions' own keys and values are one more segment
    of the tree. Stops when every caption has met a stop token.

    Args:
      policy: modules.
      params: its parameters.
      images: Images [b, ..].
      prompt: Prompt [b, p].
      key: for the draws; token i uses fold_in(key, i).
      group: g, captions per image.
      stop: ids that end a caption.
      sampling: lengths and temperature.
      pieces: in which images and prompts are read; a divisor of b.
      layout: where weights, caches and captions lie; None leaves that to the compiler.
      valid: bool [b], False for rows that only fill up a batch: nobody waits for their captions,
        which are empty. None is all True.

    Returns:
      Rollout [b, g, t].
    """
    if valid is None:
        valid = jnp.ones(prompt.tokens.shape[0], bool)
    with logical.using(layout), jax.named_scope("prefill"):
        trunk = prefill(policy, params, images, prompt, pieces)
    return sample_after(policy, params, trunk, key, group, stop, sampling, layout, valid)[0]


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
) -> tuple[Rollout, Known | None]:
    """As sample, of images and prompts that have been read; Known to keep, else None."""
    with logical.using(layout and layout.decoding), jax.named_scope("decode"):
        weights = decoding.weights(policy, params, layout)
        known = None
        if keep:
            known = known_lib.empty(policy, params, trunk, group, sampling.max_tokens)
        out, known = decode(policy, weights, trunk, key, group, stop, sampling, valid, known)
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
) -> tuple[Rollout, Known | None]:
    """Draws captions after a trunk, and fills what is to be known of them.

    Params are as decoding.weights gives them, the rest as sample's.
    """
    b, t, c = trunk.last.shape[0], sampling.max_tokens, policy.decoder.config
    variables = {"params": params["decoder"]}
    start = jnp.broadcast_to(trunk.next_position[:, None], (b, group))
    stop_ids = jnp.asarray(stop, jnp.int32)
    way = decoding.way(policy, params, tells=known is not None)
    prompt = way.prompt(trunk.kv)

    def step(carry, i, stage):
        done, hidden, out, cache, known = carry
        logits = constrain(way.logits(params, hidden), *logical.BATCH[:2], "vocab")
        token, logp, drawn = draw(jax.random.fold_in(key, i), logits, sampling)
        new = Rollout(token, ~done, logp, drawn, None, None)
        out = jax.tree.map(lambda a, x: a.at[:, :, i].set(jnp.where(done, a[:, :, i], x)), out, new)
        done = done | jnp.isin(token, stop_ids)
        x = policy.decoder.apply(variables, token[..., None], method=Decoder.embed)
        positions = policy.positions(start + i, 1)
        hidden, cache, told = way.token(params, x, positions, prompt, cache, i, stage)
        known = known_lib.filled(known, told, logits, i)
        return done, hidden[..., 0, :], out, cache, known

    zeros = jnp.zeros((b, group, t), jnp.float32)
    out = Rollout(zeros.astype(jnp.int32), zeros.astype(bool), zeros, zeros, None, None)
    hidden = jnp.broadcast_to(trunk.last[:, None], (b, group, c.width))
    done, cache = jnp.broadcast_to(~valid[:, None], (b, group)), way.empty(prompt, group, t)
    for stage in stages(t):
        carry = done, hidden, out, way.opened(cache, prompt, group, stage), known
        done, hidden, out, cache, known = _while_any_is_open(
            functools.partial(step, stage=stage), carry, *stage
        )
    return out.replace(length=jnp.sum(out.mask, axis=-1), truncated=~done), known


def stages(tokens: int) -> list[tuple[int, int]]:
    """Runs of (first, end) tokens; in each, only the cache up to its end is read.

    Each is a loop of its own in the program, so there are few, and none for a short bucket.
    """
    count = min(4, max(tokens // STAGE, 1))
    ends = [tokens * (i + 1) // count for i in range(count)]
    return list(zip([0, *ends], ends, strict=False))


def wasted(length: jax.Array, valid: jax.Array, pieces: int) -> tuple[jax.Array, jax.Array]:
    """How many slots, a caption's place in one turn of the loop, waited for longer captions.

    Args:
      length: int32 [b, g], tokens of each caption.
      valid: bool [b].
      pieces: in which the b images were captioned; each ends with its own longest caption.

    Returns:
      int32 [] each: (slots that waited, slots in all).
    """
    used, real = (logical.split(a, pieces) for a in (jnp.where(valid[:, None], length, 0), valid))
    slots = jnp.max(used, axis=(1, 2)) * jnp.sum(real, axis=1) * length.shape[1]
    return jnp.sum(slots) - jnp.sum(used), jnp.sum(slots)


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
