"""The embedded world: real handwritten digits in ink colours on a grid, with all facts known.

A scene places digits of scikit-learn's load_digits on the cells of a grid. Its captions list facts,
"digits: northwest red three, center blue seven, total two", and its questions ask for one fact
each. The precision and recall of a caption, and a perfect judge's answers, can therefore be
computed.
"""

import dataclasses
import functools
import io
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from PIL import Image

from caprl_jax.data.records import Question, Record

CELL = 28  # pixels
COLORS = {
    "red": (255, 70, 60),
    "green": (60, 220, 80),
    "blue": (80, 130, 255),
    "yellow": (255, 220, 50),
    "purple": (200, 90, 255),
    "white": (245, 245, 245),
}
_COMPASS = "northwest north northeast west center east southwest south southeast".split()
NUMBERS = "zero one two three four five six seven eight nine".split()
# No instruction: a long text before the caption kept the tiny judge from learning to look up.
JUDGE_PROMPT = "<caption>\n{caption}\n</caption>\n{question}"
OPTIONS = (4, 4)  # least and most of a question in the records
_HELD_OUT = 300  # digit instances, of 1797, that no training scene shows

Fact = tuple[str, str, int]  # (place, color, digit)


def places(rows: int, columns: int) -> list[str]:
    """Names of the cells in row-major order: compass points on 3 x 3, else a1, a2, .., b1, .."""
    if (rows, columns) == (3, 3):
        return list(_COMPASS)
    return [f"{chr(ord('a') + r)}{c + 1}" for r in range(rows) for c in range(columns)]


def random_facts(
    rng: np.random.Generator, grid: tuple[int, int], digits: tuple[int, int]
) -> list[Fact]:
    """Draws a scene with `digits` (least, most) digits; no coloured digit occurs twice."""
    names = places(*grid)
    count = int(rng.integers(digits[0], digits[1] + 1))
    cells = rng.choice(len(names), count, replace=False)
    inks = rng.choice(len(COLORS) * 10, count, replace=False)
    colors = list(COLORS)
    return [
        (names[c], colors[i // 10], int(i % 10)) for c, i in zip(sorted(cells), inks, strict=True)
    ]


@functools.cache
def _instances(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns (uint8 [i, 8, 8] ink in 0..255, int [i] digit) of the instances a split may show."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    chosen = order[:_HELD_OUT] if split == "heldout" else order[_HELD_OUT:]
    return (data.images[chosen] * (255 / 16)).astype(np.uint8), data.target[chosen]


def draw(
    facts: Sequence[Fact], rng: np.random.Generator, grid: tuple[int, int], split: str
) -> bytes:
    """Draws a scene as PNG, with the split's instances of handwriting and a small jitter."""
    rows, columns = grid
    canvas = np.zeros((rows * CELL, columns * CELL, 3), np.float32)
    canvas += rng.uniform(0, 30)
    images, labels = _instances(split)
    names = places(rows, columns)
    for place, color, digit in facts:
        instance = images[rng.choice(np.flatnonzero(labels == digit))]
        size = int(rng.integers(20, 25))
        ink = Image.fromarray(instance).resize((size, size), Image.Resampling.BILINEAR)
        ink = np.asarray(ink, np.float32)[..., None] / 255
        row, column = divmod(names.index(place), columns)
        top, left = (rng.integers(0, CELL - size + 1, 2) + (row * CELL, column * CELL)).tolist()
        cell = canvas[top : top + size, left : left + size]
        cell += ink * (np.asarray(COLORS[color], np.float32) - cell)
    canvas += rng.normal(0, 4, canvas.shape)
    out = io.BytesIO()
    Image.fromarray(canvas.clip(0, 255).astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


def _choices(
    truth: str, near: Iterable[str], all_: Iterable[str], rng, options: tuple[int, int]
) -> tuple[list[str], int]:
    """Returns the truth and distractors, about half of them from the same scene, and its index."""
    least, most = options
    # A fixed number draws nothing: the embedded world's records stay as they are.
    count = least if least == most else int(rng.integers(least, most + 1))
    near = [x for x in dict.fromkeys(near) if x != truth]
    far = [x for x in all_ if x != truth and x not in near]
    rng.shuffle(near)
    rng.shuffle(far)
    taken = near[: int(rng.integers(0, count // 2 + 1))]
    chosen = [truth, *taken, *far][:count]
    chosen += [x for x in near if x not in chosen][: count - len(chosen)]
    rng.shuffle(chosen)
    return chosen, chosen.index(truth)


def ask_digit(facts: Sequence[Fact], fact: Fact, rng, options=OPTIONS) -> Question:
    """Asks which digit stands at the fact's place."""
    near = [NUMBERS[d] for _, _, d in facts]
    choices, answer = _choices(NUMBERS[fact[2]], near, NUMBERS, rng, options)
    return Question(f"Which digit is {fact[0]}?", tuple(choices), answer)


def ask_color(facts: Sequence[Fact], fact: Fact, rng, options=OPTIONS) -> Question:
    """Asks which ink the fact's place has."""
    choices, answer = _choices(fact[1], [c for _, c, _ in facts], COLORS, rng, options)
    return Question(f"Which color is {fact[0]}?", tuple(choices), answer)


def ask_place(facts: Sequence[Fact], fact: Fact, grid, rng, options=OPTIONS) -> Question:
    """Asks where the fact's coloured digit stands."""
    place, color, digit = fact
    choices, answer = _choices(place, [p for p, _, _ in facts], places(*grid), rng, options)
    return Question(f"Where is the {color} {NUMBERS[digit]}?", tuple(choices), answer)


def ask_count(count: int, rng, options=OPTIONS) -> Question:
    """Asks how many digits there are."""
    choices, answer = _choices(NUMBERS[count], [], NUMBERS[1:], rng, options)
    return Question("How many digits are there?", tuple(choices), answer)


def questions(
    facts: Sequence[Fact], grid: tuple[int, int], rng, options: tuple[int, int] = OPTIONS
) -> tuple[Question, ...]:
    """Asks every question of a scene: three for each digit, and their number.

    Args:
      facts: of the scene.
      grid: rows and columns.
      rng: draws the options.
      options: least and most of a question, drawn for each; six is the number of colours.

    Returns:
      The questions.
    """
    out = [ask_count(len(facts), rng, options)]
    for fact in facts:
        out.append(ask_digit(facts, fact, rng, options))
        out.append(ask_color(facts, fact, rng, options))
        out.append(ask_place(facts, fact, grid, rng, options))
    return tuple(out)


def statement(fact: Fact) -> str:
    """Returns the statement "place color digit" of a fact; only adjacent words can be learned."""
    place, color, digit = fact
    return f"{place} {color} {NUMBERS[digit]}"


def caption(facts: Sequence[Fact], count: int | None) -> str:
    """Writes a caption that states the facts in order, then the count unless it is None."""
    parts = [statement(f) for f in facts]
    return "digits: " + ", ".join(parts + ([] if count is None else [f"total {NUMBERS[count]}"]))


def _parts(text: str) -> list[list[str]]:
    parts = [p.split() for p in text.removeprefix("digits:").split(",")]
    return [p for p in parts if p]


def stated(text: str) -> list[Fact | int]:
    """Returns the facts and counts that a caption states, in order and with repetitions."""
    out: list[Fact | int] = []
    for words in _parts(text):
        if words[-1] not in NUMBERS:
            continue
        number = NUMBERS.index(words[-1])
        if len(words) == 3 and words[1] in COLORS:
            out.append((words[0], words[1], number))
        elif len(words) == 2 and words[0] == "total":
            out.append(number)
    return out


def truths(facts: Sequence[Fact]) -> set[Fact | int]:
    """Returns the statements that are true of a scene: its facts and their number."""
    return {tuple(f) for f in facts} | {len(facts)}


def precision_recall(text: str, facts: Sequence[Fact]) -> tuple[int, int, int, int]:
    """Counts (true statements, statements, recalled facts and count, all facts and count).

    Text that is no statement counts against precision too.
    """
    truth = truths(facts)
    said = stated(text)
    return sum(s in truth for s in said), len(_parts(text)), len(truth & set(said)), len(truth)


def lookup(text: str, question: Question) -> int | None:
    """Returns a perfect reader's answer to the caption: index in choices, or None to abstain."""
    said = stated(text)
    facts = [s for s in said if not isinstance(s, int)]
    words = question.text.rstrip("?").split()
    if words[1] == "digit":
        found = [NUMBERS[d] for p, _, d in facts if p == words[-1]]
    elif words[1] == "color":
        found = [c for p, c, _ in facts if p == words[-1]]
    elif words[0] == "Where":
        found = [p for p, c, d in facts if [c, NUMBERS[d]] == words[-2:]]
    else:
        found = [NUMBERS[s] for s in said if isinstance(s, int)]
    return question.choices.index(found[0]) if found and found[0] in question.choices else None


def leaking(asked: Sequence[Question], facts: Sequence[Fact]) -> list[Question]:
    """Returns questions whose texts state their answers, so that they need no caption.

    Args:
      asked: what `questions` returns.
      facts: of the scene.
    """
    told = [f"total {NUMBERS[len(facts)]}", *(statement(f) for f in facts for _ in range(3))]
    return [
        dataclasses.replace(q, text=f"digits: {t}\n{q.text}")
        for q, t in zip(asked, told, strict=True)
    ]


def scenes(
    split: str, count: int, grid: tuple[int, int], digits: tuple[int, int], leaky: float = 0.0
) -> Iterator[Record]:
    """Yields the records of a split, which are the same on every machine.

    A record's caption states all of its facts.

    Args:
      split: "train" or "heldout", which show different instances of handwriting.
      count: number of records.
      grid: rows and columns.
      digits: least and most digits of a scene.
      leaky: share of the questions that state their own answer.
    """
    for i in range(count):
        rng = np.random.default_rng([i, split == "heldout", *grid])
        facts = random_facts(rng, grid, digits)
        image = draw(facts, rng, grid, split)
        asked = questions(facts, grid, rng)
        drawn = rng.random(len(asked)) < leaky
        both = zip(asked, leaking(asked, facts), drawn, strict=True)
        asked = tuple(leak if chosen else q for q, leak, chosen in both)
        captions = (caption(facts, len(facts)),)
        yield Record(f"{split}-{i:05d}", image, asked, facts, captions=captions)
