"""Metrics survive interruption: no step twice, none lost, nothing that isn't JSON."""

import contextlib
import itertools
import json
import math
import resource
import shutil
import struct
import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from caprl_jax.errors import UserError
from caprl_jax.run import export, metrics
from caprl_jax.run.sinks import SINKS

NAN, INF = float("nan"), float("inf")


def _write(workdir, steps, resume_step=None):
    with metrics.MetricWriter(workdir, resume_step) as writer:
        for step in steps:
            writer.write(step, {"reward": step / 10})


def _strict(workdir):
    """The file's lines, parsed by the letter of JSON, which has no NaN."""

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    text = (workdir / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_reduce_divides_once_whatever_the_scalars():
    measured = {
        "python": (3.0, 4),
        "numpy": (np.float32(3), np.int64(4)),
        "jax": (jnp.asarray(3.0), jnp.asarray(4)),
    }
    assert metrics.reduce(measured) == {"python": 0.75, "numpy": 0.75, "jax": 0.75}
    assert all(type(v) is float for v in metrics.reduce(measured).values())


def test_reduce_leaves_out_what_was_never_counted_but_not_what_went_wrong():
    out = metrics.reduce({"kl": (0.0, 0), "loss": (NAN, 2.0), "reward": (0.0, 3)})
    assert set(out) == {"loss", "reward"}
    assert math.isnan(out["loss"]) and out["reward"] == 0


def test_resume_drops_the_steps_after_its_checkpoint_and_keeps_the_others(tmp_path):
    _write(tmp_path, range(1, 8))  # interrupted at 7; the last checkpoint is of step 4
    before = _strict(tmp_path)
    _write(tmp_path, [5, 6], resume_step=4)
    lines = _strict(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[:4] == before[:4]
    assert metrics.read(tmp_path) == lines


def test_a_run_without_a_checkpoint_begins_anew(tmp_path):
    _write(tmp_path, range(3))
    _write(tmp_path, [0, 1])
    assert [line["step"] for line in _strict(tmp_path)] == [0, 1]


@pytest.mark.parametrize("cut", [1, 2, 10, 30])
def test_a_half_written_last_line_is_dropped_everywhere(tmp_path, cut):
    _write(tmp_path, [1, 2, 3])
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    kept = [1, 2, 3] if cut == 1 else [1, 2]  # without its newline the line is whole
    assert [line["step"] for line in metrics.read(tmp_path)] == kept
    _write(tmp_path, [4], resume_step=3)
    assert [line["step"] for line in _strict(tmp_path)] == [*kept, 4]


def test_damage_before_the_end_is_an_error_that_names_the_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "rew\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 of 3"):
        metrics.read(tmp_path)
    with pytest.raises(ValueError, match="line 2 of 3"):
        metrics.MetricWriter(tmp_path, 3)
    assert '{"step": 3}' in path.read_text()  # refused, not rewritten


def test_numbers_that_are_not_finite_become_null(tmp_path):
    with metrics.MetricWriter(tmp_path, None) as writer:
        writer.write(1, {"a": NAN, "b": INF, "c": -INF, "d": np.float32(0.5)})
    (line,) = _strict(tmp_path)
    assert [line[k] for k in "abcd"] == [None, None, None, 0.5]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_a_step_written_twice_is_one_line_with_both(tmp_path):
    with metrics.MetricWriter(tmp_path, None) as writer:
        writer.write(1, {"reward": 0.1})
        writer.write(2, {"reward": 0.2, "long_name": 1 / 3})
        writer.write(2, {"accuracy": 0.5}, prefix="eval/")
        writer.write(3, {"reward": 0.3})
    with metrics.MetricWriter(tmp_path, 2) as writer:  # a finished run evaluates again
        writer.write(2, {"long_name": 1.0, "accuracy": 0.75}, prefix="eval/")
    first, second = _strict(tmp_path)
    assert first["reward"] == 0.1 and "eval/accuracy" not in first
    assert second["reward"] == 0.2 and second["eval/accuracy"] == 0.75


def test_a_rewritten_line_that_got_shorter_leaves_nothing_behind(tmp_path):
    with metrics.MetricWriter(tmp_path, None) as writer:
        writer.write(1, {"reward": 1 / 3})
        writer.write(1, {"reward": 1.0})
        assert [line["reward"] for line in _strict(tmp_path)] == [1.0]
        writer.write(2, {"reward": 0.5})
    assert [line["reward"] for line in _strict(tmp_path)] == [1.0, 0.5]


def test_steps_can_not_go_back(tmp_path):
    with metrics.MetricWriter(tmp_path, None) as writer:
        writer.write(5, {})
        with pytest.raises(ValueError, match="step 4 after those of step 5"):
            writer.write(4, {})


def test_every_line_is_on_disk_before_the_next_step(tmp_path):
    writer = metrics.MetricWriter(tmp_path, None)
    writer.write(1, {"reward": 0.5})
    assert [line["step"] for line in metrics.read(tmp_path)] == [1]
    writer.close()


def test_a_long_run_s_lines_are_read_one_by_one(tmp_path):
    """Resuming, and every export's model card, read all lines; neither holds them."""
    values = {f"a metric with a long name, number {i}": 0.123456789 for i in range(30)}
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(1, 3001):
            file.write(json.dumps({"step": step, "eval/accuracy": step / 3000} | values) + "\n")
    size = (tmp_path / "metrics.jsonl").stat().st_size
    tracemalloc.start()
    try:
        with metrics.MetricWriter(tmp_path, 2999) as writer:
            writer.write(3000, {"reward": 0.5})
        found = export.figures(tmp_path, 2999)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found == {"accuracy": 2999 / 3000, "measured at step": 2999}
    assert peak < size / 10
    assert [line["step"] for line in metrics.read(tmp_path)] == list(range(1, 3001))


def test_reading_a_run_that_wrote_nothing(tmp_path):
    assert metrics.read(tmp_path) == []


def events(workdir):
    """The events of all of TensorBoard's files."""
    for path in sorted((workdir / "tensorboard").iterdir(), key=lambda p: p.stat().st_mtime_ns):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack_from("<Q", content)
            yield event_pb2.Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]


def board(workdir):
    """The values by tag, [(step, value), ..], that TensorBoard shows of all event files."""
    shown = {}
    for event in events(workdir):
        if event.session_log.status == event_pb2.SessionLog.START:  # as TensorBoard does
            shown = {t: [v for v in vs if v[0] < event.step] for t, vs in shown.items()}
        for value in event.summary.value:
            shown.setdefault(value.tag, []).append((event.step, value.simple_value))
    return shown


BOARD = {"tensorboard": SINKS.choose("tensorboard", {})}


def test_tensorboard_has_every_finite_value_at_once_as_a_kill_gives_no_warning(tmp_path):
    writer = metrics.MetricWriter(tmp_path, None, BOARD)
    for step in (1, 2):
        writer.write(step, {"reward": step / 4, "kl": NAN}, prefix="eval/")
        assert board(tmp_path) == {"eval/reward": [(s, s / 4) for s in range(1, step + 1)]}
    writer.close()


def test_tensorboard_shows_each_step_once_after_a_kill(tmp_path):
    killed = metrics.MetricWriter(tmp_path, None, BOARD)
    for step in range(1, 6):
        killed.write(step, {"reward": 0.5})
    with metrics.MetricWriter(tmp_path, 3, BOARD) as writer:
        for step in (4, 5, 6):
            writer.write(step, {"reward": 0.25})
    assert board(tmp_path)["reward"] == [(s, 0.5 if s < 4 else 0.25) for s in range(1, 7)]
    with metrics.MetricWriter(tmp_path, None, BOARD) as writer:
        writer.write(1, {"reward": 0.75})
    assert board(tmp_path)["reward"] == [(1, 0.75)]
    killed.close()


def test_a_finished_run_s_last_evaluation_reaches_the_sinks_once(tmp_path):
    for resume_step in (None, 2, 2):
        with metrics.MetricWriter(tmp_path, resume_step, BOARD) as writer:
            if resume_step is None:
                writer.write(1, {"reward": 0.5})
                writer.write(2, {"reward": 0.5})
            writer.write(2, {"accuracy": 0.25}, prefix="eval/")
    assert board(tmp_path) == {"reward": [(1, 0.5), (2, 0.5)], "eval/accuracy": [(2, 0.25)]}


@contextlib.contextmanager
def full_disk(size):
    """Lets no file grow beyond a size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [0, 1, 20])
def test_lines_that_find_no_room_are_a_warning_and_are_written_later(tmp_path, caplog, room):
    with metrics.MetricWriter(tmp_path, None) as writer:
        writer.write(1, {"reward": 0.5})
        size = (tmp_path / "metrics.jsonl").stat().st_size
        with full_disk(size + room):
            for step in (2, 3):
                writer.write(step, {"reward": 0.5})
                writer.write(step, {"accuracy": 0.5}, prefix="eval/")
            assert [line["step"] for line in metrics.read(tmp_path)] == [1]
        assert caplog.text.count("can't be written") == 1
        writer.write(4, {"reward": 0.5})
        assert "written again" in caplog.text
        writer.write(4, {"loss": 0.5})
        writer.write(5, {"reward": 0.5})
    lines = _strict(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert ["eval/accuracy" in line for line in lines] == [False, True, True, False, False]
    assert lines[3]["loss"] == 0.5


def test_a_sink_that_can_not_write_does_not_end_the_run(tmp_path, caplog):
    class Broken:
        def write(self, step, values):
            raise OSError("no route to host")

        close = write

    writer = metrics.MetricWriter(tmp_path, None)
    writer._sinks.append(Broken())
    writer.write(1, {"reward": 0.5})
    writer.write(2, {"reward": 0.5})
    assert caplog.text.count("no route to host") == 1
    assert [line["step"] for line in _strict(tmp_path)] == [1, 2]


@pytest.mark.parametrize("gone", [shutil.rmtree, lambda w: w.rename(w.with_name("moved"))])
def test_a_workdir_that_is_deleted_ends_the_run(tmp_path, gone):
    workdir = tmp_path / "run"
    with metrics.MetricWriter(workdir, None) as writer:
        writer.write(1, {"reward": 0.5})
        gone(workdir)
        with pytest.raises(UserError, match=r"run/metrics\.jsonl is gone: the workdir was deleted"):
            writer.write(2, {"reward": 0.5})
    assert not workdir.exists()


def test_the_bar_counts_steps_from_where_the_run_resumes(capsys):
    with metrics.progress(total=10, initial=4) as bar:
        bar.show(6, {"reward": 0.51234, "caption_length": 17.0, "seconds_step": 2.5, "kl": 9.0})
        assert bar.n == 6
    shown = capsys.readouterr().err
    for part in ("6/10", "reward=0.512", "length=17", "s/step=2.5", "left"):
        assert part in shown
    assert "kl" not in shown


def test_pace_spreads_the_time_over_the_steps_since_the_last_lap(monkeypatch):
    """A clock that each reading moves by one second."""
    ticks = itertools.count()
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: float(next(ticks)))
    pace = metrics.Pace()  # 0
    for _ in range(2):
        with pace.waiting():  # 1 to 2, 3 to 4
            pass
    with pace.paused():  # 5 to 6
        pass
    assert pace.lap() == {"seconds_data": 1.0, "seconds_step": (7 - 1) / 2}
    with pace.waiting():  # 9 to 10, after the lap's restart at 8
        pass
    assert pace.lap() == {"seconds_data": 1.0, "seconds_step": 3.0}
