"""The policy: image features and text tokens in one decoder, over the tree image -> captions.

The trunk is an image and its prompt, computed once; branches are captions that attend to it.
A text-only model (the judge in training) has no vision tower and no images.
"""

import dataclasses

import flax.struct
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from caprl_jax.models.attention import KV, Row
from caprl_jax.models.decoder import Decoder
from caprl_jax.models.lora import Lora, is_adapter
from caprl_jax.models.vision import Images, VisionTower

Params = dict  # {"decoder": ..., "vision": ... unless text only}


@flax.struct.dataclass
class Prompt:
    """The trunk's tokens, padded on the right.

    Attributes:
      tokens: int32 [b, p].
      mask: bool [b, p].
      positions: int32 [b, p, 3] with M-RoPE, else [b, p].
      feature: int32 [b, p], index of the image feature at this token; -1 for text.
      next_position: int32 [b], position of the first token after the prompt.
    """

    tokens: jax.Array
    mask: jax.Array
    positions: jax.Array
    feature: jax.Array
    next_position: jax.Array


@flax.struct.dataclass
class Trunk:
    """An encoded image and prompt, which captions attend to.

    Attributes:
      hidden: [b, p, e], hidden state of every prompt token.
      last: [b, e], hidden state of the last real token; it predicts a caption's first token.
      kv: keys and values, batch axes (b,).
      next_position: int32 [b], position of a caption's first token.
    """

    hidden: jax.Array
    last: jax.Array
    kv: KV
    next_position: jax.Array


@dataclasses.dataclass(frozen=True)
class Policy:
    """The modules of a vision-language model, or of a text model if vision is None; no arrays.

    Attributes:
      decoder: the text decoder.
      vision: the vision tower, or None.
      frozen: the parts that no step changes, as prefixes of their parameters' paths: "vision",
        "vision/merger". With LoRA everything but its updates is frozen.
    """

    decoder: Decoder
    vision: VisionTower | None = None
    frozen: tuple[str, ...] = ()

    @property
    def lora(self) -> Lora | None:
        """Returns the settings of the decoder's LoRA, or None."""
        return self.decoder.lora

    def trains(self, path: tuple[str, ...]) -> bool:
        """Tells whether a parameter, by its path, is trained."""
        if self.lora:
            return is_adapter(path)
        name = "/".join(path)
        return not any(name == part or name.startswith(f"{part}/") for part in self.frozen)

    def with_tokens(self, count: int) -> "Policy":
        """Returns the same modules for a tokenizer with ids below `count`."""
        config = dataclasses.replace(self.decoder.config, tokens=count)
        return dataclasses.replace(self, decoder=self.decoder.clone(config=config))

    def init(self, key: jax.Array) -> Params:
        """Returns random parameters, boxed with their axes' logical names.

        Trained ones are float32, frozen ones have the compute dtype.
        """
        text_key, vision_key = jax.random.split(key)
        everything = Decoder.everything
        tokens = jnp.zeros(1, jnp.int32)
        params = {"decoder": self.decoder.init(text_key, tokens, method=everything)["params"]}
        if self.vision is not None:
            c = self.vision.config
            m = c.window**2
            empty = Images(
                jnp.zeros((1, m, c.patch_dim)),
                jnp.zeros((1, m, 2), jnp.int32),
                jnp.ones((1, m), bool),
            )
            params["vision"] = self.vision.init(vision_key, empty)["params"]
        return self.cast(params)

    def cast(self, params: Params) -> Params:
        """Returns parameters, boxed or not, with the frozen ones in the compute dtype."""
        if not self.lora and not self.frozen:
            return params
        flat = flax.traverse_util.flatten_dict(params)
        for path in flat:
            if not self.trains(path):
                flat[path] = jax.tree.map(lambda a: a.astype(self.decoder.dtype), flat[path])
        return flax.traverse_util.unflatten_dict(flat)

    def positions(self, start: jax.Array, length: int) -> jax.Array:
        """Returns text positions start, start + 1, ...: int [*batch] -> [*batch, length(, 3)]."""
        return text_positions(start, length, self.decoder.config.mrope_section is not None)

    def trunk(
        self, params: Params, images: Images | None, prompt: Prompt, past: tuple[KV, ...] = ()
    ) -> Trunk:
        """Encodes images and prompts once: Images [b, m, ..], Prompt [b, p] -> Trunk.

        `past` holds keys and values of the text before the prompt; the whole batch shares them, so
        their batch axes are ().
        """
        decoder = {"params": params["decoder"]}
        x = self.decoder.apply(decoder, prompt.tokens, method=Decoder.embed)
        deep = None
        if images is not None:
            features, deep = self.vision.apply({"params": params["vision"]}, images)
            index = jnp.maximum(prompt.feature, 0)[..., None]
            is_image = prompt.feature[..., None] >= 0
            at_token = jnp.take_along_axis(features.astype(x.dtype), index, axis=1)
            x = jnp.where(is_image, at_token, x)
            if deep is not None:
                at_token = jnp.take_along_axis(deep.astype(x.dtype), index[None], axis=2)
                deep = jnp.where(is_image[None], at_token, 0)
        hidden, kv = self.decoder.apply(decoder, x, prompt.positions, prompt.mask, past, deep)
        last = jnp.maximum(jnp.sum(prompt.mask, axis=-1) - 1, 0)[:, None, None]
        last = jnp.take_along_axis(hidden, last, axis=1)[:, 0]
        return Trunk(hidden, last, kv, prompt.next_position)

    def branches(
        self,
        params: Params,
        trunk: Trunk,
        tokens: jax.Array,
        mask: jax.Array,
        past: tuple[KV, ...] = (),
    ) -> jax.Array:
        """Returns the hidden states that predict every token of every caption.

        Args:
          params: the policy's parameters.
          trunk: the captions' images and prompts, batch axes (b,).
          tokens: int32 [b, g, t], padded on the right.
          mask: bool [b, g, t].
          past: keys and values of the tokens before the trunk.

        Returns:
          [b, g, t, e]; entry i predicts token i, so entry 0 is the trunk's last hidden state.
        """
        decoder = {"params": params["decoder"]}
        b, g, t = tokens.shape
        # The last token predicts nothing, but t tokens divide into equal slices better than t - 1.
        x = self.decoder.apply(decoder, tokens, method=Decoder.embed)
        positions = self.positions(jnp.broadcast_to(trunk.next_position[:, None], (b, g)), t)
        hidden, _ = self.decoder.apply(decoder, x, positions, mask, (*past, trunk.kv))
        first = jnp.broadcast_to(trunk.last[:, None, None], (b, g, 1, hidden.shape[-1]))
        return jnp.concatenate([first, hidden[..., :-1, :]], axis=2)

    def packed(
        self, params: Params, trunk: Trunk, tokens: jax.Array, index: jax.Array, row: Row
    ) -> jax.Array:
        """Computes `branches` for captions that are packed into one row per image.

        Args:
          params: the policy's parameters.
          trunk: as for branches.
          tokens: int32 [b, r].
          index: int32 [b, r], each token's place in its caption.
          row: Row [b, r] of the captions.

        Returns:
          [b, r, e]; entry i predicts token i.
        """
        decoder = {"params": params["decoder"]}
        x = self.decoder.apply(decoder, tokens, method=Decoder.embed)
        positions = trunk.next_position[:, None] + index
        if self.decoder.config.mrope_section is not None:
            positions = jnp.repeat(positions[..., None], 3, axis=-1)
        hidden, _ = self.decoder.apply(decoder, x, positions, row, (trunk.kv,))
        before = jnp.concatenate([trunk.last[:, None], hidden[:, :-1]], axis=1)
        return jnp.where(index[..., None] == 0, trunk.last[:, None], before)

    def head(self, params: Params) -> jax.Array:
        """Returns the output rows [vocab, e] in the compute dtype."""
        head = self.decoder.apply({"params": params["decoder"]}, method=Decoder.head)
        return head.astype(self.decoder.dtype)

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Computes logits of hidden states: [..., e] -> float32 [..., vocab]."""
        return self.decoder.apply({"params": params["decoder"]}, hidden, method=Decoder.logits)


def text_positions(start: jax.Array, length: int, mrope: bool) -> jax.Array:
    """Counts from start: int [*batch] -> positions int32 [*batch, length(, 3 equal axes)]."""
    positions = jnp.broadcast_to(start[..., None], (*start.shape, length))
    positions = positions + jax.lax.broadcasted_iota(jnp.int32, positions.shape, start.ndim)
    return jnp.repeat(positions[..., None], 3, axis=-1) if mrope else positions


def root_kv(decoder: Decoder, params: dict, tokens: jax.Array) -> KV:
    """Computes keys and values of tokens int32 [s] that begin a sequence; params: the decoder's."""
    s, mrope = tokens.shape[0], decoder.config.mrope_section is not None
    x = decoder.apply({"params": params}, tokens, method=Decoder.embed)
    positions = text_positions(jnp.zeros((), jnp.int32), s, mrope)
    return decoder.apply({"params": params}, x, positions, jnp.ones(s, bool))[1]


def mrope_positions(
    tokens: np.ndarray, image_token: int, grid: tuple[int, int], merge: int
) -> tuple[np.ndarray, int]:
    """Returns M-RoPE positions of a prompt with at most one image (arXiv 2409.12191, section 2.1).

    The positions of text count up on all three axes. An image's features share one time and count
    rows and columns from there. The text after the image starts one past the largest position.

    Args:
      tokens: int [p], without padding.
      image_token: id of the image placeholder.
      grid: (rows, columns) of the image in patches.
      merge: patches on a feature's side.

    Returns:
      (int32 [p, 3], position of the next token).
    """
    at_image = np.flatnonzero(tokens == image_token)
    if not len(at_image):
        return np.repeat(np.arange(len(tokens), dtype=np.int32)[:, None], 3, axis=1), len(tokens)
    rows, columns = grid[0] // merge, grid[1] // merge
    first, last = at_image[0], at_image[-1]
    if last - first + 1 != len(at_image) or len(at_image) != rows * columns:
        raise ValueError(
            f"prompt has {len(at_image)} image tokens from {first} to {last}, "
            f"the image has {rows} x {columns} features: they must match, in one run"
        )
    row, column = (a.reshape(-1) for a in np.mgrid[:rows, :columns])
    image = first + np.stack([np.zeros_like(row), row, column], axis=-1)
    after = first + max(rows, columns)
    tail = np.arange(after, after + len(tokens) - last - 1)
    text = [np.repeat(a[:, None], 3, axis=1) for a in (np.arange(first), tail)]
    positions = np.concatenate([text[0], image, text[1]])
    return positions.astype(np.int32), int(after + len(tail))
