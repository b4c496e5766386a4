"""Measures the effect of splicing tokens in the judge's prompt, against tokenising its whole text.

The prompt's fixed part, the caption and the question are tokenised separately and spliced. If
policy and judge share a vocabulary, the caption keeps the policy's ids. Tokenising the whole text
may put the boundaries of tokens elsewhere. The judge answers the first question of each image both
ways.
"""

from collections.abc import Sequence

import jax
import numpy as np

from caprl_jax.data.pipeline import HeldOut
from caprl_jax.data.questions import JudgePrompt
from caprl_jax.decode.lengths import bucket
from caprl_jax.evaluate.heldout import GREEDY, Judged
from caprl_jax.parallel import mesh
from caprl_jax.parallel.axes import ShardRules
from caprl_jax.parallel.jit import jit
from caprl_jax.parallel.slices import Slices
from caprl_jax.rl.judge import Judge, judge
from caprl_jax.rl.types import Captions, Questions


class Splicing:
    """Compares spliced prompts with prompts that are tokenised as one text."""

    def __init__(
        self,
        data: HeldOut,
        prompt: JudgePrompt,
        rules: ShardRules,
        cuts: Slices | None = None,
        through_text: bool = False,
    ):
        """Prepares the comparison; measure() compiles. See heldout.Reader for the arguments."""
        self._data, self._prompt = data, prompt
        self._rules, self._through_text = rules, through_text

        def letters(model, first, questions):
            # An empty caption and an instruction of one token make the tree a plain sequence.
            empty = Captions(questions.tokens[:, :, :1], questions.mask[:, :, :1] & False)
            model = model.replace(instruction=model.instruction.with_tokens(first))
            key = jax.random.key(0)  # greedy answers draw nothing
            return judge(model, empty, questions, judging=GREEDY, key=key).letter

        self._letters = jit(letters, rules, cuts, out_shardings=mesh.replicated(rules))

    def measure(self, model: Judge, judged: Sequence[Judged]) -> dict[str, float]:
        """Shares of captions, one an image: {"splice_ids_differ", "splice_letters_differ"}."""
        tokenizer, special = self._prompt.tokenizer, set(self._prompt.tokenizer.special)
        whole, differ = [], []
        for j in judged:
            caption, shown = j.caption, self._data.presented[j.caption.record][0]
            ids = tokenizer.encode_caption(caption.text) if self._through_text else caption.ids
            ids = [i for i in ids if i not in special]
            spliced = [*self._prompt.fixed(), *ids, *self._prompt.tail(shown)]
            whole.append(self._prompt.whole(caption.text, shown))
            differ.append(whole[-1] != spliced)
        letters = self._read(model, whole)
        spliced_letters = [j.letters[0] for j in judged]
        return {
            "splice_ids_differ": float(np.mean(differ)),
            "splice_letters_differ": float(np.mean(np.asarray(spliced_letters) != letters)),
        }

    def _read(self, model: Judge, sequences: list[list[int]]) -> np.ndarray:
        """Returns the judge's letters after the sequences, each with an image's first question."""
        length, out = bucket(max(map(len, sequences))), []
        first = jax.device_put(np.asarray(sequences[0][:1], np.int32), mesh.replicated(self._rules))
        for batch in self._data.batches:
            b, start = len(batch.valid), sum(map(len, out))
            tokens, mask = np.zeros((b, 1, length), np.int32), np.zeros((b, 1, length), bool)
            count = int(np.sum(batch.valid))
            for i, ids in enumerate(sequences[start : start + count]):
                tokens[i, 0, : len(ids) - 1], mask[i, 0, : len(ids) - 1] = ids[1:], True
            asked = batch.questions
            kept = (a[:, :1] for a in (asked.truth, asked.letters, asked.valid))
            sequence_questions = mesh.put_whole(Questions(tokens, mask, *kept), self._rules)
            letters = jax.device_get(self._letters(model, first, sequence_questions))
            out.append(np.asarray(letters)[:count, 0, 0])
        return np.concatenate(out)
