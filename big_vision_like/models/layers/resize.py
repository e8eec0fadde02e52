"""Resizing of maps, and of what a model has learned: patch kernels and tables.

Resizing is separable and linear, so it is one small matrix for each axis. The
matrices are NumPy constants; what they are applied to may be a NumPy array, as
when weights are imported, or a JAX array, as when a model resizes its
parameters at every step and trains through that.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float


@functools.cache
def linear_matrix(
  old: int, new: int, *, antialias: bool
) -> Float[np.ndarray, "{new} {old}"]:
  """Bilinear resizing of one axis, float64: half-pixel centres, clamped edges.

  With `antialias` the kernel widens by old / new where that shrinks, as in
  `jax.image.resize`; without, an output reads two inputs at most, as in
  TensorFlow's and OpenCV's resizing.
  """
  if old < 1 or new < 1:
    raise ValueError(f"Cannot resize {old} entries to {new}.")
  center = (np.arange(new) + 0.5) * old / new - 0.5
  width = max(1.0, old / new) if antialias else 1.0
  distance = np.abs(center[:, None] - np.arange(old)) / width
  weights = np.maximum(0.0, 1.0 - distance)
  return _constant(weights / weights.sum(1, keepdims=True))


@functools.cache
def cubic_matrix(old: int, new: int) -> Float[np.ndarray, "{new} {old}"]:
  """Bicubic resizing of one axis, float64: half-pixel centres, clamped edges.

  Keys' kernel with a = -0.75, which never widens: torch's `interpolate` with
  mode="bicubic".
  """
  center = (np.arange(new) + 0.5) * old / new - 0.5
  matrix = np.zeros((new, old))
  for tap in (-1, 0, 1, 2):
    at = np.floor(center).astype(int) + tap
    weight = _keys(np.abs(center - at))
    np.add.at(matrix, (np.arange(new), np.clip(at, 0, old - 1)), weight)
  return _constant(matrix)


def _keys(x, a=-0.75):
  near = ((a + 2) * x - (a + 3)) * x**2 + 1
  far = a * (((x - 5) * x + 8) * x - 4)
  return np.where(x < 1, near, far)


@functools.cache
def pi_matrix(old: int, new: int) -> Float[np.ndarray, "{new} {old}"]:
  """(Bᵀ)⁺ of one axis, where B resizes a patch from `old` to `new`, float64."""
  b = linear_matrix(old, new, antialias=False)
  return _constant(np.linalg.pinv(b.T))


def pi_resize(
  kernel: Float[Array | np.ndarray, "p q ..."], size: tuple[int, int]
) -> Float[Array | np.ndarray, "{size[0]} {size[1]} ..."]:
  """A patch kernel for patches of another size (FlexiViT, equation 4).

  The kernel ŵ that minimises E (<x, w> - <Bx, ŵ>)² over patches x ~ N(0, I),
  where B resizes x bilinearly without antialiasing: ŵ = (Bᵀ)⁺ w. If no side
  shrinks, the minimum is 0: resized patches have the tokens of the patches.
  Resize from one buffer always: the way down loses, and chains of it lose more.

  Args:
    kernel: [P,Q,...], each trailing index resized on its own.
    size: sides of the new patch. If they are the old ones, the kernel is
      returned as it is.

  Returns:
    In the kernel's dtype; computed in float64 (NumPy), float32 (JAX).
  """
  rows, columns = kernel.shape[:2]
  return _resized(
    kernel, size, pi_matrix(rows, size[0]), pi_matrix(columns, size[1])
  )


def resize_table(
  table: Float[Array | np.ndarray, "g h ..."],
  size: tuple[int, int],
  *,
  antialias: bool = True,
) -> Float[Array | np.ndarray, "{size[0]} {size[1]} ..."]:
  """A table over a grid, such as position embeddings, on another grid.

  Bilinear, as `jax.image.resize(..., "linear", antialias)`. dtypes are those
  of `pi_resize`.
  """
  rows, columns = table.shape[:2]
  return _resized(
    table,
    size,
    linear_matrix(rows, size[0], antialias=antialias),
    linear_matrix(columns, size[1], antialias=antialias),
  )


def resize_cubic(
  table: Float[Array | np.ndarray, "g h ..."], size: tuple[int, int]
) -> Float[Array | np.ndarray, "{size[0]} {size[1]} ..."]:
  """A table over a grid on another grid, see `cubic_matrix`.

  dtypes are those of `pi_resize`.
  """
  rows, columns = table.shape[:2]
  return _resized(
    table, size, cubic_matrix(rows, size[0]), cubic_matrix(columns, size[1])
  )


def _resized(x, size, rows, columns):
  if x.shape[:2] == tuple(size):
    return x
  if isinstance(x, np.ndarray):
    y = np.einsum("ip,jq,pq...->ij...", rows, columns, x, optimize=True)
    return y.astype(x.dtype)
  y = jnp.einsum(
    "ip,jq,pq...->ij...",
    jnp.asarray(rows, jnp.float32),
    jnp.asarray(columns, jnp.float32),
    x.astype(jnp.float32),
    precision=jax.lax.Precision.HIGHEST,
  )
  return y.astype(x.dtype)


def _constant(matrix):
  matrix.flags.writeable = False  # It is cached.
  return matrix


def nearest(
  x: Float[Array, "... h w c"] | Bool[Array, "... h w c"], size: tuple[int, int]
) -> Float[Array, "... nh nw c"] | Bool[Array, "... nh nw c"]:
  """A map of another size, pixel i from pixel floor(i * old / new), as torch.

  `jax.image.resize` takes the pixel under the centre instead.
  """
  for axis, new in zip((x.ndim - 3, x.ndim - 2), size):
    old = x.shape[axis]
    if new == 2 * old:  # Its gradient is a sum, and not a scattering.
      x = jnp.repeat(x, 2, axis)
    elif old % new == 0:
      x = jax.lax.slice_in_dim(x, 0, old, old // new, axis)
    else:
      # In float32, as torch.
      index = np.arange(new, dtype=np.float32) * np.float32(old / new)
      x = jnp.take(x, np.minimum(index.astype(np.int32), old - 1), axis)
  return x


def visible(
  x: Float[Array, "b h w c"], pixel_mask: Bool[Array, "b ih iw"] | None
) -> Float[Array, "b h w c"]:
  """The map with 0 outside of the images, which `pixel_mask` shows in full."""
  if pixel_mask is None:
    return x
  return jnp.where(nearest(pixel_mask[..., None], x.shape[1:3]), x, 0)
