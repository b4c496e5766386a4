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
    "caprl_jax.rl.step",
    "caprl_jax.rl.rollout",
    "caprl_jax.rl.judge",
    "caprl_jax.rl.advantages",
    "caprl_jax.rl.losses",
    "caprl_jax.rl.kl",
    "caprl_jax.decode.loop",
    "caprl_jax.rl.rewards",
    "caprl_jax.rl.types",
    "caprl_jax.rl.update",
    "caprl_jax.models.logprobs",
    "caprl_jax.parallel.mesh",
    "caprl_jax.models.hf.files",
    "caprl_jax.models.hf.save",
)


def imports(modules, blocked):
    code = _BLOCK.format(blocked=blocked, modules=", ".join(modules))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("modules", "blocked"),
    [
        (CORE, DATA_STACK | {"ml_collections", "PIL", "tqdm", "jinja2"}),
        (("caprl_jax.plan", "caprl_jax.run.compile"), NOT_CORE),
        (("caprl_jax.bench.__main__",), NOT_CORE | {"torch", "trl", "matplotlib"}),
        (("caprl_jax.run.build", "caprl_jax.run.checkpoint"), DATA_STACK - {"tensorboardX"}),
    ],
)
def test_imports_without(modules, blocked):
    found = imports(modules, blocked)
    assert found.returncode == 0, found.stderr


def test_the_block_blocks():
    assert "grain is not here" in imports(["grain"], DATA_STACK).stderr
