"""generate and filter are killed at random moments: the files are those of a job that ran through.

By hand: bash launch/test.sh -m kills -n 0 -s tests/curate.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from ..endpoint_server import FAULTS, serving
from ..xla_flags import ONE_DEVICE
from . import filter_test, scripted

pytestmark = [pytest.mark.slow, pytest.mark.kills]
KILLS = 10


def start(*arguments):
    command = [sys.executable, "-m", "caprl_jax.curate", *map(str, arguments)]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ONE_DEVICE}
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)


def run_through(*arguments):
    process = start(*arguments)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said


def killed(moment, server, out, *arguments):
    """Kills a job `moment` seconds after it first asks; (entries so far, exit code)."""
    before = server.asked.total()
    process = start(*arguments)
    while server.asked.total() == before and process.poll() is None:
        time.sleep(0.02)
    try:
        process.wait(moment)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
    process.communicate()
    return sum(p.read_bytes().count(b'{"index"') for p in out.glob("*.part-*")), process.returncode


@pytest.mark.parametrize("job", ["generate", "filter"])
def test_ten_kills_lose_and_double_nothing(tmp_path, job):
    def slowly(request):
        time.sleep(0.15)
        return {"generate": scripted.writes, "filter": filter_test.answers}[job](request)

    (tmp_path / "in").mkdir()
    names = [*scripted.photographs(tmp_path / "in"), *scripted.crops(tmp_path / "in", 117)]
    rows = [
        {"id": n, "image": n, "questions": [filter_test.question(kind, i)]}
        for i, n in enumerate(names)
        for kind in [list(filter_test.KINDS)[i % 6]]
    ]
    if job == "filter":
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "in" / "rows.jsonl").write_text(text)
    else:
        (tmp_path / "in" / "bad.jpg").write_bytes(b"<html>")
    source = {"generate": "--images", "filter": "--rows"}[job]
    given = tmp_path / "in" / ("rows.jsonl" if job == "filter" else "")
    rng, done, ends = random.Random(job), [], []
    own = [job, f"{source}={given}", "--timeout=1", "--concurrency=16"]
    with serving(slowly, FAULTS) as server:
        run_through(*own, f"--model={server.url}", f"--out={tmp_path / 'whole'}")
    out = tmp_path / "out"
    own.append(f"--out={out}")
    with serving(slowly, FAULTS) as server:
        for _ in range(KILLS):
            moment = rng.uniform(0, 1 if job == "generate" else 4)
            count, end = killed(moment, server, out, *own, f"--model={server.url}")
            done.append(count)
            ends.append(end)
        run_through(*own, f"--model={server.url}")
    print(f"{job}: entries after each kill {done}, exit codes {ends}")
    assert ends.count(-signal.SIGKILL) >= 7 and len(set(done)) >= 5  # in the midst of the work
    found, expected = (
        {p.name: p.read_bytes() for p in (tmp_path / x).iterdir()} for x in ("out", "whole")
    )
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
    about = json.loads(expected["about.json"])
    key = {"generate": "images", "filter": "rows"}[job]
    assert about[key] == 120 + (job == "generate")
