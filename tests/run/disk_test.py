"""Disks that fill up, turn read-only or lose the workdir: a run goes on, or ends with one message.

The disks are real ones (tmpfs); the loop is the run's own, around a step that only counts.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from caprl_jax import config as config_lib
from caprl_jax import train
from caprl_jax.commands import cli
from caprl_jax.data.set_aside import SetAside
from caprl_jax.models.hf import files as hf
from caprl_jax.report import html
from caprl_jax.rl.types import State
from caprl_jax.run import checkpoint, choices, export, load, metrics, skipped, summary
from caprl_jax.run import workdir as workdir_lib
from caprl_jax.run.task import Task
from caprl_jax.run.workdir import WorkdirError

from .. import disk as disks
from .metrics_test import board

_INSIDE = "CAPRL_JAX_TEST_IN_NAMESPACE"  # set in the process that unshare starts
MIB = 1 << 20


@pytest.fixture
def disk(tmp_path):
    with disks.mounted(tmp_path / "disk", 24 * MIB) as directory:
        yield directory


@pytest.mark.skipif(
    _INSIDE in os.environ or disks.can_mount(), reason="the tests below can mount disks themselves"
)
def test_users_who_may_not_mount_run_these_tests_in_a_namespace_of_their_own():
    inside = ["unshare", "--user", "--map-root-user", "--mount"]
    try:
        allowed = subprocess.run([*inside, "true"], capture_output=True).returncode == 0
    except OSError:
        allowed = False
    if not allowed:
        pytest.skip("neither mount nor unshare is allowed here")
    command = [*inside, sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:xdist", __file__]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=os.environ | {_INSIDE: "1"}, capture_output=True
    )
    assert done.returncode == 0, done.stdout.decode()[-3000:]


def config(**changes):
    c = config_lib.default()
    c.update_from_flattened_dict({"steps": 8, "checkpoint.every": 2, "eval.every": 0} | changes)
    return config_lib.complete(c)


def state(steps=0):
    """A state of 2 MiB whose numbers grow by 1 a step; no file of it takes less than 1 MiB."""
    start = np.random.default_rng(0).integers(0, 1 << 22, MIB // 2)
    return State(jnp.int32(steps), {"w": jnp.asarray(start + steps, jnp.float32)}, ())


@jax.jit
def count(state, batch, key):
    """A step that adds 1 to everything."""
    del batch, key
    return jax.tree.map(lambda a: a + 1, state), {"reward": (state.step / 2, jnp.float32(1))}


def train_in(workdir, events=None, held=(None, {}), **changes):
    """Runs train.Loop in a workdir; events maps a step to what happens before it.

    No checkpoint is being written when it happens. `held` has the held-out data, and the captions
    of every evaluation.
    """

    def data(done):
        for step in range(done + 1, 100):
            if step in (events or {}):
                checkpoints.latest()
                events[step]()
            yield np.zeros(1, np.float32)

    c = config(**changes)
    task = Task(
        policy=None,
        source=workdir,
        step=count,
        traces=lambda: 1,
        data=data,
        place=lambda batch: batch,
        evaluate=lambda params: ({"accuracy_greedy": 0.5}, held[1]),
        heldout=held[0],
    )
    with (
        workdir_lib.held(workdir),
        checkpoint.Checkpoints(workdir, c.checkpoint.keep) as checkpoints,
    ):
        last, _ = train.Loop(c, workdir, task, checkpoints).train(state(), ({}, held[1]))
        checkpoints.require_saved()
    return last


def restored(workdir):
    """The last checkpoint's step, after a look at its numbers."""
    with checkpoint.Checkpoints(workdir, None) as checkpoints:
        found = checkpoints.restore_last(state())
    np.testing.assert_array_equal(found.params["w"], state(int(found.step)).params["w"])
    return int(found.step)


def rewards(workdir):
    return [(line["step"], line["reward"]) for line in metrics.read(workdir)]


WHOLE = [(s, (s - 1) / 2) for s in range(1, 9)]  # the metrics of a whole run


@pytest.mark.parametrize("left", [0, 4096, MIB])
def test_a_full_disk_costs_the_checkpoints_that_find_no_room(disk, caplog, left):
    """Full from step 3 to 5: the save of step 4 fails, those of steps 6 and 8 are whole again."""
    workdir, there = disk / "run", []
    events = {
        3: lambda: disks.fill(disk, left),
        5: lambda: there.append(restored(workdir)) or disks.free(disk),
    }
    last = train_in(workdir, events)
    assert int(last.step) == 8 and there == [2]
    assert "the checkpoint of step 4 can't be written" in caplog.text
    assert "No space left on device" in caplog.text
    assert "the one of step 2 is kept, and the next save tries again" in caplog.text
    assert checkpoint.steps(workdir) == [6, 8] and restored(workdir) == 8
    assert not list((workdir / "checkpoints").glob("*tmp*"))
    assert rewards(workdir) == WHOLE
    assert board(workdir)["reward"] == WHOLE


def test_a_disk_that_stays_full_ends_the_run_and_the_same_command_goes_on(disk):
    workdir = disk / "run"
    with pytest.raises(checkpoint.CheckpointError, match=r"See to the disk.* goes on from step 2"):
        train_in(workdir, {3: lambda: disks.fill(disk)})
    with pytest.raises(WorkdirError, match="free space there"):
        train_in(workdir)
    assert restored(workdir) == 2
    disks.free(disk)
    assert int(train_in(workdir).step) == 8
    assert restored(workdir) == 8 and rewards(workdir) == WHOLE
    assert board(workdir)["reward"] == WHOLE


def test_a_disk_that_turns_read_only_keeps_the_last_checkpoint(disk):
    workdir = disk / "run"
    with pytest.raises(checkpoint.CheckpointError, match="Read-only"):
        train_in(workdir, {3: lambda: disks.turn_read_only(disk)})
    assert restored(workdir) == 2
    with pytest.raises(WorkdirError, match="a disk that isn't read-only"):
        train_in(workdir)
    disks.turn_writable(disk)
    assert int(train_in(workdir).step) == 8
    assert restored(workdir) == 8 and rewards(workdir) == WHOLE


@pytest.mark.parametrize("log_every", [1, 100])
def test_a_workdir_that_is_deleted_ends_the_run_with_a_message(disk, log_every):
    workdir = disk / "run"
    with pytest.raises(SystemExit) as ended, cli.in_one_paragraph():
        train_in(workdir, {3: lambda: shutil.rmtree(workdir)}, log_every=log_every)
    # Python prints a text on stderr and exits with 1.
    assert ended.value.code.startswith("error: ") and "the workdir was deleted" in ended.value.code
    assert not workdir.exists()  # else a later run would begin with a stray checkpoint
    assert int(train_in(workdir).step) == 8


def test_a_full_disk_is_told_before_a_run_starts(disk):
    disks.fill(disk, left=MIB // 2)
    with (
        pytest.raises(WorkdirError, match=r"can't write .*run.*: No space left on device; free"),
        workdir_lib.held(disk / "run"),
    ):
        pass
    assert not list((disk / "run").iterdir())


def test_tensorboard_loses_and_tears_nothing_on_a_full_disk(disk, caplog):
    """More events than any buffer holds, first without room, then with some."""
    sinks = {"tensorboard": choices.sinks(config())["tensorboard"]}
    values = {f"figure_{i}": 0.5 for i in range(40)}
    with metrics.MetricWriter(disk / "run", None, sinks) as writer:
        writer.write(1, values)
        for step in range(2, 40):
            if step in (5, 20):
                disks.fill(disk, left=0 if step == 5 else 8192)
            writer.write(step, values)
        disks.free(disk)
        writer.write(40, values)
    assert "metrics are written again" in caplog.text
    shown = board(disk / "run")
    assert shown == {name: [(s, 0.5) for s in range(1, 41)] for name in values}
    assert [line["step"] for line in metrics.read(disk / "run")] == list(range(1, 41))


def test_records_are_set_aside_on_a_full_disk(disk, caplog):
    path = disk / "set_aside.jsonl"
    aside = SetAside(path)
    aside.add("a", "no image")
    disks.fill(disk)
    for i in range(200):  # more than the rest of the file's last page holds
        aside.add(f"b{i}", "too long " * 9)
    assert caplog.text.count("can't be written") == 1
    disks.free(disk)
    aside.add("c", "no image")
    assert [json.loads(x) for x in path.read_text().splitlines()] == aside.listing()
    assert len(aside.listing()) == 202


def test_skipped_batches_find_no_room(disk, caplog):
    watch = skipped.Skipped(disk, most=9)
    disks.fill(disk)
    watch.add(1, {"a": np.zeros(MIB)}, {"skipped_updates": (jnp.float32(1), jnp.float32(1))})
    watch.look()
    assert "its batch can't be kept: " in caplog.text
    disks.free(disk)
    assert not list((disk / "skipped").iterdir())


@pytest.fixture(scope="module")
def model():
    policy, directory = load.read_model("asset:tiny/policy", "", "float32")
    return export.Trained(policy, hf.load_params(directory, policy), directory)


@pytest.mark.parametrize("left", [0, 64 << 10])
def test_an_export_without_room_leaves_none_of_it(disk, model, left):
    """Room for nothing, and for all files but the weights."""
    out, card = disk / "export" / "2", export.model_card(config(), 2, {})
    disks.fill(disk, left=left)
    with pytest.raises(WorkdirError, match="free space there"), workdir_lib.writing(out):
        export.export(out, model, "float32", card)
    assert not list(disk.glob("export/*"))
    disks.free(disk)
    export.export(out, model, "float32", card)
    assert hf.load_params(out, model.policy)


@pytest.mark.parametrize("left", [0, 4096])
def test_a_report_without_room_leaves_the_one_of_before(disk, capsys, left):
    """A finished run's files stay whole when the same command finds the disk full."""
    c, figures = config(), summary.Figures(({}, {}), ({"accuracy_greedy": 0.5}, {}), None, 1.0)
    metrics.MetricWriter(disk, None).close()
    summary.finish(c, disk, None, figures, SetAside())
    names = ("summary.json", "samples.json", "report.html")
    before = {name: (disk / name).read_bytes() for name in names}
    disks.fill(disk, left)
    with pytest.raises(WorkdirError, match="free space there"), workdir_lib.writing(disk):
        summary.finish(c, disk, None, dataclasses.replace(figures, wall_seconds=2.0), SetAside())
    left_over = {"metrics.jsonl", "filler", *names}
    assert {f.name for f in disk.iterdir()} == left_over
    assert len((disk / "report.html").read_bytes()) == len(before["report.html"])
    json.loads((disk / "summary.json").read_text()), json.loads(before["samples.json"])
    disks.free(disk)
    summary.finish(c, disk, None, figures, SetAside())
    assert "report: " in capsys.readouterr().out
    assert html.summary_table({"steps": 1})
