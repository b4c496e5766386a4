"""W&B and MLflow, without a network, hold what metrics.jsonl and captions.jsonl hold."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from caprl_jax.errors import UserError
from caprl_jax.run import environment, metrics
from caprl_jax.run.sinks import SINKS, dashboard, require_packages

from ...clock import CLOCK
from ..captions_test import evaluated
from ..disk_test import train_in
from . import shown
from .shown import NAN, rows

ROOT = Path(__file__).parents[3]
SHOWN = {
    "wandb": (shown.wandb_scalars, shown.wandb_tables),
    "mlflow": (shown.mlflow_scalars, shown.mlflow_tables),
}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No variable of the user's or of an earlier test chooses a server."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    for name in ("MLFLOW_TRACKING_URI", "WANDB_DATA_DIR", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=SHOWN)
def service(request):
    return request.param


def open_writer(workdir, service, resume_step=None):
    return metrics.MetricWriter(workdir, resume_step, {service: SINKS.choose(service, {})})


def step(writer, number):
    """Writes a step's scalars and every second step's evaluation and table."""
    loss = NAN if number == 2 else -1e-30 * number
    writer.write(number, {"reward": number / 3, "reward/accuracy": 0.1 * number, "loss": loss})
    if number % 2 == 0:
        writer.write(number, {"accuracy_greedy": number / 7}, prefix="eval/")
        writer.table(number, rows())


def agrees(workdir, service, redone=()):
    """The dashboard's scalars are exactly those of metrics.jsonl, and not empty.

    The clock's figures of steps that were done twice are those of the first time.
    """
    found, expected = SHOWN[service][0](workdir), shown.jsonl(workdir)
    assert found.keys() == expected.keys() and len(found) > 4
    keys = [k for k in sorted(expected) if not (k[0] in redone and k[1] in CLOCK)]
    np.testing.assert_array_equal(*([d[k] for k in keys] for d in (found, expected)))


def test_the_scalars_and_the_tables_are_those_of_the_files(tmp_path, service):
    with open_writer(tmp_path, service) as writer:
        writer.table(0, rows())
        for number in range(1, 6):
            step(writer, number)
    agrees(tmp_path, service)
    tables = SHOWN[service][1](tmp_path)
    lines = [json.loads(x) for x in (tmp_path / "captions.jsonl").read_text().splitlines()]
    assert sorted(tables) == [0, 2, 4] == sorted({line["step"] for line in lines})
    for line, row in zip(lines, (r for s in sorted(tables) for r in tables[s]), strict=True):
        assert (row["name"], row["caption"]) == (line["image"], line["caption"])
        assert (row["tokens"], row["reward"]) == (line["tokens"], line["reward"])
        for verdict in line["verdicts"]:
            assert verdict["question"] in row["verdicts"] and verdict["verdict"] in row["verdicts"]
    for i, row in enumerate(tables[4]):
        assert row["image"].size == (40, 20)
        assert row["image"].convert("RGB").getpixel((3, 3)) == (100 * i, 50, 0)


def test_a_resumed_run_goes_on_in_the_same_run_with_each_step_once(tmp_path, service):
    """Stopped at 7, resumed from 4: steps 5 to 7 keep their values; a later start adds nothing."""
    with open_writer(tmp_path, service) as writer:
        for number in range(1, 8):
            step(writer, number)
    first = json.loads((tmp_path / f"{service}.json").read_text())
    with open_writer(tmp_path, service, 4) as writer:
        for number in range(5, 11):
            step(writer, number)
    agrees(tmp_path, service)
    with open_writer(tmp_path, service, 10) as writer:
        writer.write(10, {"accuracy_greedy": 10 / 7}, prefix="eval/")
        writer.table(10, rows())
    agrees(tmp_path, service)
    assert json.loads((tmp_path / f"{service}.json").read_text())["run"] == first["run"]
    if service == "wandb":
        runs = [r.run for r in shown.wandb_records(tmp_path) if r.HasField("run")]
        assert len(runs) == 2  # the last start had nothing to send
        assert {run.run_id for run in runs} == {first["run"]}
        counts = [row["_step"] for row in shown.wandb_history(tmp_path)]
        assert counts == list(range(len(counts)))  # as if it were one file


def test_a_sink_that_a_resumed_run_adds_gets_the_earlier_steps_too(tmp_path, service):
    with metrics.MetricWriter(tmp_path) as writer:
        for number in range(1, 6):
            step(writer, number)
    with open_writer(tmp_path, service, 4) as writer:
        step(writer, 5)
    agrees(tmp_path, service)


def test_a_service_that_fails_costs_a_warning_and_gets_everything_later(
    tmp_path, service, monkeypatch, caplog
):
    """Broken within steps 2 to 5: errors of the client, of any kind, are never the run's."""
    now = [0.0]
    monkeypatch.setattr(dashboard.time, "monotonic", lambda: now[0])
    with open_writer(tmp_path, service) as writer:
        step(writer, 1)
        sink, tries = writer._sinks[0], []
        working = sink._client

        class Broken:
            def __getattr__(self, name):
                tries.append(name)
                raise RuntimeError("the server is on fire")

        sink._client = Broken()
        for number in range(2, 5):
            step(writer, number)
        assert len(tries) == 2  # metrics and a table: no second try before a minute has passed
        now[0] += 61
        step(writer, 5)
        assert len(tries) == 3
        said = f"the run goes on: {service}: RuntimeError: the server is on fire"
        # Of metrics and of tables, each once.
        assert caplog.text.count("on fire") == 2 and caplog.text.count(said) == 2
        sink._client = working
        now[0] += 121
        step(writer, 6)
        assert caplog.text.count("written again") == 2
    agrees(tmp_path, service)
    assert sorted(SHOWN[service][1](tmp_path)) == [2, 4, 6]


def test_steps_that_never_arrived_are_sent_when_the_run_resumes(tmp_path, service, caplog):
    with open_writer(tmp_path, service) as writer:
        step(writer, 1)
        writer._sinks[0].send = lambda *_: 1 / 0
        for number in range(2, 6):
            step(writer, number)
    assert "ZeroDivisionError" in caplog.text
    with open_writer(tmp_path, service, 5) as writer:
        step(writer, 6)
    agrees(tmp_path, service)


def test_a_new_run_whose_dashboard_can_not_be_opened_is_refused(tmp_path, service, monkeypatch):
    """A resumed run goes on without it, and opens it later."""
    with open_writer(tmp_path, service) as writer:
        step(writer, 1)
    sink = type(SINKS.choose(service, {})(tmp_path, 1))
    opens, now = sink.open, [0.0]
    monkeypatch.setattr(dashboard.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sink, "open", lambda self, run: 1 / 0)
    with pytest.raises(UserError, match=f"the sink {service} can't be opened: ZeroDivisionError"):
        open_writer(tmp_path / "other", service)
    with open_writer(tmp_path, service, 1) as writer:
        step(writer, 2)
        monkeypatch.setattr(sink, "open", opens)
        now[0] += 61
        step(writer, 3)
    agrees(tmp_path, service)


def test_config_and_environment_are_in_the_dashboard(tmp_path, service):
    config = {"steps": 3, "mesh": {"rules": {"mlp": ["tensor"]}}, "policy": {"path": "x" * 9000}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    environment.record(tmp_path, {"data": 8})
    (start,) = environment.starts(tmp_path)
    with open_writer(tmp_path, service) as writer:
        step(writer, 1)
    if service == "wandb":
        (run,) = (r.run for r in shown.wandb_records(tmp_path) if r.HasField("run"))
        found = {u.key: json.loads(u.value_json) for u in run.config.update}
        assert found["config"] == config and found["environment"] == start
        return
    _, run = shown.mlflow_run(tmp_path)
    assert run.data.params["steps"] == "3" and run.data.params["mesh.rules.mlp"] == "['tensor']"
    assert run.data.tags["packages.jax"] == start["packages"]["jax"]
    assert run.data.tags["devices.count"] == "8"
    assert run.data.tags["mlflow.source.git.commit"] == start["git"]["revision"]


def test_a_missing_package_is_told_before_a_run_with_its_extra(tmp_path, service, monkeypatch):
    chosen = {"board": SINKS.choose(service, {}), "tensorboard": SINKS.choose("tensorboard", {})}
    require_packages(chosen)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"config\.sinks\.board .*'caprl_jax\[{service}\]'"):
        require_packages(chosen)


def test_a_run_that_its_config_gives_a_dashboard_is_stopped_and_resumed(tmp_path, service):
    """The loop of a real run, around a step that only counts."""
    held = evaluated(rows(1)[0].image)
    changes = {"sinks": {"board": {"sink": service}}, "eval.every": 3, "eval.shown": 2}

    def stop():
        raise RuntimeError("out of order")

    with pytest.raises(RuntimeError, match="out of order"):
        train_in(tmp_path, {6: stop}, held, **changes)
    train_in(tmp_path, None, held, **changes)
    agrees(tmp_path, service, redone=[5])
    assert len({step for step, _ in shown.jsonl(tmp_path)}) == 8
    tables = SHOWN[service][1](tmp_path)
    assert {s: [row["caption"] for row in table] for s, table in tables.items()} == {
        s: ["caption 0", "caption 1"] for s in (0, 3, 6, 8)
    }


KILLED = """
import os, sys, time
from pathlib import Path
from tests.run.sinks.dashboards_test import open_writer, step
writer = open_writer(Path(sys.argv[1]), "wandb")
for number in range(1, 6):
    step(writer, number)
time.sleep(2)  # a kill may cost W&B the last second
os.kill(os.getpid(), 9)
"""


def test_a_killed_run_goes_on_without_a_gap(tmp_path, monkeypatch):
    """MLflow's files are written at once; W&B's come from a process of its own."""
    monkeypatch.delenv("WANDB_SERVICE", raising=False)  # this process's own, which lives on
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == -9
    with open_writer(tmp_path, "wandb", 4) as writer:
        for number in range(5, 8):
            step(writer, number)
    agrees(tmp_path, "wandb")


def test_a_run_that_fails_is_marked_until_it_has_been_resumed(tmp_path, service):
    def status():
        if service == "mlflow":
            return shown.mlflow_run(tmp_path)[1].info.status
        ends = [r.exit.exit_code for r in shown.wandb_records(tmp_path) if r.HasField("exit")]
        return {0: "FINISHED", 1: "FAILED"}[ends[-1]]

    with pytest.raises(ZeroDivisionError), open_writer(tmp_path, service) as writer:
        step(writer, 1)
        step(writer, 1 // 0)
    assert status() == "FAILED"
    with open_writer(tmp_path, service, 1) as writer:
        step(writer, 2)
    assert status() == "FINISHED"


def test_a_try_that_failed_half_way_doubles_nothing(tmp_path, monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr(dashboard.time, "monotonic", lambda: now[0])
    with open_writer(tmp_path, "mlflow") as writer:
        client = writer._sinks[0]._client
        log_batch = client.log_batch

        def half(run, metrics):
            log_batch(run, metrics=metrics[:2])
            raise ConnectionError("the line is cut")

        step(writer, 1)
        client.log_batch = half
        step(writer, 2)
        client.log_batch = log_batch
        now[0] += 61
        step(writer, 3)
        client.set_terminated = None  # the end fails too, with another kind of error
    assert "can't be closed: mlflow: TypeError" in caplog.text
    agrees(tmp_path, "mlflow")


def test_tables_that_find_no_store_hold_no_metrics_up(tmp_path, service):
    """MLflow, say, keeps tables in another store than metrics."""
    with open_writer(tmp_path, service) as writer:
        writer._sinks[0]._tables._send = lambda *_: 1 / 0
        for number in range(1, 5):
            step(writer, number)
    agrees(tmp_path, service)
