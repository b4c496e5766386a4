"""Weights and key-value caches of the decode loop, in two variants.

Stacked: the layers are one loop in the program, and a layer's weights and caches are cut out of
arrays that hold all layers. A TPU reads such a part in place. A CPU copies it first, and a GPU may
do so too, because its products come from libraries that take whole arrays.

PerLayer: each layer has arrays of its own, and the layers follow one another in the program, which
takes longer to compile. `weights` prepares the variant that suits the devices; the structure of
the weights decides which variant runs.
"""

import dataclasses
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from caprl_jax.decode import scheduling
from caprl_jax.decode.scheduling import Stage
from caprl_jax.models.attention import KV
from caprl_jax.models.block import Block, Context
from caprl_jax.models.decoder import Decoder
from caprl_jax.models.vlm import Params, Policy
from caprl_jax.parallel import axes, mesh
from caprl_jax.parallel.axes import constrain


def weights(policy: Policy, params: Params, per_layer: bool | None = None) -> Params:
    """Casts and reshards the decoder's weights once, before the decode loop.

    Traced under the shard rules of decoding (axes.decoding), which say where the weights go. LoRA's
    updates stay apart: in bfloat16 a sum with the weights would round away most of an update that
    is small beside them, and captions would be drawn from another policy than the one that learns.

    Args:
      policy: modules.
      params: the policy's parameters, in any dtype.
      per_layer: whether each layer gets arrays of its own; None is yes except on TPUs.

    Returns:
      {"decoder": ..}: matrices in the compute dtype, norms unchanged. With arrays per layer,
      "layers" is a tuple, and on a CPU its kernels are [outputs, inputs]: a second copy of the
      layers, even where params have the compute dtype already.
    """
    decoder = jax.tree_util.tree_map_with_path(
        lambda path, a: a if path[-1].key == "scale" else a.astype(policy.decoder.dtype),
        params["decoder"],
    )
    if (rules := axes.current()) is not None:
        boxed = jax.eval_shape(policy.init, jax.random.key(0))["decoder"]
        decoder = jax.lax.with_sharding_constraint(decoder, mesh.param_shardings(boxed, rules))
    platform = axes.platform()
    if per_layer or (per_layer is None and platform != "tpu"):
        layers = _unstacked(decoder["layers"], policy.decoder.config.layers)
        if platform == "cpu":
            layers = jax.tree_util.tree_map_with_path(_transposed, layers)
        decoder = decoder | {"layers": layers}
    # Without the barrier the compiler may move the cast, or the gathering, into the loop.
    return {"decoder": jax.lax.optimization_barrier(decoder)}


def _unstacked(stacked: Any, layers: int) -> tuple[Any, ...]:
    return tuple(jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(layers))


def _transposed(path: tuple, a: jax.Array) -> jax.Array:
    """Transposes a kernel for Linear's `transposed`: [*inputs, *outputs] -> [outputs, inputs]."""
    if path[-1].key != "kernel":
        return a
    inputs = math.prod(a.shape[: 2 if path[-2].key == "o" else 1])
    return a.reshape(inputs, -1).T


def variant(policy: Policy, weights: Params) -> "Stacked | PerLayer":
    """Returns the decoder variant (stacked or per layer) that matches these weights."""
    per_layer = isinstance(weights["decoder"]["layers"], tuple)
    return (PerLayer if per_layer else Stacked)(policy.decoder)


@flax.struct.dataclass
class Write:
    """The place where one iteration writes its tokens, and the length of the caches that it reads.

    Attributes:
      at: int32 [], the tokens' place in their captions, and in the caches.
      stage: the current stage; no cache is read beyond its end.
    """

    at: jax.Array
    stage: Stage = flax.struct.field(pytree_node=False)


@dataclasses.dataclass(frozen=True)
class Stacked:
    """Decoder with one loop over layers; caches are KV [layers, c, w, t, kv_heads, head_dim].

    Attributes:
      decoder: the policy's decoder.
    """

    decoder: Decoder

    def prompt(self, kv: KV) -> KV:
        """Returns the prompts' keys and values in the form that every iteration reads."""
        return kv.replace(k=_cached(kv.k, 1), v=_cached(kv.v, 1))

    def prompt_of_cells(self, prompt: KV, image: jax.Array) -> KV:
        """Returns the prompt of each cell's image, int32 [d, cells] as in scheduling.Cells."""
        return _taken(prompt, image, 0)

    def empty(self, prompt: KV, width: int, tokens: int) -> KV:
        """Returns caches of captions that have not begun."""
        layers, b, _, kv_heads, head_dim = prompt.k.shape
        zeros = jnp.zeros((layers, b, width, tokens, kv_heads, head_dim), prompt.k.dtype)
        return KV(_cached(zeros, 2), _cached(zeros, 2), jnp.zeros((b, width, tokens), bool))

    def moved(self, cache: KV, row: jax.Array, tokens: int) -> KV:
        """Returns caches of `tokens` tokens for the rows taken, int32 [d, cells, width]."""
        return _taken(cache, row, tokens - cache.mask.shape[-1])

    def logits(self, weights: Params, hidden: jax.Array) -> jax.Array:
        """Returns logits: [c, w, e] -> float32 [c, w, vocab]."""
        return self.decoder.apply({"params": weights["decoder"]}, hidden, method=Decoder.logits)

    def opened(self, cache: KV, prompt: KV, stage: Stage) -> KV:
        """Returns the cache with room up to the stage's end; fewer rows may have less yet."""
        more = stage.end - cache.mask.shape[-1]
        if more <= 0:
            return cache
        wider = [(0, 0)] * 3 + [(0, more), (0, 0), (0, 0)]
        k, v = (_cached(jnp.pad(a, wider), 2) for a in (cache.k, cache.v))
        return KV(k, v, jnp.pad(cache.mask, [(0, 0), (0, 0), (0, more)]))

    def token(
        self,
        weights: Params,
        x: jax.Array,
        positions: jax.Array,
        prompt: KV,
        cache: KV,
        write: Write,
    ) -> tuple[jax.Array, KV]:
        """Runs the next token of every caption through the decoder.

        Args:
          weights: {"decoder": ..}, as `weights` prepares them.
          x: [c, w, 1, e] embeddings.
          positions: int [c, w, 1] or [c, w, 1, 3].
          prompt: as `prompt` returns it.
          cache: the captions' keys and values so far.
          write: the place of these tokens.

        Returns:
          (hidden states [c, w, 1, e], cache with these tokens).
        """
        seen = cache.replace(mask=cache.mask[..., : write.stage.end])
        hidden, new = self.decoder.apply(
            {"params": weights["decoder"]},
            x,
            positions,
            jnp.ones(x.shape[:-1], bool),
            (prompt,),
            caches=(seen,),
        )
        put = jax.lax.dynamic_update_slice_in_dim
        k, v = (
            put(old, own, write.at, axis=3) for old, own in ((cache.k, new.k), (cache.v, new.v))
        )
        mask = cache.mask.at[:, :, write.at].set(True)
        return hidden, KV(_cached(k, 2), _cached(v, 2), mask)


LayerKV = tuple[tuple[jax.Array, jax.Array], ...]  # (k, v) of each layer


@flax.struct.dataclass
class LayerCaches:
    """Keys and values of each layer in separate arrays, heads before tokens.

    A cache grows by one array per stage: each array is always read whole, because a part cut out of
    the middle of an array would be copied.

    Attributes:
      kv: for each stage, the (k, v) of each layer, [*batch, kv_heads, length, head_dim].
      masks: for each stage, bool [*batch, length].
    """

    kv: tuple[LayerKV, ...]
    masks: tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class PerLayer:
    """Decoder with separate arrays for each layer; it has the methods of Stacked."""

    decoder: Decoder

    def prompt(self, kv: KV) -> LayerCaches:
        """Returns the prompts' keys and values in the form that every iteration reads."""

        def layer(a, i):
            return constrain(jnp.swapaxes(a[i], 1, 2), "caches", "kv_heads", None, None)

        layers = range(self.decoder.config.layers)
        kvs = tuple((layer(kv.k, i), layer(kv.v, i)) for i in layers)
        return LayerCaches((jax.lax.optimization_barrier(kvs),), (kv.mask,))

    def prompt_of_cells(self, prompt: LayerCaches, image: jax.Array) -> LayerCaches:
        """Returns the prompt of each cell's image, int32 [d, cells] as in scheduling.Cells."""

        def move(a):
            return constrain(scheduling.take(a, image), "caches", "kv_heads", None, None)

        return LayerCaches(
            jax.tree.map(move, prompt.kv),
            tuple(scheduling.take(mask, image) for mask in prompt.masks),
        )

    def empty(self, prompt: LayerCaches, width: int, tokens: int) -> LayerCaches:
        """Returns caches of captions that have not begun: they have no stage yet."""
        return LayerCaches((), ())

    def logits(self, weights: Params, hidden: jax.Array) -> jax.Array:
        """Returns logits: [c, w, e] -> float32 [c, w, vocab]."""
        layers, rest = _layers(weights)
        return self.decoder.apply(rest, hidden, _are_transposed(layers), method=Decoder.logits)

    def opened(self, cache: LayerCaches, prompt: LayerCaches, stage: Stage) -> LayerCaches:
        """Returns the cache with room for a stage's tokens."""
        length = stage.end - sum(mask.shape[-1] for mask in cache.masks)
        if not length:
            return cache
        k, _ = prompt.kv[0][0]
        c, kv_heads, _, head_dim = k.shape
        zeros = jnp.zeros((c, stage.width, kv_heads, length, head_dim), k.dtype)
        zeros = constrain(zeros, *axes.CACHED[:2], "kv_heads", None, None)
        layers, mask = (
            ((zeros, zeros),) * len(prompt.kv[0]),
            jnp.zeros((c, stage.width, length), bool),
        )
        return LayerCaches((*cache.kv, layers), (*cache.masks, mask))

    def moved(self, cache: LayerCaches, row: jax.Array, tokens: int) -> LayerCaches:
        """Returns caches of `tokens` tokens for the rows taken, in one array for each layer."""

        def move(axis, *parts):
            length = sum(a.shape[axis] for a in parts)
            parts = [scheduling.take(a, row) for a in parts]
            shape = list(parts[0].shape)
            shape[axis] = tokens - length
            return jnp.concatenate([*parts, jnp.zeros(shape, parts[0].dtype)], axis)

        def pinned(*parts):
            return constrain(move(3, *parts), *axes.CACHED[:2], "kv_heads", None, None)

        return LayerCaches((jax.tree.map(pinned, *cache.kv),), (move(2, *cache.masks),))

    def token(
        self,
        weights: Params,
        x: jax.Array,
        positions: jax.Array,
        prompt: LayerCaches,
        cache: LayerCaches,
        write: Write,
    ) -> tuple[jax.Array, LayerCaches]:
        """Runs the next token of every caption through the decoder; it is written, then read."""
        layers, rest = _layers(weights)
        # The last array of each layer holds the stage's own tokens; others hold earlier ones.
        at = write.at - sum(mask.shape[-1] for mask in cache.masks[:-1])
        block = Block(self.decoder.config, _are_transposed(layers), self.decoder.lora)
        ones = jnp.ones(x.shape[:-1], bool)
        rotation = self.decoder.apply(rest, positions, ones, method=Decoder.rotation)
        # The barrier keeps the compiler from computing cosines and sines again in every layer.
        rotation = jax.lax.optimization_barrier(rotation)
        *full, mask = cache.masks
        mask, written = mask.at[:, :, at].set(True), []
        context = Context(rotation, mask, (*prompt.masks, *full))
        for n, params in enumerate(layers):
            past = tuple(kv[n] for kv in (*prompt.kv, *cache.kv[:-1]))
            x, new = block.apply(
                {"params": params}, x, context, past, cache.kv[-1][n], at, method=Block.decode
            )
            written.append(new)
        hidden = self.decoder.apply(rest, x, method=Decoder.apply_norm)
        return hidden, LayerCaches((*cache.kv[:-1], tuple(written)), (*full, mask))


def _layers(weights: Params) -> tuple[tuple, dict]:
    """Returns (parameters of each layer, variables of everything beside the layers)."""
    rest = {k: a for k, a in weights["decoder"].items() if k != "layers"}
    return weights["decoder"]["layers"], {"params": rest}


def _are_transposed(layers: tuple) -> bool:
    return layers[0]["q"]["kernel"].ndim == 2


def _cached(a: jax.Array, batch: int) -> jax.Array:
    """Pins [layers, *batch, length, kv_heads, head_dim] with `batch` batch axes as a cache."""
    return constrain(a, None, *axes.CACHED[:batch], None, "kv_heads", None)


def _taken(kv: KV, index: jax.Array, room: int) -> KV:
    """Takes cells [d, cells] or rows [d, cells, width] of all layers, with room for more tokens."""
    axes = index.ndim - 1

    def move(a, axis):
        pad = [(0, 0)] * a.ndim
        pad[axis] = (0, room)
        return jnp.pad(a, pad)

    k, v = (jax.vmap(scheduling.take, in_axes=(0, None))(a, index) for a in (kv.k, kv.v))
    mask = scheduling.take(kv.mask, index)
    return KV(*(_cached(move(a, axes + 1), axes) for a in (k, v)), move(mask, axes))
