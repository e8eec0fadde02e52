"""What is read off programs, of this CPU's compiler and of libtpu's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from big_vision_like import hlo

# What libtpu wrote for a step on v5e, cut down.
TPU = """\
HloModule jit_step, is_scheduled=true

%region_0 (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[]{:T(256)} parameter(0)
  %b = bf16[]{:T(256)} parameter(1)
  ROOT %add = bf16[]{:T(256)} add(%a, %b)
}

%fused_gather (p: bf16[8,128]) -> bf16[64,128] {
  %p = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %gather = bf16[64,128]{1,0:T(8,128)(2,1)} all-gather(%p), \
replica_groups=[2,8]<=[8,2]T(1,0), dimensions={0}
}

%fused_slice (p0: s32[], p1: f32[12,64,128], p2: f32[12,64,128]) -> \
f32[12,64,128] {
  %p1 = f32[12,64,128]{2,1,0:T(8,128)} parameter(1)
  %p0 = s32[]{:T(128)} parameter(0)
  %p2 = f32[12,64,128]{2,1,0:T(8,128)} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  %one = f32[1,64,128]{2,1,0:T(8,128)} dynamic-slice(%p1, %p0, %zero, %zero), \
dynamic_slice_sizes={1,64,128}
  ROOT %put = f32[12,64,128]{2,1,0:T(8,128)} dynamic-update-slice(%p2, %one, \
%p0, %zero, %zero)
}

%body (t: (s32[], f32[12,64,128])) -> (s32[], f32[12,64,128]) {
  %t = (s32[]{:T(128)}, f32[12,64,128]{2,1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  %stack = f32[12,64,128]{2,1,0:T(8,128)} get-tuple-element(%t), index=1
  %w = bf16[128,128]{1,0:T(8,128)(2,1)S(1)} custom-call(%i), \
custom_call_target="tpu_custom_call", metadata={op_name="splash"}
  %all-reduce.1 = (bf16[128,128]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/\
bf16[128]{0:T(256)}) all-reduce(%w, %w), replica_groups=mesh['axis_0'=2,\
'axis_1'=8] {'axis_1'}, to_apply=%region_0
  %async-collective-start.3 = bf16[64,128]{1,0:T(8,128)(2,1)} fusion(%w), \
kind=kCustom, calls=%fused_gather
  %async-collective-done.3 = bf16[64,128]{1,0:T(8,128)(2,1)} fusion(\
%async-collective-start.3), kind=kCustom, calls=%fused_gather
  %fusion.5 = f32[12,64,128]{2,1,0:T(8,128)} fusion(%i, %stack, %stack), \
kind=kLoop, calls=%fused_slice
  ROOT %next = (s32[]{:T(128)}, f32[12,64,128]{2,1,0:T(8,128)}) tuple(%i, \
%fusion.5)
}

%condition (t: (s32[], f32[12,64,128])) -> pred[] {
  %t2 = (s32[]{:T(128)}, f32[12,64,128]{2,1,0:T(8,128)}) parameter(0)
  %i2 = s32[]{:T(128)} get-tuple-element(%t2), index=0
  %last = s32[]{:T(128)} constant(12)
  ROOT %less = pred[]{:T(512)} compare(%i2, %last), direction=LT
}

ENTRY %main (x: f32[12,64,128]) -> f32[12,64,128] {
  %x = f32[12,64,128]{2,1,0:T(8,128)} parameter(0)
  %start = s32[]{:T(128)} constant(0)
  %tuple = (s32[]{:T(128)}, f32[12,64,128]{2,1,0:T(8,128)}) tuple(%start, %x)
  %while.2 = (s32[]{:T(128)}, f32[12,64,128]{2,1,0:T(8,128)}) while(%tuple), \
condition=%condition, body=%body
  ROOT %out = f32[12,64,128]{2,1,0:T(8,128)} get-tuple-element(%while.2), \
index=1
}
"""


def test_a_tpu_program_is_read():
  program = hlo.Program(TPU)
  assert program.runs == {"main": 1, "condition": 12, "body": 12}
  reduce, gather = program.collectives(16)
  assert reduce == hlo.Collective(
    "all-reduce", "bf16", 2 * 129 * 128, 12, tuple(range(8)), False
  )
  assert gather == hlo.Collective(
    "all-gather", "bf16", 2 * 64 * 128, 12, tuple(range(0, 16, 2)), True
  )
  assert reduce.sent == 2 * 7 / 8 * reduce.bytes * 12
  assert gather.sent == 7 / 8 * gather.bytes * 12
  assert program.kernels() == {"w": 12}


def test_traffic_counts_slices_and_main_memory_only():
  """Of the loop's stack, a slice is read and one written."""
  layer, matrix, bias, scalar = 4 * 64 * 128, 2 * 128 * 128, 2 * 128, 4
  gather = 2 * 64 * 128
  kernel = scalar  # Its result stays in fast memory, S(1).
  reduce = bias
  # Both halves of the gather, and what the first reads is in fast memory.
  woven = gather + (gather + 2 * 8 * 128)
  stack = scalar + 2 * layer
  compare = 1 + 2 * scalar
  each = kernel + reduce + woven + stack + compare
  assert hlo.Program(TPU).memory_bytes() == 12 * each
  del matrix


@pytest.mark.parametrize(
  ("attributes", "group"),
  [
    ("replica_groups={{1,3},{0,2}}", (1, 3)),
    ("replica_groups=[4,2]<=[8]", (0, 1)),
    ("replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}", (0, 2, 4, 6)),
    ("replica_groups=mesh['a'=2,'b'=4] {'a'}", (0, 4)),
    ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", tuple(range(8))),
    ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", (0, 1)),
    ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", (0, 2)),
    ("source_target_pairs={{0,1},{1,0}}", (0, 1)),
    ("replica_groups={}", tuple(range(8))),
  ],
)
def test_groups_are_read_in_all_spellings(attributes, group):
  assert hlo.replica_group(f"channel_id=1, {attributes}", 8) == group


def test_loops_of_this_compiler_count_as_often_as_they_run():
  """A gather of the weights in each of seven layers, and one sum at the end."""
  mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

  def program(x, w):
    def layer(x, w):
      w = jax.lax.all_gather(w, "b", axis=0, tiled=True)
      return jnp.tanh(x @ w), None

    x, _ = jax.lax.scan(layer, x, w)
    return jax.lax.psum(x.sum(), "a")

  sharded = jax.shard_map(
    program,
    mesh=mesh,
    in_specs=(P("a"), P(None, "b")),
    out_specs=P(),
    check_vma=False,
  )
  shapes = [
    jax.ShapeDtypeStruct(s, jnp.float32) for s in ((16, 24), (7, 24, 24))
  ]
  compiled = jax.jit(sharded).lower(*shapes).compile()
  found = hlo.Program(compiled.as_text()).collectives(8)
  by_op = {c.op: c for c in found}
  gather, scalar = by_op["all-gather"], by_op["all-reduce"]
  assert (gather.runs, gather.bytes) == (7, 4 * 24 * 24)
  assert gather.group == (0, 1, 2, 3)
  assert (scalar.runs, scalar.bytes, scalar.group) == (1, 4, (0, 4))


def test_arrays_know_their_bytes_and_where_they_are():
  found = hlo.arrays("(pred[3]{0}, u8[2,5]{1,0:T(8,128)S(1)}, f8e4m3fn[4], c)")
  assert found == [("pred", 3, True), ("u8", 10, False), ("f8e4m3fn", 4, True)]
  np.testing.assert_equal(hlo.arrays("s64[]"), [("s64", 8, True)])
