"""Programs of GPUs, as their compiler wrote them: what a call costs, and what is counted once."""

from pathlib import Path

import pytest

from caprl_jax.plan import roofline
from caprl_jax.plan.hlo.costs import costs, parse, visits
from caprl_jax.plan.hlo.products import flops

PROGRAMS = Path(__file__).parent / "programs"
# Lines of the compiler's, shortened; the configuration of attention is that of jax.nn's.
CALLS = parse((PROGRAMS / "h100_calls.hlo").read_text())
# The gradient of six layers, 512 x 1024 by 1024 x 1024, weights and rows cut over 8 GPUs.
LAYERS = parse((PROGRAMS / "h100_8_layers.hlo").read_text())

GEMM = 2 * 4 * 128 * 256 * 64
CONVOLUTION = 2 * 2 * 7 * 7 * 16 * (4 * 4 * 8)
SCORES = 2 * 2 * 2 * 512 * 256 * 128  # queries with keys, for 2 images and 2 heads


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        ("matmul", GEMM),
        ("gemm", GEMM),
        ("conv", CONVOLUTION),
        ("conv_input", CONVOLUTION),
        ("conv_filter", CONVOLUTION),
        ("fmha", 2 * SCORES),
        ("fmha_backward", 5 * SCORES // 2),  # causal
        ("forward", 2 * SCORES),
        ("query", 3 * SCORES),
        ("key", 4 * SCORES // 4),  # a quarter of the pairs see each other
        ("estimated", 1234),
    ],
)
def test_a_call_is_priced_by_its_shapes(scope, expected):
    found = costs(CALLS, (scope,))[scope]
    assert (found.flops, found.unpriced) == (expected, ())


def test_a_call_that_nobody_knows_is_named():
    found = costs(CALLS, ("unknown",))["unknown"]
    assert (found.flops, found.unpriced) == (0, ("__gpu$xla.gpu.triton",))


def test_a_librarys_workspace_is_no_traffic():
    """4 x 128 x 256 and 4 x 256 x 64 of bfloat16 are read, 4 x 128 x 64 of float32 written."""
    expected = 2 * 4 * (128 * 256 + 256 * 64) + 4 * 4 * 128 * 64
    assert costs(CALLS, ("matmul",))["matmul"].hbm_bytes == expected
    statistics = 4 * 2 * 2 * 512
    expected = 2 * 2 * 2 * 128 * (512 + 256 + 256 + 512) + statistics
    assert costs(CALLS, ("fmha",))["fmha"].hbm_bytes == expected
    assert costs(CALLS, ("estimated",))["estimated"].hbm_bytes == 6789


def test_fused_products_count_and_their_cut_sums_do_not_again():
    """Two products of a layer are cut along their sum, each followed by a reduce of its name."""
    assert costs(LAYERS, ("update",))["update"].flops == 6 * 3 * 2 * 64 * 1024 * 1024
    called = LAYERS.computations["fused_reduce"]
    reduce = called.instructions["reduce.5"]
    assert reduce.op_name.endswith("dot_general") and flops(called, reduce) == 0


def test_asynchronous_collectives_count_once():
    started = [v.instruction.opcode for v in visits(LAYERS)]
    assert {"all-gather-start", "all-gather-done", "reduce-scatter-start"} <= set(started)
    found = costs(LAYERS, ("update",))
    layer = 2 * 1024 * 1024
    kinds = [(c.kind, c.bytes, c.executions, c.group_size) for c in found["update"].collectives]
    gather, scatter = ("all-gather", layer, 6, 8), ("reduce-scatter", layer, 6, 8)
    assert kinds == [gather, gather, scatter] and not found["other"].collectives


def test_slices_of_tpus_hand_their_sums_to_their_hosts():
    """Each device lacks two thirds of the sum of 4 x 128 of three slices, twice."""
    text = """HloModule jit_sum, is_scheduled=true, num_partitions=4

ENTRY %main (x: f32[4,128]) -> f32[4,128] {
  %x = f32[4,128]{1,0} parameter(0)
  %start = token[] after-all()
  %send = (f32[4,128]{1,0}, u32[], token[]) send(%x, %start), channel_id=2, FRONT
  %recv = (f32[4,128]{1,0}, u32[], token[]) recv(%start), channel_id=1, FRONT
  %sent = token[] send-done(%send), channel_id=2, is_host_transfer=true
  %got = (f32[4,128]{1,0}, token[]) recv-done(%recv), channel_id=1, is_host_transfer=true
  ROOT %sum = f32[4,128]{1,0} get-tuple-element(%got), index=0
}
"""
    front = 'frontend_attributes={_xla_megascale_target="{1:2,4}x{0:3}",'
    front += '_xla_megascale_transfer_type="ALL_REDUCE"}'
    (found,) = costs(parse(text.replace("FRONT", front)))["other"].collectives
    assert (found.kind, found.bytes, found.executions) == ("all-reduce", 4 * 4 * 128, 1)
    assert found.groups == ((0, 4, 8),)
    assert roofline.from_network(found, 4) == pytest.approx(2 * 2 / 3 * 4 * 4 * 128)
