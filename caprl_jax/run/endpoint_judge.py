"""A judge behind an OpenAI-compatible endpoint, for judges too large for the mesh.

A step is two programs, as in through_text.py. Captions leave the first as ids and become text on
the host, the endpoint answers, and its letters' log-probabilities enter the second in the place of
the letter logits that a judge on the mesh has (rl.judge.letter_logits).
"""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from caprl_jax.data.pipeline import HeldOut
from caprl_jax.data.questions import JudgePrompt
from caprl_jax.data.records import LETTERS
from caprl_jax.data.tokens import Tokenizer
from caprl_jax.endpoint import Drawn, Endpoint, Failure, Reply
from caprl_jax.errors import UserError
from caprl_jax.evaluate.heldout import Judged, Written
from caprl_jax.letters import likely, named
from caprl_jax.parallel import mesh, processes
from caprl_jax.parallel.axes import ShardRules
from caprl_jax.rl.step import Run
from caprl_jax.rl.types import Batch, Captions, Metrics, State
from caprl_jax.run.text_terms import TextTerms
from caprl_jax.run.through_text import keys, told

ABSENT = -1e4  # logit of a letter that the answer leaves out; finite, so that nothing becomes NaN
_TOKENS = 8  # of an answer: a letter, or a few words that hold one
_SEED_LIMIT = 2**31  # servers take seeds below it


class Unanswered(UserError):
    """Questions that the endpoint didn't answer in all tries; the step was not taken."""


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Raises Unanswered in all processes if one of them does within."""
    error = None
    try:
        yield
    except Unanswered as e:
        error = e
    with jax.transfer_guard("allow"):
        answered = processes.all_say(error is None)
    if not answered:
        raise error or Unanswered("the judge's endpoint left a question of another process open")


def letter_logits(reply: Reply, letters: int) -> np.ndarray | None:
    """Returns logits of the letters from an answer; None if it names no option.

    Log-probabilities count where the answer's letter has them, and letters hold most of the
    probability. Else the letter that the text names counts, alone.

    Args:
      reply: the answer.
      letters: number of options; the last one abstains.

    Returns:
      float32 [letters].
    """
    logits = np.full(letters, ABSENT, np.float32)
    logps = likely(reply, LETTERS[:letters])
    if not logps:
        chosen = named(reply.text, letters)
        logps = {} if chosen is None else {chosen: 0.0}
    for letter, logp in logps.items():
        logits[letter] = logp
    return logits if logps else None


@dataclasses.dataclass(frozen=True)
class EndpointJudge:
    """A judge that is asked in text.

    Attributes:
      endpoint: where it is.
      prompt: text around captions and questions, without a chat template.
      tokenizer: the policy's, in whose ids captions and questions come.
      temperature: of letters that are drawn where the server gives no log-probabilities.
    """

    endpoint: Endpoint
    prompt: JudgePrompt
    tokenizer: Tokenizer
    temperature: float

    @classmethod
    def create(
        cls, endpoint: Endpoint, prompt: JudgePrompt, tokenizer: Tokenizer, temperature: float
    ) -> "EndpointJudge":
        """Makes a judge; the server adds its own chat template to the prompt."""
        return cls(endpoint, dataclasses.replace(prompt, head="", foot=""), tokenizer, temperature)

    def ask(
        self, texts: Sequence[str], letters: Sequence[int], seed: int, temperature: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Asks for answers; equal texts are asked once.

        Args:
          texts: whole user turns.
          letters: number of options of each.
          seed: of drawn letters.
          temperature: of letters that are drawn, where the server gives no log-probabilities.

        Returns:
          (logits float32 [texts, letters], bool [texts] whether the answer named no option, which
          counts as abstaining).

        Raises:
          Unanswered: one has no answer; the others that are under way are given up.
        """
        drawn = Drawn(_TOKENS, temperature, seed=seed % _SEED_LIMIT, letters=True)
        unique = list(dict.fromkeys(texts))
        chats = ([{"role": "user", "content": text}] for text in unique)
        replies: dict[str, Reply] = {}
        with contextlib.closing(self.endpoint.ask(chats, drawn)) as answers:
            for text, reply in zip(unique, answers, strict=True):
                if isinstance(reply, Failure):
                    raise Unanswered(
                        f"{self.endpoint.url} left a question without an answer after "
                        f"{self.endpoint.limits.tries} tries: {reply.reason}. Start again with the "
                        "same command when it answers, or change judge.timeout, judge.tries or "
                        "judge.concurrency"
                    )
                replies[text] = reply
        logits = np.full((len(texts), len(LETTERS)), ABSENT, np.float32)
        silent = np.zeros(len(texts), bool)
        for i, (text, count) in enumerate(zip(texts, letters, strict=True)):
            row = letter_logits(replies[text], count)
            if row is None:
                silent[i], logits[i, count - 1] = True, 0
            else:
                logits[i, :count] = row
        return logits, silent

    def text(self, caption: str, tail: str) -> str:
        """Returns the user's turn for a caption and a question."""
        return self.prompt.before + caption + tail

    def of_batch(self, batch: Batch, captions: Any, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Asks the questions of a host batch's captions.

        Args:
          batch: `valid` and `questions` are read, numpy.
          captions: tokens and mask [b, g, t], numpy.
          seed: of drawn letters.

        Returns:
          (logits float32 [b, g, n, letters], bool [b, g, n] whether an answer named no option).
        """
        g = captions.tokens.shape[1]
        asked = batch.questions
        if asked.truth.ndim == 2:  # shared by an image's captions
            asked = jax.tree.map(lambda a: np.repeat(a[:, None], g, axis=1), asked)
        real = np.argwhere(asked.valid & batch.valid[:, None, None])
        written = {
            (i, j): self.tokenizer.decode(captions.tokens[i, j][captions.mask[i, j]])
            for i, j in {(i, j) for i, j, _ in real.tolist()}
        }
        tails = [self._plain(asked.tokens[*at][asked.mask[*at]]) for at in real]
        texts = [
            self.text(written[i, j], tail)
            for (i, j, _), tail in zip(real.tolist(), tails, strict=True)
        ]
        counts = [int(asked.letters[*at]) for at in real]
        found, none = self.ask(texts, counts, seed, self.temperature)
        logits = np.zeros((*asked.valid.shape, len(LETTERS)), np.float32)
        silent = np.zeros(asked.valid.shape, bool)
        at = tuple(real.T)
        logits[at], silent[at] = found, none
        return logits, silent

    def _plain(self, ids: np.ndarray) -> str:
        """Returns the exact text of ids: a question's, between caption and the user turn's end."""
        return self.tokenizer.inner.decode(
            ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )


class EndpointReader:
    """Lets the endpoint answer all questions of held-out captions; as evaluate.heldout.Reader."""

    def __init__(self, judge: EndpointJudge, data: HeldOut, temperature: float):
        """Prepares a reader.

        Args:
          judge: behind the endpoint.
          data: held-out images.
          temperature: of the softmax over letters.
        """
        self._judge, self._data, self._temperature = judge, data, temperature

    def asking(self, data: HeldOut) -> "EndpointReader":
        """Returns a reader of the same images with other questions."""
        return EndpointReader(self._judge, data, self._temperature)

    def longest(self, captions: Sequence[Written]) -> int:
        """Returns 0: texts aren't padded."""
        del captions
        return 0

    def read(self, model: Any, captions: Sequence[Written], length: int = 0) -> list[Judged]:
        """Judges captions, each on all questions of its image, greedily.

        Args:
          model: not used.
          captions: the captions.
          length: not used.
        """
        del model, length
        shown = [self._data.presented[c.record] for c in captions]
        texts = [
            self._judge.text(c.text, self._judge.prompt.tail_text(p))
            for c, own in zip(captions, shown, strict=True)
            for p in own
        ]
        counts = [len(p.options) for own in shown for p in own]
        logits, _ = self._asked_once(texts, counts)
        p = np.exp((logits - logits.max(axis=1, keepdims=True)) / self._temperature)
        p /= p.sum(axis=1, keepdims=True)
        out, start = [], 0
        for caption, own in zip(captions, shown, strict=True):
            rows = range(start, start + len(own))
            start += len(own)
            letters = [int(np.argmax(logits[i])) for i in rows]
            truths = [float(p[i, q.truth]) for i, q in zip(rows, own, strict=True)]
            out.append(Judged(caption, letters, truths))
        return out

    def _asked_once(
        self, texts: Sequence[str], counts: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Asks in process 0 for all processes, greedily."""
        answers = None
        with together():
            if processes.is_first():
                answers = self._judge.ask(texts, counts, 0, temperature=0.0)
        if answers is None:
            answers = np.zeros((len(texts), len(LETTERS)), np.float32), np.zeros(len(texts), bool)
        return processes.of_first(answers)

    def read_texts(self, model: Any, texts: Sequence[str]) -> list[Judged]:
        """Judges one given caption for each image."""
        return self.read(model, [Written(i, text, []) for i, text in enumerate(texts)])


def step_with_endpoint(
    rollout: Callable,
    finish: Callable,
    rules: ShardRules,
    judge: EndpointJudge,
    texts: TextTerms | None = None,
) -> Callable[[Run, State, Batch, jax.Array], tuple[State, Metrics]]:
    """Returns (run, state, batch, key) -> (state, metrics), like the one program.

    Args:
      rollout: jitted (run, state, batch, key) -> Rollout.
      finish: jitted (run, state, batch, rollout, ((logits, silent), told), key) ->
        (state, metrics); told is what texts gives.
      rules: mesh of the batch.
      judge: asked between the two, by each process about its own images.
      texts: the run's reward terms on text.
    """
    logging.info("the judge is asked at %s: a step is two programs", judge.endpoint.url)

    def step(run: Run, state: State, batch: Batch, key: jax.Array):
        rollout_key, judge_key = keys(key, state.step)
        captions = rollout(run, state, batch, rollout_key)
        own = {"captions": (captions.tokens, captions.mask)}
        own |= {"questions": batch.questions, "valid": batch.valid}
        host = mesh.fetch_batch(own, rules)
        tokens, mask = host["captions"]
        asked = batch.replace(questions=host["questions"], valid=host["valid"])
        seed = int(jax.device_get(jax.random.key_data(judge_key)).ravel()[-1])
        with together():
            found = judge.of_batch(asked, Captions(tokens, mask), seed)
        passed = mesh.put_batch(found, rules), told(texts, batch, (tokens, mask), rules)
        return finish(run, state, batch, captions, passed, judge_key)

    return step
