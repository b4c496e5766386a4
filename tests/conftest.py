"""Strict JAX on 8 virtual CPU devices, set before JAX starts."""

import dataclasses
import itertools
import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests spend their time compiling, and run what they compile once: LLVM need not polish it.
# Eight devices meet at every collective on however few and busy cores: each needs threads of its
# own, and one that waits for the slowest must not take it for dead, as it does after 40 seconds.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    + " --xla_cpu_collective_call_terminate_timeout_seconds=1200"
    + " --xla_cpu_collective_timeout_seconds=1200"
)
os.environ.setdefault("NPROC", "32")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from flax import linen as nn
from jax.experimental.compilation_cache import compilation_cache

from caprl_jax.data.tokens import PolicyPrompt
from caprl_jax.models.decoder import Decoder
from caprl_jax.models.decoder_config import DecoderConfig
from caprl_jax.models.vision import VisionConfig, VisionTower, pad_to_windows
from caprl_jax.models.vlm import Policy
from caprl_jax.rl.judge import Judge
from caprl_jax.rl.types import Batch, Instruction, Questions

jax.config.update("jax_numpy_rank_promotion", "raise")
flags.FLAGS.mark_as_parsed()  # grain reads flags in its workers


@pytest.fixture(scope="session", autouse=True)
def eight_devices():
    """The sharding tests mean nothing on fewer devices."""
    assert jax.device_count() == 8


@dataclasses.dataclass(frozen=True)
class World:
    """Random modules, parameters and a padded batch of images of unequal size."""

    policy: Policy
    params: dict
    judge: Judge
    batch: Batch


def _policy(key):
    text = DecoderConfig(60, 32, 2, 4, 2, 8, 48, 1e4, 1e-6, False, (2, 1, 1))
    vision = VisionConfig(12, 16, 2, 4, 24, 32, 4, 2, (1,))
    policy = Policy(Decoder(text), VisionTower(vision))
    return policy, nn.meta.unbox(jax.jit(policy.init)(key))


def _questions(rng, b, n, q):
    lengths = rng.integers(3, q + 1, (b, n))
    return Questions(
        tokens=rng.integers(0, 50, (b, n, q)).astype(np.int32),
        mask=np.arange(q)[None, None] < lengths[..., None],
        truth=rng.integers(0, 3, (b, n)).astype(np.int32),
        letters=np.full((b, n), 4, np.int32),
        valid=np.ones((b, n), bool),
    )


def make_world(images: int = 4, seed: int = 0) -> World:
    """Images of 2 x 2 to 8 x 4 patches, prompts of unequal length, 3 questions each."""
    rng = np.random.default_rng(seed)
    policy, params = _policy(jax.random.key(seed))
    # Larger weights than at initialisation, so that distributions are far from uniform.
    params = jax.tree.map(lambda a: a * 1.5 if a.ndim > 2 else a, params)
    text = DecoderConfig(60, 32, 2, 4, 1, 8, 32, 1e4, 1e-6, False)
    decoder = Decoder(text)
    init = jax.jit(lambda key, x: decoder.init(key, x, method=Decoder.everything))
    judge_params = nn.meta.unbox(init(jax.random.key(1), jnp.zeros(1, jnp.int32)))
    vision, bucket, rows = policy.vision.config, 20, []
    for grid in itertools.islice(itertools.cycle([(4, 6), (2, 2), (8, 4), (6, 4)]), images):
        patches = rng.normal(size=(grid[0] * grid[1], vision.patch_dim)).astype(np.float32)
        before = rng.integers(0, 50, rng.integers(2, 6))
        ids = np.concatenate([before, [59], rng.integers(0, 50, rng.integers(2, 6))])
        prompt = PolicyPrompt(ids.astype(np.int32), 59, vision, True)
        rows.append((pad_to_windows(patches, grid, vision, 2), prompt.fill(grid, bucket)))
    stacked = jax.tree.map(lambda *a: np.stack(a), *rows)
    instruction = Instruction(
        rng.integers(0, 50, 7).astype(np.int32), np.arange(10, 14), np.arange(55, 60)
    )
    batch = Batch(*stacked, _questions(rng, images, 3, 6), np.ones(images, bool))
    judge = Judge(decoder, judge_params["params"], instruction)
    return World(policy, params, judge, batch)


@pytest.fixture(scope="session")
def world() -> World:
    """make_world() of 4 images."""
    return make_world()


@pytest.fixture(scope="module")
def programs_kept(tmp_path_factory):
    """Programs that several tests of a file compile are compiled once. For one device only.

    On 8 CPU devices a run with kept programs hung (JAX 0.10).
    """
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


@pytest.fixture
def one_device(monkeypatch):
    """As if there were no others."""
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: first)
