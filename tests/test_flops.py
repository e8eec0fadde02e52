"""FLOP counts against closed forms and against XLA's own count."""

from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from big_vision_like import flops

DEPTH, WIDTH, HEADS, MLP = 3, 96, 3, 384
BATCH, SIDE, PATCH, CLASSES = 5, 56, 7, 11
TOKENS = (SIDE // PATCH) ** 2


def spec(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def vit_params():
  return {
    "embed": spec(PATCH, PATCH, 3, WIDTH),
    "qkv": spec(DEPTH, WIDTH, 3, HEADS, WIDTH // HEADS),
    "out": spec(DEPTH, HEADS, WIDTH // HEADS, WIDTH),
    "fc1": spec(DEPTH, WIDTH, MLP),
    "fc2": spec(DEPTH, MLP, WIDTH),
    "head": spec(WIDTH, CLASSES),
  }


def block(x, layer):
  q, k, v = jnp.einsum("bnd,dtkh->tbnkh", x, layer["qkv"])
  weights = jax.nn.softmax(jnp.einsum("bqkh,bnkh->bkqn", q, k))
  x = x + jnp.einsum("bkqn,bnkh,khd->bqd", weights, v, layer["out"])
  return x + jax.nn.relu(x @ layer["fc1"]) @ layer["fc2"], None


def vit(params, image, *, unroll=False, remat=False):
  x = jax.lax.conv_general_dilated(
    image,
    params["embed"],
    (PATCH, PATCH),
    "VALID",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  ).reshape(BATCH, TOKENS, WIDTH)
  layers = {k: params[k] for k in ("qkv", "out", "fc1", "fc2")}
  body = jax.checkpoint(block) if remat else block
  if unroll:
    for i in range(DEPTH):
      x, _ = body(x, {k: w[i] for k, w in layers.items()})
  else:
    x, _ = jax.lax.scan(body, x, layers)
  return x.mean(1) @ params["head"]


def analytic_vit():
  patches = TOKENS * PATCH**2 * 3 * WIDTH
  layer = TOKENS * (4 * WIDTH**2 + 2 * WIDTH * MLP) + 2 * TOKENS**2 * WIDTH
  return 2 * BATCH * (patches + DEPTH * layer + WIDTH * CLASSES)


IMAGE = spec(BATCH, SIDE, SIDE, 3)


def test_scanned_vit_equals_the_analytic_count():
  assert flops.count_flops(vit, vit_params(), IMAGE) == analytic_vit()


def test_scanned_equals_unrolled():
  unrolled = flops.count_flops(
    lambda p, x: vit(p, x, unroll=True), vit_params(), IMAGE
  )
  assert unrolled == analytic_vit()


def test_agrees_with_xla_on_the_unrolled_forward_and_gradient():
  def loss(params, image):
    return vit(params, image, unroll=True).sum()

  step = jax.value_and_grad(loss)
  xla = jax.jit(step).lower(vit_params(), IMAGE).cost_analysis()["flops"]
  ours = flops.count_flops(step, vit_params(), IMAGE)
  # XLA counts elementwise work too; ours leaves it out.
  assert 0.99 * xla < ours <= xla


def test_gradient_is_three_forwards_without_the_images_gradient():
  grad = jax.grad(lambda p, x: vit(p, x).sum())
  embed = 2 * BATCH * TOKENS * PATCH**2 * 3 * WIDTH
  assert flops.count_flops(grad, vit_params(), IMAGE) == (
    3 * analytic_vit() - embed
  )


def test_rematerialised_layers_count_as_often_as_they_run():
  def count(remat):
    grad = jax.grad(lambda p, x: vit(p, x, remat=remat).sum())
    return flops.count_flops(grad, vit_params(), IMAGE)

  layer = TOKENS * (4 * WIDTH**2 + 2 * WIDTH * MLP) + 2 * TOKENS**2 * WIDTH
  # The second matrix of the MLP has no use in the recomputation.
  again = layer - TOKENS * WIDTH * MLP
  assert count(True) - count(False) <= 2 * BATCH * DEPTH * layer
  assert count(True) - count(False) >= 2 * BATCH * DEPTH * again


@pytest.mark.parametrize(
  ("stride", "padding", "lhs_dilation", "rhs_dilation", "groups"),
  [
    ((1, 1), "SAME", (1, 1), (1, 1), 1),
    ((2, 3), "VALID", (1, 1), (1, 1), 1),
    ((1, 2), ((2, 1), (0, 3)), (1, 1), (2, 1), 1),
    ((1, 1), ((2, 2), (1, 4)), (2, 3), (1, 1), 1),
    ((1, 1), "SAME", (1, 1), (1, 1), 7),
  ],
)
def test_convolution_counts_what_xla_counts(
  stride, padding, lhs_dilation, rhs_dilation, groups
):
  def conv(x, w):
    return jax.lax.conv_general_dilated(
      x,
      w,
      stride,
      padding,
      lhs_dilation=lhs_dilation,
      rhs_dilation=rhs_dilation,
      feature_group_count=groups,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )

  args = spec(2, 13, 17, 7), spec(3, 5, 7 // groups, 14)
  xla = jax.jit(conv).lower(*args).cost_analysis()["flops"]
  assert flops.count_flops(conv, *args) == xla


def test_control_flow():
  x, w = spec(5, 7), spec(7, 7)
  one = 2 * 5 * 7 * 7

  def branches(x, w):
    return jax.lax.cond(x.sum() > 0, lambda: x @ w @ w, lambda: x @ w)

  def loop(x, w):
    return jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c @ w, x)

  assert flops.count_flops(branches, x, w) == 2 * one
  assert flops.count_flops(jax.jit(loop), x, w) == one
  assert flops.count_flops(
    lambda x, w: jax.lax.fori_loop(0, 11, lambda _, c: c @ w, x), x, w
  ) == (11 * one)


def test_custom_vjp_counts_forward_and_backward():
  @jax.custom_vjp
  def product(x, w):
    return x @ w

  product.defvjp(
    lambda x, w: (x @ w, (x, w)),
    lambda saved, g: (g @ saved[1].T, saved[0].T @ g),
  )
  x, w = spec(5, 7), spec(7, 3)
  one = 2 * 5 * 7 * 3
  assert flops.count_flops(product, x, w) == one
  grad = jax.grad(lambda x, w: product(x, w).sum(), argnums=(0, 1))
  assert flops.count_flops(grad, x, w) == 3 * one


def test_shard_map_counts_all_shards():
  devices = len(jax.devices())
  mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
  rows = PartitionSpec("data")
  sharded = jax.shard_map(
    lambda x, w: x @ w,
    mesh=mesh,
    in_specs=(rows, PartitionSpec()),
    out_specs=rows,
  )
  x, w = spec(3 * devices, 5), spec(5, 7)
  assert flops.count_flops(sharded, x, w) == 2 * 3 * devices * 5 * 7


def device(kind):
  return mock.Mock(spec=jax.Device, device_kind=kind)


@pytest.mark.parametrize(
  ("kind", "teraflops"),
  [
    ("TPU v3", 61.5),
    ("TPU v4", 275),
    ("TPU v5 lite", 197),
    ("TPU v5", 459),
    ("TPU v5p", 459),
    ("TPU v6 lite", 918),
    ("NVIDIA A100-SXM4-40GB", 312),
    ("NVIDIA H100 80GB HBM3", 989),
    ("NVIDIA H100 PCIe", 756),
    ("NVIDIA H200", 989),
    ("NVIDIA L4", 121),
    ("NVIDIA L40S", 362),
    ("Tesla T4", 65),
    ("Tesla V100-SXM2-16GB", 125),
  ],
)
def test_peaks_by_device_kind(kind, teraflops):
  assert flops.peak_flops(device(kind)) == teraflops * 1e12


def test_no_peak_for_an_unknown_device():
  cpu = jax.devices("cpu")[0]
  assert flops.peak_flops(cpu) is None
  assert flops.peak_flops_of([device("TPU v4"), cpu]) is None


def test_peak_of_all_devices_is_their_sum():
  chips = [device("TPU v4"), device("TPU v5 lite"), device("TPU v4")]
  assert flops.peak_flops_of(chips) == (275 + 197 + 275) * 1e12


def test_a_traced_program_counts_the_same():
  traced = jax.jit(vit).trace(vit_params(), IMAGE)
  assert flops.count_jaxpr(traced.jaxpr) == analytic_vit()
