"""One token of every caption through the decoder, in the two ways that layers can lie.

Stacked, the layers are one loop in the program, and a layer's weights and caches are cut out of
arrays that hold all layers. A TPU reads what is cut out where it lies; on a CPU XLA copies it
first, and on a GPU it may, where products come from libraries that take whole arrays. Apart, each
layer has arrays of its own and the layers follow one another in the program, which takes longer to
compile. Which it is, the weights say; `weights` takes what suits the devices.
"""

import dataclasses
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from caprl_jax.models.attention import KV
from caprl_jax.models.decoder import Block, Decoder
from caprl_jax.models.layers import KNOWN
from caprl_jax.models.vlm import Params, Policy
from caprl_jax.parallel import axes as logical
from caprl_jax.parallel import mesh
from caprl_jax.parallel.axes import Layout, constrain


def weights(
    policy: Policy, params: Params, layout: Layout | None, apart: bool | None = None
) -> Params:
    """The decoder's weights as decoding reads them, cast and moved once, before its loop.

    Args:
      policy: modules.
      params: the policy's, in any dtype.
      layout: where to; None leaves them.
      apart: whether each layer's lie by themselves; None is yes except on TPUs.

    Returns:
      {"decoder": ..}: matrices in the compute dtype, norms as they were, under layout.decoding. Of
      layers apart "layers" is a tuple, and on a CPU their kernels are [outputs, inputs]: a second
      copy of the layers, also where params have the compute dtype already.
    """
    decoder = jax.tree_util.tree_map_with_path(
        lambda path, a: a if path[-1].key == "scale" else a.astype(policy.decoder.dtype),
        params["decoder"],
    )
    if layout is not None:
        boxed = jax.eval_shape(policy.init, jax.random.key(0))["decoder"]
        shardings = mesh.param_shardings(boxed, layout.decoding)
        decoder = jax.lax.with_sharding_constraint(decoder, shardings)
    platform = _platform(layout)
    if apart or (apart is None and platform != "tpu"):
        layers = _taken_apart(decoder["layers"], policy.decoder.config.layers)
        if platform == "cpu":
            layers = jax.tree_util.tree_map_with_path(_flipped, layers)
        decoder = decoder | {"layers": layers}
    # Without the barrier the compiler may put the cast, or the gathering, into the loop.
    return {"decoder": jax.lax.optimization_barrier(decoder)}


def _platform(layout: Layout | None) -> str:
    return layout.mesh.devices.flat[0].platform if layout is not None else jax.default_backend()


def _taken_apart(stacked: Any, layers: int) -> tuple[Any, ...]:
    return tuple(jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(layers))


def _flipped(path: tuple, a: jax.Array) -> jax.Array:
    """A kernel as Linear's `flipped` wants it: [*inputs, *outputs] -> [outputs, inputs]."""
    if path[-1].key != "kernel":
        return a
    inputs = math.prod(a.shape[: 2 if path[-2].key == "o" else 1])
    return a.reshape(inputs, -1).T


def way(policy: Policy, params: Params, tells: bool = False) -> "Stacked | Apart":
    """How weights lie that `weights` has made; whether each token tells what it has computed."""
    apart = isinstance(params["decoder"]["layers"], tuple)
    return (Apart if apart else Stacked)(policy.decoder, tells)


@dataclasses.dataclass(frozen=True)
class Stacked:
    """Layers as one loop; caches [layers, b, g, t, kv_heads, head_dim].

    Attributes:
      decoder: the policy's.
      tells: whether `token` gives out what each layer has computed.
    """

    decoder: Decoder
    tells: bool = False

    def prompt(self, kv: KV) -> KV:
        """What is read of the prompts for every token."""
        return kv.replace(k=_cached(kv.k, 1), v=_cached(kv.v, 1))

    def empty(self, prompt: KV, group: int, tokens: int) -> KV:
        """Caches of captions that have not begun."""
        layers, b, _, kv_heads, head_dim = prompt.k.shape
        zeros = jnp.zeros((layers, b, group, tokens, kv_heads, head_dim), prompt.k.dtype)
        return KV(_cached(zeros, 2), _cached(zeros, 2), jnp.zeros((b, group, tokens), bool))

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """[b, g, e] -> float32 [b, g, vocab]."""
        return self.decoder.apply({"params": params["decoder"]}, hidden, method=Decoder.logits)

    def opened(self, cache: KV, prompt: KV, group: int, stage: tuple[int, int]) -> KV:
        """The cache with room for the tokens of a stage, which it has from the start."""
        return cache

    def joined(self, cache: KV) -> KV:
        """The stages as one from 0 on, as they lie from the start."""
        return cache

    def token(
        self,
        params: Params,
        x: jax.Array,
        positions: jax.Array,
        prompt: KV,
        cache: KV,
        i: jax.Array,
        stage: tuple[int, int],
        fresh: jax.Array | None = None,
    ) -> tuple[jax.Array, KV, Any]:
        """The next token of every caption.

        Args:
          params: {"decoder": ..}, as `weights` gives them.
          x: [b, g, 1, e] embeddings.
          positions: int [b, g, 1] or [b, g, 1, 3].
          prompt: as `prompt` gives it.
          cache: of the captions up to here.
          i: int [], where in the caches these tokens are put: after those of their captions, or
            from the start again once a cache is full (of captions that share slots).
          stage: (first, end) of the tokens that i is one of; no cache is read beyond.
          fresh: bool [b, g], where a caption begins and what its cache holds is another's; None is
            nowhere.

        Returns:
          (hidden [b, g, 1, e], cache with these tokens, what is told, [layers, b, g, 1, ..] each).
        """
        before = _own(cache.mask, fresh)
        seen = cache.replace(mask=before[..., : stage[1]])
        (hidden, new), told = self.decoder.apply(
            {"params": params["decoder"]}, x, positions, jnp.ones(x.shape[:-1], bool), (prompt,),
            caches=(seen,), mutable=[KNOWN] if self.tells else [],
        )  # fmt: skip
        cache = KV(
            _cached(jax.lax.dynamic_update_slice_in_dim(cache.k, new.k, i, axis=3), 2),
            _cached(jax.lax.dynamic_update_slice_in_dim(cache.v, new.v, i, axis=3), 2),
            before.at[:, :, i].set(True),
        )
        return hidden, cache, told.get(KNOWN)


LayerKV = tuple[tuple[jax.Array, jax.Array], ...]  # (k, v) of each layer


@flax.struct.dataclass
class LayerCaches:
    """Keys and values of every layer by themselves, heads before tokens as attention reads them.

    A cache grows by an array a stage: what is read of it is always whole, for what is cut out of
    the middle of an array would be copied.

    Attributes:
      kv: of each stage, the (k, v) of each layer, [*batch, kv_heads, length, head_dim].
      masks: of each stage, bool [*batch, length].
    """

    kv: tuple[LayerKV, ...]
    masks: tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Apart:
    """Layers one after the other, each with caches of its own; all else as Stacked's."""

    decoder: Decoder
    tells: bool = False

    def prompt(self, kv: KV) -> LayerCaches:
        """What is read of the prompts for every token."""

        def layer(a, i):
            return constrain(jnp.swapaxes(a[i], 1, 2), "caches", "kv_heads", None, None)

        layers = range(self.decoder.config.layers)
        kvs = tuple((layer(kv.k, i), layer(kv.v, i)) for i in layers)
        return LayerCaches((jax.lax.optimization_barrier(kvs),), (kv.mask,))

    def empty(self, prompt: LayerCaches, group: int, tokens: int) -> LayerCaches:
        """Caches of captions that have not begun: no stage yet."""
        return LayerCaches((), ())

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """[b, g, e] -> float32 [b, g, vocab]."""
        layers, rest = _layers(params)
        return self.decoder.apply(rest, hidden, _flipped_kernels(layers), method=Decoder.logits)

    def opened(
        self, cache: LayerCaches, prompt: LayerCaches, group: int, stage: tuple[int, int]
    ) -> LayerCaches:
        """The cache with room for the tokens of a stage."""
        k, _ = prompt.kv[0][0]
        b, kv_heads, _, head_dim = k.shape
        length = stage[1] - stage[0]
        zeros = jnp.zeros((b, group, kv_heads, length, head_dim), k.dtype)
        zeros = constrain(zeros, *logical.CACHED[:2], "kv_heads", None, None)
        layers, mask = ((zeros, zeros),) * len(prompt.kv[0]), jnp.zeros((b, group, length), bool)
        return LayerCaches((*cache.kv, layers), (*cache.masks, mask))

    def joined(self, cache: LayerCaches) -> LayerCaches:
        """The stages as one from 0 on."""

        def one(*parts):
            whole = jnp.concatenate(parts, axis=3)
            return constrain(whole, *logical.CACHED[:2], "kv_heads", None, None)

        layers = jax.tree.map(one, *cache.kv)
        return LayerCaches((layers,), (jnp.concatenate(cache.masks, axis=2),))

    def token(
        self,
        params: Params,
        x: jax.Array,
        positions: jax.Array,
        prompt: LayerCaches,
        cache: LayerCaches,
        i: jax.Array,
        stage: tuple[int, int],
        fresh: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCaches, Any]:
        """The next token of every caption, which is written before it is read."""
        (layers, rest), at = _layers(params), i - stage[0]
        block = Block(self.decoder.config, flipped=_flipped_kernels(layers))
        one = jnp.ones(x.shape[:-1], bool)
        turns = self.decoder.apply(rest, positions, one, method=Decoder.turns)
        # The barrier keeps the compiler from taking cosines and sines again in every layer.
        turns = jax.lax.optimization_barrier(turns)
        *full, mask = (_own(mask, fresh) for mask in cache.masks)
        mask, written, told = mask.at[:, :, at].set(True), [], []
        seen = (*prompt.masks, *full)
        for n, layer in enumerate(layers):
            past = tuple(
                tuple(jnp.swapaxes(a, -3, -2) for a in kv[n]) for kv in (*prompt.kv, *cache.kv[:-1])
            )
            (x, new), more = block.apply(
                {"params": layer}, x, turns, mask[..., None, :], deep=None, caches=(),
                past_masks=seen, past=past, layer=n, own=(*cache.kv[-1][n], at),
                mutable=[KNOWN] if self.tells else [],
            )  # fmt: skip
            written.append(new)
            told.append(more.get(KNOWN))
        hidden = self.decoder.apply(rest, x, method=Decoder.normed)
        cache = LayerCaches((*cache.kv[:-1], tuple(written)), (*full, mask))
        return hidden, cache, {"layers": _stacked(told)} if self.tells else None


def _own(mask: jax.Array, fresh: jax.Array | None) -> jax.Array:
    """Which of a cache's tokens, bool [b, g, length], are those of the caption that goes on."""
    return mask if fresh is None else mask & ~fresh[..., None]


def _stacked(layers: list[Any]) -> Any:
    """One tree of arrays [layers, ..] of the layers' trees."""
    return jax.tree.map(lambda *a: jnp.stack(a), *layers)


def _layers(params: Params) -> tuple[tuple, dict]:
    """(each layer's parameters, variables of what is beside the layers)."""
    rest = {k: a for k, a in params["decoder"].items() if k != "layers"}
    return params["decoder"]["layers"], {"params": rest}


def _flipped_kernels(layers: tuple) -> bool:
    return layers[0]["q"]["kernel"].ndim == 2


def _cached(a: jax.Array, batch: int) -> jax.Array:
    """[layers, *batch, length, kv_heads, head_dim] of that many batch axes, where caches lie."""
    return constrain(a, None, *logical.CACHED[:batch], None, "kv_heads", None)
