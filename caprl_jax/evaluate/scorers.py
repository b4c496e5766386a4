"""Scores an answer's text against the true answer's text.

A scorer is a pure function (said, truth) -> float in [0, 1]; SCORERS names them. `best` takes
several truths. Prism (CapRL, arXiv 2509.22647, section 4) scores charts with `chart`, infographics
with `info` and all else with `maths`; `by_source` chooses by a data set's name.
"""

import ast
import functools
import json
import re
import threading
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

from caprl_jax.errors import ConfigError, did_you_mean

Scorer = Callable[[str, str], float]
_TOLERANCE = 0.05 + 1e-9  # of relaxed accuracy, as a share of the truth; 1.05 is near 1
_LEAST_SIMILARITY = 0.5  # of ANLS; less scores 0
_SCALES = (1.0, 0.01, 100.0)  # a share may be written in percent, and a percentage as a share
_SECONDS = 5  # most time for one parse or comparison of math-verify
_GROUPED = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_LONGEST = 20000  # characters; math-verify takes seconds for more
_COMMAND = re.compile(r"\\[a-z]+")  # of LaTeX
_TEXT = re.compile(r"\\(?:text\w*|mathrm|mbox)\s*\{([^{}]*)\}")  # words in LaTeX
_WORD = re.compile(r"(?P<glued>(?<=[\d()^_{}]))?(?P<word>[^\W\d_]{2,})")
_MATHS = re.compile(r"[\d\\]")
# An operator beside a letter; a hyphen before three letters or more is one of words.
_OPERATOR = re.compile(r"[a-z)]\s*(?:[+*^=<>|]|-(?!\w{3}))|(?:[+*^=<>|]|(?<!\w)-)\s*[a-z(]", re.I)
_CHARTS, _INFO = ("chartqa", "charxiv"), ("infovqa", "infographic")


def number(text: str) -> float | None:
    """Returns the number that a text is: "1,200" is 1200 and "5%" is 0.05; None for other text."""
    text = text.strip().replace("\\%", "%")
    percent = text.endswith("%")
    text = text.removesuffix("%").strip()
    if _GROUPED.fullmatch(text):
        text = text.replace(",", "")
    try:
        value = float(text)
    except ValueError:
        return None
    return value / 100 if percent else value


def exact(said: str, truth: str) -> float:
    """Returns 1 if the texts are equal but for case, width, white space and a final full stop."""
    return float(_plain(said) == _plain(truth) != "")


def relaxed(said: str, truth: str) -> float:
    """Returns 1 for a number within 5% of the truth, or for a text equal to it.

    The bound is relative to the truth (ChartQA, arXiv 2203.10244, section 5.1), so 0 needs 0.
    """
    said_number, true_number = number(said), number(truth)
    if exact(said, truth) or said_number is None or true_number is None:
        return exact(said, truth)
    return float(abs(said_number - true_number) <= _TOLERANCE * abs(true_number))


def anls(said: str, truth: str) -> float:
    """Returns the normalised Levenshtein similarity, 0 if below 0.5 (arXiv 1907.00490, eq. 1).

    Several truths: the similarity to the nearest, as `best` takes it.
    """
    said, truth = _spaced(said), _spaced(truth)
    longest = max(len(said), len(truth))
    similarity = 1 - _distance(said, truth) / longest if longest else 0.0
    return similarity if similarity >= _LEAST_SIMILARITY else 0.0


def maths(said: str, truth: str) -> float:
    """Returns 1 for equal texts, or for equal expressions as math-verify finds them.

    math-verify reads a word as a product of letters, so that "act" would equal "cat": words are
    compared as text, and a unit must be that of the truth, or left out. Letters beside an operator,
    and those after a number, are a product. A truth that math-verify can't read is compared as
    text.

    Raises:
      ConfigError: math-verify isn't installed.
    """
    if exact(said, truth):
        return 1.0
    texts = said, truth
    words = [_words(text) for text in texts]
    if not any(map(_is_expression, texts)):
        if all(words) and words[0] != words[1]:
            return 0.0
        if any(own and not _MATHS.search(text) for own, text in zip(words, texts, strict=True)):
            return 0.0
    parsed = parse(_latex(truth))
    return float(verify(parsed, parse(_latex(said)))) if parsed else 0.0


def _words(text: str) -> list[str]:
    """Returns a text's words; of one glued to a number or a bracket, the letters in order."""
    plain = _COMMAND.sub(" ", _TEXT.sub(r" \1 ", text.lower()))
    found = _WORD.finditer(plain)
    return ["".join(sorted(m["word"])) if m["glued"] is not None else m["word"] for m in found]


def _is_expression(text: str) -> bool:
    """Tells whether letters stand beside an operator."""
    return bool(_OPERATOR.search(_COMMAND.sub(" ", _TEXT.sub(" ", text))))


def chart(said: str, truth: str) -> float:
    """Returns the higher of relaxed accuracy, also at 0.01 and 100 times the number, and maths."""
    value = number(said)
    scaled = [said] if value is None else [repr(scale * value) for scale in _SCALES]
    found = max(relaxed(text, truth) for text in scaled)
    return found or maths(said, truth)


def info(said: str, truth: str) -> float:
    """Returns the higher of `chart` and ANLS."""
    return max(chart(said, truth), anls(said, truth))


SCORERS: dict[str, Scorer] = {f.__name__: f for f in (anls, chart, exact, info, maths, relaxed)}


def named(name: str) -> Scorer:
    """Returns the scorer of a name.

    Raises:
      ConfigError: there is none.
    """
    try:
        return SCORERS[name]
    except (KeyError, TypeError) as e:
        raise ConfigError(f"no scorer is named {name!r}: {did_you_mean(name, SCORERS)}") from e


def by_source(source: str) -> str:
    """Returns the name of the scorer for a data set: "chart", "info" or "maths"."""
    name = re.sub(r"[^a-z]", "", source.lower())
    if any(part in name for part in _CHARTS):
        return "chart"
    return "info" if any(part in name for part in _INFO) else "maths"


def best(scorer: Scorer, said: str, truths: Sequence[str]) -> float:
    """Returns the highest score over several true answers."""
    return max(scorer(said, truth) for truth in truths)


def truths(answer: Any) -> tuple[str, ...]:
    """Returns the true answers of a row: a text, a number, a list, or the text of a list.

    Raises:
      ValueError: there is none.
    """
    if isinstance(answer, str) and answer.strip().startswith("["):
        for read in (json.loads, ast.literal_eval):
            try:
                listed = read(answer)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
            if isinstance(listed, list) and all(isinstance(a, str) for a in listed):
                answer = listed
                break
    listed = answer if isinstance(answer, list | tuple) else [answer]
    if not listed or not all(isinstance(a, str | int | float) for a in listed):
        raise ValueError("the answer is no text, number or list of them")
    return tuple(str(a) for a in listed)


def parse(text: str) -> list:
    """Returns math-verify's reading of the first LaTeX expression in a text; empty without one.

    Raises:
      ConfigError: math-verify isn't installed.
    """
    return list(_parse(text)) if len(text) <= _LONGEST else []


@functools.lru_cache(4096)
def _parse(text: str) -> tuple:
    lib = _math_verify()
    kinds, limit = [lib.LatexExtractionConfig()], _time_limit()
    return tuple(lib.parse(text, kinds, extraction_mode="first_match", parsing_timeout=limit))


def _latex(text: str) -> str:
    return "$" + text.strip().strip("$").replace("°", r"^\circ") + "$"


def verify(truth: Any, said: Any) -> bool:
    """Tells whether math-verify finds two parsed answers equal; an error of its own is no."""
    try:
        return bool(_math_verify().verify(truth, said, timeout_seconds=_time_limit()))
    except Exception:  # sympy raises any error on strange expressions
        return False


def _math_verify() -> Any:
    try:
        import math_verify  # an extra: choices and texts need none
    except ImportError as e:
        raise ConfigError("this scorer needs: pip install 'caprl_jax[score]'") from e
    return math_verify


def _time_limit() -> int | None:
    """Returns the seconds for one call; None outside the main thread, where no alarm works."""
    return _SECONDS if threading.current_thread() is threading.main_thread() else None


def _plain(text: str) -> str:
    return _spaced(unicodedata.normalize("NFKC", text)).removesuffix(".").rstrip()


def _spaced(text: str) -> str:
    return " ".join(text.lower().split())


def _distance(one: str, other: str) -> int:
    """Computes Levenshtein's distance, row by row."""
    before = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        row = [i]
        for j, b in enumerate(other, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (a != b)))
        before = row
    return before[-1]
