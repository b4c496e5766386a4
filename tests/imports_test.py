"""The core embeds anywhere: it imports neither the data stack nor the checkpoint library."""

import subprocess
import sys

import pytest

_BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(name + " is not here")
sys.meta_path.insert(0, Block())
import {modules}
"""
DATA_STACK = {"grain", "tensorflow_datasets", "transformers", "orbax", "tensorboardX", "sklearn"}
NOT_CORE = DATA_STACK | {"PIL", "tqdm", "jinja2", "safetensors", "huggingface_hub", "fsspec"}
CORE = (
    "caprl_jax.step", "caprl_jax.rollout", "caprl_jax.judge", "caprl_jax.policy_gradient",
    "caprl_jax.rewards", "caprl_jax.step_types", "caprl_jax.update",
    "caprl_jax.logprobs", "caprl_jax.mesh", "caprl_jax.models.hf",
)  # fmt: skip


def imports(modules, blocked):
    code = _BLOCK.format(blocked=blocked, modules=", ".join(modules))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("modules", "blocked"),
    [
        (CORE, DATA_STACK | {"ml_collections", "PIL", "tqdm", "jinja2"}),
        (("caprl_jax.plan", "caprl_jax.programs"), NOT_CORE),
        (("caprl_jax.bench.__main__",), NOT_CORE | {"torch", "trl", "matplotlib"}),
        (("caprl_jax.objectives", "caprl_jax.checkpoint"), DATA_STACK - {"tensorboardX"}),
    ],
)
def test_imports_without(modules, blocked):
    found = imports(modules, blocked)
    assert found.returncode == 0, found.stderr


def test_the_block_blocks():
    assert "grain is not here" in imports(["grain"], DATA_STACK).stderr
