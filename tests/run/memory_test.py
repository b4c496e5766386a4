"""A run that needs too much memory is told what to change."""

import jax
import pytest

from caprl_jax import config as config_lib
from caprl_jax.errors import ConfigError
from caprl_jax.run import memory

SHORT = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 81604378624 bytes."


def test_what_to_change_is_what_lies_evenly():
    c = config_lib.default()
    c.policy.remat, c.data.batch, c.caprl.micro_batches = "full", 32, 2
    found = list(memory.changes(c, 4))
    pieces = [d["caprl.micro_batches"] for d in found if "caprl.micro_batches" in d]
    assert pieces == [4, 8]  # of 32 images on 4 devices
    assert {"mesh.tensor": 2} in found and {"sampling.max_tokens": 256} in found


def test_running_out_of_memory_says_what_to_change():
    c = config_lib.default()
    with pytest.raises(ConfigError, match="81604378624 bytes") as told, memory.advised(c):
        raise jax.errors.JaxRuntimeError(f"Error: {SHORT}\nBufferAssignment ..")
    remat = "--config.policy.remat=products; then --config.policy.remat=full; then "
    assert f"{remat}--config.caprl.micro_batches=2" in str(told.value)
    assert "caprl_jax.plan" in str(told.value) and "BufferAssignment" not in str(told.value)


def test_any_other_error_is_left_alone():
    for error in (jax.errors.JaxRuntimeError("INTERNAL: a bug"), ValueError(SHORT)):
        with pytest.raises(type(error)) as told, memory.advised(config_lib.default()):
            raise error
        assert told.value is error
