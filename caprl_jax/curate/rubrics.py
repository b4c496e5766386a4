"""Rubrics that a model writes about an image: the request, the parser, the filter's question.

The form is that of prompt: a line "Criterion: .." and a line "Weight: 3". Numbers of criteria and
Markdown's stars are read over. RubiCap (arXiv 2603.09160) weighs criteria by 3, 2 and 1.
"""

import re
from collections.abc import Sequence

from caprl_jax.curate import parse as parse_lib
from caprl_jax.curate.parse import CUT, DUPLICATE, EMPTY, OUTSIDE, UNUSABLE, Reject
from caprl_jax.data.records import Question
from caprl_jax.data.rubrics import Rubric, parse_rubric, unparse_rubric
from caprl_jax.data.texts import MalformedRecord

NO_TEXT = "no text of the criterion"
NO_WEIGHT = "no weight of 1, 2 or 3"
REASONS = (EMPTY, OUTSIDE, NO_TEXT, NO_WEIGHT, CUT, DUPLICATE, UNUSABLE)
WEIGHTS = (1, 2, 3)
_CRITERION = re.compile(
    r"(?:\d+\s*[.):]\s*)?criteri(?:on|um)(?:\s*\d+)?\s*[:.)]\s*(.*)", re.IGNORECASE
)
_WEIGHT = re.compile(r"weight\s*[:=]\s*(\d+)\W*", re.IGNORECASE)


def prompt(count: int) -> str:
    """Returns the request for `count` rubrics, in the form that parse reads."""
    return (
        f"Look closely at the image and write {count} criteria by which a caption of it can be "
        "checked. Each begins with 'The caption says that' and names one fact that is plain to see "
        "in the image and can't be guessed without it: an object, its color, number or place, an "
        "action, a text, or what a chart says. Somebody who reads the caption and never sees the "
        "image must be able to answer each with yes or no. Write about different facts, also about "
        "those that a hasty caption leaves out or gets wrong. Give each a weight: 3 for what the "
        "image is about, 2 for what matters beside that, 1 for a detail. Write every criterion in "
        "exactly this form, with an empty line between criteria, and write nothing else:\n\n"
        "Criterion: The caption says that ..\nWeight: 3, 2 or 1"
    )


def parse(text: str, truncated: bool = False) -> tuple[tuple[Rubric, ...], tuple[Reject, ...]]:
    """Parses an answer.

    Args:
      text: the whole answer of a model that was asked for rubrics.
      truncated: whether it ran into the length limit, so that its last criterion may not be whole.

    Returns:
      (usable rubrics without duplicates, everything else with its reason), in order.
    """
    if not text.strip():
        return (), (Reject(EMPTY, text),)
    before, blocks = parse_lib.blocks(text, _CRITERION)
    rubrics: list[Rubric] = []
    rejects: list[Reject] = []
    if parse_lib.says_something(before):
        reason = CUT if truncated and not blocks else OUTSIDE
        rejects.append(Reject(reason, "\n".join(before).strip()))
    seen: set[str] = set()
    for number, lines in enumerate(blocks, 1):
        block, rest = parse_lib.until(lines, _WEIGHT)
        parsed = _rubric(block)
        if isinstance(parsed, Rubric) and parse_lib.plain(parsed.text) in seen:
            parsed = DUPLICATE
        if isinstance(parsed, Rubric):
            rubrics.append(parsed)
            seen.add(parse_lib.plain(parsed.text))
        else:
            last = truncated and number == len(blocks) and parsed != DUPLICATE
            rejects.append(Reject(CUT if last else parsed, "\n".join(block).strip()))
        if parse_lib.says_something(rest):
            rejects.append(Reject(OUTSIDE, "\n".join(rest).strip()))
    return tuple(rubrics), tuple(rejects)


def _rubric(lines: Sequence[str]) -> Rubric | str:
    """Parses the lines of one criterion; a str is the reason why it can't be used."""
    bare = [line for line in map(parse_lib.bare, lines) if line]
    weight = _WEIGHT.fullmatch(bare[-1])
    body = bare[:-1] if weight else bare
    text = " ".join([_CRITERION.fullmatch(body[0])[1], *body[1:]]).strip()
    if not text:
        return NO_TEXT
    if weight is None or int(weight[1]) not in WEIGHTS:
        return NO_WEIGHT
    rubric = Rubric(text, float(weight[1]))
    try:  # as those who read the rows will
        again = parse_rubric(unparse_rubric(rubric))
    except MalformedRecord:
        return UNUSABLE
    return rubric if again == rubric else UNUSABLE


def question(rubric: Rubric) -> Question:
    """Returns the question by which a model is asked whether the image demands a rubric.

    With the image, "yes" means that it is true; without it, that it goes without saying. A rubric
    with options of its own is a question already.
    """
    text = rubric.text
    if rubric.options == Rubric.options:
        text = f"Does a true and complete caption of the image meet this criterion?\n{text}"
    return Question(text, rubric.options, 0)
