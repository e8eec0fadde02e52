"""A learned position table on another grid, as for a higher resolution.

Both ways are bilinear. They differ in where the entries lie, and not by
little: a table has to be resized in the way its code does it.

  corners     the corner entries stay in place (align_corners). The original
              checkpoints' code: scipy.ndimage.zoom(order=1).
  antialias   the outer edges stay in place, and the kernel widens where the
              grid shrinks. FlexiViT's code: jax.image.resize.
"""

import math

import numpy as np
from jaxtyping import Array, Float

from big_vision_like.models.layers.resize import resize_table

KINDS = ("corners", "antialias")
Grid = tuple[int, int]


def resize_corners(
  table: Float[np.ndarray, "g h ..."], size: Grid
) -> Float[np.ndarray, "{size[0]} {size[1]} ..."]:
  """scipy.ndimage.zoom(order=1) of the first two axes, for whole sizes."""
  rows, columns = (
    _corners_matrix(old, new) for old, new in zip(table.shape, size)
  )
  y = np.einsum("ip,jq,pq...->ij...", rows, columns, table, optimize=True)
  return y.astype(table.dtype)


def _corners_matrix(old, new):
  at = np.linspace(0, old - 1, new)
  return np.maximum(0.0, 1.0 - np.abs(at[:, None] - np.arange(old)))


def resize_positions(
  table: Float[Array | np.ndarray, "1 n d"],
  size: Grid,
  *,
  kind: str,
  prefix: int = 0,
  old_size: Grid | None = None,
) -> Float[np.ndarray, "1 {prefix+size[0]*size[1]} d"]:
  """The table for a grid of `size`; of the same size, the table as it is.

  Args:
    table: entries of tokens before the patches, then the grid in raster order.
    size: rows and columns of the new grid.
    kind: one of KINDS.
    prefix: entries before the grid's, such as a class token's; they stay.
    old_size: rows and columns of the old grid; None: it is square.

  Raises:
    ValueError: for another kind, or a table that is not of `old_size`.
  """
  if kind not in KINDS:
    raise ValueError(f"Positions are resized as one of {KINDS}, not {kind!r}.")
  table = np.asarray(table)
  old_size = old_size or square(table.shape[1] - prefix)
  if math.prod(old_size) != table.shape[1] - prefix:
    raise ValueError(
      f"A table of {table.shape[1]} positions, {prefix} of them before the "
      f"grid, has no grid of {old_size[0]} x {old_size[1]}."
    )
  if old_size == tuple(size):
    return table
  grid = table[0, prefix:].reshape(*old_size, -1)
  resize = resize_corners if kind == "corners" else resize_table
  grid = resize(grid, tuple(size)).reshape(1, math.prod(size), -1)
  return np.concatenate([table[:, :prefix], grid], 1)


def square(positions: int) -> Grid:
  """The sides of a square grid.

  Raises:
    ValueError: if that many positions do not make a square.
  """
  side = math.isqrt(max(positions, 0))
  if side * side != positions or not side:
    raise ValueError(
      f"{positions} positions are no square grid; say how many rows and "
      "columns they have."
    )
  return side, side
