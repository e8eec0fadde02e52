"""Position embeddings of patches, for fixed grids and for packed rows.

NaViT (arXiv 2307.06304, section 2.1 and table 3) compares seven, each of the
absolute patch coordinates, and where it makes sense of the fractional ones.
All are a function of a (row, column) pair in units of table entries, which
`coordinates` computes, so that they differ in one line each. NaFlex models
(SigLIP 2, arXiv 2502.14786) resize a table to each image instead.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

KINDS = (
  "learned1d",
  "learned2d",
  "factorised_add",
  "factorised_mul",
  "factorised_stack",
  "sinusoidal",
  "fourier",
)
RESIZED = ("resized_bilinear", "resized_bicubic", "resized_factorised")
# Frequencies of a Fourier embedding over the unit square, before training
# (Tancik et al., arXiv 2006.10739, use 10 for images).
_FOURIER_SCALE = 10.0


def sincos2d(
  coords: Float[Array, "*n 2"], width: int
) -> Float[Array, "*n {width}"]:
  """[sin x, cos x, sin y, cos y] of (row y, column x), width/4 frequencies.

  From 1 down to 1/10000, both included, as big_vision has it.
  """
  if width % 4:
    raise ValueError(
      f"A sin-cos embedding needs a width divisible by 4, not {width}."
    )
  count = width // 4
  omega = 10_000.0 ** -(jnp.arange(count) / max(count - 1, 1))
  y, x = coords[..., :1] * omega, coords[..., 1:] * omega
  return jnp.concatenate([jnp.sin(x), jnp.cos(x), jnp.sin(y), jnp.cos(y)], -1)


def grid_coordinates(height: int, width: int) -> Float[Array, "n 2"]:
  """(row, column) of a grid's cells, in raster order."""
  grid = jnp.indices((height, width), jnp.float32)
  return grid.reshape(2, -1).T


def coordinates(
  positions: Int[Array, "b l n"],
  grid: Int[Array, "b l n"],
  *,
  entries: int,
  fractional: bool,
) -> Float[Array, "b l n"]:
  """Where patches lie in a table of `entries` a side.

  Absolute: the patch's own row and column; an image with more than `entries`
  of them is squeezed until its last one meets the table's last, and reads
  between entries, so that no two of its patches fall together. Fractional:
  position / grid in [0, 1) of the way from the first entry to the last.
  """
  grid = jnp.maximum(grid, 1)
  if fractional:
    return positions * ((entries - 1) / grid)
  squeeze = (entries - 1) / jnp.maximum(grid - 1, 1)
  return positions * jnp.where(grid <= entries, 1.0, squeeze)


def resize_weights(
  positions: Int[Array, "*n"],
  grid: Int[Array, "*n"],
  *,
  entries: int,
  cubic: bool = False,
  antialias: bool = True,
) -> Float[Array, "*n {entries}"]:
  """The row `positions` of the matrix that resizes `entries` to `grid`.

  float32, as `torch.nn.functional.interpolate` without align_corners has it:
  half-pixel centres; with `antialias` the kernel widens where the table
  shrinks, and its part that is outside of the table is left out.

  Args:
    positions: below `grid`; each may belong to an image of its own.
    grid: rows, or columns, of the position's image.
    entries: of the table.
    cubic: Keys' kernel with a = -0.5 instead of the linear one; torch takes
      -0.75 without antialias, so it goes with antialias.
    antialias: see above.
  """
  if cubic and not antialias:
    raise ValueError("Cubic resizing is for antialias=True only.")
  scale = entries / jnp.maximum(grid, 1)[..., None]
  center = (positions[..., None] + 0.5) * scale - 0.5
  distance = jnp.abs(center - jnp.arange(entries))
  if antialias:
    distance = distance / jnp.maximum(scale, 1)
  weights = _cubic(distance) if cubic else jax.nn.relu(1 - distance)
  return weights / weights.sum(-1, keepdims=True)


def _cubic(x):
  near = (1.5 * x - 2.5) * x**2 + 1
  far = ((2.5 - 0.5 * x) * x - 4) * x + 2
  return jnp.where(x < 1, near, jnp.where(x < 2, far, 0))


class PositionEmbedding(nn.Module):
  """Embeds the positions of packed patches.

  Tables are read by linear interpolation, which at whole coordinates is plain
  lookup. Any grid has an embedding, see `coordinates`; without fractional
  coordinates the sinusoidal and the Fourier one need no limit at all.

  Attributes:
    kind: one of KINDS or RESIZED. learned1d is ViT's, by the index in the
      image's own raster; learned2d has an entry for each (row, column); the
      factorised ones have a table for rows and one for columns, of which the
      embeddings are added, multiplied, or stacked as halves; sinusoidal is
      fixed; fourier is the sine and cosine of a learned linear map. The resized
      ones stretch a table over each image: antialiased, one for (row, column),
      or linearly, the sum of one for rows and one for columns.
    width: features.
    max_grid: rows, and columns, that a table has entries for.
    fractional: embed position / grid; not for learned1d and resized ones.
    keep_aspect: resize to a square over the longer side, of which an image
      reads its upper left part; for resized ones only.
  """

  kind: str
  width: int
  max_grid: int = 64
  fractional: bool = False
  keep_aspect: bool = False

  @nn.compact
  def __call__(
    self,
    positions: Int[Array, "b l 2"],
    grid_hw: Int[Array, "b m 2"],
    segment_ids: Int[Array, "b l"],
  ) -> Float[Array, "b l {self.width}"]:
    """The embedding of each patch, float32; padding gets some finite one."""
    self.check()
    image = jnp.maximum(segment_ids - 1, 0)[..., None]
    grid = jnp.take_along_axis(grid_hw, image, axis=1)
    if self.kind == "learned1d":
      return self.learned1d(positions, grid)
    if self.kind in RESIZED:
      return self.resized(positions, grid)
    bounded = self.fractional or self.kind not in ("sinusoidal", "fourier")
    coords = positions.astype(jnp.float32)
    if bounded:
      coords = coordinates(
        positions, grid, entries=self.max_grid, fractional=self.fractional
      )
    if self.kind == "sinusoidal":
      return sincos2d(coords, self.width)
    if self.kind == "fourier":
      return self.fourier(coords)
    if self.kind == "learned2d":
      return self.learned2d(coords)
    return self.factorised(coords)

  def check(self):
    if self.kind not in KINDS + RESIZED:
      raise ValueError(
        f"position is {self.kind!r}; it is one of {', '.join(KINDS + RESIZED)}."
      )
    if self.kind in RESIZED and self.fractional:
      raise ValueError(
        f"{self.kind} stretches over each image already; leave out fractional."
      )
    if self.kind not in RESIZED and self.keep_aspect:
      raise ValueError(
        f"keep_aspect is for {', '.join(RESIZED)}, not for {self.kind}."
      )
    if self.fractional and self.kind == "learned1d":
      raise ValueError(
        "learned1d counts patches, so it has no fractional form; take "
        "learned2d, or a factorised, sinusoidal or fourier embedding."
      )

  def table(self, name, *shape):
    # Products of two start as small as the sums and the lookups do.
    scale = 0.02**0.5 if self.kind == "factorised_mul" else 0.02
    return self.param(name, nn.initializers.normal(scale), shape)

  def factorised(self, coords):
    stack = self.kind == "factorised_stack"
    if stack and self.width % 2:
      raise ValueError(
        f"factorised_stack halves the width, which is {self.width}."
      )
    features = self.width // 2 if stack else self.width
    rows = self.table("rows", self.max_grid, features)
    columns = self.table("columns", self.max_grid, features)
    y, x = (
      _interpolate(table, coords[..., axis])
      for axis, table in enumerate((rows, columns))
    )
    if stack:
      return jnp.concatenate([y, x], -1)
    return y + x if self.kind == "factorised_add" else y * x

  def learned1d(self, positions, grid):
    entries = self.max_grid**2
    table = self.table("table", entries, self.width)
    h, w = grid[..., 0], grid[..., 1]
    index = (positions[..., 0] * w + positions[..., 1])[..., None]
    coords = coordinates(
      index, (h * w)[..., None], entries=entries, fractional=False
    )
    return sum(
      weight[..., None] * table[i]
      for i, weight in _neighbours(coords[..., 0], entries)
    )

  def learned2d(self, coords):
    side = self.max_grid
    table = self.table("table", side, side, self.width)
    return sum(
      (wy * wx)[..., None] * table[y, x]
      for y, wy in _neighbours(coords[..., 0], side)
      for x, wx in _neighbours(coords[..., 1], side)
    )

  def resized(self, positions, grid):
    side, factorised = self.max_grid, self.kind == "resized_factorised"
    if self.keep_aspect:
      grid = jnp.broadcast_to(grid.max(-1, keepdims=True), grid.shape)
    weights = resize_weights(
      positions,
      grid,
      entries=side,
      cubic=self.kind == "resized_bicubic",
      antialias=not factorised,
    )
    y, x = weights[:, :, 0], weights[:, :, 1]
    if factorised:
      rows = self.table("rows", side, self.width)
      columns = self.table("columns", side, self.width)
      return _product(y, rows) + _product(x, columns)
    table = self.table("table", side, side, self.width)
    outer = (y[..., :, None] * x[..., None, :]).reshape(*y.shape[:-1], -1)
    return _product(outer, table.reshape(side**2, self.width))

  def fourier(self, coords):
    if self.width % 2:
      raise ValueError(
        f"A Fourier embedding needs an even width, not {self.width}."
      )
    frequencies = self.param(
      "frequencies",
      nn.initializers.normal(_FOURIER_SCALE),
      (2, self.width // 2),
    )
    unit = coords / (self.max_grid - 1)
    phase = 2 * jnp.pi * jnp.matmul(unit, frequencies, precision="highest")
    return jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], -1)


def _interpolate(table, coords):
  """Reads a short table between its entries, as one product.

  The weights of the entries are a hat of width 1 around the coordinate. A
  product has a product for its gradient, where a lookup scatters.
  """
  entries = jnp.arange(table.shape[0], dtype=coords.dtype)
  weights = jax.nn.relu(1 - jnp.abs(coords[..., None] - entries))
  return _product(weights, table)


def _product(weights, table):
  return jnp.matmul(weights, table, precision="highest")


def _neighbours(coords, entries):
  """The two entries beside each coordinate, with their weights."""
  low = jnp.clip(jnp.floor(coords), 0, entries - 1)
  high = jnp.minimum(low + 1, entries - 1)
  weight = coords - low
  return (
    (low.astype(jnp.int32), 1 - weight),
    (high.astype(jnp.int32), weight),
  )
