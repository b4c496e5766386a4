"""--config.profile: a trace of the steps that were asked for, whatever ends the run."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest

from caprl_jax import config as config_lib
from caprl_jax.errors import ConfigError
from caprl_jax.run.profile import Profile, steps_of

from .disk_test import train_in


def traced(directory):
    """The steps that a directory's traces name, sorted."""
    steps = set()
    for path in directory.rglob("*.trace.json.gz"):
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        steps |= {int(e["args"]["step_num"]) for e in events if "step_num" in e.get("args", {})}
    return sorted(steps)


def test_a_run_is_traced_from_start_to_end(tmp_path):
    train_in(tmp_path / "run", profile="3:5")
    assert traced(tmp_path / "run" / "profile") == [3, 4, 5]


def test_a_run_that_ends_or_fails_early_keeps_its_trace(tmp_path, caplog):
    def fail():
        raise RuntimeError("no more data")

    with pytest.raises(RuntimeError, match="no more data"):
        train_in(tmp_path / "failed", {4: fail}, profile="3:6")
    assert traced(tmp_path / "failed" / "profile") == [3, 4]
    train_in(tmp_path / "short", profile="7:99")
    assert traced(tmp_path / "short" / "profile") == [7, 8]
    caplog.clear()
    train_in(tmp_path / "short", profile="1:3", steps=10)  # a resumed run begins at step 9
    assert "no profile: none of the steps 1 to 3 was run" in caplog.text
    assert len(list((tmp_path / "short").rglob("*.trace.json.gz"))) == 1


def test_a_trace_that_can_not_be_written_is_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with Profile("1:2", tmp_path / "file") as profile:
        for step in (1, 2):
            profile.before(step, jnp.zeros(2))
            profile.after(step, jnp.zeros(2))
    assert "no profile in" in caplog.text
    with jax.profiler.trace(str(tmp_path / "next")):  # and nothing is left open
        pass


@pytest.mark.parametrize("text", ["5", "5:", "0:3", "7:5", "a:b", "1:2:3", "-1:4", "1.5:2", "٣:٤٥"])
def test_other_texts_are_refused_before_a_run(text):
    c = config_lib.default()
    c.profile = text
    with pytest.raises(ConfigError, match=r"config\.profile=.* must be START:END"):
        config_lib.validate(c)


def test_one_step_is_a_range_too():
    assert list(steps_of("4:4")) == [4] and not steps_of("")
