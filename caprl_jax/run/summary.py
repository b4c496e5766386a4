"""The end of a run: summary.json, the printed table, report.html."""

import base64
import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_collections

from caprl_jax.data.pipeline import HeldOut
from caprl_jax.data.set_aside import SetAside
from caprl_jax.evaluate import hygiene
from caprl_jax.evaluate.heldout import Evaluation, Judged, Written
from caprl_jax.files import write_whole
from caprl_jax.parallel import processes
from caprl_jax.report import html
from caprl_jax.run import captions, metrics, same_run

# Names that the summary begins with "heldout_".
_OF_HELDOUT = ("accuracy", "rubric", "loss", "perplexity", *hygiene.NAMES)


@dataclasses.dataclass(frozen=True)
class Figures:
    """The figures of a run.

    Attributes:
      before: held-out evaluation before the first step.
      after: held-out evaluation after the last step.
      ceiling: held-out accuracy on complete true captions; None where the truth is unknown.
      wall_seconds: seconds of the run since this start.
    """

    before: Evaluation
    after: Evaluation
    ceiling: float | None
    wall_seconds: float


def remembered(
    path: Path, config: ml_collections.ConfigDict, evaluate: Callable[[], Evaluation]
) -> Evaluation:
    """Returns evaluate(), or the result that an earlier part of the run wrote to path.

    Either all processes evaluate, or none does; then only the first gets the result. A result of
    another run's settings, or one that can't be read, is not used.

    Args:
      path: the file of the result, with the config that it was made with.
      config: of this run, settled.
      evaluate: evaluates the model before training.
    """
    earlier = _recall(path, config) if processes.is_first() else None
    if processes.agreed(earlier is not None):
        return earlier or ({}, {})
    logging.info("evaluating before training")
    values, sets = evaluate()
    if processes.is_first():
        plain = {name: [dataclasses.asdict(j) for j in judged] for name, judged in sets.items()}
        try:
            write_whole(path, json.dumps([values, plain, json.loads(config.to_json())]))
        except OSError as e:
            logging.warning("%s can't be written: a restart evaluates again (%s)", path, e)
    return values, sets


def _recall(path: Path, config: ml_collections.ConfigDict) -> Evaluation | None:
    """Reads what `remembered` wrote; None if it isn't there, is damaged, or is another run's."""
    if not path.is_file():
        return None
    try:
        values, sets, saved = json.loads(path.read_text())
        changed = same_run.differences(saved, config)
        evaluation = (
            dict(values),
            {
                name: [Judged(Written(**j.pop("caption")), **j) for j in judged]
                for name, judged in sets.items()
            },
        )
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as e:
        logging.warning("%s can't be used (%s: %s): evaluating again", path, type(e).__name__, e)
        return None
    if changed:
        logging.info("%s is of another run (%s): evaluating again", path, "; ".join(changed))
        return None
    return evaluation


def summarise(figures: Figures, steps: int, set_aside: int) -> dict[str, Any]:
    """Returns summary.json's figures: greedy ones have plain names, sampled ones say so.

    Figures of the judge alone stand there once, as the ceiling does.
    """
    out: dict[str, Any] = {"steps": steps, "wall_seconds": round(figures.wall_seconds, 1)}
    for when, (values, _) in (("before", figures.before), ("after", figures.after)):
        for name, value in values.items():
            plain = name.removesuffix("_greedy")
            plain = f"heldout_{plain}" if plain.startswith(_OF_HELDOUT) else plain
            out[plain if name in hygiene.ALONE else f"{plain}_{when}"] = value
    if figures.ceiling is not None:
        out["ceiling"] = figures.ceiling
    out["records_set_aside"] = set_aside
    return out


def finish(
    config: ml_collections.ConfigDict,
    workdir: Path,
    held: HeldOut | None,
    figures: Figures,
    set_aside: SetAside,
) -> dict[str, Any]:
    """Writes summary.json, samples.json and report.html, prints the table, returns the summary."""
    for other in sorted(workdir.glob("set_aside-*.jsonl")):  # files of other processes
        set_aside.read(other)
    history = metrics.read(workdir)
    steps = max((line["step"] for line in history), default=0)
    listing = set_aside.listing()
    summary = summarise(figures, steps, len(listing))
    write_whole(workdir / "summary.json", json.dumps(summary, indent=2) + "\n")
    samples = _samples(held, figures, config.eval.shown)
    if config.objective == "sft":
        given = (r.captions for r in held.records) if held else ()
        samples = [dataclasses.replace(s, given=g) for s, g in zip(samples, given, strict=False)]
    write_whole(workdir / "samples.json", json.dumps([_plain(s) for s in samples]) + "\n")
    content = html.Content(
        title=f"caprl_jax: {config.objective} run in {workdir.name}",
        summary=summary,
        history=history,
        samples=samples,
        set_aside=listing,
        config_text=config.to_json(indent=2),
    )
    html.write_report(workdir / "report.html", content)
    print(html.summary_table(summary))
    print(f"report: {workdir / 'report.html'}")
    return summary


def _plain(sample: html.Sample) -> dict[str, Any]:
    """Converts a sample to plain JSON data, the image in base64."""
    plain = dataclasses.asdict(sample)
    return plain | {"image_png": base64.b64encode(sample.image_png).decode()}


def _samples(held: HeldOut | None, figures: Figures, count: int) -> list[html.Sample]:
    """Returns held-out images with their greedy captions before and after."""
    sets = figures.before[1], figures.after[1]
    if held is None or not all(sets):
        return []
    pairs = list(zip(*(judged["greedy"] for judged in sets), strict=True))[:count]
    return [
        html.Sample(
            held.records[old.caption.record].image,
            captions.described(held, old),
            captions.described(held, new),
        )
        for old, new in pairs
    ]
