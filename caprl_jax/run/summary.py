"""What a run leaves behind: summary.json, the printed table, report.html."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_collections

from caprl_jax.data.pipeline import HeldOut
from caprl_jax.data.questions import Presented
from caprl_jax.data.records import LETTERS
from caprl_jax.data.set_aside import SetAside
from caprl_jax.evaluate.heldout import Judged, Written
from caprl_jax.parallel import processes as distributed
from caprl_jax.report import html as report
from caprl_jax.run import metrics
from caprl_jax.run.build import Objective

Evaluation = tuple[dict[str, float], dict[str, list[Judged]]]


def remembered(path: Path, evaluate: Callable[[Any], Evaluation], params: Any) -> Evaluation:
    """evaluate(params), or what an earlier part of the run wrote to path.

    All processes evaluate, or none does; then others than the first get nothing.
    """
    if distributed.agreed(path.is_file()):
        if not distributed.is_first():
            return {}, {}
        values, sets = json.loads(path.read_text())
        return values, {
            name: [Judged(Written(**j.pop("caption")), **j) for j in judged]
            for name, judged in sets.items()
        }
    values, sets = evaluate(params)
    if not distributed.is_first():
        return values, sets
    plain = {name: [dataclasses.asdict(j) for j in judged] for name, judged in sets.items()}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps([values, plain]))
    partial.rename(path)
    return values, sets


def summarise(
    before: dict[str, float],
    after: dict[str, float],
    ceiling: float | None,
    steps: int,
    wall_seconds: float,
    set_aside: int,
) -> dict[str, Any]:
    """The figures of summary.json: greedy ones plainly named, the sampled ones so called."""
    out: dict[str, Any] = {"steps": steps, "wall_seconds": round(wall_seconds, 1)}
    for when, values in (("before", before), ("after", after)):
        for name, value in values.items():
            plain = name.removesuffix("_greedy")
            plain = f"heldout_{plain}" if plain.startswith("accuracy") else plain
            out[f"{plain}_{when}"] = value
    if ceiling is not None:
        out["ceiling"] = ceiling
    out["records_set_aside"] = set_aside
    return out


def _answer(presented: Presented, letter: int, p_truth: float) -> report.Answer:
    return report.Answer(
        question=presented.text,
        options=presented.lettered(),
        letter=LETTERS[letter],
        truth=LETTERS[presented.truth],
        abstained=letter == len(presented.options) - 1,
        p_truth=p_truth,
    )


def _caption(data: HeldOut, judged: Judged) -> report.Caption:
    shown = data.presented[judged.caption.record]
    answers = [
        _answer(p, letter, p_truth)
        for p, letter, p_truth in zip(shown, judged.letters, judged.p_truth, strict=True)
    ]
    text, length = judged.caption.text, len(judged.caption.ids)
    return report.Caption(text, length, judged.accuracy(shown), answers)


def finish(
    config: ml_collections.ConfigDict,
    workdir: Path,
    objective: Objective,
    before: Evaluation,
    after: Evaluation,
    set_aside: SetAside,
    wall_seconds: float,
) -> dict[str, Any]:
    """Writes summary.json and report.html, prints the table, returns the summary."""
    for other in sorted(workdir.glob("set_aside-*.jsonl")):  # of other processes
        set_aside.read(other)
    history = metrics.read(workdir)
    steps = max((line["step"] for line in history), default=0)
    listing = set_aside.listing()
    summary = summarise(before[0], after[0], objective.ceiling, steps, wall_seconds, len(listing))
    (workdir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    samples = []
    if before[1] and objective.heldout is not None:
        pairs = zip(before[1]["greedy"], after[1]["greedy"], strict=True)
        for old, new in list(pairs)[: config.eval.shown]:
            image = objective.heldout.records[old.caption.record].image
            held = objective.heldout
            samples.append(report.Sample(image, _caption(held, old), _caption(held, new)))
    report.write_report(
        workdir / "report.html",
        title=f"caprl_jax: {config.objective} run in {workdir.name}",
        summary=summary,
        history=history,
        samples=samples,
        set_aside=listing,
        config_text=config.to_json(indent=2),
    )
    print(report.summary_table(summary))
    print(f"report: {workdir / 'report.html'}")
    return summary
