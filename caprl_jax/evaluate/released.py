"""Flaws of the released evaluation scripts, which --as_released reproduces.

The functions say what these scripts compute (InternLM/CapRL, Prism_Evaluation and its reward
server; bronyayang/CaptionQA, qa.py), so that published figures can be reached from the same
answers. The default of every protocol mends each flaw; results.json counts the rows it touches.
"""

import ast
import dataclasses
import random
import re
from collections.abc import Sequence

from caprl_jax.evaluate import scorers

ABSTAIN = "Cannot answer from the caption"  # CaptionQA's option
ABSTAIN_LETTER = "F"  # of the reward server, however many options there are
_BOX = re.compile(r"</think>\s*<answer>.*?\\boxed{(?P<said>.*)}.*?</answer>", re.DOTALL)
_AUXILIARY = (
    "is are was were do does did have has had can could will would should shall may might must"
).split()


@dataclasses.dataclass(frozen=True)
class Flaw:
    """A flaw of released code.

    Attributes:
      released: what that code does.
      mended: what is done here instead.
    """

    released: str
    mended: str


PRISM = {
    "truth": Flaw(
        "a true answer that math-verify can't read counts as given", "it is compared as text"
    ),
    "path": Flaw(
        "'char' or 'info' anywhere in the data's path chooses the scorer",
        "the row's scorer, --scorer, or the name of the row's source",
    ),
    "box": Flaw(
        "the box reaches to the last brace, and needs </think> before the answer",
        "braces are matched; the last box in the last answer counts, else the last after </think>",
    ),
    "reading": Flaw(
        "a word is a product of letters ('act' is 'cat'); truth and answer are swapped",
        "words are compared as text, truth and answer in their places",
    ),
    "slot": Flaw(
        "a question whose image isn't at the start of the user's turn gets no caption",
        "the caption stands in the image's place, or before the question",
    ),
}
MCQ = {
    "letter": Flaw(
        "the first capital from A to I counts: 'Cannot tell' is C",
        "the likeliest letter where the judge tells; else a capital that is marked as an option "
        "or stands alone, or an option's text",
    ),
    "label": Flaw(
        "the worked example's abstain option is E, the question's is F",
        "both have the letter after the last option",
    ),
    "chunk": Flaw(
        "an answer that fails scores 0, and so do all of its batch",
        "an image with an answer that fails is left out of the scores, and counted",
    ),
}
# What else the reward server does otherwise, and why it isn't reproduced.
NOT_REPRODUCED = {
    "prefill": "the judge's answer begins with 'The answer is': an endpoint begins no answer",
    "skip": "a truth that names no option skips the shuffle: such a row is refused when it is read",
    "unseeded": "questions and orders are drawn without a seed: here every draw has one",
}
CAPTIONQA = {
    "yes_no": Flaw(
        "options with 'yes' and 'no' anywhere, as in 'eyes' and 'none', get no abstain option",
        "an option's first word must be yes, and another's no",
    ),
    "order": Flaw(
        "an image without a caption shifts the orders of all that follow",
        "every question of `all` draws, with its caption or without",
    ),
    "letter": Flaw(
        "the first letter that stands alone counts, 'a' in small too, and only after a line's end",
        "the likeliest letter where the judge tells; else a capital that is marked as an option "
        "or stands alone, or an option's text",
    ),
    "failure": Flaw(
        "an answer that fails scores 0",
        "a question whose answer fails is left out of the scores, and counted",
    ),
}


def extract_boxed(text: str) -> str:
    """Returns the boxed answer as released; empty if it finds none."""
    found = _BOX.findall(text)
    return found[-1] if found else ""


def scorer(path: str) -> str:
    """Returns the name of the scorer that the data's path chooses as released."""
    path = path.lower()
    if "info" in path:
        return "info"
    return "chart" if "char" in path else "maths"


def truth_is_unreadable(truth: str) -> bool:
    """Tells whether math-verify finds nothing in a true answer."""
    return not scorers.parse(f"${truth}$")


def maths(said: str, truth: str) -> float:
    """Scores as released, but for true answers that can't be read, which score 0 here."""
    known, given = scorers.parse(f"${truth}$"), scorers.parse(f"${said}$")
    return float(scorers.verify(said, known) or scorers.verify(given, known))


def chart(said: str, truth: str) -> float:
    """Scores relaxed accuracy or equality as released, whichever is higher."""
    read = _reading(said)
    try:
        scaled = [str(scale * float(read)) for scale in (1, 0.01, 100)]
    except ValueError:
        scaled = [read]
    found = max(_relaxed(text.strip(), t) for text in scaled for t in _truths(truth))
    return max(found, maths(said, truth))


def info(said: str, truth: str) -> float:
    """Scores `chart` or ANLS as released, whichever is higher."""
    similarity = max(scorers.anls(_reading(said), t) for t in _truths(truth))
    return max(chart(said, truth), similarity)


SCORERS = {"chart": chart, "info": info, "maths": maths}


def _reading(said: str) -> str:
    read = scorers.parse(f"${said}$")
    return str(read[-1]) if read else ""


def _truths(truth: str) -> list[str]:
    try:
        listed = ast.literal_eval(truth)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return [truth]
    return [str(t) for t in listed] if isinstance(listed, list) and listed else [truth]


def _relaxed(said: str, truth: str) -> float:
    numbers = [_number(said), _number(truth)]
    if numbers[0] is None or not numbers[1]:
        return float(said.lower() == truth.lower())
    return float(abs(numbers[0] - numbers[1]) / abs(numbers[1]) <= 0.05)


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def is_yes_no(question: str, choices: Sequence[str]) -> bool:
    """Tells whether CaptionQA as released takes a question for one of yes or no."""
    said = [choice.strip().lower() for choice in choices]
    if any("yes" in c for c in said) and any("no" in c for c in said):
        return True
    return asks(question)


def asks(question: str) -> bool:
    """Tells whether a question opens with an auxiliary verb, as "Is .." and "Does .." do."""
    return question.strip().lower().startswith(tuple(f"{word} " for word in _AUXILIARY))


def first_letter(text: str) -> str | None:
    """Returns the first capital from A to I, which the reward server takes for the answer."""
    found = re.search("[A-I]", text)
    return found[0] if found else None


def option_letter(text: str, count: int) -> int | None:
    """Returns the option that CaptionQA as released reads in an answer, from 0; None without one.

    Args:
      text: the answer.
      count: number of options.
    """
    for mark in ("</think>", "Answer: ", "\n"):
        text = text.split(mark, 1)[-1]
    letter = re.search(r"\b[A-Z]\b", text.upper())
    if letter and ord(letter[0]) - ord("A") < max(1, count):
        return ord(letter[0]) - ord("A")
    digit = re.search(r"\b[1-9][0-9]?\b", text)
    return int(digit[0]) - 1 if digit and int(digit[0]) <= max(1, count) else None


def shuffled(count: int, rng: random.Random) -> list[int]:
    """Returns the next order of `count` options, as released."""
    order = list(range(count))
    rng.shuffle(order)
    return order
