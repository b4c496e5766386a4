"""Metrics survive interruption: no step twice, none lost, nothing that isn't JSON."""

import itertools
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from caprl_jax.run import metrics
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


def test_reading_a_run_that_wrote_nothing(tmp_path):
    assert metrics.read(tmp_path) == []


def test_tensorboard_gets_the_finite_values_and_hides_an_interrupted_run_s(tmp_path, monkeypatch):
    events = []
    for name in ("add_event", "add_summary"):

        def keep(self, event, *args, name=name):
            events.append((name, event, *args))

        monkeypatch.setattr(f"tensorboardX.writer.FileWriter.{name}", keep)
    board = {"tensorboard": SINKS.choose("tensorboard", {})}
    with metrics.MetricWriter(tmp_path, 4, board) as writer:
        writer.write(5, {"reward": 0.25, "kl": NAN}, prefix="eval/")
    assert {e[1].step for e in events if e[0] == "add_event"} == {5}  # purged from here on
    (added,) = [e for e in events if e[0] == "add_summary"]
    assert added[1].value[0].tag == "eval/reward" and added[2] == 5
    assert added[1].value[0].simple_value == 0.25


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
