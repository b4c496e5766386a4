"""Where compiled programs are kept."""

import jax
import pytest

from caprl_jax.run import compile as compile_lib

NAME = "jax_compilation_cache_dir"


@pytest.fixture
def unset():
    before = jax.config.jax_compilation_cache_dir
    jax.config.update(NAME, None)
    yield
    jax.config.update(NAME, before)


def test_programs_are_kept_unless_a_folder_is_set(tmp_path, unset, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    compile_lib.keep_compiled(tmp_path / "first")
    compile_lib.keep_compiled(tmp_path / "second")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "first")


def test_programs_of_several_cpu_devices_are_not_kept(tmp_path, unset):
    compile_lib.keep_compiled(tmp_path)
    assert jax.config.jax_compilation_cache_dir is None
