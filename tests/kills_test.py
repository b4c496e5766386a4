"""kill -9 at 20 random points of one run: it goes on, and ends as the run that nobody killed."""

import random
import re

import pytest

from .killed import Kill, Server, everything_equals, newest_equals

pytestmark = pytest.mark.slow
STEPS, KILLS = 14, 20
SEED = 18
# Changes of files in a save, an export and the report of this run.
SAVE, EXPORT, REPORT = 24, 10, 3


def kills(rng: random.Random) -> list[Kill]:
    """Draws the points: 9 in saves, 3 in exports, 5 at any time; then in the report and export."""
    # Without a delay the point lies at a change of a file, with one within the writing of arrays.
    save = [
        Kill("save", rng.choice((1, 1, 2)), rng.randint(1, SAVE), rng.choice((0.0, 0.0, 0.1)))
        for _ in range(9)
    ]
    export = [Kill("export", 1, rng.randint(1, EXPORT)) for _ in range(3)]
    anywhere = [Kill("start", delay=rng.uniform(0.1, 12)) for _ in range(5)]
    mixed = save + export + anywhere
    rng.shuffle(mixed)
    return mixed


def last_kills(rng: random.Random) -> list[Kill]:
    """Draws two points in the report, and between the two renames that replace an export."""
    report = [Kill("report", 1, event) for event in rng.sample(range(1, REPORT + 1), 2)]
    return [report[0], Kill("export", 1, EXPORT + 3), report[1]]


def test_a_run_killed_at_20_random_points_equals_an_uninterrupted_one(tmp_path):
    rng = random.Random(SEED)
    server = Server(tmp_path)
    try:
        common = {"steps": STEPS, "eval.every": 5}
        whole, parts = tmp_path / "whole", tmp_path / "parts"
        assert server.run("whole", **common, **{"checkpoint.keep": 99}) == 0, server.log.read_text()
        count = {"save": 0, "export": 0, "report": 0}
        points = kills(rng) + last_kills(rng)
        assert len(points) == KILLS
        for number, kill in enumerate(points, start=1):
            code = server.run("parts", kill, **common)
            assert code == -9, (kill, code, server.log.read_text())
            inside, change, seconds = server.killed_inside()
            done = newest_equals(parts, whole)
            print(
                f"{number:2} | {kill} | {inside} | {change} | {seconds:.1f} s | step {done} equal"
            )
            for place in count:
                count[place] += bool(re.search(place, inside))
        assert count["save"] >= 6 and count["export"] + count["report"] >= 3, count
        assert server.run("parts", **common) == 0, server.log.read_text()
        everything_equals(parts, whole)
        print(f"{KILLS} of {KILLS} kills; inside: {count}")
    finally:
        server.close()
