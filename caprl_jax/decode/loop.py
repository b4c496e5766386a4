"""The decode loop: it draws captions of images token by token after their prompts.

The loop is a chain of stages, each a loop of its own in the program with its own number of rows and
its own length of caches; scheduling.py says which.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from caprl_jax.decode import caches, scheduling
from caprl_jax.decode.sampling import Sampling, draw, only_known
from caprl_jax.decode.scheduling import Cells, Stage
from caprl_jax.models.decoder import Decoder
from caprl_jax.models.vlm import Params, Policy, Trunk
from caprl_jax.parallel import axes
from caprl_jax.parallel.axes import constrain


@dataclasses.dataclass(frozen=True)
class Decoding:
    """Settings for drawing captions.

    Attributes:
      group: g, captions per image.
      stop: ids that end a caption.
      sampling: length limit, temperature and filters.
      usual: tokens that most captions don't exceed; the others go on in fewer rows, so caches
        are not held for all of them. 0 holds the longest captions' caches for all. The draws
        depend on it.
      baseline: whether the first caption of each image takes the most likely tokens, as a baseline
        for the others (self-critical training, arXiv 1612.00563).
    """

    group: int
    stop: tuple[int, ...]
    sampling: Sampling
    usual: int = 0
    baseline: bool = False


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
      computed: float32 [b, g], tokens that the loop computed, those of empty and ended rows too;
        the sum over its images is spread evenly.
      baseline: bool [b, g], True for a greedy caption that only the others are compared with; None
        where there is none.
    """

    tokens: jax.Array
    mask: jax.Array
    logp: jax.Array
    sample_logp: jax.Array
    length: jax.Array
    truncated: jax.Array
    computed: jax.Array | None = None
    baseline: jax.Array | None = None

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
      decoding: group size, stop tokens, sampling and usual length.
      valid: bool [b], False for rows that only fill up the batch. Their captions are empty, and no
        other caption waits for them. Or int32 [b, g], the most tokens of each caption, all 0 in
        such rows: a caption ends there as if it had met the limit (benchmarks draw given lengths).
      key: a key, or keys [b], one for each image; token i is drawn with fold_in(key, i). With
        decoding.usual, each caption has a key of its own made of it.

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
    prompt = variant.prompt(trunk.kv)
    random = jax.random.key_impl(key)
    loop = _Loop(policy, weights, decoding, variant, random, prompt, trunk.next_position)
    (b, width), group, t = trunk.last.shape, decoding.group, decoding.sampling.max_tokens
    if decoding.usual:
        key = _of_captions(key, b, group)
    most = valid if valid.ndim == 2 else jnp.where(valid, t, 0)[:, None]
    most = jnp.broadcast_to(most, (b, group))
    blocks = scheduling.blocks(b, axes.current())
    stages = scheduling.stages(b // blocks, group, t, decoding.usual)
    zeros = jnp.zeros((b, group, t), jnp.float32)
    first = jnp.broadcast_to(jnp.arange(group) == 0, (b, group)) if decoding.baseline else None
    image = jnp.broadcast_to(jnp.arange(b // blocks, dtype=jnp.int32), (blocks, b // blocks))
    rows = _Rows(
        image=image,
        open=most > 0,
        most=most,
        hidden=jnp.broadcast_to(trunk.last[:, None], (b, group, width)),
        out=Rollout(zeros.astype(jnp.int32), zeros.astype(bool), zeros, zeros, None, None),
        at=jnp.int32(0),
        key=jax.random.key_data(key),
        greedy=first,
        computed=jnp.float32(0),
        cache=variant.empty(prompt, group, scheduling.held(stages)[0].end),
    )
    rows = _draw(loop, rows, stages, whole=loop)
    out, computed = rows.out, rows.computed / (b * group)
    stopped = jnp.isin(out.tokens, jnp.asarray(decoding.stop, jnp.int32)) & out.mask
    return out.replace(
        length=jnp.sum(out.mask, axis=-1),
        truncated=(most > 0) & ~jnp.any(stopped, axis=-1),
        computed=jnp.broadcast_to(computed, (b, group)),
        baseline=first,
    )


@flax.struct.dataclass
class _Rows:
    """State of the rows of a stage: d blocks of `cells` cells each, so c = d * cells in all.

    Attributes:
      image: int32 [d, cells], as in scheduling.Cells.
      open: bool [c, w], True where a caption is being drawn.
      most: int32 [c, w], limit of each caption's tokens.
      hidden: [c, w, e], from which the next tokens are drawn.
      out: Rollout [c, w, t] of the captions in these rows.
      at: int32 [], place of the next token in every open caption.
      key: data of a key, of keys [c], or of keys [c, w] that move with the rows.
      greedy: bool [c, w], captions that take the most likely tokens; None for none.
      computed: float32 [], tokens computed so far, in any rows.
      cache: as the variant keeps it; None once no stage follows.
    """

    image: jax.Array
    open: jax.Array
    most: jax.Array
    hidden: jax.Array
    out: Rollout
    at: jax.Array
    key: jax.Array
    greedy: jax.Array | None
    computed: jax.Array
    cache: Any

    @property
    def by_block(self) -> jax.Array:
        """Returns `open` by block, bool [d, cells, w]."""
        return self.open.reshape(*self.image.shape, -1)

    def moved(
        self, variant: caches.Stacked | caches.PerLayer, cells: Cells, tokens: int
    ) -> "_Rows":
        """Returns the state of a later stage's rows, with caches of so many tokens."""

        def move(a):
            a = scheduling.take(a, cells.row)
            return constrain(a, *axes.BATCH[:2], *[None] * (a.ndim - 2))

        return self.replace(
            image=cells.image,
            open=cells.taken.reshape(-1, cells.taken.shape[-1]),
            most=move(self.most),
            hidden=move(self.hidden),
            key=move(self.key),
            greedy=None if self.greedy is None else move(self.greedy),
            out=jax.tree.map(move, self.out),
            cache=variant.moved(self.cache, cells.row, tokens),
        )

    def after(self, fewer: "_Rows", cells: Cells) -> "_Rows":
        """Returns the state after captions in fewer rows have ended; the others go on from here."""
        return self.replace(
            open=scheduling.put(self.open, cells, jnp.zeros_like(fewer.open)),
            out=jax.tree.map(lambda a, x: scheduling.put(a, cells, x), self.out, fewer.out),
            computed=fewer.computed,
            cache=None,
        )


def _fold_in(keys: jax.Array, number: jax.Array) -> jax.Array:
    """Folds the number into a key, or into each of keys of any shape."""
    if not keys.ndim:
        return jax.random.fold_in(keys, number)
    return jax.vmap(_fold_in, in_axes=(0, None))(keys, number)


def _of_captions(key: jax.Array, images: int, group: int) -> jax.Array:
    """Returns keys of captions, [images, group], made of one key or of keys [images]."""
    keys = jax.random.split(key, images) if key.ndim == 0 else key
    return jax.vmap(lambda key: jax.random.split(key, group))(keys)


@dataclasses.dataclass(frozen=True)
class _Loop:
    """Everything that stays the same in every iteration of a stage."""

    policy: Policy
    weights: Params
    decoding: Decoding
    variant: caches.Stacked | caches.PerLayer
    random: Any
    prompt: Any
    next_position: jax.Array

    def of_cells(self, image: jax.Array) -> "_Loop":
        """Returns the loop of cells int32 [d, cells]: each with its image's prompt."""
        prompt = self.variant.prompt_of_cells(self.prompt, image)
        next_position = scheduling.take(self.next_position, image)
        return dataclasses.replace(self, prompt=prompt, next_position=next_position)

    def draw(self, rows: _Rows) -> tuple[Rollout, jax.Array]:
        """Draws each row's next token: (Rollout [c, w], bool [c, w] that stop)."""
        logits = self.variant.logits(self.weights, rows.hidden)
        logits = constrain(logits, *axes.BATCH[:2], "vocab")
        logits = only_known(logits, self.policy.decoder.config.known)
        sampling, stop = self.decoding.sampling, self.decoding.stop
        key = _fold_in(jax.random.wrap_key_data(rows.key, impl=self.random), rows.at)
        token, logp, drawn = draw(key, logits, sampling, rows.greedy)
        ends = jnp.isin(token, jnp.asarray(stop, jnp.int32))
        return Rollout(token, None, logp, drawn, None, None), ends

    def read(self, token: jax.Array, cache: Any, write: caches.Write) -> tuple[jax.Array, Any]:
        """Runs tokens [c, w] through the decoder."""
        decoder = {"params": self.weights["decoder"]}
        x = self.policy.decoder.apply(decoder, token[..., None], method=Decoder.embed)
        start = jnp.broadcast_to(self.next_position[:, None], token.shape)
        positions = self.policy.positions(start + write.at, 1)
        hidden, cache = self.variant.token(self.weights, x, positions, self.prompt, cache, write)
        return hidden[..., 0, :], cache


def _draw(loop: _Loop, rows: _Rows, stages: tuple[Stage, ...], whole: _Loop) -> _Rows:
    """Draws the rows' captions to their ends; leaves out the cache. `whole` is of all images."""
    stage, *later = stages
    rows = rows.replace(cache=loop.variant.opened(rows.cache, loop.prompt, stage))
    if not later:
        return _iterate(loop, rows, stage, None).replace(cache=None)
    if later[0].rows == stage.rows:
        return _draw(loop, _iterate(loop, rows, stage, None), tuple(later), whole)
    images = len(whole.next_position) // len(rows.image)

    def fits(rows: _Rows) -> jax.Array:
        return scheduling.fits(rows.by_block, rows.image, images, later[0])

    rows = _iterate(loop, rows, stage, fits)

    # Usually all open captions fit now. If the stage ended before they did, the others wait.
    def draw_some(rows: _Rows) -> _Rows:
        cells = scheduling.assign(rows.by_block, rows.image, images, later[0])
        fewer = rows.moved(loop.variant, cells, later[0].end)
        fewer = _draw(whole.of_cells(cells.image), fewer, tuple(later), whole)
        return rows.after(fewer, cells)

    held, rows = rows.cache, rows.replace(cache=None)
    with jax.named_scope(f"{scheduling.USUALLY}1"):
        rows = jax.lax.while_loop(
            lambda rows: jnp.any(rows.open), lambda rows: draw_some(rows.replace(cache=held)), rows
        )
    return rows


def _iterate(
    loop: _Loop, rows: _Rows, stage: Stage, fits: Callable[[_Rows], jax.Array] | None
) -> _Rows:
    """Draws tokens up to the stage's end, or until the open captions fit into the next one."""

    def goes_on(counted: tuple) -> jax.Array:
        # The count starts at 0, so that the program states the largest number of iterations.
        i, rows = counted
        more = (i < stage.end) & (rows.at < stage.end) & jnp.any(rows.open)
        return more if fits is None else more & ~fits(rows)

    def one(counted: tuple) -> tuple:
        i, rows = counted
        at, open_ = rows.at, rows.open
        new, ends = loop.draw(rows)
        new = new.replace(mask=open_)
        out = jax.tree.map(
            lambda a, x: a.at[:, :, at].set(jnp.where(open_, x, a[:, :, at])), rows.out, new
        )
        hidden, cache = loop.read(new.tokens, rows.cache, caches.Write(at, stage))
        return i + 1, rows.replace(
            open=open_ & ~ends & (at + 1 < rows.most),
            hidden=hidden,
            out=out,
            at=at + 1,
            computed=rows.computed + open_.size,
            cache=cache,
        )

    with jax.named_scope(f"{scheduling.USUALLY}{stage.end - stage.first}"):
        return jax.lax.while_loop(goes_on, one, (0, rows))[1]
