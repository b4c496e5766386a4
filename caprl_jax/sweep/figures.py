"""Means of a sweep's arms over seeds, differences to the base arm, and their table."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from caprl_jax.sweep.arms import Sweep
from caprl_jax.sweep.runs import Failure, Outcome

INTERVAL = "95%, Student's t over seeds"


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Returns the mean over seeds with Student's 95% interval (Student 1908).

    A bootstrap over three seeds can't leave their range, and is much too narrow. The interval tells
    how other seeds would come out, on the same held-out images.

    Args:
      values: of each seed, at least one.

    Returns:
      {"mean", "low", "high"}; with one seed low and high are None.
    """
    n, mean = len(values), math.fsum(values) / len(values)
    if n == 1:
        return {"mean": mean, "low": None, "high": None}
    from scipy.special import stdtrit  # JAX needs scipy too

    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    half = float(stdtrit(n - 1, 0.975)) * deviation / math.sqrt(n)
    return {"mean": mean, "low": mean - half, "high": mean + half}


def compare(sweep: Sweep, ended: Sequence[Outcome | Failure]) -> dict[str, Any]:
    """Returns a sweep's results as JSON data.

    Args:
      sweep: with the base arm.
      ended: finished and failed runs.

    Returns:
      {"figure", "interval", "base", "panels", "cpu_seconds", "failed", "beside", "arms"}; each arm
      has "seeds", {seed: {"before", "after", "cpu_seconds", "beside"}}, and spreads over them:
      "before", "after" and, seed by seed with the base arm's, "difference" (None for the base, and
      without a seed in common), and "beside", {name: spread of a figure that seeds have}.
    """
    outcomes = [e for e in ended if isinstance(e, Outcome)]
    failures = [e for e in ended if isinstance(e, Failure)]
    found = {arm: [o for o in outcomes if o.arm == arm] for arm in sweep.arms}
    base = {o.seed: o.after for o in found[sweep.base]}
    arms = {arm: _arm(own, base, arm == sweep.base) for arm, own in found.items() if own}
    return {
        "figure": sweep.figure,
        "interval": INTERVAL,
        "base": sweep.base,
        "panels": {title: dict(panel) for title, panel in sweep.panels.items()},
        "cpu_seconds": round(math.fsum(o.cpu_seconds for o in outcomes), 1),
        "beside": list(sweep.beside),
        "failed": [{"arm": f.arm, "seed": f.seed, "said": f.said} for f in failures],
        "arms": arms,
    }


def _arm(own: Sequence[Outcome], base: Mapping[int, float], is_base: bool) -> dict[str, Any]:
    pairs = [o.after - base[o.seed] for o in own if o.seed in base]
    return {
        "seeds": {
            str(o.seed): {
                "before": o.before,
                "after": o.after,
                "cpu_seconds": o.cpu_seconds,
                "beside": dict(o.beside),
            }
            for o in own
        },
        "before": spread([o.before for o in own]),
        "after": spread([o.after for o in own]),
        "difference": spread(pairs) if pairs and not is_base else None,
        "beside": {
            name: spread([o.beside[name] for o in own if name in o.beside])
            for name in dict.fromkeys(name for o in own for name in o.beside)
        },
    }


def table(results: Mapping[str, Any]) -> str:
    """Formats results as plain text: a line for each arm of each panel."""
    beside = results.get("beside", [])
    head = ("", "seeds", "before", "after", "95% interval", "minus base", "95% interval", *beside)
    rows: list[tuple[str, ...]] = [head]
    for title, panel in results["panels"].items():
        rows.append((title,))
        for label, arm in panel.items():
            found = results["arms"].get(arm)
            others = found["beside"] if beside and found else {}
            means = (f"{others[n]['mean']:.3f}" if n in others else "" for n in beside)
            rows.append((f"  {label}", *_cells(found, arm == results["base"]), *means))
    widths = [max(len(row[i]) for row in rows if len(row) > i) for i in range(len(head))]
    lines = []
    for row in rows:
        first, rest = f"{row[0]:<{widths[0]}}", zip(row[1:], widths[1:], strict=False)
        lines.append("  ".join([first, *(f"{cell:>{w}}" for cell, w in rest)]).rstrip())
    minutes = results["cpu_seconds"] / 60
    lines.append(f"{results['figure']}; {results['interval']}; {minutes:.0f} CPU minutes")
    for failed in results["failed"]:
        lines.append(f"failed: {failed['arm']}, seed {failed['seed']}: {failed['said']}")
    return "\n".join(lines)


def _cells(arm: Mapping[str, Any] | None, is_base: bool) -> tuple[str, ...]:
    if arm is None:
        return ("0", "", "", "", "", "")
    after, difference = arm["after"], arm["difference"]
    first = (str(len(arm["seeds"])), f"{arm['before']['mean']:.3f}", f"{after['mean']:.3f}")
    if difference is None:
        return (*first, _interval(after), "base" if is_base else "", "")
    return (*first, _interval(after), f"{difference['mean']:+.3f}", _interval(difference, "+"))


def _interval(spread: Mapping[str, float | None], sign: str = "") -> str:
    if spread["low"] is None:
        return ""
    return f"[{spread['low']:{sign}.3f}, {spread['high']:{sign}.3f}]"
