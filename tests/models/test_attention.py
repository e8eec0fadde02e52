"""Every backend against softmax attention written out per segment."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from big_vision_like.models.layers import attention as attention_lib
from big_vision_like.models.layers import cudnn
from big_vision_like.models.layers.attention import attention
from big_vision_like.models.layers.blockwise import blockwise_attention


def packed_ids(rng, rows, length, smallest=3, largest=29):
  """Rows of images 1, 2, ... of random lengths, then padding."""
  ids = np.zeros((rows, length), np.int32)
  for row in ids:
    start, image = 0, 1
    while True:
      end = start + rng.integers(smallest, largest)
      if end > length:
        break
      row[start:end] = image
      start, image = end, image + 1
  return ids


def normals(rng, *shape, dtype=np.float64):
  return rng.normal(size=shape).astype(dtype)


def written_out(q, k, v, q_ids, k_ids):
  """The definition, one query at a time, in float64."""
  out = np.zeros_like(q)
  for b, i, h in np.ndindex(q.shape[:3]):
    seen = k_ids[b] == q_ids[b, i]
    if seen.any():
      s = k[b, seen, h] @ q[b, i, h] / math.sqrt(q.shape[-1])
      p = np.exp(s - s.max())
      out[b, i, h] = p / p.sum() @ v[b, seen, h]
  return out


@functools.partial(jax.jit, static_argnames=("backend", "block", "rows"))
def attend(q, k, v, g, ids, kv_ids, *, backend, block=64, rows=None):
  """Output and gradients; one compiled program for each backend and shape."""

  def run(q, k, v):
    if backend == "blocks":
      return blockwise_attention(q, k, v, ids, kv_ids, block=block, rows=rows)
    if q.shape == k.shape:
      return attention(q, k, v, segment_ids=ids, backend=backend)
    return attention(
      q, k, v, segment_ids=ids, kv_segment_ids=kv_ids, backend=backend
    )

  out, pull = jax.vjp(run, q, k, v)
  return out, *pull(g)


@pytest.mark.parametrize("order", ["packed", "random"])
def test_xla_and_blockwise_are_the_definition_in_float64(order):
  """Padding sees padding; blockwise needs no order in the ids to be right."""
  rng = np.random.default_rng(0)
  q, k, v, g = (normals(rng, 2, 53, 3, 5) for _ in range(4))
  ids = packed_ids(rng, 2, 53)
  if order == "random":
    ids = rng.integers(0, 7, ids.shape).astype(np.int32)
  with jax.enable_x64(True):
    dense = attend(q, k, v, g, ids, ids, backend="xla")
    assert dense[0].dtype == jnp.float64
    want = written_out(q, k, v, ids, ids)
    np.testing.assert_allclose(dense[0], want, rtol=0, atol=1e-13)
    for rows in (1, 2):
      blocks = attend(
        q, k, v, g, ids, ids, backend="blocks", block=16, rows=rows
      )
      for got, want in zip(blocks, dense):
        # Float64 rounding; no entry is larger than about 10.
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["xla", "blockwise"])
def test_queries_of_empty_slots_get_zero_and_finite_gradients(backend):
  rng = np.random.default_rng(3)
  q, g = (normals(rng, 2, 5, 3, 7) for _ in range(2))
  k, v = (normals(rng, 2, 67, 3, 7) for _ in range(2))
  slots = np.tile(np.arange(1, 6, dtype=np.int32), (2, 1))
  ids = np.zeros((2, 67), np.int32)
  ids[0, :31], ids[0, 31:60] = 1, 2  # Row 1 has no image at all.
  with jax.enable_x64(True):
    out, *grads = attend(q, k, v, g, slots, ids, backend=backend)
  want = written_out(q, k, v, slots, ids)
  np.testing.assert_allclose(out, want, rtol=0, atol=1e-13)
  assert not out[0, 2:].any()
  assert not out[1].any()
  assert all(np.isfinite(g).all() for g in grads)
  assert not grads[1][1].any()


def test_kernels_equal_xla_and_mix_no_images_in_float32():
  """Packed rows with padding, of a length that is no block's multiple.

  splash runs interpreted, with the block mask that a TPU would get. The second
  half is bit equality: what the masks remove adds an exact 0 in all three, so
  perturbing image 2 changes no bit of another image's output.
  """
  rng = np.random.default_rng(4)
  ids = packed_ids(rng, 2, 269, 20, 80)
  assert ids.max(1).min() >= 3
  x = normals(rng, 4, 2, 269, 2, 8, dtype=np.float32)
  scales = np.where(ids == 2, 1e3, 1).astype(np.float32)[..., None, None]
  want = attend(*x, ids, ids, backend="xla")
  for backend in ("xla", "blockwise", "splash"):
    before = attend(*x, ids, ids, backend=backend)
    for got, wanted in zip(before, want):
      # Some hundred terms of size 1, summed in another order, in float32.
      np.testing.assert_allclose(got, wanted, rtol=0, atol=5e-6)
    after = attend(*(x * scales), ids, ids, backend=backend)
    for a, b in zip(before, after):
      np.testing.assert_array_equal(a[ids != 2], b[ids != 2])
      assert (a[ids == 2] != b[ids == 2]).any()


@pytest.mark.parametrize("backend", ["xla", "blockwise", "splash"])
def test_bfloat16_stays_near_float32(backend):
  rng = np.random.default_rng(5)
  ids = packed_ids(rng, 1, 67, 20, 30)
  x = normals(rng, 4, 1, 67, 2, 8)
  low = jnp.asarray(x, jnp.bfloat16)
  out = attend(*low, ids, ids, backend=backend)[0]
  assert out.dtype == jnp.bfloat16
  want = written_out(*np.asarray(low[:3], np.float64), ids, ids)
  # bfloat16 keeps 8 bits, of the scaled queries, the weights and the output.
  np.testing.assert_allclose(
    out.astype(jnp.float32), want, rtol=2**-6, atol=2**-6
  )


def test_without_ids_all_attend_to_all_and_a_mask_restricts():
  rng = np.random.default_rng(6)
  q, k, v = (jnp.asarray(normals(rng, 2, 13, 3, 5)) for _ in range(3))
  one = np.ones((2, 13), np.int32)
  want = written_out(*map(np.asarray, (q, k, v)), one, one)
  for backend in ("xla", "blockwise"):
    run = jax.jit(functools.partial(attention, backend=backend))
    np.testing.assert_allclose(run(q, k, v), want, rtol=0, atol=1e-6)
  ids = jnp.asarray(packed_ids(rng, 2, 13, 3, 6))
  mask = (ids[:, :, None] == ids[:, None, :])[:, None]
  run = jax.jit(attention)
  np.testing.assert_array_equal(
    run(q, k, v, mask=mask), run(q, k, v, segment_ids=ids)
  )


def test_blockwise_never_reads_foreign_blocks():
  """A NaN in a block that shares no image would spread if it were touched."""
  ids = np.repeat([1, 2, 3, 0], [64, 70, 58, 64]).astype(np.int32)[None]
  rng = np.random.default_rng(7)
  q, k, v = (jnp.asarray(normals(rng, 1, 256, 1, 4)) for _ in range(3))
  # Tokens 128 to 159 hold ends of images 2 and 3: their blocks may read it.
  v = v.at[0, 150].set(jnp.nan)
  out = attend(q, k, v, q, ids, ids, backend="blocks", block=32)[0]
  assert np.isfinite(out[0, :64]).all()
  assert np.isfinite(out[0, 192:]).all()
  assert np.isnan(out[0, 150]).all()


def test_kernels_run_per_shard_under_a_mesh():
  mesh = jax.make_mesh(
    (2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3
  )
  rng = np.random.default_rng(9)
  ids = packed_ids(rng, 8, 67)
  x = normals(rng, 4, 8, 67, 4, 5, dtype=np.float32)
  want = attend(*x, ids, ids, backend="xla")
  batch = ("data", "fsdp")
  with jax.set_mesh(mesh):
    x = [jax.device_put(a, NamedSharding(mesh, P(batch))) for a in x]
    ids = jax.device_put(ids, NamedSharding(mesh, P(batch)))
    compiled = attend.lower(*x, ids, ids, backend="blockwise").compile()
    for got, wanted in zip(compiled(*x, ids, ids), want):
      np.testing.assert_allclose(got, wanted, rtol=0, atol=5e-6)
  # The rows' loops stay on their device.
  loops = [x for x in compiled.as_text().splitlines() if "while/body" in x]
  assert loops
  assert not any("all-" in line for line in loops)


def test_rows_of_16k_train_without_a_matrix_of_scores():
  length, heads = 16_384, 2

  def loss(x, ids):
    return attention(*x, segment_ids=ids, backend="auto").sum()

  compiled = (
    jax.jit(jax.grad(loss))
    .lower(
      jax.ShapeDtypeStruct((3, 1, length, heads, 8), jnp.float32),
      jax.ShapeDtypeStruct((1, length), jnp.int32),
    )
    .compile()
  )
  one_array = 4 * length * heads * 8
  scores = 4 * heads * length**2
  used = compiled.memory_analysis().temp_size_in_bytes
  assert used < 16 * one_array < scores / 100


def test_auto_follows_its_rule(monkeypatch):
  def chosen(queries, keys, *, platform, dtype=jnp.bfloat16, **kw):
    monkeypatch.setattr(attention_lib, "target_platform", lambda: platform)
    q = jax.ShapeDtypeStruct((2, queries, 4, 64), dtype)
    k = jax.ShapeDtypeStruct((2, keys, 4, 64), dtype)
    return attention_lib.choose(q, k, **{"packed": True, "mask": None, **kw})

  assert chosen(512, 512, platform="cpu") == "xla"
  assert chosen(1024, 1024, platform="cpu") == "blockwise"
  assert chosen(1024, 1024, platform="cpu", packed=False) == "xla"
  assert chosen(16, 4096, platform="cpu") == "xla"
  assert chosen(512, 512, platform="tpu") == "xla"
  assert chosen(1024, 1024, platform="tpu") == "splash"
  assert chosen(1024, 1024, platform="tpu", mask=jnp.ones(1, bool)) == "xla"
  assert chosen(600, 1024, platform="tpu") == "blockwise"
  assert chosen(1024, 1024, platform="gpu") == "blockwise"
  monkeypatch.setattr(cudnn, "device_refusal", lambda: None)
  assert chosen(1024, 1024, platform="gpu") == "cudnn"
  assert chosen(1024, 1024, platform="gpu", dtype=jnp.float32) == "blockwise"


def test_cudnn_lowers_to_its_packed_kernel(monkeypatch):
  """Forward and backward reach cuDNN; without a GPU nothing can run."""
  private = cudnn._private()
  for name, value in (
    ("check_cudnn_version", lambda: 91400),
    ("check_compute_capability", lambda _: True),
    ("is_cuda_compute_capability_equal", lambda _: False),
  ):
    monkeypatch.setattr(private, name, value)
  monkeypatch.setattr(cudnn, "device_refusal", lambda: None)

  def loss(x, ids):
    out = attention(*x, segment_ids=ids, backend="cudnn", max_segments=7)
    return out.astype(jnp.float32).sum()

  traced = jax.jit(jax.grad(loss)).trace(
    jax.ShapeDtypeStruct((3, 2, 256, 4, 64), jnp.bfloat16),
    jax.ShapeDtypeStruct((2, 256), jnp.int32),
  )
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert "__cudnn$fmhaSoftmax(" in text or "__cudnn$fmhaSoftmax " in text
  assert "__cudnn$fmhaSoftmaxBackward" in text


def test_runs_are_the_lengths_and_starts_of_images():
  ids = jnp.asarray([[1, 1, 1, 2, 2, 0, 0], [1, 2, 3, 3, 3, 3, 3]])
  lengths, starts = cudnn.runs(ids, 4)
  np.testing.assert_array_equal(lengths, [[3, 2, 2, -1], [1, 1, 5, -1]])
  np.testing.assert_array_equal(starts, [[0, 3, 5, -1, -1], [0, 1, 2, -1, -1]])


def refused(match, queries=9, keys=9, dtype=jnp.float32, **kw):
  q = jnp.zeros((2, queries, 2, 8), dtype)
  k = jnp.zeros((2, keys, 2, 8), dtype)
  with pytest.raises(ValueError, match=match):
    attention(q, k, k, **kw)


def test_refusals():
  ids = jnp.ones((2, 9), jnp.int32)
  refused(
    "Unknown attention backend 'flash'. There are: auto, xla, blockwise, "
    "splash, cudnn",
    backend="flash",
  )
  refused("give kv_segment_ids too", keys=11, segment_ids=ids)
  refused("need the queries' segment_ids", kv_segment_ids=ids)
  for backend in ("blockwise", "splash", "cudnn"):
    mask = jnp.ones((1, 1, 9, 9), bool)
    refused("takes segment ids and no mask", mask=mask, backend=backend)
  refused("'splash' needs self-attention", keys=11, backend="splash")
  refused(
    "'splash' needs bfloat16 or float32", dtype=jnp.float16, backend="splash"
  )
  refused("'cudnn' needs bfloat16 or float16", backend="cudnn")
  refused(
    "'cudnn' needs a GPU; this is a cpu", dtype=jnp.bfloat16, backend="cudnn"
  )
