"""Compiled programs are kept in one place, and only so many."""

import os

import jax
import jax.numpy as jnp
import pytest

from caprl_jax.run import kept_programs

NAME = "jax_compilation_cache_dir"


@pytest.fixture
def unset():
    before = jax.config.jax_compilation_cache_dir
    jax.config.update(NAME, None)
    yield
    jax.config.update(NAME, before)


def test_programs_are_kept_unless_a_folder_is_set(tmp_path, unset, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    kept_programs.keep(tmp_path / "first")
    kept_programs.keep(tmp_path / "second")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "first")


def test_programs_of_several_cpu_devices_are_not_kept(tmp_path, unset):
    kept_programs.keep(tmp_path)
    assert jax.config.jax_compilation_cache_dir is None


def program(folder, name, size, used):
    """A file as JAX keeps a program, last used at a time in seconds."""
    (folder / f"{name}-cache").write_bytes(bytes(size))
    os.utime(folder / f"{name}-cache", (used, min(used, 100)))


def test_programs_beyond_the_bound_are_deleted_those_unused_for_longest_first(tmp_path):
    for name, used in (("old", 300), ("new", 500), ("oldest", 200), ("newer", 400)):
        program(tmp_path, name, 1000, used)
    (tmp_path / "notes.txt").write_text("somebody's own")
    kept_programs.trim(tmp_path, 4000)
    assert len(list(tmp_path.iterdir())) == 5
    kept_programs.trim(tmp_path, 2500)
    assert {f.name for f in tmp_path.iterdir()} == {"new-cache", "newer-cache", "notes.txt"}
    kept_programs.trim(tmp_path / "not there", 0)


def test_a_start_trims_what_earlier_ones_kept(tmp_path, unset, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(kept_programs, "MOST", 1500)
    for used in (200, 300):
        program(tmp_path, str(used), 1000, used)
    kept_programs.keep(tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["300-cache"]


def test_jax_names_its_programs_as_the_bound_takes_them(tmp_path, unset):
    """A program that JAX itself keeps is counted and deleted; the next start compiles it again."""
    from jax._src import compilation_cache

    compilation_cache.reset_cache()
    options = {NAME: str(tmp_path), "jax_persistent_cache_min_compile_time_secs": 0}
    before = {name: getattr(jax.config, name) for name in options}
    try:
        for name, value in options.items():
            jax.config.update(name, value)
        jax.jit(lambda x: jnp.sin(x) * 3.25).lower(1.0).compile()
        assert list(tmp_path.iterdir())
        kept_programs.trim(tmp_path, 0)
        assert not list(tmp_path.iterdir())
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
