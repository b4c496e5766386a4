"""The form of results.json, which all protocols share: reads, compares, writes and prints it.

    {"protocol", "images", "without", "judge", "data", "captions": the file or model,
     "summary": {name: {"mean", "low", "high"}}, "groups": as mcq.groups returns them,
     "each": [{"id", "caption" or "captions", a number for each name of the summary,
               "source", "questions": [{"text", "type", "right", "expected", "abstained", ..}]}]}

"source" and "questions" may be missing; "against", {"file", "images", "summary"} of each
evaluation that it was compared with, too.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from caprl_jax.errors import ConfigError
from caprl_jax.evaluate import mcq
from caprl_jax.files import write_whole
from caprl_jax.report.charts import number

_COUNTED = ("words",)  # figures that are counts, not shares
# Settings that make two evaluations hard to compare if they differ.
_SETTINGS = (
    *("judge", "judge_model", "data", "as_released", "orders", "expected_temperature"),
    *("split", "scorer"),
)


def read(path: str) -> dict[str, Any]:
    """Reads a results.json.

    Raises:
      ConfigError: there is none, or it has another form.
    """
    try:
        results = json.loads(Path(path).read_text("utf-8"))
        for one in results["summary"].values():
            if any(number(one[name]) is None for name in ("mean", "low", "high")):
                raise ValueError("a figure of its summary is no number")
        if not results["each"] or not all(isinstance(row["id"], str) for row in results["each"]):
            raise ValueError("it lists no images, or one without an id")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        reason = f"{type(e).__name__}: {e}"
        raise ConfigError(
            f"--against={path} is no results.json: {reason:.200}; evaluate writes one"
        ) from e
    return results


def compare(
    results: Mapping[str, Any],
    others: Mapping[str, Mapping[str, Any]],
    paired: Callable[[Sequence, Sequence], dict] = mcq.paired,
) -> list[dict[str, Any]]:
    """Returns {"file", "images", "summary": of the differences} for each other evaluation.

    Args:
      results: of this evaluation.
      others: results by file.
      paired: returns the differences between the "each" of two; a protocol may have its own.

    Raises:
      ConfigError: an evaluation has another protocol, or no image, or no figure, in common with
        this one.
    """
    found = []
    for file, other in others.items():
        _check_alike(file, results, other)
        common = {row["id"] for row in results["each"]} & {row["id"] for row in other["each"]}
        try:
            differences = paired(results["each"], other["each"])
        except ValueError as e:
            raise ConfigError(f"--against={file}: {e}") from e
        if not differences:
            raise ConfigError(f"--against={file}: no figure is in both: is it another protocol's?")
        found.append({"file": file, "images": len(common), "summary": differences})
    return found


def _check_alike(file: str, ours: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Raises ConfigError at another protocol; warns of other settings."""
    known = [k for k in ("protocol", *_SETTINGS) if k in ours and k in other]
    differ = {k: f"{k} is {other[k]}, not {ours[k]}" for k in known if ours[k] != other[k]}
    if "protocol" in differ:
        raise ConfigError(f"--against={file}: its {differ['protocol']}; compare those of one")
    if differ:
        logging.warning("--against=%s is of other settings: %s", file, "; ".join(differ.values()))


def shown(name: str, value: float, sign: str = "") -> str:
    """Formats a figure for people: a share as a percentage; `sign` may be "+"."""
    if name in _COUNTED:
        return format(value, f"{sign}.1f")
    return format(value, f"{sign}.1%")


def write(out: Path, results: Mapping[str, Any]) -> None:
    """Writes out/results.json, a line for each image, and prints its table."""
    head = json.dumps({k: v for k, v in results.items() if k != "each"}, indent=1)
    rows = ",\n".join(map(json.dumps, results["each"]))
    write_whole(
        out / "results.json", f'{head.removesuffix("}").rstrip()},\n"each": [\n{rows}\n]}}\n'
    )
    print(f"{results['images']} images: {results['without']}")
    for name, own in results["summary"].items():
        line = f"{name:<12}" + _cell(name, own)
        for other in results.get("against", ()):
            difference = other["summary"].get(name)
            line += "   " + (_cell(name, difference, "+") if difference else f"{'–':>8}")
        print(line.rstrip())
    print(f"results: {out / 'results.json'}")


def _cell(name: str, one: Mapping[str, float], sign: str = "") -> str:
    mean, low, high = (shown(name, one[k], sign) for k in ("mean", "low", "high"))
    return f"{mean:>8}  {f'{low} to {high}':<18}"


def names(files: Sequence[str]) -> list[str]:
    """Returns a short name for each results.json: its folder's, longer where two are equal."""
    paths = [Path(file).absolute() for file in files]
    ways = (
        [path.parent.name for path in paths],
        [f"{path.parent.name}/{path.stem}" for path in paths],
        [str(Path(file).parent) for file in files],
    )
    whole = [str(Path(file).with_suffix("")) for file in files]
    return next((way for way in ways if len(set(way)) == len(way)), whole)
