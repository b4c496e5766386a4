"""The table of configs and the topologies that they were planned for, in Markdown.

python -m caprl_jax.plan_table PLAN.json ...    (what caprl_jax.plan --json wrote)
"""

import json
import sys
from pathlib import Path
from typing import Any

_HEAD = (
    "| config | topology | GiB a chip | step, s at least | bound by | tokens/s a chip, at most |",
    "|---|---|---|---|---|---|",
)


def row(plan: dict[str, Any]) -> str:
    """One plan as a row."""
    where = f"| `{Path(plan['config']).name}` | {plan['topology']} "
    if not plan["fits"]:
        return where + f"| does not fit | | | {plan['refusal'][:80]} |"
    bounds = ", ".join(
        f"{name} {f['bound']}" for name, f in plan["floors"].items() if name != "other"
    )
    rate = plan["tokens"] / plan["step_seconds"] / plan["chips"]
    return where + (
        f"| {plan['total'] / 2**30:.1f} of {plan['hbm'] / 2**30:.0f} "
        f"| {plan['step_seconds']:.1f} | {bounds} | {rate:,.0f} |"
    )


def main(paths: list[str]) -> None:
    """Prints the table of the files' plans, in the order given."""
    if not paths:
        sys.exit(__doc__)
    print("\n".join([*_HEAD, *(row(json.loads(Path(p).read_text())) for p in paths)]))


if __name__ == "__main__":
    main(sys.argv[1:])
