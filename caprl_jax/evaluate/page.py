"""Writes the page of an evaluation: runs side by side, and the images where they differ most.

Everything that a page shows is bounded, so that its size doesn't grow with the number of images.
"""

import collections
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from caprl_jax.errors import UserError
from caprl_jax.evaluate import mcq, panels, results
from caprl_jax.evaluate.panels import Run
from caprl_jax.evaluate.results import shown
from caprl_jax.files import write_whole
from caprl_jax.report import parts
from caprl_jax.report.charts import number

_SHOWN = 40  # maximum number of images
_LISTED = 20  # maximum number of rows of a panel, and of questions of an image
_EXAMPLES = 3  # captions with a sign, for each run
_AROUND = 160  # characters shown before and after a sign
_CAPTIONS = 4  # captions of one image and run
_LARGEST = 480  # pixels of an image's longer side
MARKS = {"right": "✓", "wrong": "✗", "abstained": "?", "partly": "~"}

_ABOUT = ("protocol", "captions", "judge", "judge_model", "data", "orders", "split", "scorer")
# Of each protocol: the sentence on its options, and its unit, of which a figure is the mean.
_WORDS = {
    "mcq": {"options": "“Cannot tell” is always an option.", "unit": "image"},
    "prism": {"options": "It answers in its own words.", "unit": "row"},
    "captionqa": {
        "options": "All but yes/no questions have an option that says that they can’t be answered.",
        "unit": "question",
    },
}

Told = Mapping[str, float]  # {"mean", "low", "high"}
Images = Callable[[Collection[str]], Mapping[str, bytes]]  # ids -> encoded bytes by id


def _images(of: Mapping[str, Any]) -> str:
    """Returns the number of images; several rows may have one."""
    return f"{of.get('images', len(of['each'])):,}"


def _about(color: str, run: Run) -> dict[str, Any]:
    """Returns a run's name, its number of images, and (name, value) of what it was made of."""
    given = {k: run.results.get(k, "") for k in _ABOUT}
    given |= {"as released": "yes" if run.results.get("as_released") else ""}
    given |= {"images": _images(run.results)}
    for key, value in run.results.get("without", {}).items():
        parted = value.items() if isinstance(value, Mapping) else ()
        given[key] = "; ".join(f"{k}: {v}" for k, v in parted) if parted else value
    pairs = [
        (panels.cut(key.replace("_", " "), panels.NAME), panels.cut(value, panels.SENTENCE))
        for key, value in given.items()
        if value
    ]
    return {"name": run.name, "color": color, "pairs": pairs}


def _headline(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Returns the table's rows of all figures: a cell for each run, and one for each difference."""
    first = runs[0].results
    names = dict.fromkeys(name for run in runs for name in run.results["summary"])
    against = first.get("against", [])

    def cell(name: str, told: Told | None, sign: str = "") -> dict[str, Any] | None:
        if told is None:
            return None
        texts = {key: shown(name, told[key], sign) for key in ("mean", "low", "high")}
        return texts | {"certain": told["low"] > 0 or told["high"] < 0}

    return [
        {
            "label": panels.label(name),
            "name": name,
            "note": panels.FIGURES.get(name, ("", ""))[1],
            "cells": [cell(name, run.results["summary"].get(name)) for run in runs],
            "differences": [cell(name, other["summary"].get(name), "+") for other in against],
        }
        for name in names
    ]


def _examples(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Returns the first captions that have each sign, with the text around it."""
    out = []
    for name in panels.SIGNS:
        for color, run in zip(panels.colors(runs), runs, strict=True):
            for row in [r for r in run.results["each"] if r.get(name)][:_EXAMPLES]:
                told = {"sign": panels.label(name), "run": run.name, "color": color}
                told |= {"id": panels.cut(row["id"], panels.SENTENCE), "text": _around(name, row)}
                out.append(told)
    return out


def _around(name: str, row: Mapping[str, Any]) -> tuple[str, str, str]:
    """Returns (text before a sign, the sign, text after it), cut at both ends."""
    asked = [str(q.get("text", "")) for q in row.get("questions", ())]
    for text in _texts(row):
        if span := mcq.find_sign(name, text, asked):
            start, end = max(span[0] - _AROUND, 0), span[1] + _AROUND
            before, after = text[start : span[0]], text[span[1] : end]
            before = "… " + before.partition(" ")[2] if start else before
            after = after.rpartition(" ")[0] + " …" if end < len(text) else after
            return before, panels.cut(text[slice(*span)], panels.SENTENCE), after
    return panels.cut(" ".join(_texts(row)[:1]), panels.SENTENCE), "", ""


def _texts(row: Mapping[str, Any]) -> list[str]:
    """Returns the captions of an image, one or several."""
    given = row.get("captions", row.get("caption", []))
    return [given] if isinstance(given, str) else list(given)


def _main_figure(runs: Sequence[Run]) -> str | None:
    """Returns the first figure of the first run that all runs have."""
    names = runs[0].results["summary"]
    return next((n for n in names if all(n in r.results["summary"] for r in runs)), None)


def _chosen(runs: Sequence[Run], name: str) -> list[tuple[str, float]]:
    """Returns (id, spread) of the images where runs differ most; of one run, its worst and best."""
    rows = [run.row_of() for run in runs]
    if len(runs) == 1:
        values = {i: row[name] for i, row in rows[0].items()}
        order = sorted(values, key=values.get)
        if len(order) > _SHOWN:
            order = order[: _SHOWN // 2] + order[-(_SHOWN // 2) :]
        return [(i, values[i]) for i in order]
    common = [i for i in rows[0] if all(i in own for own in rows[1:])]
    spreads = {}
    for i in common:
        values = [own[i][name] for own in rows]
        spreads[i] = max(values) - min(values)
    order = sorted((i for i in common if spreads[i] > 0), key=lambda i: -spreads[i])
    return [(i, spreads[i]) for i in order[:_SHOWN]]


def _questions(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns an image's questions with each run's answers; the same question twice is two."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for at, row in enumerate(rows):
        times: collections.Counter[str] = collections.Counter()
        for question in row.get("questions", ()):
            text = str(question.get("text", ""))
            key = (text, times[text])
            times[text] += 1
            told = found.setdefault(
                key,
                {
                    "text": panels.cut(text, panels.SENTENCE),
                    "type": panels.cut(_first(question, "type", "category"), panels.NAME),
                    "truth": panels.cut(_first(question, "truth", "answer"), panels.SENTENCE),
                    "cells": [None] * len(rows),
                },
            )
            told["cells"][at] = _mark(question)
    return list(found.values())


def _first(question: Mapping[str, Any], *names: str) -> Any:
    return next((question[name] for name in names if name in question), "")


def _mark(question: Mapping[str, Any]) -> dict[str, str]:
    """Returns a question's verdict, by the majority of orders or its score, and its figures."""
    right = number(_first(question, "right", "score")) or 0.0
    score = number(question.get("score"))
    abstained = (number(question.get("abstained")) or 0.0) >= 0.5
    verdict = "right" if right >= 0.5 else "abstained" if abstained else "wrong"
    notes = []
    if score is not None and 0 < score < 1:
        verdict = "partly" if verdict == "wrong" else verdict
        notes.append(f"score {score:.2f}")
    elif 0 < right < 1:
        notes.append(f"right in {right:.0%} of the orders")
    if (expected := number(question.get("expected"))) is not None:
        notes.append(f"p(truth) {expected:.2f}")
    for name, label in (("blind", "no caption"), ("elsewhere", "another’s")):
        if (value := number(question.get(name))) is not None:
            notes.append(f"{label} {MARKS['right' if value >= 0.5 else 'wrong']}")
    said = panels.cut(question.get("said", ""), panels.NAME)
    return {"verdict": verdict, "said": said, "note": "; ".join(notes)}


def _image(chosen: tuple[str, float], name: str, runs: Sequence[Run], rows: Sequence[dict]) -> dict:
    """Returns an image of the page: its captions and questions."""
    own = [of_run[chosen[0]] for of_run in rows]
    questions = _questions(own)
    return {
        "id": panels.cut(chosen[0], panels.SENTENCE),
        "source": panels.cut(own[0].get("source", ""), panels.NAME),
        "spread": shown(name, chosen[1]),
        "captions": [
            {
                "run": run.name,
                "color": color,
                "texts": [panels.cut(t) for t in _texts(row)[:_CAPTIONS]],
                "score": shown(name, row[name]),
                "words": row.get("words"),
                "signs": [panels.label(s) for s in panels.SIGNS if row.get(s)],
                "verdicts": [q["cells"][i]["verdict"] for q in questions if q["cells"][i]],
            }
            for i, (color, run, row) in enumerate(zip(panels.colors(runs), runs, own, strict=True))
        ],
        "questions": questions[:_LISTED],
        "left_out": len(questions[_LISTED:]),
    }


def finish(
    out: Path,
    measured: dict[str, Any],
    others: Mapping[str, dict[str, Any]],
    images: Images,
) -> None:
    """Ends an evaluation by any protocol: writes out/results.json, out/report.html and a table.

    Args:
      out: folder.
      measured: results in the form of results.py; a protocol with differences of its own has put
        them into "against".
      others: those to compare with, by file.
      images: as `write` takes them; where it raises an error, the page shows none.

    Raises:
      ConfigError: others have no image, or no figure, in common with these.
    """
    if others and "against" not in measured:
        measured = measured | {"against": results.compare(measured, others)}
    results.write(out, measured)
    names = results.names([str(out / "results.json"), *others])
    runs = [Run(*pair) for pair in zip(names, [measured, *others.values()], strict=True)]

    def images_if_any(ids: Collection[str]) -> Mapping[str, bytes]:
        try:
            return images(ids)
        except (UserError, OSError, ValueError) as e:
            logging.warning("the page shows no images: %s", e)
            return {}

    write(out / "report.html", runs, images_if_any)
    print(f"page: {out / 'report.html'}")


def write(path: Path, runs: Sequence[Run], images: Images) -> None:
    """Writes the page of an evaluation, one self-contained HTML file without scripts.

    Args:
      path: the file, which is replaced.
      runs: this evaluation, then those that its results were compared with.
      images: reads the images with these ids, at most 40; those that can't be read are left out.

    Raises:
      OSError: it can't be written.
    """
    runs = [Run(panels.cut(run.name, panels.NAME), run.results) for run in runs]
    name = _main_figure(runs)
    rows = [run.row_of() for run in runs]
    chosen = _chosen(runs, name) if name else []
    encoded = images({i for i, _ in chosen}) if chosen else {}
    pages = [
        (_image(one, name, runs, rows), parts.image(encoded.get(one[0], b""), _LARGEST, "JPEG"))
        for one in chosen
    ]
    cells = [c for image, _ in pages for q in image["questions"] for c in q["cells"] if c]
    html = parts.template("evaluation.html.j2").render(
        title=" against ".join([runs[0].name, ", ".join(r.name for r in runs[1:])][: len(runs)]),
        protocol=panels.cut(runs[0].results.get("protocol", "mcq"), panels.NAME),
        count=_images(runs[0].results),
        words=_WORDS.get(runs[0].results.get("protocol", "mcq"), _WORDS["mcq"]),
        runs=list(map(_about, panels.colors(runs), runs)),
        figures=_headline(runs),
        panels=panels.make(runs),
        examples=_examples(runs),
        main=panels.label(name) if name else "",
        images=pages,
        verdicts={cell["verdict"] for cell in cells},
        marks=MARKS,
        checked=any("blind" in run.results["summary"] for run in runs),
    )
    # A caption may hold invalid Unicode, which must not break the page.
    write_whole(path, html, errors="replace")
