"""Memory of a config's step on each device, reckoned from shapes alone: nothing is compiled.

A device holds some arrays throughout a step (parameters, optimizer state, judge, reference, batch).
Each phase holds others beside them, and the largest phase decides. The bytes of arrays that
the program names (parameters, caches, gradients, kept activations) follow from their shapes and
shard rules. What the compiler holds between operations is a multiple of the largest arrays there;
those multiples are the constants below. They are set so that whole steps come out between 0 and 25%
over what compilers said of ten steps (compiled, GiB a device: configs/3b.py v5e:4x4 11.9, v6e:4x4
14.8, v5p:2x2x2 19.1, v5p:2x2x4 10.3, v5p:4x4x4 11.9, one H200 94.0, eight 23.0; configs/7b.py
v5p:2x2x4 24.3, v5e:8x8 12.7; configs/qwen3vl_4b.py v5e:4x4 13.6).
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import NamedSharding

from caprl_jax.config import learned_images, slices_of
from caprl_jax.decode import scheduling
from caprl_jax.models import logprobs
from caprl_jax.models import trained as trained_lib
from caprl_jax.models.attention import SCORE_BYTES
from caprl_jax.models.decoder import Decoder
from caprl_jax.parallel import mesh
from caprl_jax.parallel.axes import CACHED, ShardRules
from caprl_jax.rl import packing
from caprl_jax.run import choices
from caprl_jax.run import compile as compile_lib
from caprl_jax.run.models import Models, models

GIB = 2**30
# Reckoned, and fitted to the compiled steps above: copies of an array that exist at one time.
SCORES = 4  # attention's scores in the backward pass: scores, weights and the gradients of both
READ_SCORES = 2  # the same in a forward pass
VERIFIER_QUESTION = 32  # tokens of the verifier's question, which only its tokenizer knows
LOGITS = 3  # float32 logits of a chunk of the vocabulary, their exponentials and gradients
WIDE = 6  # copies of the perceptron's hidden values, in the compute dtype
NARROW = 4  # copies of the residual stream, in float32
ROWS = 4  # head, its rows in chunks, and the gradients of head and embedding
GATHERED = 2  # layers whose weights are gathered: the current one and the next
GPU = 1.1  # factor on all these for GPUs, where fewer operations are fused
# Compiled for a v5e: the bytes for each layer and token, taken from the difference between 8 and 4
# layers of a small decoder, are 5% above the sum for "products", and 2% below the sum for "none".
KEPT = 1.05


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device.

    Attributes:
      held: bytes throughout the step, by the arrays' purpose.
      phases: bytes that each phase holds beside them, by the arrays' purpose.
    """

    held: dict[str, int]
    phases: dict[str, dict[str, int]]

    @property
    def largest(self) -> str:
        """Returns the phase that holds the most bytes."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def total(self) -> int:
        """Returns the bytes held throughout and by the largest phase."""
        return sum(self.held.values()) + sum(self.phases[self.largest].values())

    def tell(self) -> str:
        """Describes the parts of the total in words, in GiB."""
        phase = self.phases[self.largest]
        held = ", ".join(f"{name} {size / GIB:.1f}" for name, size in self.held.items() if size)
        inside = ", ".join(f"{name} {size / GIB:.1f}" for name, size in phase.items() if size)
        return f"{held}; {self.largest} {sum(phase.values()) / GIB:.1f} ({inside})"


def reckon(config: ml_collections.ConfigDict, devices: Sequence[Any]) -> Memory:
    """Reckons the memory that a settled config's step takes on each of the devices.

    Args:
      config: the run's config, with objective caprl.
      devices: JAX's, or stand-ins (hardware.described); only their platform and number are used.

    Raises:
      UserError: the config's sizes are unknown, or don't lie evenly on the devices.
    """
    known = models(config, devices[0].platform)
    return Reckoner(config, known, compile_lib.abstract_rules(config, len(devices))).memory()


def caches(config: ml_collections.ConfigDict, decoder: Decoder, rules: ShardRules) -> int:
    """Returns bytes on each device of the prompts' and captions' keys and values in decoding.

    Args:
      config: the run's config.
      decoder: the policy's.
      rules: mesh and shard rules.
    """
    return _caches(config, decoder, rules, slices_of(config, "rollout_batches"))


def _caches(config: Any, decoder: Decoder, rules: ShardRules, count: int) -> int:
    c, on, b = decoder.config, rules.decoding, config.data.batch // count
    blocks = scheduling.blocks(b, on)

    def one(batch: tuple[int, ...], length: int) -> int:
        shape = (c.layers, *batch, length, c.kv_heads, c.head_dim)
        names = (None, *CACHED[: len(batch)], None, "kv_heads", None)
        sharding = NamedSharding(on.mesh, on.spec(names, shape))
        return 2 * math.prod(sharding.shard_shape(shape)) * jnp.dtype(decoder.dtype).itemsize

    return sum(
        one((blocks * stage.cells,), config.data.max_prompt)
        + one((blocks * stage.cells, stage.width), stage.end)
        for stage in scheduling.held(_stages(config, b // blocks))
    )


def _stages(config: Any, images: int) -> tuple[scheduling.Stage, ...]:
    """Returns the decode loop's stages for blocks of so many images."""
    caprl, tokens = config.caprl, config.sampling.max_tokens
    return scheduling.stages(images, caprl.group, tokens, caprl.usual_tokens)


def _on_one(boxed: Any, rules: ShardRules, itemsize: int | None = None) -> int:
    """Returns bytes on each device of a boxed tree of shapes; itemsize None: each array's own."""
    shardings = mesh.param_shardings(boxed, rules)
    return sum(
        math.prod(s.shard_shape(a.shape)) * (itemsize or a.dtype.itemsize)
        for a, s in zip(
            jax.tree.leaves(nn.meta.unbox(boxed)), jax.tree.leaves(shardings), strict=True
        )
    )


@dataclasses.dataclass(frozen=True)
class Reckoner:
    """Reckoner of a step's memory, for any number of slices and kind of rematerialisation.

    Attributes:
      config: the run's config; only `memory` reads its numbers of slices and policy.remat.
      models: shapes.
      rules: on a mesh that may be abstract.
    """

    config: ml_collections.ConfigDict
    models: Models
    rules: ShardRules

    def memory(self) -> Memory:
        """Returns the memory of the config's step."""
        count = functools.partial(slices_of, self.config)
        rollout = count("rollout_batches")
        return Memory(
            self.held,
            {
                "prefill": self.prefill(rollout, count("prefill_batches")),
                "casting": self.casting(rollout),
                "decode": self.decode(rollout),
                "score": self.score(count("score_batches")),
                "update": self.update(self.config.policy.remat, count("micro_batches")),
            },
        )

    @property
    def itemsize(self) -> int:
        """Returns the bytes of a value in the dtype of computation."""
        return jnp.dtype(self.models.policy.decoder.dtype).itemsize

    def images(self, count: int) -> int:
        """Returns a slice's images on each device, of `count` slices, in training and scoring."""
        return -(-self.config.data.batch // (count * self.rules.size("images")))

    @functools.cached_property
    def held(self) -> dict[str, int]:
        """Returns the bytes held throughout a step."""
        m, own = self.models, self.itemsize
        return {
            "parameters": _on_one(m.params, self.rules),
            "optimizer": _on_one(m.opt_state, self.rules),
            "judge": _on_one(m.judge_params, self.rules, own),
            "reference": _on_one(m.params, self.rules, m.reference) if m.reference else 0,
            **{name: _on_one(a, self.rules, own) for name, a in m.frozen.items()},
            "batch": self._batch(),
        }

    def _batch(self) -> int:
        data, vision, caprl = self.config.data, self.models.policy.vision.config, self.config.caprl
        patches = data.max_windows * vision.window**2
        asked = (caprl.questions + caprl.rubrics) * (caprl.group if data.per_caption else 1)
        image = patches * (4 * vision.patch_dim + 2 * 4 + 1)
        prompt = data.max_prompt * (4 + 1 + 3 * 4 + 4)
        return self.images(1) * (image + prompt + asked * (5 * data.max_question + 9))

    def prefill(self, rollout: int, prefill: int) -> dict[str, int]:
        """Returns the bytes while images and prompts of one rollout slice are read."""
        c, p = self.models.policy.decoder.config, self.config.data.max_prompt
        inside = self.images(rollout * max(prefill // rollout, 1))
        return self._between(
            {
                "prompts": self._prompts(rollout),
                "layer": inside * max(self._layer(p), self._vision_layer()),
                "scores": inside * READ_SCORES * self._scores(c.heads, p, p),
                "gathered weights": self._gathered(self.models.params["decoder"], self.rules),
            }
        )

    def casting(self, rollout: int) -> dict[str, int]:
        """Returns the bytes while decoding weights are cast; a CPU or GPU holds a second copy."""
        copies = 1 if self.models.platform == "tpu" else 2
        return {"weights": copies * self._decoding_weights, "prompts": self._prompts(rollout)}

    def decode(self, rollout: int) -> dict[str, int]:
        """Returns the bytes while one rollout slice is decoded."""
        decoder, on, caprl = self.models.policy.decoder, self.rules.decoding, self.config.caprl
        captions = -(-self.config.data.batch // (rollout * on.size("images"))) * caprl.group
        return {
            "weights": self._decoding_weights,
            "caches": _caches(self.config, decoder, self.rules, rollout),
            "prompts": self._prompts(rollout),
            "logits": LOGITS * 4 * captions * decoder.config.vocab // on.size("vocab"),
        }

    def score(self, count: int) -> dict[str, int]:
        """Returns the bytes while judge or verifier, whichever takes more, reads a slice."""
        return max(self.judge(count), self.verify(count), key=lambda parts: sum(parts.values()))

    def verify(self, count: int) -> dict[str, int]:
        """Returns the bytes while the verifier reads one of `count` slices; none without one."""
        if self.models.verifier is None:
            return {}
        c, own = self.models.verifier.decoder.config, self.config.verifier
        prompt = self.config.data.max_prompt + choices.reference_tokens(self.config)
        i, texts = self.images(count), self.config.caprl.group * own.sentences
        each = own.max_sentence + VERIFIER_QUESTION
        tokens, hidden = texts * each + prompt, c.feed_forward // self.rules.size("mlp")
        return self._between(
            {
                "keys and values": i * tokens * self._kv_bytes(c),
                "layer": i * tokens * self.itemsize * (3 * hidden + 4 * c.width),
                "scores": i * READ_SCORES * self._scores(c.heads, texts * each, each + prompt),
            }
        )

    def judge(self, count: int) -> dict[str, int]:
        """Returns the bytes while the judge reads one of `count` slices; none at an endpoint."""
        if self.models.judge is None:
            return {}
        c, config = self.models.judge.config, self.config
        i, g, t = self.images(count), config.caprl.group, config.sampling.max_tokens
        each = (config.caprl.questions + config.caprl.rubrics) * config.data.max_question
        usual, asked = config.caprl.usual_tokens, g * each
        most = packing.most_tokens((g, t + each), usual + each if usual else 0)
        hidden = c.feed_forward // self.rules.size("mlp")
        scores = max(
            self._scores(c.heads, g * t, t),
            self._scores(c.heads, asked, t + config.data.max_question),
        )
        return self._between(
            {
                "keys and values": i * most * self._kv_bytes(c),
                "layer": i
                * (most if usual else max(g * t, asked))
                * self.itemsize
                * (3 * hidden + 4 * c.width),
                "scores": i * READ_SCORES * scores,
                "gathered weights": self._gathered(self.models.judge_params, self.rules),
            }
        )

    def update(self, remat: str, count: int) -> dict[str, int]:
        """Returns the bytes while gradients of one of `count` slices are computed.

        With several slices, the gradients of one are held beside the sum of those before.
        """
        c, config, on = self.models.policy.decoder.config, self.config, self.rules
        i, g, t = self.images(count), config.caprl.group, config.sampling.max_tokens
        i = -(-i * learned_images(config) // config.data.batch)
        captions = i * packing.most_tokens((g, t), config.caprl.usual_tokens)
        p = config.data.max_prompt
        trained, _ = trained_lib.split(self.models.policy, self.models.params)
        gradients = _on_one(trained, on, 4)
        chunk = -(-c.vocab // -(-c.vocab // 8192))
        logits = LOGITS * chunk
        if logprobs.keeps_logits(captions * on.size("images"), c.vocab):
            logits = c.vocab + chunk
        kept = c.layers * (captions + i * p) * self._kept(remat) + i * self._vision_kept(remat)
        return {
            "gradients": gradients * (1 if count == 1 else 2),
            "cast weights": gradients * self.itemsize // 4 if self.itemsize < 4 else 0,
            "activations": int(kept),
        } | self._between(
            {
                "layer": max(self._layer(captions), i * self._vision_layer()),
                "scores": i * SCORES * self._scores(c.heads, captions // i, t + p),
                "logits": 4 * captions * logits // on.size("vocab"),
                "head": ROWS * c.vocab * c.width * self.itemsize // on.size("vocab"),
                "gathered weights": self._gathered(self.models.params["decoder"], on),
            }
        )

    def _between(self, parts: dict[str, int]) -> dict[str, int]:
        factor = GPU if self.models.platform == "gpu" else 1
        return {name: int(factor * size) for name, size in parts.items()}

    @functools.cached_property
    def _decoding_weights(self) -> int:
        return _on_one(self.models.params["decoder"], self.rules.decoding, self.itemsize)

    def _kv_bytes(self, c: Any) -> int:
        """Returns the bytes of a token's keys and values in all layers."""
        return 2 * c.layers * c.kv_heads * c.head_dim * self.itemsize

    def _prompts(self, rollout: int) -> int:
        c = self.models.policy.decoder.config
        return self.images(rollout) * self.config.data.max_prompt * self._kv_bytes(c)

    def _gathered(self, boxed: Any, rules: ShardRules) -> int:
        """Returns bytes of the layers and embedding gathered at one time, if any are cut."""
        if rules.size("embed") == 1:
            return 0
        layers = jax.tree.leaves(nn.meta.unbox(boxed["layers"]))
        one = sum(a.size // a.shape[0] for a in layers) * self.itemsize
        return GATHERED * one // rules.size("mlp")

    def _layer(self, tokens: int) -> int:
        """Returns the bytes of one decoder layer's values for this many tokens."""
        c = self.models.policy.decoder.config
        wide = WIDE * c.feed_forward * self.itemsize // self.rules.size("mlp")
        return tokens * (wide + NARROW * c.width * 4)

    def _vision_layer(self) -> int:
        """Returns the bytes of one vision layer's values, for one image."""
        c = self.models.policy.vision.config
        patches = self.config.data.max_windows * c.window**2
        wide = WIDE * c.feed_forward * self.itemsize // self.rules.size("mlp")
        return patches * (wide + NARROW * c.width * 4)

    def _scores(self, heads: int, queries: int, keys: int) -> int:
        """Returns the bytes of one image's float32 scores, within attention's bound."""
        return min(SCORE_BYTES, 4 * heads * queries * keys) // self.rules.size("heads")

    def _kept(self, remat: str) -> float:
        """Returns the bytes of the residuals that a decoder layer keeps for each token."""
        c = self.models.policy.decoder.config
        queries = c.heads * c.head_dim // self.rules.size("heads")
        keys = 2 * c.kv_heads * c.head_dim // min(self.rules.size("kv_heads"), c.kv_heads)
        hidden = 2 * c.feed_forward // self.rules.size("mlp")
        return _residuals(remat, self.itemsize, c.width, (queries + keys, queries), hidden)

    def _vision_kept(self, remat: str) -> float:
        """Returns the bytes of the residuals that the tower keeps for one image."""
        c, parts = self.models.policy.vision.config, ("blocks", "patch", "positions")
        before = [
            f"vision/{part}" for part in parts
        ]  # a merger's gradient needs its own layer only
        if not trained_lib.trains_any(self.models.policy, self.models.params, *before):
            return 0
        patches = self.config.data.max_windows * c.window**2
        heads = c.width // self.rules.size("heads")
        hidden = (1 if c.layer_norm else 2) * c.feed_forward // self.rules.size("mlp")
        one = _residuals(remat, self.itemsize, c.width, (3 * heads, heads), hidden)
        return c.layers * patches * one


def _residuals(
    remat: str, itemsize: int, width: int, attention: tuple[int, int], hidden: int
) -> float:
    """Returns the bytes of the residuals that a layer keeps for each token.

    Args:
      remat: key of layers.REMAT.
      itemsize: bytes of a value in the dtype of computation.
      width: size of the residual stream.
      attention: sizes of (queries, keys and values together; attention's result).
      hidden: results of the perceptron's first products.
    """
    projected, attended = attention
    if remat == "full":
        return itemsize * width
    products = itemsize * (3 * width + projected + attended + hidden)
    if remat == "products":
        return KEPT * products
    # Norms in float32 and in their own dtype, the activation's parts, and the rotation in float32.
    others = 2 * width * (4 + 2 * itemsize) + 3 * hidden * itemsize / 2 + 8 * attended
    return KEPT * (products + others)
