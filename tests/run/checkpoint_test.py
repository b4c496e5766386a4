"""Checkpoints: damaged ones, failed saves, and what is kept."""

import contextlib
import logging
import resource
import shutil
import threading

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from caprl_jax import config as config_lib
from caprl_jax.rl.types import State
from caprl_jax.run import checkpoint, manifest


def tree(value):
    return {"params": {"w": jnp.full((8, 300), value, jnp.float32)}, "step": jnp.int32(value)}


def save(workdir, *steps, keep=None):
    with checkpoint.Checkpoints(workdir, keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, tree(step), config_lib.complete(config_lib.default()))


def restore(workdir):
    with checkpoint.Checkpoints(workdir, None) as checkpoints:
        return int(checkpoints.restore_last(tree(0))["step"])


def files(directory):
    names = (f for f in sorted(directory.rglob("*")) if f.is_file() and f.name != manifest.NAME)
    return [f.relative_to(directory) for f in names]


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "a flipped bit": flip,
}


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("saved")
    save(workdir, 6, 13)
    return workdir


@pytest.fixture
def saved(saved_once, tmp_path):
    """A workdir with checkpoints of steps 6 and 13."""
    return shutil.copytree(saved_once, tmp_path / "run")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damage_of_any_file_of_the_last_checkpoint_costs_only_that_one(saved, caplog, damage):
    names = files(saved / "checkpoints" / "13")
    assert len(names) > 8
    whole = shutil.copytree(saved, saved.parent / "whole")
    for name in names:
        shutil.rmtree(saved)
        shutil.copytree(whole, saved)
        caplog.clear()
        DAMAGES[damage](saved / "checkpoints" / "13" / name)
        assert checkpoint.saved_config(saved)["seed"] == 0
        assert restore(saved) == 6, name
        assert name.name in caplog.text and "goes on from step 6" in caplog.text
        assert "delete that directory" in caplog.text
        assert [d.name.split("-")[0] for d in (saved / "damaged-checkpoints").iterdir()] == ["13"]
    save(saved, 13)  # its place is free
    assert restore(saved) == 13


@pytest.mark.parametrize("make", [lambda d: d.mkdir(), lambda d: (d / "state").mkdir(parents=True)])
def test_a_directory_that_is_no_checkpoint_is_moved_away(saved, make, caplog):
    make(saved / "checkpoints" / "14")
    assert checkpoint.saved_config(saved) is not None
    assert restore(saved) == 13
    assert "checkpoints/14 is damaged" in caplog.text
    assert checkpoint.steps(saved) == [6, 13]


def test_damaged_checkpoints_do_not_pile_up(saved):
    """A disk that damages one after the other doesn't fill up with them: the last four stay."""
    away = saved / "damaged-checkpoints"
    away.mkdir()
    (away / "notes").write_text("somebody's own")
    for step in (100, 20, 40, 9, 30):  # the order of their times, not of their steps
        (away / f"{step}-20200101-0000{len(list(away.iterdir())):02d}").mkdir()
    (saved / "checkpoints" / "14").mkdir()
    assert restore(saved) == 13
    kept = {f.name.split("-")[0] for f in away.iterdir()}
    assert kept == {"notes", "40", "9", "30", "14"}


def test_a_checkpoint_without_a_manifest_is_used_if_orbax_reads_it(saved, caplog):
    """Those of older versions, and of runs killed between a save and its manifest."""
    caplog.set_level(logging.INFO)
    last = saved / "checkpoints" / "13"
    (last / manifest.NAME).unlink()
    assert restore(saved) == 13
    assert "13 has no manifest" in caplog.text
    shutil.rmtree(last / "state" / "d")
    assert restore(saved) == 6


def test_without_a_whole_checkpoint_nothing_begins_anew(saved):
    for step in (6, 13):
        flip(next((saved / "checkpoints" / str(step) / "state" / "d").iterdir()))
    with pytest.raises(checkpoint.CheckpointError, match=r"/13 is damaged.*/6 is damaged.*delete"):
        restore(saved)
    assert checkpoint.steps(saved) == [6, 13]
    for step in (6, 13):
        flip(saved / "checkpoints" / str(step) / "config" / "metadata")
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint in"):
        checkpoint.saved_config(saved)


def test_a_checkpoint_from_before_states_had_further_fields_is_restored(tmp_path, monkeypatch):
    """A reference that moves and a weight that adapts came later, and are None in most runs."""

    @flax.struct.dataclass
    class Older:
        step: jax.Array
        params: dict
        opt_state: tuple

    state = State(jnp.int32(4), {"w": jnp.arange(3.0)}, ({"mu": jnp.ones(3)},))
    config = config_lib.complete(config_lib.default())
    with checkpoint.Checkpoints(tmp_path, None) as checkpoints, monkeypatch.context() as then:
        then.setattr(checkpoint, "_held", lambda state: state)
        checkpoints.save(4, Older(state.step, state.params, state.opt_state), config)
    with checkpoint.Checkpoints(tmp_path, None) as checkpoints:
        found = checkpoints.restore_last(jax.tree.map(jnp.zeros_like, state))
    jax.tree.map(np.testing.assert_array_equal, found, state)
    assert found.reference is None and found.kl_weight is None


def test_parameters_alone_are_checked_too(saved):
    target = {"w": jax.ShapeDtypeStruct((8, 300), jnp.float32)}
    sharding = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), target)
    with checkpoint.Checkpoints(saved, None) as checkpoints:
        params = checkpoints.restore_params(13, target, sharding)
        np.testing.assert_array_equal(params["w"], 13)
        assert checkpoints.config(13)["seed"] == 0
        flip(next((saved / "checkpoints" / "13" / "state" / "d").iterdir()))
        with pytest.raises(checkpoint.CheckpointError, match="another checksum"):
            checkpoints.restore_params(13, target, sharding)


@contextlib.contextmanager
def unreachable(workdir):
    """Puts a file in the place of the checkpoints, as a mount that is lost would."""
    place, away = workdir / "checkpoints", workdir / "away"
    place.rename(away)
    place.write_text("")
    try:
        yield
    finally:
        place.unlink()
        away.rename(place)


@contextlib.contextmanager
def full(workdir):
    """Refuses files of more than 100 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("fault", [unreachable, full])
def test_a_save_that_fails_is_a_warning_and_the_next_one_tries_again(tmp_path, caplog, fault):
    c = config_lib.complete(config_lib.default())
    with checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, tree(1), c)
        assert checkpoints.latest() == 1
        with fault(tmp_path):
            checkpoints.save(2, tree(2), c)
            checkpoints.save(3, tree(3), c)
            left = [
                t for t in threading.enumerate() if t.name.startswith(("json_ch", "write_meta"))
            ]
            for thread in left:  # they would keep the process from ending
                threading.Thread.join(thread, 10)  # Orbax's own raises its error
                assert not thread.is_alive()
            with pytest.raises(checkpoint.CheckpointError, match=r"of step 3 can't be written"):
                checkpoints.require_saved()
        assert "of step 2 can't be written" in caplog.text
        assert "Traceback" not in caplog.text
        assert checkpoint.steps(tmp_path) == [1]
        assert [d.name for d in (tmp_path / "checkpoints").iterdir()] == ["1"]  # no half ones
        checkpoints.save(4, tree(4), c)
        checkpoints.require_saved()
    assert checkpoint.steps(tmp_path) == [4]
    assert restore(tmp_path) == 4


def test_what_a_killed_save_left_is_deleted(saved):
    left = saved / "checkpoints" / "14.orbax-checkpoint-tmp"
    left.mkdir()
    assert restore(saved) == 13
    assert not left.exists()
