"""Chunked losses against optax on the matrix of all logits, in float64.

The matrix holds pairs only: what the mask hides is cut out of it by numpy.
"""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from big_vision_like import chips, sharding
from big_vision_like.losses import contrastive

ROWS, SLOTS, WIDTH = 8, 5, 7
# How many of the arguments (zimg, ztxt, t, b) each loss takes.
LOSSES = {"softmax": 3, "sigmoid": 4}
# Mesh, devices, exchange, chunk, keep_mb. Chunks do not divide a device's
# pairs, so that there is padding, and there are several of them.
THREE = {"data": 2, "fsdp": 2, "tensor": 2}
LAYOUTS = {
  "no mesh": (None, 1, "ring", 11, 0),
  "one device": ({}, 1, "gather", 11, 1),
  "ring of 8": ({"data": 8}, 8, "ring", 2, 0),
  "gather of 8": ({"data": 8}, 8, "gather", 11, 0),
  "ring of 2, tensor": ({"data": 2, "tensor": 4}, 8, "ring", 3, 1),
  "ring of 4, all axes": (THREE, 8, "ring", 100, 1),
  "gather of 4, all axes": (THREE, 8, "gather", 8, 1),
}


def arguments(shape=(ROWS, SLOTS), *, width=WIDTH, seed=0):
  """zimg, ztxt, t, b in float64; texts are near their images."""
  rng = np.random.default_rng(seed)
  zimg = rng.normal(size=(*shape, width))
  ztxt = zimg + rng.normal(size=(*shape, width))
  unit = lambda z: z / np.linalg.norm(z, axis=-1, keepdims=True)
  return unit(zimg), unit(ztxt), np.float64(11.0), np.float64(-3.0)


def masks():
  rng = np.random.default_rng(1)
  some = rng.random((ROWS, SLOTS)) < 0.6
  some[1] = False  # Of 8 devices, the second has no pair at all.
  one = np.zeros((ROWS, SLOTS), bool)
  one[-1, -2] = True
  none = np.zeros((ROWS, SLOTS), bool)
  return {"all": ~none, "some": some, "one": one, "none": none}


def dense(name, mask):
  """The loss as a function of (zimg, ztxt, t[, b])."""
  real = np.flatnonzero(mask)

  def loss(zimg, ztxt, t, b=0.0):
    zimg, ztxt = (z.reshape(-1, z.shape[-1])[real] for z in (zimg, ztxt))
    logits = t * zimg @ ztxt.T + b
    if name == "sigmoid":
      labels = jnp.eye(len(real), dtype=logits.dtype)
      losses = optax.sigmoid_binary_cross_entropy(logits, labels)
    else:
      labels = jnp.arange(len(real))
      cross = optax.softmax_cross_entropy_with_integer_labels
      losses = (cross(logits, labels) + cross(logits.T, labels)) / 2
    return losses.sum() / max(len(real), 1)

  return loss


@functools.cache
def dense_results(name):
  """Value and gradients by name of the mask."""
  args = arguments()[: LOSSES[name]]
  results = {}
  with jax.enable_x64(True):
    for key, mask in masks().items():
      if key == "none":  # The matrix is empty.
        results[key] = (0.0, tuple(map(np.zeros_like, args)))
      else:
        grad = jax.value_and_grad(dense(name, mask), tuple(range(len(args))))
        results[key] = jax.device_get(jax.jit(grad)(*args))
  return results


def chunked(name, **settings):
  """(zimg, ztxt, t[, b], mask) -> (loss, hits), gradients; jitted."""
  function = getattr(contrastive, f"{name}_loss")

  def loss(*args):
    loss, *hits = function(*args, **settings)
    return loss, hits

  argnums = tuple(range(LOSSES[name]))
  return jax.jit(jax.value_and_grad(loss, argnums, has_aux=True))


def on_mesh(shape, devices):
  if shape is None:
    return contextlib.nullcontext()
  mesh = sharding.make_mesh(shape, jax.devices()[:devices])
  return jax.set_mesh(mesh)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_dense_loss(name, layout):
  shape, devices, exchange, chunk, keep_mb = LAYOUTS[layout]
  how = dict(exchange=exchange, chunk=chunk)
  if name == "softmax":
    how["keep_mb"] = keep_mb
  args = arguments()[: LOSSES[name]]
  with jax.enable_x64(True), on_mesh(shape, devices):
    run = chunked(name, **how)
    for key, mask in masks().items():
      (loss, hits), grads = jax.device_get(run(*args, mask))
      jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-14),
        (loss, grads),
        dense_results(name)[key],
      )
      for hit, want in zip(hits, expected_hits(mask)):
        np.testing.assert_array_equal(hit, want)


def expected_hits(mask):
  zimg, ztxt, *_ = arguments()
  cos = np.einsum("bme,cne->bmcn", zimg, ztxt).reshape(mask.size, mask.size)
  cos = np.where(mask.ravel() & mask.reshape(-1, 1), cos, -np.inf)
  own = np.arange(mask.size)
  for axis in (1, 0):
    yield (cos.argmax(axis) == own).reshape(mask.shape) & mask


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_hidden_may_be_anything(name):
  *args, mask = *arguments()[: LOSSES[name]], masks()["some"]
  want = dense_results(name)["some"]
  for z in args[:2]:
    z[~mask] = np.nan
  with jax.enable_x64(True):
    (loss, _), grads = jax.device_get(chunked(name, chunk=11)(*args, mask))
  np.testing.assert_allclose(loss, want[0], rtol=1e-12)
  for got, expected in zip(grads, want[1]):
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-14)
  assert not grads[0][~mask].any()


def easy(t, count=11):
  """Pairs that agree exactly, and have nothing to do with others."""
  z = np.eye(count, dtype=np.float32)
  return z, z, np.float32(t), np.float32(-10.0)


@pytest.mark.parametrize("name", LOSSES)
def test_float32_keeps_the_digits_of_easy_pairs(name):
  # 1 + 10 exp(-20) is 1 in float32.
  args = easy(20.0)[: LOSSES[name]]
  (loss, hits), grads = chunked(name, chunk=3)(*args, np.ones(11, bool))
  if name == "softmax":
    want = np.log1p(10 * np.exp(-20.0))
    want_t = -10 * np.exp(-20.0) / (1 + 10 * np.exp(-20.0))
  else:
    want = 11 * np.log1p(np.exp(-10.0))
    want_t = -1 / (1 + np.exp(10.0))
  np.testing.assert_allclose(loss, want, rtol=1e-5)
  np.testing.assert_allclose(grads[2], want_t, rtol=1e-5)
  assert np.all(hits)


@pytest.mark.parametrize("name", LOSSES)
def test_large_temperatures_stay_finite(name):
  zimg, _, t, b = easy(1000.0)
  args = (zimg, -zimg, t, b)[: LOSSES[name]]
  (loss, hits), grads = chunked(name, chunk=3)(*args, np.ones(11, bool))
  want = 1000 + np.log(10) if name == "softmax" else 1010 + 10 * np.exp(-10.0)
  np.testing.assert_allclose(loss, want, rtol=1e-6)
  np.testing.assert_allclose(grads[2], 1.0, rtol=1e-6)
  assert not np.any(hits)


@pytest.mark.parametrize("name", LOSSES)
def test_collapsed_embeddings_hit_nothing(name):
  z = np.full((11, 16), 0.25, np.float32)
  args = (z, z, np.float32(10.0), np.float32(-10.0))[: LOSSES[name]]
  mask = np.arange(11) < 9
  (_, hits), _ = chunked(name, chunk=4)(*args, mask)
  assert not np.any(hits)
  (_, hits), _ = chunked(name, chunk=4)(*args, np.arange(11) == 3)
  assert np.sum(hits) == 2  # A lone pair has no rival.


def array_sizes(hlo):
  shapes = re.findall(r"\b(?:f32|f64|s32|u32|pred|bf16)\[([\d,]+)\]", hlo)
  return [np.prod([int(n) for n in shape.split(",")]) for shape in shapes]


def compiled(name, mesh, *, pairs, width, keep_mb=0, **how):
  spec = jax.ShapeDtypeStruct
  rows = sharding.batch_sharding(mesh)
  z = spec((pairs, width), jnp.float32, sharding=rows)
  one = spec((), jnp.float32, sharding=sharding.replicated(mesh))
  mask = spec((pairs,), bool, sharding=rows)
  args = (z, z, one, one)[: LOSSES[name]]
  if name == "softmax":
    how["keep_mb"] = keep_mb
  return chunked(name, **how).lower(*args, mask).compile()


def largest_array(name, **settings):
  mesh = sharding.make_mesh({"data": 8})
  with jax.set_mesh(mesh):
    program = compiled(name, mesh, pairs=512, width=16, chunk=32, **settings)
  return max(array_sizes(program.as_text()))


@pytest.mark.parametrize("exchange", contrastive.EXCHANGES)
@pytest.mark.parametrize("name", LOSSES)
def test_no_device_holds_more_than_a_chunk(name, exchange):
  # Not even the embeddings of all texts, 512 * 16, let alone the logits.
  assert largest_array(name, exchange=exchange) == 64 * 32


def test_kept_logits_are_those_of_own_images():
  # Of the texts that travel one way, and of those that travel the other way.
  assert largest_array("softmax", exchange="ring", keep_mb=1) == 64 * 512 // 2


@pytest.mark.slow
@pytest.mark.parametrize(
  ("exchange", "chunk"), [("ring", 1024), ("gather", 16384)]
)
@pytest.mark.parametrize("name", LOSSES)
def test_compiles_for_a_tpu_slice(name, exchange, chunk):
  pytest.importorskip("libtpu")
  devices = chips.parse("v5e:16x16").devices()
  mesh = sharding.make_mesh({"data": 256}, devices)
  with jax.set_mesh(mesh):
    program = compiled(
      name, mesh, pairs=131_072, width=768, exchange=exchange, chunk=chunk
    )
  # All logits of a chip's 512 images in float32 would be 268 MB.
  assert program.memory_analysis().temp_size_in_bytes < 150e6


def test_the_dense_program_holds_all_logits():
  z = jax.ShapeDtypeStruct((64, 16), jnp.float32)
  one = jax.ShapeDtypeStruct((), jnp.float32)
  loss = dense("softmax", np.ones(64, bool))
  program = jax.jit(jax.grad(loss)).lower(z, z, one).compile()
  assert max(array_sizes(program.as_text())) == 64 * 64


@pytest.mark.parametrize(
  ("settings", "sentence"),
  [
    (
      dict(exchange="broadcast"),
      "config.task.exchange = 'broadcast'; it is one of ('ring', 'gather').",
    ),
    (dict(chunk=0), "config.task.chunk = 0; it is a number of texts."),
  ],
)
def test_refusals(settings, sentence):
  zimg, ztxt, t, _ = map(jnp.asarray, arguments())
  mask = jnp.ones((ROWS, SLOTS), bool)
  with pytest.raises(ValueError, match=re.escape(sentence)):
    contrastive.softmax_loss(zimg, ztxt, t, mask, **settings)


def test_rows_that_do_not_divide_are_refused():
  zimg, ztxt, t, b = map(jnp.asarray, arguments((6, 5)))
  sentence = (
    "A contrastive batch of 6 rows cannot be shared evenly by the 4 devices of "
    "the mesh axes data 2 x fsdp 2."
  )
  mesh = {"data": 2, "fsdp": 2, "tensor": 2}
  with (
    on_mesh(mesh, 8),
    pytest.raises(ValueError, match=re.escape(sentence)),
  ):
    contrastive.sigmoid_loss(zimg, ztxt, t, b, jnp.ones((6, 5), bool))
