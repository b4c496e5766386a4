"""Skipped updates are counted, their batches kept and read again, and too many end the run."""

import weakref

import jax.numpy as jnp
import numpy as np
import pytest

from caprl_jax.errors import UserError
from caprl_jax.run import skipped
from caprl_jax.run.skipped import NotFinite, Skipped


def measured(count):
    return {"skipped_updates": (jnp.float32(count), jnp.float32(2)), "loss": (jnp.nan, 1)}


def batch(i):
    return {"a": np.full((2, 3), i, np.float32), "b": (np.arange(4) == i,)}


def test_skipped_steps_are_counted_and_kept(tmp_path, caplog):
    watch = Skipped(tmp_path, most=3)
    for step, count in enumerate([0, 1, 2, 0], start=1):
        watch.add(step, batch(step), measured(count))
    assert watch.total == 0 and not list(tmp_path.iterdir())  # nothing is fetched before look()
    watch.look()
    assert watch.total == 2
    assert sorted(p.name for p in (tmp_path / "skipped").iterdir()) == ["2.npz", "3.npz"]
    assert "step 2" in caplog.text and "--replay=" in caplog.text
    found = skipped.load(tmp_path / "skipped" / "3.npz", batch(0))
    np.testing.assert_array_equal(found["a"], batch(3)["a"])
    np.testing.assert_array_equal(found["b"][0], batch(3)["b"][0])


def test_only_the_last_batches_are_kept_also_after_a_restart(tmp_path):
    """A replay needs a checkpoint from before its step, and old ones are gone."""
    folder = tmp_path / "skipped"
    for start in (0, 10, 20):
        watch = Skipped(tmp_path, most=99)
        for step in range(start + 1, start + 11):
            watch.add(step, batch(step), measured(1))
        watch.look()
        (folder / f"{start + 5}-1.npz").write_bytes(b"process 1's, which it collects itself")
    kept = {f"{step}.npz" for step in range(15, 31)}
    assert {f.name for f in folder.iterdir()} == kept | {"5-1.npz", "15-1.npz", "25-1.npz"}


def test_few_batches_are_held_however_rarely_the_loop_logs(tmp_path):
    """Without a bound, log_every=1000 would hold a thousand batches in the host's memory."""
    watch, held = Skipped(tmp_path, most=99), []
    for step in range(1, 101):
        whole = batch(step)
        held.append(weakref.ref(whole["a"]))
        watch.add(step, whole, measured(step == 7))
    del whole
    assert sum(ref() is not None for ref in held) <= 4
    assert watch.total == 1 and (tmp_path / "skipped" / "7.npz").is_file()


def test_more_in_a_row_than_allowed_end_the_run(tmp_path):
    watch = Skipped(tmp_path, most=2)
    for step, count in enumerate([1, 1, 0, 1, 1], start=1):
        watch.add(step, batch(step), measured(count))
    watch.look()  # never three in a row
    watch.add(6, batch(6), measured(1))
    with pytest.raises(NotFinite, match=r"3 steps in a row up to step 6 .*6\.npz"):
        watch.look()


def test_a_batch_that_can_not_be_written_is_told_and_no_error(tmp_path, caplog):
    (tmp_path / "skipped").write_text("a file where the folder should be")
    watch = Skipped(tmp_path, most=3)
    watch.add(1, batch(1), measured(1))
    watch.look()
    assert "(1 so far); its batch can't be kept: " in caplog.text


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "no kept batch"), (b"PK\x03\x04", "no kept batch")]
)
def test_a_file_that_is_no_batch_is_refused(tmp_path, content, message):
    (tmp_path / "2.npz").write_bytes(content)
    with pytest.raises(UserError, match=message):
        skipped.load(tmp_path / "2.npz", batch(0))


def test_a_batch_of_another_config_is_refused(tmp_path):
    skipped.save(tmp_path / "2.npz", batch(2))
    other = batch(2) | {"a": np.zeros((2, 4), np.float32)}
    with pytest.raises(UserError, match=r"\['a'\] has the shape \(2, 3\), not \(2, 4\)"):
        skipped.load(tmp_path / "2.npz", other)


def test_faults_are_told_by_their_place():
    tree = {"whole": np.arange(3), "fine": np.ones(2), "bad": np.array([[1, np.nan], [np.inf, 0]])}
    assert skipped.faults(tree) == "['bad']: 2 of 4, the first at [0, 1]"
    assert skipped.faults({"fine": np.ones(2)}) == ""
