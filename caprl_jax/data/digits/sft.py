"""Supervised examples for the embedded world's tiny models, as texts with loss weights.

The judge reads captions with random subsets of a scene's facts, recalls them in other orders, and
answers questions about them, in words and by letter. It abstains if the caption lacks the fact. The
policy names the content of each cell, and captions its images sparsely: mostly one or two digits.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from caprl_jax.data.digits import world as digits
from caprl_jax.data.digits.world import Fact
from caprl_jax.data.questions import ABSTAIN, JudgePrompt, present
from caprl_jax.data.records import LETTERS, Question, Record
from caprl_jax.data.tokens import Tokenizer

Piece = tuple[str, float]  # (text, weight of its tokens in the loss)
Pieces = Sequence[Piece]

_END = "<|im_end|>"
_LETTER_WEIGHT = 2.0


def encode(tokenizer: Tokenizer, pieces: Pieces) -> tuple[list[int], list[float]]:
    """Tokenises each text separately; returns all ids and the loss weight of each."""
    ids, weights = [], []
    for text, weight in pieces:
        piece = tokenizer.encode(text) if text else []
        ids += piece
        weights += [weight] * len(piece)
    return ids, weights


@dataclasses.dataclass(frozen=True)
class PolicyTask:
    """Makes branches for the policy: the content of some cells, and sparse captions.

    Attributes:
      grid: rows and columns.
      probes: cells asked per image.
      captions: captions per image.
      stated: probability of stating 1, 2, 3, .. facts.
      count: probability of stating the count.
      statements: statements that are asked about, half of them true; they make a verifier.
      asked: (text after a statement, answer to a true one, answer to a false one).
    """

    grid: tuple[int, int]
    probes: int
    captions: int
    stated: tuple[float, ...]
    count: float
    statements: int = 0
    asked: tuple[str, str, str] = ("", "", "")

    def cells(self, record: Record, rng: np.random.Generator) -> list[str]:
        """Returns a word for each cell in row-major order: its colour, its digit, or " nothing".

        As targets of the image's features, the words teach the tower before text can name places.
        """
        words = {f[0]: (f" {f[1]}", f" {digits.NUMBERS[f[2]]}") for f in record.facts}
        return [
            words[place][rng.integers(2)] if place in words else " nothing"
            for place in digits.places(*self.grid)
        ]

    def branches(self, record: Record, rng: np.random.Generator) -> list[Pieces]:
        """Makes a record's branches."""
        facts = [tuple(f) for f in record.facts]
        held = {f[0]: digits.statement(f).removeprefix(f[0]) for f in facts}
        cells = rng.permutation(digits.places(*self.grid))[: self.probes]
        probes = [((f" {place}", 0.0), (held.get(place, " nothing"), 1.0)) for place in cells]
        captions = [((self._caption(facts, rng), 1.0), (_END, 1.0)) for _ in range(self.captions)]
        asked = [self._asked(facts, rng) for _ in range(self.statements)]
        return [*probes, *captions, *asked]

    def _asked(self, facts: list[Fact], rng: np.random.Generator) -> Pieces:
        """Returns a statement as a sentence of a caption, the question and the answer."""
        question, yes, no = self.asked
        true = rng.random() < 0.5
        text = true_statement(facts, rng) if true else false_statement(facts, self.grid, rng)
        before = "digits: " if rng.random() < 0.2 else " "
        after = "," if rng.random() < 0.8 else ""
        return (f"{before}{text}{after}", 0.0), (question, 0.0), (yes if true else no, 1.0)

    def _caption(self, facts: list[Fact], rng: np.random.Generator) -> str:
        stated = 1 + rng.choice(len(self.stated), p=self.stated)
        chosen = rng.permutation(len(facts))[:stated]
        count = len(facts) if rng.random() < self.count else None
        return digits.caption([facts[i] for i in chosen], count)


def true_statement(facts: Sequence[Fact], rng: np.random.Generator) -> str:
    """Draws a fact of a scene, or sometimes its count, as a caption states it."""
    if rng.random() < 0.15:
        return f"total {digits.NUMBERS[len(facts)]}"
    return digits.statement(facts[rng.integers(len(facts))])


def false_statement(facts: Sequence[Fact], grid: tuple[int, int], rng: np.random.Generator) -> str:
    """Draws a false statement about a scene: mostly wrong in one word, sometimes no statement."""
    place, color, digit = facts[rng.integers(len(facts))]
    others = [f for f in facts if f[0] != place]
    drawn, kind = others[rng.integers(len(others))] if others else None, rng.random()
    if kind < 0.35:  # another digit, a third of them of the same scene
        near = drawn is not None and drawn[2] != digit and rng.random() < 0.33
        digit = drawn[2] if near else int((digit + rng.integers(1, 10)) % 10)
    elif kind < 0.5:
        color = str(rng.choice([c for c in digits.COLORS if c != color]))
    elif kind < 0.75:  # an empty cell
        held = {f[0] for f in facts}
        place = str(rng.choice([p for p in digits.places(*grid) if p not in held]))
        if rng.random() < 0.5:
            color, digit = str(rng.choice(list(digits.COLORS))), int(rng.integers(10))
    elif kind < 0.8 and drawn is not None:  # another place's digit
        color, digit = drawn[1:]
    elif kind < 0.93:
        wrong = [n for n in range(1, 10) if n != len(facts)]
        near = [n for n in wrong if abs(n - len(facts)) <= 2]
        return f"total {digits.NUMBERS[rng.choice(near if rng.random() < 0.7 else wrong)]}"
    else:
        words = digits.statement((place, color, digit)).split()
        return " ".join(np.delete(words, rng.integers(len(words))))
    return digits.statement((place, color, digit))


@dataclasses.dataclass(frozen=True)
class JudgeTask:
    """Makes trunk and branches for the judge: a caption, questions about it, recall drills.

    Attributes:
      grid: rows and columns.
      digits: least and most digits of a scene.
      prompt: the judge's prompt.
      questions: questions per caption that are answered by a letter.
      open_questions: questions per caption that are answered in words.
      options: least and most options of a question, the abstain option not counted.
      caption_weight: loss weight of the caption's own tokens.
    """

    grid: tuple[int, int]
    digits: tuple[int, int]
    prompt: JudgePrompt
    questions: int
    open_questions: int
    options: tuple[int, int] = (2, 6)
    caption_weight: float = 0.1

    def scene(self, rng: np.random.Generator) -> tuple[list[Fact], list[Fact], int | None]:
        """Draws (facts, the facts that the caption states in its order, the count if it states it).

        Every call draws a new scene: the judge sees only text, and must not memorise the facts that
        a caption leaves out. A fifth of the captions repeat a fact, as captions of a policy in
        training do.
        """
        facts = digits.random_facts(rng, self.grid, self.digits)
        kept = rng.permutation(len(facts))[: rng.integers(0, len(facts) + 1)]
        if rng.random() < 0.3:
            kept = np.sort(rng.permutation(len(facts)))
        if len(kept) and rng.random() < 0.2:
            kept = np.insert(kept, rng.integers(1, len(kept) + 1), kept[0])
        return facts, [facts[i] for i in kept], len(facts) if rng.random() < 0.5 else None

    def ask(self, facts: Sequence[Fact], rng: np.random.Generator) -> tuple[Question, ...]:
        """Asks every question of a scene, each with a number of options of its own."""
        return digits.questions(facts, self.grid, rng, self.options)

    def sample(self, rng: np.random.Generator) -> tuple[Pieces, list[Pieces]]:
        """Draws (trunk, branches)."""
        facts, stated, count = self.scene(rng)
        caption = digits.caption(stated, count)
        asked = self.ask(facts, rng)
        known = [q for q in asked if digits.lookup(caption, q) is not None]
        unknown = [q for q in asked if digits.lookup(caption, q) is None]
        branches = [self._drill(stated, rng), self._open(caption, asked, rng)]
        for _ in range(self.questions):
            pool = known if known and (not unknown or rng.random() < 0.6) else unknown
            shown = present(pool[rng.integers(len(pool))], rng)
            answer = shown.truth if pool is known else len(shown.options) - 1
            letter = f" {LETTERS[answer]}"
            branches.append(((self.prompt.tail_text(shown), 0.0), (letter, _LETTER_WEIGHT)))
        return ((caption, self.caption_weight),), branches

    def _open(self, caption: str, asked: Sequence[Question], rng: np.random.Generator) -> Pieces:
        """Returns questions without options and their answers in words, which teach the lookup."""
        pieces: list[Piece] = []
        for i in rng.permutation(len(asked))[: self.open_questions]:
            found = digits.lookup(caption, asked[i])
            answer = ABSTAIN if found is None else asked[i].choices[found]
            pieces += [(f"\n{asked[i].text}", 0.0), (f" {answer}", 1.0)]
        return pieces

    def _drill(self, stated: list[Fact], rng: np.random.Generator) -> Pieces:
        """Repeats the caption's facts in another order, keyed by place or by colour and digit."""
        pieces: list[Piece] = [("\n", 0.0)]
        for i in rng.permutation(len(stated)):
            place, inked = stated[i][0], digits.statement(stated[i]).removeprefix(stated[i][0])
            if rng.random() < 0.5:
                pieces += [(f" {place}", 0.0), (inked, 1.0), (",", 0.0)]
            else:
                pieces += [(inked, 0.0), (f" {place}", 1.0), (",", 0.0)]
        return pieces
