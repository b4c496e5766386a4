"""The text of programs: what this machine's compiler doesn't write, written by hand."""

import re

import pytest

from caprl_jax.plan.hlo.costs import collectives, costs, loops
from caprl_jax.plan.hlo.text import Array, arrays, parse, replica_groups

ALL = (tuple(range(8)),)


def _joined(text):
    """Programs below are broken after " |" to fit the page; XLA writes an instruction a line."""
    return re.sub(r" \|\n *", " ", text)


def test_shapes():
    assert arrays("bf16[2,256]{1,0:T(8,128)(2,1)S(1)}") == (Array("bf16", (2, 256), 1),)
    nested = arrays("((s4[3]{0}), pred[], /*index=2*/(f32[<=4,2]{1,0}, u32[]{:S(2)}, token[]))")
    assert [a.bytes for a in nested] == [2, 1, 32, 4, 0]
    assert [a.space for a in nested] == [0, 0, 0, 2, 0]


@pytest.mark.parametrize(
    "text, groups",
    [
        ("replica_groups={{0,1},{2,3}}, dimensions={1}", ((0, 1), (2, 3))),
        ("replica_groups={}, dimensions={1}, x={{5,6}}", ALL),
        ("dimensions={1}", ALL),
        ("replica_groups=[2,4]<=[8], x", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("replica_groups=[2,4]<=[4,2]T(1,0), x", ((0, 2, 4, 6), (1, 3, 5, 7))),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}, x", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, x", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("replica_groups=mesh['a'=8] {'a':(2)2}, x={1}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("source_target_pairs={{0,1},{1,0}}, x={{5,6}}", ((0, 1), (1, 0))),
    ],
)
def test_replica_groups(text, groups):
    assert replica_groups(f"channel_id=1, {text}", 8) == groups


def test_unknown_replica_groups():
    with pytest.raises(ValueError, match="in a way"):
        replica_groups("replica_groups=V2(8)", 8)


def test_not_a_program():
    with pytest.raises(ValueError, match="ENTRY"):
        parse("module @jit_f {\n}\n")


# As a TPU writes it: no trip count, weights stacked, an update in place, arrays in VMEM: S(1).
LOOP = _joined("""HloModule jit_step, is_scheduled=true, num_partitions=4

%read (stack: f32[10,8,8], i: s32[]) -> f32[1,8,8] {
  %stack = f32[10,8,8]{2,1,0:T(8,128)} parameter(0)
  %i = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %slice = f32[1,8,8]{2,1,0:T(8,128)S(1)} dynamic-slice(%stack, %i, %zero, %zero), |
      dynamic_slice_sizes={1,8,8}
}

%write (cache: bf16[10,8], x: f32[8,8], i.1: s32[]) -> bf16[10,8] {
  %cache = bf16[10,8]{1,0:T(8,128)(2,1)} parameter(0)
  %x = f32[8,8]{1,0:T(8,128)S(1)} parameter(1)
  %i.1 = s32[]{:T(128)} parameter(2)
  %zero.1 = s32[]{:T(128)} constant(0)
  %row = f32[1,8]{1,0:T(1,128)} slice(%x), slice={[0:1], [0:8]}
  %narrow = bf16[1,8]{1,0:T(2,128)(2,1)} convert(%row)
  ROOT %update = bf16[10,8]{1,0:T(8,128)(2,1)} dynamic-update-slice(%cache, %narrow, %i.1, %zero.1)
}

%body (carry: (s32[], f32[10,8,8], bf16[10,8], s32[])) -> (s32[], f32[10,8,8], bf16[10,8], s32[]) {
  %carry = (s32[]{:T(128)}, f32[10,8,8]{2,1,0:T(8,128)}, bf16[10,8]{1,0:T(8,128)(2,1)}, |
      s32[]{:T(128)}) parameter(0)
  %step = s32[]{:T(128)} constant(2)
  %index = s32[]{:T(128)} get-tuple-element(%carry), index=0
  %next = s32[]{:T(128)} add(%index, %step), metadata={op_name="jit(step)/rollout/while/body/add"}
  %weights = f32[10,8,8]{2,1,0:T(8,128)} get-tuple-element(%carry), index=1
  %w = f32[1,8,8]{2,1,0:T(8,128)S(1)} fusion(%weights, %index), kind=kLoop, calls=%read
  %w.1 = f32[8,8]{1,0:T(8,128)S(1)} bitcast(%w)
  %y = f32[8,8]{1,0:T(8,128)S(1)} convolution(%w.1, %w.1), dim_labels=bf_io->bf
  %rows = bf16[10,8]{1,0:T(8,128)(2,1)} get-tuple-element(%carry), index=2
  %written = bf16[10,8]{1,0:T(8,128)(2,1)} fusion(%rows, %y, %index), kind=kLoop, calls=%write
  %last = s32[]{:T(128)} get-tuple-element(%carry), index=3
  ROOT %out = (s32[]{:T(128)}, f32[10,8,8]{2,1,0:T(8,128)}, bf16[10,8]{1,0:T(8,128)(2,1)}, |
      s32[]{:T(128)}) tuple(%next, %weights, %written, %last)
}

%condition (carry.1: (s32[], f32[10,8,8], bf16[10,8], s32[])) -> pred[] {
  %carry.1 = (s32[]{:T(128)}, f32[10,8,8]{2,1,0:T(8,128)}, bf16[10,8]{1,0:T(8,128)(2,1)}, |
      s32[]{:T(128)}) parameter(0)
  %at = s32[]{:T(128)} get-tuple-element(%carry.1), index=0
  %end = s32[]{:T(128)} get-tuple-element(%carry.1), index=3
  ROOT %less = pred[]{:T(512)} compare(%at, %end), direction=LT
}

ENTRY %main (stack.1: f32[10,8,8], cache.1: bf16[10,8]) -> bf16[10,8] {
  %stack.1 = f32[10,8,8]{2,1,0:T(8,128)} parameter(0)
  %cache.1 = bf16[10,8]{1,0:T(8,128)(2,1)} parameter(1)
  %first = s32[]{:T(128)} constant(1)
  %from = s32[]{:T(128)} copy(%first)
  %limit = s32[]{:T(128)} constant(10)
  %start = (s32[]{:T(128)}, f32[10,8,8]{2,1,0:T(8,128)}, bf16[10,8]{1,0:T(8,128)(2,1)}, |
      s32[]{:T(128)}) tuple(%from, %stack.1, %cache.1, %limit)
  %loop = (s32[]{:T(128)}, f32[10,8,8]{2,1,0:T(8,128)}, bf16[10,8]{1,0:T(8,128)(2,1)}, |
      s32[]{:T(128)}) while(%start), condition=%condition, body=%body, |
      metadata={op_name="jit(step)/rollout/while"}
  ROOT %result = bf16[10,8]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=2
}
""")


def test_a_loop_without_a_trip_count():
    (loop,) = loops(parse(LOOP))
    assert (loop.trips, loop.exact) == (5, True)  # 1, 3, 5, 7, 9
    (loop,) = loops(parse(LOOP.replace("direction=LT", "direction=LE")))
    assert loop.trips == 5
    (loop,) = loops(parse(LOOP.replace("constant(10)", "constant(11)").replace("=LT", "=LE")))
    assert loop.trips == 6


def test_only_slices_in_hbm_count():
    cost = costs(parse(LOOP), ("rollout",))
    assert cost["rollout"].flops == 5 * 2 * 8 * 8 * 8
    scalars = 5 * (3 + 2) * 4 + 6 * (2 * 4 + 1)  # next, the two indices; the condition
    slices = 5 * (8 * 8 * 4 + 8 * 2)  # a layer's weights, a row of the cache
    assert cost["rollout"].hbm_bytes == slices + scalars
    assert cost["other"].hbm_bytes == 8  # the copy of the first index


SUM = """%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}
"""
ASYNC = _joined(f"""HloModule jit_step, num_partitions=4

{SUM}
%begin (x: bf16[8]) -> (bf16[8], bf16[32], u32[]) {{
  %x = bf16[8]{{0}} parameter(0)
  %gather = bf16[32]{{0}} all-gather(%x), channel_id=3, replica_groups=[1,4]<=[4], |
      dimensions={{0}}, backend_config={{"async_collective_fusion_config":{{"flag_start":"-1"}}}}
  ROOT %start = (bf16[8]{{0}}, bf16[32]{{0}}, u32[]{{:S(2)}}) custom-call(%gather), |
      custom_call_target="AsyncCollectiveStart"
}}

%continue (x.2: bf16[8], y.1: bf16[32], m: f32[4]) -> (f32[4], bf16[8], bf16[32], bf16[32]) {{
  %x.2 = bf16[8]{{0}} parameter(0)
  %y.1 = bf16[32]{{0}} parameter(1)
  %m = f32[4]{{0}} parameter(2)
  %gather.2 = bf16[32]{{0}} all-gather(%x.2), channel_id=3, replica_groups=[1,4]<=[4], |
      dimensions={{0}}, backend_config={{"async_collective_fusion_config":{{"flag_start":"2"}}}}
  %square = f32[4]{{0}} multiply(%m, %m)
  ROOT %passed = (f32[4]{{0}}, bf16[8]{{0}}, bf16[32]{{0}}, bf16[32]{{0}}) tuple(%square, |
      %x.2, %y.1, %gather.2)
}}

%finish (x.1: bf16[8], y: bf16[32]) -> bf16[32] {{
  %x.1 = bf16[8]{{0}} parameter(0)
  %y = bf16[32]{{0}} parameter(1)
  %gather.1 = bf16[32]{{0}} all-gather(%x.1), channel_id=3, replica_groups=[1,4]<=[4], |
      dimensions={{0}}, backend_config={{"async_collective_fusion_config":{{"flag_start":"2"}}}}
  ROOT %done = bf16[32]{{0}} custom-call(%x.1, %y, %gather.1), |
      custom_call_target="AsyncCollectiveDone"
}}

%scatter (z: f32[32]) -> f32[8] {{
  %z = f32[32]{{0}} parameter(0)
  %reduce = f32[32]{{0}} all-reduce(%z), channel_id=4, replica_groups={{{{0,1,2,3}}}}, to_apply=%sum
  %id = u32[] partition-id()
  ROOT %kept = f32[8]{{0}} dynamic-slice(%reduce, %id), dynamic_slice_sizes={{8}}
}}

%wrapped (v: f32[8]) -> f32[2] {{
  %v = f32[8]{{0}} parameter(0)
  ROOT %shared = f32[2]{{0}} reduce-scatter(%v), channel_id=5, replica_groups={{{{0,1,2,3}}}}, |
      dimensions={{0}}, to_apply=%sum
}}

ENTRY %main (p: bf16[8], q: f32[32], r: f32[4]) -> f32[2] {{
  %p = bf16[8]{{0}} parameter(0)
  %q = f32[32]{{0}} parameter(1)
  %r = f32[4]{{0}} parameter(2)
  %begun = (bf16[8]{{0}}, bf16[32]{{0}}, u32[]{{:S(2)}}) fusion(%p), kind=kCustom, calls=%begin
  %g0 = bf16[8]{{0}} get-tuple-element(%begun), index=0
  %g1 = bf16[32]{{0}} get-tuple-element(%begun), index=1
  %carried = (f32[4]{{0}}, bf16[8]{{0}}, bf16[32]{{0}}, bf16[32]{{0}}) fusion(%g0, %g1, %r), |
      kind=kOutput, calls=%continue
  %g2 = bf16[8]{{0}} get-tuple-element(%carried), index=1
  %g3 = bf16[32]{{0}} get-tuple-element(%carried), index=2
  %finished = bf16[32]{{0}} fusion(%g2, %g3), kind=kCustom, calls=%finish
  %part = f32[8]{{0}} fusion(%q), kind=kCustom, calls=%scatter
  %ar = f32[8]{{0}} all-reduce-start(%part), channel_id=6, replica_groups={{}}, to_apply=%sum
  %ar.1 = f32[8]{{0}} all-reduce-done(%ar)
  %cp = (f32[8]{{0}}, f32[8]{{0}}, u32[], u32[]) collective-permute-start(%ar.1), channel_id=7, |
      source_target_pairs={{{{0,1}},{{1,2}}}}
  %cp.1 = f32[8]{{0}} collective-permute-done(%cp)
  %rs = ((f32[8]{{0}}), f32[2]{{0}}) async-start(%cp.1), calls=%wrapped
  ROOT %rs.1 = f32[2]{{0}} async-done(%rs)
}}
""")


def test_asynchronous_collectives_count_once():
    found = [(c.kind, c.bytes, c.group_size) for c in collectives(parse(ASYNC))]
    assert found == [
        ("all-gather", 64, 4),
        ("reduce-scatter", 128, 4),
        ("all-reduce", 32, 4),
        ("collective-permute", 32, 2),
        ("reduce-scatter", 32, 4),
    ]
    # Gathered, what goes on beside it, scattered, reduced, permuted, scattered: in and out.
    moved = [16 + 64, 16 + 16, 128 + 32, 32 + 32, 32 + 32, 32 + 8]
    assert costs(parse(ASYNC))["other"].hbm_bytes == sum(moved)


VECTOR = _joined(f"""HloModule jit_step

{SUM}
%product (w: f32[8,16], x: f32[8]) -> f32[16] {{
  %w = f32[8,16]{{1,0}} parameter(0)
  %x = f32[8]{{0}} parameter(1)
  %wide = f32[8,16]{{1,0}} broadcast(%x), dimensions={{0}}
  %each = f32[8,16]{{1,0}} multiply(%w, %wide)
  %zero = f32[] constant(0)
  ROOT %y = f32[16]{{0}} reduce(%each, %zero), dimensions={{0}}, to_apply=%sum, |
      metadata={{op_name="jit(step)/score/k,kn->n/dot_general"}}
}}

ENTRY %main (w.1: f32[8,16], x.1: f32[8]) -> f32[16] {{
  %w.1 = f32[8,16]{{1,0}} parameter(0)
  %x.1 = f32[8]{{0}} parameter(1)
  ROOT %z = f32[16]{{0}} fusion(%w.1, %x.1), kind=kLoop, calls=%product
}}
""")


def test_a_product_with_a_vector():
    cost = costs(parse(VECTOR), ("score",))["score"]  # the fusion has no name, its product has
    assert (cost.flops, cost.hbm_bytes) == (2 * 8 * 16, 4 * (8 * 16 + 8 + 16))
