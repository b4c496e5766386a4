"""A policy on the mesh answers questions by letter: one prefill over the tree, nothing decoded.

An image with the instruction is read once; all trials of all its questions are branches that attend
to its keys and values. Without the image, the instruction alone is their shared past.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from caprl_jax.api import LoadedPolicy, loading
from caprl_jax.curate.trials import INSTRUCTION, Trial
from caprl_jax.data.questions import PREFILL
from caprl_jax.data.tokens import PolicyPrompt
from caprl_jax.decode.lengths import bucket
from caprl_jax.models.attention import KV
from caprl_jax.models.decoder import Decoder
from caprl_jax.models.vision import batch_images, pad_to_windows, window_count
from caprl_jax.models.vlm import Params, Policy, root_kv
from caprl_jax.parallel import axes
from caprl_jax.parallel import mesh as mesh_lib
from caprl_jax.rl.judge import among_options


@dataclasses.dataclass(frozen=True)
class Row:
    """An image and the trials of its questions.

    Attributes:
      image: RGB.
      trials: at least one.
    """

    image: Image.Image
    trials: Sequence[Trial]


def last_hidden(
    modules: Policy,
    params: Params,
    past: KV,
    start: jax.Array,
    branches: tuple[jax.Array, jax.Array],
) -> jax.Array:
    """Returns the hidden state of each branch's last token, which predicts the letter.

    Args:
      modules: the policy.
      params: its parameters.
      past: keys and values of the text before, batch axes (b,), or () where all share them.
      start: int32 [b], position of a branch's first token.
      branches: (int32 tokens, bool mask), [b, n, q], padded on the right.

    Returns:
      [b, n, e].
    """
    tokens, mask = branches
    b, n, q = tokens.shape
    decoder = {"params": params["decoder"]}
    x = modules.decoder.apply(decoder, tokens, method=Decoder.embed)
    positions = modules.positions(jnp.broadcast_to(start[:, None], (b, n)), q)
    end = jnp.maximum(jnp.sum(mask, axis=-1) - 1, 0)[..., None]
    method = Decoder.hidden_at
    hidden, _ = modules.decoder.apply(decoder, x, positions, mask, (past,), end, method=method)
    return hidden[..., 0, :]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _answers(rules, modules, params, shared, seen, asked):
    """Returns letters' logits with the images and without, float32 [2, b, n, letters].

    shared: (keys and values of the instruction, letters' ids); seen: (images, prompt); asked:
    (tokens, mask, number of options) of the branches.
    """
    (root, letters), (images, prompt), (tokens, mask, count) = shared, seen, asked
    with axes.using(rules):
        trunk = modules.trunk(params, images, prompt)
        start = jnp.full(tokens.shape[0], root.mask.shape[-1], jnp.int32)
        pasts = ((trunk.kv, trunk.next_position), (root, start))
        hidden = jnp.stack([last_hidden(modules, params, *p, (tokens, mask)) for p in pasts])
        head = modules.head(params)[letters]
        logits = jnp.einsum("xbne,le->xbnl", hidden, head, preferred_element_type=jnp.float32)
        return among_options(logits, jnp.broadcast_to(count, logits.shape[:-1]), 1.0)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _root(rules, modules, params, tokens):
    with axes.using(rules):
        return root_kv(modules.decoder, params["decoder"], tokens)


@dataclasses.dataclass(frozen=True)
class Reader:
    """A policy that answers by letter.

    Attributes:
      policy: the model.
      batch: rows of a batch; those that aren't full are filled with copies.
    """

    policy: LoadedPolicy
    batch: int

    @functools.cached_property
    def _prompt(self) -> PolicyPrompt:
        """Returns the image and the instruction, open at its end."""
        policy = self.policy
        mrope = policy.modules.decoder.config.mrope_section is not None
        vision = policy.modules.vision.config
        closed = PolicyPrompt.create(policy.tokenizer, INSTRUCTION, vision, mrope)
        return dataclasses.replace(closed, ids=np.asarray(self.shared(True), np.int32))

    @functools.cached_property
    def _foot(self) -> str:
        return self.policy.tokenizer.around_text()[1] + PREFILL

    @functools.cached_property
    def _shared(self) -> tuple[KV, jax.Array]:
        """Returns (keys and values of the instruction without an image, ids of the letters)."""
        whole = mesh_lib.replicated(self.policy.rules)
        tokens = jax.device_put(np.asarray(self.shared(False), np.int32), whole)
        letters = jax.device_put(np.asarray(self.policy.tokenizer.letters(), np.int32), whole)
        policy = self.policy
        return _root(policy.rules, policy.modules, policy.params, tokens), letters

    def shared(self, image: bool) -> list[int]:
        """Returns the ids before a question: with a placeholder for the image, or without."""
        before, _ = self.policy.tokenizer.around_text(image=image)
        return self.policy.tokenizer.encode_around(before, INSTRUCTION, "")

    def branch(self, trial: Trial) -> list[int]:
        """Returns the ids from a question to the letter."""
        return self.policy.tokenizer.encode_around("", trial.body(), self._foot)

    def size(self, row: Row) -> tuple[int, int, int, int]:
        """Returns the (windows, prompt tokens, branches, their tokens) that a row is padded to.

        Raises:
          UnreadableImage: the image can't be used.
        """
        vision = self.policy.modules.vision.config
        rows, columns = grid = self.policy.processor.grid(row.image.height, row.image.width)
        length = self._prompt.length(rows * columns // vision.merge**2)
        longest = max(len(self.branch(t)) for t in row.trials)
        windows = bucket(window_count(grid, vision))
        return windows, bucket(length), bucket(len(row.trials)), bucket(longest)

    def logits(self, rows: Sequence[Row]) -> np.ndarray:
        """Returns the letters' logits of up to `batch` rows of one size.

        Returns:
          float32 [2, rows, branches, letters]: with the images, then without; -inf for letters
          that are no option. A row's last branches are padding.
        """
        policy, vision = self.policy, self.policy.modules.vision.config
        windows, length, n, q = self.size(rows[0])
        filled = [rows[i % len(rows)] for i in range(self.batch)]
        processed = [policy.processor(row.image) for row in filled]
        images = batch_images([pad_to_windows(p, grid, vision, windows) for p, grid in processed])
        prompts = [self._prompt.fill(grid, length) for _, grid in processed]
        tokens = np.zeros((len(filled), n, q), np.int32)
        mask, count = np.zeros(tokens.shape, bool), np.ones(tokens.shape[:2], np.int32)
        for i, row in enumerate(filled):
            for j, trial in enumerate(row.trials):
                ids = self.branch(trial)
                tokens[i, j, : len(ids)], mask[i, j, : len(ids)] = ids, True
                count[i, j] = len(trial.options)
        prompt = jax.tree.map(lambda *a: np.stack(a), *prompts)
        seen, asked = loading.put(((images, prompt), (tokens, mask, count)), policy.rules)
        made = _answers(policy.rules, policy.modules, policy.params, self._shared, seen, asked)
        return np.asarray(jax.device_get(made))[:, : len(rows)]
