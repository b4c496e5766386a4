"""Attention kernels compiled for devices that need not be there: their calls, and no scores."""

import math
import os
import re

import jax
import jax.numpy as jnp
import pytest

from caprl_jax.errors import ConfigError
from caprl_jax.models import attention, places
from caprl_jax.models.attention import Segment
from caprl_jax.parallel import axes, hardware, mesh

IMAGES, PROMPT, TOKENS, HEADS, KV_HEADS = 8, 512, 2048, 16, 2


@pytest.fixture(autouse=True)
def flags(monkeypatch):
    """Flags of the GPUs' compiler, for this test only."""
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))


def devices(topology):
    try:
        hardware.before_jax(topology)
        return hardware.devices(topology)
    except ConfigError as e:
        pytest.skip(f"the compiler can't be had: {e}")


def gradients(rules, head_dim=128, dtype=jnp.bfloat16):
    """The compiled gradients of captions packed in rows behind their images' prompts."""
    by_image = rules.sharding("images")

    def shape(*dims, dtype=dtype):
        return jax.ShapeDtypeStruct((IMAGES, *dims), dtype, sharding=by_image)

    k = shape(PROMPT, KV_HEADS, head_dim), shape(TOKENS, KV_HEADS, head_dim)
    q, mask = shape(TOKENS, HEADS, head_dim), shape(PROMPT, dtype=jnp.bool_)
    row = places.Places(*[shape(TOKENS, dtype=jnp.int32)] * 3)

    def run(q, prompt, own, mask, row):
        def attend(q, prompt, own):
            kept = Segment(*own, row.group >= 0, row, row)
            return attention.attend(q, [Segment(*prompt, mask), kept])

        with axes.using(rules):
            out, back = jax.vjp(attend, q, prompt, own)
            return back(out)

    return jax.jit(run).lower(q, (k[0],) * 2, (k[1],) * 2, mask, row).compile()


def largest(text):
    """Elements of the largest array in a program's text."""
    shapes = re.findall(r"\b(?:f32|bf16|pred|s32)\[([\d,]+)\]", text)
    return max(math.prod(map(int, dims.split(","))) for dims in shapes)


SLOW = [pytest.param(t, marks=pytest.mark.slow) for t in ("v6e:2x4", "v5p:2x2x2", "a100:1")]


@pytest.mark.parametrize("topology", ["v5e:2x4", "h100:1", *SLOW])
def test_compiled_attention_is_kernels_and_keeps_no_scores(topology):
    on = mesh.make_mesh({"fsdp": -1}, devices(topology))
    compiled = gradients(mesh.shard_rules(on))
    text = compiled.as_text()
    for name in ("flash_forward", "flash_query", "flash_key"):
        calls = re.findall(rf"custom-call\(.*op_name=\"[^\"]*{name}", text)
        assert len(calls) == 2, name  # the prompt's and the captions' own
    queries = IMAGES // on.size * TOKENS * HEADS * 128
    assert largest(text) <= queries  # scores of the captions alone would be 16 times as large
    # Of the queries' size: a result, or a gradient of the queries, for each of the two segments. On
    # TPUs, arrays are copied to have heads before tokens.
    most = 8 if topology.startswith("v") else 2.5
    assert compiled.memory_analysis().temp_size_in_bytes < most * 2 * queries
