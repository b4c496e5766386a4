"""Prints plans as a Markdown table: topology, memory and a step's roofline.

python -m caprl_jax.plan_table PLAN.json ...    (files that caprl_jax.plan --json wrote)
python -m caprl_jax.plan_table --scaling SMALL.json LARGE.json
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from caprl_jax.commands import listing

GIB = 2**30
_HEAD = (
    "| config | topology | GiB a chip | roofline, s a step | bound by | tokens/s a chip by it |",
    "|---|---|---|---|---|---|",
)


def row(plan: dict[str, Any]) -> str:
    """Formats one plan as a row."""
    words = "".join(f" {k}={v}" for k, v in plan["overrides"].items())
    where = f"| `{Path(plan['config']).name}`{words} | {plan['topology']} "
    if plan["fits"] is False and plan["refusal"]:
        needs = f"needs {plan['reckoned'] / GIB:.1f}, reckoned" if plan["reckoned"] else ""
        needs += f", of {plan['usable'] / GIB:.1f}" if plan.get("usable") else ""
        return where + f"| does not fit: {needs or plan['refusal'][:80]} | | | |"
    bounds = _bounds(plan)
    if not plan["step_seconds"]:
        return where + f"| {plan['total'] / GIB:.1f} | unknown | {bounds} | |"
    rate = plan["tokens"] / plan["step_seconds"] / plan["chips"]
    fits = "" if plan["fits"] else ": too much"
    return where + (
        f"| {plan['total'] / GIB:.1f} of {(plan.get('usable') or plan['hbm']) / GIB:.0f}{fits} "
        f"| {plan['step_seconds']:.1f} | {bounds} | {rate:,.0f} |"
    )


def efficiency(small: dict[str, Any], large: dict[str, Any]) -> str:
    """Compares a chip's pace, bounds and received bytes on few and on many devices.

    Both rooflines are taken twice: with all resources overlapping perfectly, and with the time of
    links and network on top of the slower of the other two.
    """
    lines = []
    for how, seconds in (("overlapped", _overlapped), ("links on top", _on_top)):
        ratio = seconds(small) / seconds(large)
        lines.append(f"{how}: {seconds(small):.2f} s -> {seconds(large):.2f} s a step, {ratio:.1%}")
    for plan in (small, large):
        lines += [f"{plan['topology']} is bound by {_bounds(plan)}"]
        for key, by in (("link_bytes", ""), ("network_bytes", " by network")):
            kinds: dict[str, float] = {}
            for f in plan["rooflines"].values():
                for kind, count in f.get(key, {}).items():
                    kinds[kind] = kinds.get(kind, 0.0) + count / 1e9
            if kinds:
                told = ", ".join(f"{kind} {count:.1f}" for kind, count in kinds.items())
                lines += [f"received by a chip of {plan['topology']}{by}, GB a step: {told}"]
    return "\n".join(lines)


def _bounds(plan: dict[str, Any]) -> str:
    phases = plan["rooflines"].items()
    return ", ".join(f"{name} {f['bound']}" for name, f in phases if name != "other")


def _overlapped(plan: dict[str, Any]) -> float:
    return sum(max(f["seconds"].values()) for f in plan["rooflines"].values())


def _on_top(plan: dict[str, Any]) -> float:
    return sum(
        max(f["seconds"]["compute"], f["seconds"]["memory"])
        + f["seconds"]["links"]
        + f["seconds"].get("network", 0.0)
        for f in plan["rooflines"].values()
    )


def main(paths: list[str]) -> None:
    """Prints the table of the files' plans, in the order given."""
    if not paths or "--help" in paths:
        print(f"{__doc__}\n{listing.describe_commands()}")
        return
    scaling = paths[0] == "--scaling"
    if scaling and len(paths) != 3:
        sys.exit(f"error: --scaling takes two plans, not {len(paths) - 1}")
    files = {path: _read(path) for path in paths[scaling:]}
    if scaling:
        print(_told(efficiency, *files.items()))
    else:
        print("\n".join([*_HEAD, *(_told(row, item) for item in files.items())]))


def _read(path: str) -> Any:
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as e:
        sys.exit(f"error: {path} is not what caprl_jax.plan --json writes: {e}")


def _told(tell: Callable[..., str], *plans: tuple[str, Any]) -> str:
    try:
        return tell(*(plan for _, plan in plans))
    except (KeyError, TypeError, AttributeError, ValueError, ZeroDivisionError) as e:
        names = " or ".join(path for path, _ in plans)
        sys.exit(
            f"error: {names} is not what caprl_jax.plan --json writes: {type(e).__name__}: {e}"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
