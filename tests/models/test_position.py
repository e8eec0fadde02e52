"""Every position embedding against an independent computation in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from big_vision_like.models.layers import position
from big_vision_like.models.layers.position import PositionEmbedding

WIDTH, SIDE = 12, 7
# Two rows: a common size and a single row of patches; then one that is larger
# than the tables, whose first half of the patches were dropped.
GRIDS = [[(3, 5), (1, 6)], [(11, 2), (0, 0)]]


def packed_positions():
  ids = np.zeros((2, 23), np.int32)
  positions = np.zeros((2, 23, 2), np.int32)
  for b, row in enumerate(GRIDS):
    start = 0
    for m, (h, w) in enumerate(row):
      cells = np.argwhere(np.ones((h, w)))[h * w // 2 * b :]
      end = start + len(cells)
      ids[b, start:end] = m + 1
      positions[b, start:end] = cells
      start = end
  return positions, np.asarray(GRIDS, np.int32), ids


def sin_cos(y, x):
  count = WIDTH // 4
  omega = [10_000 ** (-i / (count - 1)) for i in range(count)]
  parts = [np.sin(x * w) for w in omega] + [np.cos(x * w) for w in omega]
  parts += [np.sin(y * w) for w in omega] + [np.cos(y * w) for w in omega]
  return np.asarray(parts)


def table_coordinate(p, n, fractional):
  """Of patch p of n, in units of entries."""
  if fractional:
    return p / n * (SIDE - 1)
  return p if n <= SIDE else p * (SIDE - 1) / (n - 1)


def read(table, at):
  """Linear interpolation along the first axis."""
  entries = np.arange(len(table))
  return np.stack([np.interp(at, entries, column) for column in table.T], -1)


def expected(kind, params, p, grid, fractional):
  """The embedding of one patch."""
  (row, column), (h, w) = p, grid
  if kind == "learned1d":
    index, count = row * w + column, h * w
    scale = 1 if count <= SIDE**2 else (SIDE**2 - 1) / (count - 1)
    return read(params["table"], index * scale)
  y, x = (table_coordinate(a, n, fractional) for a, n in zip(p, grid))
  if kind in ("sinusoidal", "fourier") and not fractional:
    y, x = row, column
  if kind == "sinusoidal":
    return sin_cos(y, x)
  if kind == "fourier":
    unit = np.asarray([y, x]) / (SIDE - 1)
    phase = 2 * np.pi * unit @ params["frequencies"]
    return np.concatenate([np.sin(phase), np.cos(phase)])
  if kind == "learned2d":
    return np.asarray(
      [
        ndimage.map_coordinates(
          params["table"][..., d], [[y], [x]], order=1, mode="nearest"
        )[0]
        for d in range(WIDTH)
      ]
    )
  y, x = read(params["rows"], y), read(params["columns"], x)
  return {
    "factorised_add": y + x,
    "factorised_mul": y * x,
    "factorised_stack": np.concatenate([y, x], -1),
  }[kind]


@pytest.mark.parametrize("fractional", [False, True])
@pytest.mark.parametrize("kind", position.KINDS)
def test_embedding_of_every_patch(kind, fractional):
  if kind == "learned1d" and fractional:
    pytest.skip("has no fractional form, see test_refusals")
  positions, grids, ids = packed_positions()
  module = PositionEmbedding(kind, WIDTH, SIDE, fractional)
  inputs = [jnp.asarray(x) for x in (positions, grids, ids)]
  params = module.init(jax.random.key(0), *inputs).get("params", {})

  @jax.jit
  def run(params):
    out, pull = jax.vjp(lambda p: module.apply({"params": p}, *inputs), params)
    # Not `out` itself: along it, a sine and its cosine stand still.
    return out, pull(jnp.ones_like(out))[0]

  out, grads = run(params)
  assert out.shape == (2, 23, WIDTH)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves((out, grads)))
  assert all(x.any() for x in jax.tree.leaves(grads))
  params = {k: np.asarray(x, np.float64) for k, x in params.items()}
  for b, i in np.argwhere(ids > 0):
    want = expected(
      kind, params, positions[b, i], grids[b, ids[b, i] - 1], fractional
    )
    # Float32; phases of the Fourier embedding reach some hundred radians.
    np.testing.assert_allclose(out[b, i], want, rtol=0, atol=1e-4)
    if "factorised" in kind or "learned" in kind:
      np.testing.assert_allclose(out[b, i], want, rtol=0, atol=1e-6)


def test_whole_coordinates_are_plain_lookup():
  positions, grids, ids = packed_positions()
  inputs = [jnp.asarray(x[:1]) for x in (positions, grids, ids)]
  module = PositionEmbedding("factorised_add", WIDTH, SIDE)
  params = module.init(jax.random.key(0), *inputs)["params"]
  out = module.apply({"params": params}, *inputs)
  rows, columns = (np.asarray(params[k]) for k in ("rows", "columns"))
  y, x = positions[0].T
  np.testing.assert_array_equal(out[0], rows[y] + columns[x])


@pytest.mark.parametrize("kind", position.KINDS)
def test_no_two_patches_of_a_large_image_fall_together(kind):
  cells = np.argwhere(np.ones((29, 3)))[None].astype(np.int32)
  module = PositionEmbedding(kind, WIDTH, SIDE)
  inputs = (
    jnp.asarray(cells),
    jnp.asarray([[[29, 3]]]),
    jnp.ones(cells.shape[:2], jnp.int32),
  )
  params = module.init(jax.random.key(0), *inputs)
  out = np.asarray(module.apply(params, *inputs)[0])
  apart = np.abs(out[:, None] - out[None]).max(-1)
  np.fill_diagonal(apart, 1)
  assert apart.min() > 1e-6


@pytest.mark.parametrize("keep_aspect", [False, True])
@pytest.mark.parametrize("kind", position.RESIZED)
def test_resized_tables_are_jax_image_resize(kind, keep_aspect):
  """Each image of a row gets the table resized to its own grid."""
  positions, grids, ids = packed_positions()
  module = PositionEmbedding(kind, WIDTH, SIDE, keep_aspect=keep_aspect)
  inputs = [jnp.asarray(x) for x in (positions, grids, ids)]
  params = module.init(jax.random.key(0), *inputs)["params"]
  # A size at which an error shows.
  params = jax.tree.map(lambda x: x / 0.02, params)
  out = jax.jit(module.apply)({"params": params}, *inputs)
  for b, row in enumerate(GRIDS):
    for m, (h, w) in enumerate(row):
      own = ids[b] == m + 1
      y, x = positions[b, own].T
      size = (max(h, w),) * 2 if keep_aspect else (h, w)
      if not own.any():
        continue
      if kind == "resized_factorised":
        rows, columns = (
          jax.image.resize(params[k], (n, WIDTH), "linear", antialias=False)
          for k, n in zip(("rows", "columns"), size)
        )
        want = rows[y] + columns[x]
      else:
        method = "linear" if kind == "resized_bilinear" else "cubic"
        want = jax.image.resize(params["table"], (*size, WIDTH), method)[y, x]
      # Float32, of values around 1.
      np.testing.assert_allclose(out[b, own], want, rtol=0, atol=1e-5)


def test_grid_coordinates_are_in_raster_order():
  np.testing.assert_array_equal(
    position.grid_coordinates(2, 3),
    [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]],
  )


def test_refusals():
  inputs = [jnp.asarray(x) for x in packed_positions()]

  def init(*args):
    PositionEmbedding(*args).init(jax.random.key(0), *inputs)

  with pytest.raises(ValueError, match="position is 'rope'; it is one of"):
    init("rope", WIDTH)
  with pytest.raises(ValueError, match="learned1d counts patches"):
    init("learned1d", WIDTH, SIDE, True)
  with pytest.raises(ValueError, match="divisible by 4, not 10"):
    init("sinusoidal", 10)
  with pytest.raises(ValueError, match="halves the width, which is 9"):
    init("factorised_stack", 9)
  with pytest.raises(ValueError, match="needs an even width, not 9"):
    init("fourier", 9)
  with pytest.raises(ValueError, match="stretches over each image already"):
    init("resized_bilinear", WIDTH, SIDE, True)
  with pytest.raises(ValueError, match="keep_aspect is for resized_"):
    init("learned2d", WIDTH, SIDE, False, True)
