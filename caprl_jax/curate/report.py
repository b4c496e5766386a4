"""The page of a job's folder, report.html: what was accepted, what was not and why, with images.

The page is one file without scripts. However many rows there are, it shows a few of them, spread
evenly, and says how many.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from caprl_jax.curate import filter as filter_lib
from caprl_jax.curate import generate as generate_lib
from caprl_jax.curate import paraphrase as paraphrase_lib
from caprl_jax.curate.trials import Settings, why_dropped
from caprl_jax.data.images import UnreadableImage
from caprl_jax.data.records import MalformedRecord
from caprl_jax.data.rubrics import parse_rubric
from caprl_jax.data.sources import rows
from caprl_jax.errors import ConfigError
from caprl_jax.files import write_whole
from caprl_jax.report import parts

PAGE = "report.html"
_SAMPLES = 24  # rows of a section
_QUESTIONS = 12  # of a row
_EXAMPLES = 3  # rejects of a reason
_LISTED = 50  # failures
_PIXELS = 320  # longer side of an image
_TEXT = 600  # characters of a rejected text


@dataclasses.dataclass(frozen=True)
class Section:
    """Rows of a file, some of which are shown.

    Attributes:
      title: of the section.
      total: number of rows in the file.
      samples: the rows that are shown: {"id", "image", "questions", "more"}.
    """

    title: str
    total: int
    samples: list[dict[str, Any]]


def write(folder: Path) -> Path:
    """Writes report.html into a folder that another job has made; returns its path.

    Raises:
      ConfigError: the folder holds no results.
    """
    try:
        about = json.loads((folder / "about.json").read_text("utf-8"))
        kind = about["settings"]["job"]
        make, of = KINDS[kind]
        content = make(folder, about, of)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ConfigError(
            f"--dir={folder} holds no finished job of curate: {type(e).__name__}: {e}; give the "
            "--out of generate, rubrics, paraphrase or filter"
        ) from e
    failed, failures = _examples(folder / generate_lib.FAILED, _LISTED)
    common = {"job": kind, "of": of, "about": about, "settings": about["settings"]}
    common |= {"failed": failed, "failures": failures}
    page = parts.template("curate.html.j2").render(common | content)
    write_whole(folder / PAGE, page, errors="replace")
    return folder / PAGE


def _generated(folder: Path, about: Mapping[str, Any], of: str) -> dict[str, Any]:
    examples: dict[str, list[str]] = {}
    for line in _lines(folder / generate_lib.REJECTS):
        texts = examples.setdefault(line["reason"], [])
        if len(texts) < _EXAMPLES:
            texts.append(_cut(line["text"]))
    by_reason = sorted(about["rejects_by_reason"].items(), key=lambda item: (-item[1], item[0]))
    written = about[of] + about["rejects"]
    images = _share(about[f"with_{of}"], about["images"])
    tiles = [
        (f"Images with {of}", images, "of all images"),
        (of.capitalize(), f"{about[of]:,}", "accepted, without duplicates in an image"),
        ("Accepted", _share(about[of], written), "of what the model wrote"),
        ("Failed images", f"{about['failed']:,}", "unreadable, or without an answer in all tries"),
    ]
    return {
        "writes": True,
        "title": f"{of.capitalize()} that a model wrote",
        "tiles": tiles,
        "reasons": [(why, n, examples.get(why, [])) for why, n in by_reason],
        "table": None,
        "sections": [_section(f"Images with their {of}", folder / generate_lib.ROWS, of)],
    }


def _paraphrased(folder: Path, about: Mapping[str, Any], of: str) -> dict[str, Any]:
    page = _generated(folder, about, of)
    tiles = [(name, value, note) for name, value, note in page["tiles"] if name != "Accepted"]
    return page | {"title": "Rubrics made of captions", "tiles": tiles}


def _filtered(folder: Path, about: Mapping[str, Any], of: str) -> dict[str, Any]:
    names = {f.name for f in dataclasses.fields(Settings)}
    settings = Settings(**{k: v for k, v in about["settings"].items() if k in names})
    by_reason = sorted(about["dropped_by_reason"].items(), key=lambda item: (-item[1], item[0]))
    answered = sum(about["options"].values())
    chance = sum(n / int(size) for size, n in about["options"].items()) / max(answered, 1)
    kept, failed = about["kept"], about[f"failed_{of}"]
    asked, unusable = about[of], about["failed"]
    seen, blind = (_share(about[k]["right"], about[k]["answers"]) for k in ("image", "text_only"))
    tiles = [
        ("Kept", _share(kept, asked), f"{kept:,} of {asked:,} {of}"),
        ("Accuracy with the image", seen, f"chance is {parts.percent(chance)}"),
        ("Blind accuracy", blind, f"the same {of} without the image"),
        ("Failed", f"{failed:,}", f"{of}; {unusable:,} rows can’t be used"),
    ]
    return {
        "writes": False,
        "title": f"{of.capitalize()} that need the image",
        "tiles": tiles,
        "reasons": [(why, n, []) for why, n in by_reason],
        "table": _table(about["table"], settings),
        "sections": [
            _section("Kept", folder / filter_lib.KEPT, of),
            _section("Dropped", folder / filter_lib.DROPPED, of),
        ],
    }


def _table(counts: list[list[int]], settings: Settings) -> dict[str, Any]:
    """Counts questions by right answers with the image (rows) and without (columns)."""
    most, n = max(max(map(max, counts)), 1), settings.trials

    def cell(i: int, j: int) -> dict[str, Any]:
        kept = why_dropped(i / n, j / n, settings) is None
        return {"count": counts[i][j], "kept": kept, "share": counts[i][j] / most}

    return {"trials": n, "rows": [[cell(i, j) for j in range(n + 1)] for i in range(n, -1, -1)]}


KINDS = {  # job -> (maker of the page's content, field of a row that it is about)
    generate_lib.QUESTIONS.job: (_generated, "questions"),
    generate_lib.RUBRICS.job: (_generated, "rubrics"),
    paraphrase_lib.JOB: (_paraphrased, "rubrics"),
    filter_lib.JOBS["questions"]: (_filtered, "questions"),
    filter_lib.JOBS["rubrics"]: (_filtered, "rubrics"),
}


def _section(title: str, path: Path, of: str) -> Section:
    total = sum(1 for _ in path.open("rb"))
    shown = {i * total // min(total, _SAMPLES) for i in range(min(total, _SAMPLES))}
    samples = []
    with path.open("rb") as file:
        for number, line in enumerate(file):
            if number in shown:
                samples.append(_sample(path, json.loads(line), of))
    return Section(title, total, samples)


def _sample(path: Path, raw: Mapping[str, Any], of: str) -> dict[str, Any]:
    asked = raw.get(of) or []
    verdicts = raw.get("verdicts") or [None] * len(asked)
    show = _question if of == "questions" else _rubric
    shown = [show(q) | {"verdict": v} for q, v in zip(asked, verdicts, strict=True)]
    try:
        # This project wrote the row, and shows what decodes as an image: any folder will do.
        encoded = rows.image_bytes(rows.Row("", raw, path.parent), Path("/"))
        image = parts.image(encoded, _PIXELS, "JPEG")
    except (MalformedRecord, UnreadableImage):
        image = None
    return {
        "id": raw["id"],
        "image": image,
        "questions": shown[:_QUESTIONS],
        "more": len(shown[_QUESTIONS:]),
        "malformed": raw.get("malformed") or [],
    }


def _question(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {"text": raw["question"], "options": raw["choices"], "truth": raw["answer"]}


def _rubric(raw: Mapping[str, Any]) -> dict[str, Any]:
    rubric = parse_rubric(raw)
    options = [f"{x}) {o}" for x, o in zip("AB", rubric.options, strict=True)]
    text = f"{rubric.text} (weight {rubric.weight:g})"
    return {"text": text, "options": options, "truth": "A"}


def _examples(path: Path, most: int) -> tuple[int, list[dict[str, Any]]]:
    """Returns (number of lines, the first of them)."""
    total = sum(1 for _ in path.open("rb"))
    return total, [line for line, _ in zip(_lines(path), range(most), strict=False)]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def _share(part: int, whole: int) -> str:
    return parts.percent(part / whole if whole else None)


def _cut(text: str) -> str:
    return text if len(text) <= _TEXT else text[: _TEXT - 2] + ".."
