"""kill -9 at 20 points of a run: it goes on, and ends as the run that nobody killed."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from .killed import CAPRL, Kill, Server, everything_equals, kinds_of_changes, newest_equals

pytestmark = [pytest.mark.slow, pytest.mark.kills]
SETTINGS = CAPRL | {"steps": 12, "eval.every": 6, "checkpoint.every": 1}
# The last change of an export before it takes its place. A process's first export is slow: by
# then the checkpoint of the step is whole, and a restart begins behind the export.
WRITTEN = r"os.rename export/\d+\.partial/"


def draw(rng: random.Random, changes: dict[str, list[str]]) -> tuple[list[Kill], list[Kill]]:
    """Draws the points of two chains of 10: of any time, in saves, exports and reports."""
    saves = [
        Kill("save", rng.choice((1, 2)), change, rng.choice((0.0, 0.0, 0.1)))
        for change in rng.sample(changes["save"], 8)
    ]
    exports = [Kill("export", 1, change) for change in rng.sample(changes["export"], 2)]
    anywhere = [Kill("start", delay=rng.uniform(0.1, 9)) for _ in range(6)]
    reports = [Kill("report", 1, change) for change in rng.sample(changes["report"], 2)]
    # The end of the first chain: in the report, then between the renames that replace the export.
    first, second = saves[:4] + exports[:1] + anywhere[:3], saves[4:] + exports[1:] + anywhere[3:]
    rng.shuffle(first)
    rng.shuffle(second)
    between = Kill("export", 1, r"os.rename export/\d+\.partial$")
    return [*first, reports[0], between], [*second, Kill("export", 1, WRITTEN), reports[1]]


def chain(folder, name: str, kills: list[Kill]) -> list[str]:
    """Starts one run again and again, each time with a kill, then to its end; returns a table."""
    whole, parts, rows = folder / "whole", folder / name, []
    with Server(folder) as server:
        for kill in kills:
            code = server.run(name, kill, SETTINGS)
            assert code == -9, (kill, code, server.log.read_text())
            inside, change, seconds = server.killed_inside()
            step = newest_equals(parts, whole)
            rows.append(f"{name} | {inside} | {change} | {seconds:.1f} s | step {step}: equal")
            print(rows[-1], flush=True)
        assert server.run(name, None, SETTINGS) == 0, server.log.read_text()
    everything_equals(parts, whole)
    assert not (parts / "damaged-checkpoints").exists()
    return rows


def test_a_run_killed_at_20_points_equals_an_uninterrupted_one(tmp_path):
    """8 kills in saves, 4 in exports, 2 in reports and 6 at any time, in two workdirs."""
    with Server(tmp_path) as server:
        code = server.run("whole", None, SETTINGS | {"checkpoint.keep": 99})
        assert code == 0, server.log.read_text()
        changes = kinds_of_changes(server.events)
    chains = draw(random.Random(18), changes)
    with ThreadPoolExecutor(2) as pool:
        tables = list(pool.map(chain, [tmp_path] * 2, ("a", "b"), chains))
    places = [row.split(" | ")[1] for table in tables for row in table]
    assert len(places) == 20
    assert sum("save" in place for place in places) >= 6
    assert sum("export" in place or "report" in place for place in places) >= 3
