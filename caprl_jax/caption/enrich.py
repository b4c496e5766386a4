"""Enrichment: questions about a caption's objects, whose answers go into a final caption.

After ScaleCap (arXiv 2506.19848), with one model for all parts: it lists the objects of its own
caption, looks at the image again for each of them, and writes the caption anew with what it saw.
The prompts are our own.
"""

import dataclasses
import re
from collections.abc import Generator
from typing import Any

from caprl_jax.data.templates import IMAGE_TOKEN

LIST = (
    "Here is a caption of this image:\n{caption}\n\nList the objects that the caption names and "
    "the image shows, the most important first: at most {most}, each on a line of its own, as a "
    "short noun phrase. Write nothing else."
)
LOOK = (
    "Look at this in the image: {thing}. Say in one or two sentences what it looks like, how many "
    "there are, where it is, and how it stands to what is around it. Say only what you can see. If "
    "it isn't in the image, answer: not visible."
)
MERGE = (
    "Here is a first caption of this image:\n{caption}\n\nA second look at its objects gave these "
    "notes:\n{notes}\n\nWrite one complete caption in flowing text: keep what is right in the "
    "first caption, add the details of the notes, and where the two disagree say what the image "
    "shows. Write the caption alone."
)
_MARK = re.compile(r"^\s*(?:[-*•·]+|\(?\d+[.):]*|[a-zA-Z][.)])\s+")
_LONGEST = 80  # characters of an object's name
_UNSEEN = "not visible"
BRIEF = 128  # tokens


@dataclasses.dataclass(frozen=True)
class Turn:
    """Prompts about one image, which are answered together.

    Attributes:
      prompts: the texts after the image.
      brief: whether an answer of at most BRIEF tokens will do.
    """

    prompts: list[str]
    brief: bool = True


@dataclasses.dataclass(frozen=True)
class Answer:
    """A text that the policy wrote.

    Attributes:
      text: without special tokens.
      tokens: number of tokens, its stop token included.
      truncated: whether it was cut at its limit.
      logp: log-probability under the policy, summed over the tokens.
    """

    text: str
    tokens: int
    truncated: bool
    logp: float


@dataclasses.dataclass(frozen=True)
class Enriched:
    """The result of a dialogue.

    Attributes:
      caption: the final caption, or the first one where there was nothing to add.
      notes: (object, answer) of each question, those about objects that aren't there included.
    """

    caption: Answer
    notes: tuple[tuple[str, str], ...]


# Yields turns, and is sent the answers to each.
Dialogue = Generator[Turn, list[Answer], Enriched]


def things(text: str, most: int) -> list[str]:
    """Returns the objects that an answer lists, a line each, without their bullets or numbers.

    Empty, repeated and very long lines are left out, and so is one that introduces a list.
    """
    found: dict[str, str] = {}
    for line in text.splitlines():
        name = _MARK.sub("", line).strip().rstrip(".,;").strip()
        if name and len(name) <= _LONGEST and not name.endswith(":"):
            found.setdefault(name.casefold(), name)
    return list(found.values())[:most]


def dialogue(first: Answer, most: int) -> Dialogue:
    """Enriches a caption: asks for its objects, about each of them, and for a final caption.

    Args:
      first: the caption.
      most: most objects that are asked about.
    """
    [listed] = yield Turn([_fill(LIST, caption=first.text, most=most)])
    named = things(listed.text, most)
    if not named:
        return Enriched(first, ())
    answers = yield Turn([_fill(LOOK, thing=thing) for thing in named])
    notes = tuple((name, " ".join(a.text.split())) for name, a in zip(named, answers, strict=True))
    seen = [(name, text) for name, text in notes if text and _UNSEEN not in text.casefold()]
    if not seen:
        return Enriched(first, notes)
    told = "\n".join(f"- {name}: {text}" for name, text in seen)
    [final] = yield Turn([_fill(MERGE, caption=first.text, notes=told)], brief=False)
    return Enriched(final if final.text else first, notes)


def _fill(prompt: str, **texts: Any) -> str:
    """Fills a prompt's fields; a model's text may contain the image's placeholder."""
    return prompt.format(**texts).replace(IMAGE_TOKEN, "")
