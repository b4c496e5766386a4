"""The table of all cases: python -m tests.hostile.table writes it to tests/hostile/TABLE.md."""

import collections
import importlib
from pathlib import Path

from .case import Case

FILE = Path(__file__).with_name("TABLE.md")
MODULES = (
    "checkpoints",
    "commands",
    "configs",
    "images",
    "model_configs",
    "model_files",
    "rows",
    "templates",
    "text",
)


def cases() -> list[Case]:
    """Returns the cases of all files, sorted by kind and name."""
    modules = (importlib.import_module(f"{__package__}.{name}_test") for name in MODULES)
    found = [case for module in modules for case in module.CASES]
    return sorted(found, key=lambda c: (c.kind, c.name))


def _cell(text: object) -> str:
    shown = str(text).encode("unicode_escape").decode()
    return shown.replace("|", r"\|").replace("<", "&lt;").replace("*", r"\*")


def render(found: list[Case]) -> str:
    """Returns the table, with the number of cases of each kind at its head."""
    counts = collections.Counter(case.kind for case in found)
    lines = [
        "# Hostile inputs, and what comes of each",
        "",
        "Each row is asserted by a test of its own: without a traceback, within 10 s, and without",
        "reading outside of the input's folder or running its code (a config file is code).",
        "`python -m tests.hostile.table` makes this file from the cases.",
        "",
        "| kind | cases |",
        "|---|---|",
        *(f"| {_cell(kind)} | {count} |" for kind, count in counts.items()),
        f"| all | {len(found)} |",
        "",
        "| kind | input | what happens |",
        "|---|---|---|",
        *(f"| {_cell(c.kind)} | {_cell(c.name)} | {_cell(c.outcome)} |" for c in found),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    FILE.write_text(render(cases()))
