"""The embedded world: real handwritten digits in ink colours on a grid, with all facts known.

A scene places digits of scikit-learn's load_digits on the cells of a grid. Its captions list facts,
"digits: northwest red three, center blue seven, total two", and its questions ask for one fact
each. The precision and recall of a caption, and a perfect judge's answers, can therefore be
computed.
"""

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
    """(uint8 [i, 8, 8] ink in 0..255, int [i] digit) of the instances that a split may show."""
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


def _choices(truth: str, near: Iterable[str], all_: Iterable[str], rng) -> tuple[list[str], int]:
    """Four options: the truth, and distractors of which about half come from the same scene."""
    near = [x for x in dict.fromkeys(near) if x != truth]
    far = [x for x in all_ if x != truth and x not in near]
    rng.shuffle(near)
    rng.shuffle(far)
    taken = near[: int(rng.integers(0, 3))]
    options = [truth, *taken, *far][:4]
    options += [x for x in near if x not in options][: 4 - len(options)]
    rng.shuffle(options)
    return options, options.index(truth)


def ask_digit(facts: Sequence[Fact], place: str, truth: int, rng) -> Question:
    """Makes a question about the digit at a place."""
    near = [NUMBERS[d] for _, _, d in facts]
    options, answer = _choices(NUMBERS[truth], near, NUMBERS, rng)
    return Question(f"Which digit is {place}?", tuple(options), answer)


def ask_color(facts: Sequence[Fact], place: str, truth: str, rng) -> Question:
    """Makes a question about the ink colour at a place."""
    options, answer = _choices(truth, [c for _, c, _ in facts], COLORS, rng)
    return Question(f"Which color is {place}?", tuple(options), answer)


def ask_place(facts: Sequence[Fact], color: str, digit: int, truth: str, grid, rng) -> Question:
    """Makes a question about the place of a coloured digit."""
    options, answer = _choices(truth, [p for p, _, _ in facts], places(*grid), rng)
    return Question(f"Where is the {color} {NUMBERS[digit]}?", tuple(options), answer)


def ask_count(count: int, rng) -> Question:
    """Makes a question about the number of digits."""
    options, answer = _choices(NUMBERS[count], [], NUMBERS[1:], rng)
    return Question("How many digits are there?", tuple(options), answer)


def questions(facts: Sequence[Fact], grid: tuple[int, int], rng) -> tuple[Question, ...]:
    """Every question of a scene: three for each digit, and their number."""
    out = [ask_count(len(facts), rng)]
    for place, color, digit in facts:
        out.append(ask_digit(facts, place, digit, rng))
        out.append(ask_color(facts, place, color, rng))
        out.append(ask_place(facts, color, digit, place, grid, rng))
    return tuple(out)


def statement(fact: Fact) -> str:
    """Statement "place color digit" of a fact; words must be adjacent to be learnable."""
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
    """Facts and counts that a caption states, in order and with repetitions."""
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


def precision_recall(text: str, facts: Sequence[Fact]) -> tuple[int, int, int, int]:
    """Counts (true statements, statements, recalled facts and count, all facts and count).

    Text that is no statement counts against precision too.
    """
    truth = {tuple(f) for f in facts} | {len(facts)}
    said = stated(text)
    return sum(s in truth for s in said), len(_parts(text)), len(truth & set(said)), len(truth)


def lookup(text: str, question: Question) -> int | None:
    """Answer of a perfect reader of the caption: index in choices, or None to abstain."""
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


def scenes(
    split: str, count: int, grid: tuple[int, int], digits: tuple[int, int]
) -> Iterator[Record]:
    """Yields the records of a split, which are the same on every machine."""
    for i in range(count):
        rng = np.random.default_rng([i, split == "heldout", *grid])
        facts = random_facts(rng, grid, digits)
        image = draw(facts, rng, grid, split)
        yield Record(f"{split}-{i:05d}", image, questions(facts, grid, rng), facts)
