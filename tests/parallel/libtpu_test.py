"""The environment of libtpu changes only on machines that have no TPU."""

import os

import pytest

from caprl_jax.parallel import libtpu


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    """An environment and a machine without a TPU."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("TPU_", "JAX_FORCE_TPU"))}
    monkeypatch.setattr(os, "environ", plain)
    monkeypatch.setattr(libtpu, "_DEVICES", ())
    return plain


def test_it_is_told_of_one_chip_where_there_is_none(bare):
    bare |= {"TPU_LIBRARY_PATH": "x", "TPU_SKIP_MDS_QUERY": "1"}  # as JAX sets them
    libtpu.keep_quiet()
    assert bare["TPU_WORKER_HOSTNAMES"] == "localhost" and bare["TPU_HOST_BOUNDS"] == "1,1,1"


@pytest.mark.parametrize("name", ["TPU_WORKER_ID", "TPU_ACCELERATOR_TYPE", "JAX_FORCE_TPU_INIT"])
def test_settings_of_a_tpu_stay(bare, name):
    bare[name] = "0"
    before = dict(bare)
    libtpu.keep_quiet()
    assert bare == before


def test_a_machine_with_a_tpu_stays(bare, monkeypatch, tmp_path):
    (tmp_path / "accel0").touch()
    monkeypatch.setattr(libtpu, "_DEVICES", (f"{tmp_path}/accel[0-9]*",))
    before = dict(bare)
    libtpu.keep_quiet()
    assert bare == before
