"""How often the judge reads other tokens than its tokenizer would make of the whole prompt.

The prompt's fixed part, the caption and the question are tokenised each by itself and spliced (the
caption in the policy's own ids, where the two share a vocabulary). Tokenised as one text, the
boundaries might fall elsewhere. Held-out captions are asked their image's first question both ways.
"""

from collections.abc import Sequence

import jax
import numpy as np

from caprl_jax.data.pipeline import HeldOut
from caprl_jax.data.questions import JudgePrompt
from caprl_jax.evaluate.heldout import Judged, bucket
from caprl_jax.models.decoder import Decoder
from caprl_jax.parallel import axes as logical
from caprl_jax.parallel.axes import Layout
from caprl_jax.parallel.mesh import put_whole, replicated
from caprl_jax.rl import judge
from caprl_jax.rl.step import Frozen
from caprl_jax.run import compile as programs


class Splicing:
    """Compares spliced with whole prompts."""

    def __init__(
        self,
        decoder: Decoder,
        data: HeldOut,
        prompt: JudgePrompt,
        on: Layout,
        text: bool,
        pieces: int = 1,
    ):
        """`text`: captions are spliced as their text's ids, not as the policy's.

        Prompts are read in that many pieces of a batch.
        """
        self._data, self._prompt, self._layout, self._text = data, prompt, on, text

        def letters(frozen, first, questions):
            # The tree with nothing above the question but one token: a plain sequence.
            nothing = questions.tokens[:, :, :1], questions.mask[:, :, :1] & False
            instruction = frozen.instruction.with_tokens(first)
            with logical.using(on):
                return judge.score(
                    decoder, frozen.judge, instruction, *nothing, questions, jax.random.key(0),
                    "greedy", pieces=pieces,
                ).letter  # fmt: skip

        self._letters = programs.jit(letters, on, out_shardings=replicated(on))

    def measure(self, frozen: Frozen, judged: Sequence[Judged]) -> dict[str, float]:
        """{"splice_ids_differ", "splice_letters_differ"}: shares of captions, one of each image."""
        tokenizer, special = self._prompt.tokenizer, set(self._prompt.tokenizer.special)
        whole, differ = [], []
        for j in judged:
            caption, shown = j.caption, self._data.presented[j.caption.record][0]
            tail = self._prompt.tail_text(shown)
            own = tokenizer.encode_caption(caption.text) if self._text else caption.ids
            own = [i for i in own if i not in special]
            spliced = [*tokenizer.encode(self._prompt.before), *own, *tokenizer.encode(tail)]
            whole.append(tokenizer.encode(self._prompt.before + caption.text + tail))
            differ.append(whole[-1] != spliced)
        letters = self._read(frozen, whole)
        spliced_letters = [j.letters[0] for j in judged]
        return {
            "splice_ids_differ": float(np.mean(differ)),
            "splice_letters_differ": float(np.mean(np.asarray(spliced_letters) != letters)),
        }

    def _read(self, frozen: Frozen, sequences: list[list[int]]) -> np.ndarray:
        """The letter after each sequence, the first of each image's questions."""
        length, out = bucket(max(map(len, sequences))), []
        first = jax.device_put(np.asarray(sequences[0][:1], np.int32), replicated(self._layout))
        for batch in self._data.batches:
            b, at = len(batch.valid), sum(map(len, out))
            tokens, mask = np.zeros((b, 1, length), np.int32), np.zeros((b, 1, length), bool)
            own = sequences[at : at + int(np.sum(batch.valid))]
            for i, ids in enumerate(own):
                tokens[i, 0, : len(ids) - 1], mask[i, 0, : len(ids) - 1] = ids[1:], True
            asked = judge.Questions(
                tokens, mask, *(a[:, :1] for a in (
                    batch.questions.truth, batch.questions.letters, batch.questions.valid
                ))
            )  # fmt: skip
            found = self._letters(frozen, first, put_whole(asked, self._layout))
            out.append(np.asarray(jax.device_get(found))[: len(own), 0, 0])
        return np.concatenate(out)
