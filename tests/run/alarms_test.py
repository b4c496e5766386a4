"""Alarms warn once each time that a bound stays broken."""

import pytest

from caprl_jax.run.alarms import Watch
from caprl_jax.run.settings import Alarms

FINE = {"reward_std": 0.2, "truncation_rate": 0.1, "grad_norm": 1.0, "logp_gap": 0.01}


@pytest.mark.parametrize(
    ("name", "value"),
    [("reward_std", 0.0), ("truncation_rate", 1.0), ("grad_norm", 0.0), ("logp_gap", 0.5)],
)
def test_a_bound_that_stays_broken_is_told_once(name, value, caplog):
    watch = Watch(Alarms(steps=3))
    for step in range(1, 10):
        watch.see(step, FINE | ({name: value} if step > 2 else {}))
    (alarm,) = caplog.messages
    assert alarm.startswith(f"alarm at step 5: {name} has been at")
    watch.see(10, FINE)
    for step in range(11, 14):
        watch.see(step, FINE | {name: value})
    assert [m.split(":")[0] for m in caplog.messages] == ["alarm at step 5", "alarm at step 13"]


def test_bounds_can_be_switched_off_and_missing_metrics_break_none(caplog):
    watch = Watch(Alarms(1, reward_std=-1.0, truncation_rate=2.0, grad_norm=-1.0, logp_gap=1e9))
    watch.see(1, {"reward_std": 0.0, "truncation_rate": 1.0, "grad_norm": 0.0, "logp_gap": 5.0})
    Watch(Alarms(steps=1)).see(1, {"loss": 0.0})
    assert not caplog.text
