"""DETR's masks: where each query looks, refined on the backbone's finer maps.

Paper: arXiv 2005.12872, section 4.4 and figure 8. Reference:
facebookresearch/detr @ 29901c5, `models/segmentation.py`.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from big_vision_like.models.layers import convolution
from big_vision_like.models.layers.resize import nearest, visible

GROUPS = 8
# Finite, so that no softmax ever sees a row of -inf.
_LOWEST = -1e30


def wide(dtype: Any) -> Any:
  """float32, or float64 for a model that computes in it."""
  return jnp.promote_types(dtype, jnp.float32)


class AttentionMaps(nn.Module):
  """Weights of attention over all heads and tokens together, without values.

  Attributes:
    heads: they share the width equally.
    dtype: of the projections; the weights are float32.
  """

  heads: int
  dtype: str = "float32"

  @nn.compact
  def __call__(
    self,
    query: Float[Array, "b q d"],
    memory: Float[Array, "b n d"],
    mask: Bool[Array, "b n"] | None = None,
  ) -> Float[Array, "b q n {self.heads}"]:
    """They sum to 1 for each query, and are 0 where `mask` is False."""

    def project(name, x):
      return nn.DenseGeneral(
        (self.heads, x.shape[-1] // self.heads),
        kernel_init=nn.initializers.xavier_uniform(),
        dtype=self.dtype,
        name=name,
      )(x)

    q, k = project("query", query), project("key", memory)
    q = q * q.shape[-1] ** -0.5
    s = jnp.einsum(
      "bqkd,bnkd->bqnk", q, k, preferred_element_type=wide(self.dtype)
    )
    if mask is not None:
      s = jnp.where(mask[:, None, :, None], s, _LOWEST)
    p = jnp.exp(s - jax.lax.stop_gradient(s.max((2, 3), keepdims=True)))
    if mask is not None:
      p = jnp.where(mask[:, None, :, None], p, 0)
    total = p.sum((2, 3), keepdims=True)
    return p / jnp.where(total == 0, 1, total)


class _Weights(nn.Module):
  """The parameters of a convolution."""

  shape: tuple[int, int, int, int]

  @nn.compact
  def __call__(self) -> tuple[Array, Array]:
    # kaiming_uniform_ of torch with a = 1.
    init = nn.initializers.lecun_uniform()
    kernel = self.param("kernel", init, self.shape)
    return kernel, self.param("bias", nn.initializers.zeros, self.shape[-1:])


class _Scale(nn.Module):
  """The parameters of a normalisation."""

  features: int

  @nn.compact
  def __call__(self) -> tuple[Array, Array]:
    shape = (self.features,)
    scale = self.param("scale", nn.initializers.ones, shape)
    return scale, self.param("bias", nn.initializers.zeros, shape)


def group_norm(
  x: Float[Array, "b q h w c"],
  scale: Float[Array, " c"],
  bias: Float[Array, " c"],
  pixel_mask: Bool[Array, "b ih iw"] | None = None,
  *,
  groups: int = GROUPS,
  eps: float = 1e-5,
) -> Float[Array, "b q h w c"]:
  """Normalises groups of channels by the pixels that `pixel_mask` shows.

  Statistics are float32. Channels that do not divide into the groups go into
  the most that they divide into and that divide these.
  """
  groups = math.gcd(groups, x.shape[-1])
  y = x.astype(wide(x.dtype)).reshape(*x.shape[:-1], groups, -1)
  weight = jnp.ones((1, 1, *x.shape[2:4], 1, 1), y.dtype)
  if pixel_mask is not None:
    inside = nearest(pixel_mask[..., None], x.shape[2:4])
    weight = inside[:, None, ..., None].astype(y.dtype)
  count = jnp.maximum(weight.sum((2, 3, 5), keepdims=True) * y.shape[-1], 1)

  def mean(y):
    return (y * weight).sum((2, 3, 5), keepdims=True) / count

  y = y - mean(y)
  y = y * jax.lax.rsqrt(mean(y * y) + eps)
  return (y.reshape(x.shape) * scale + bias).astype(x.dtype)


def convolve(
  x: Float[Array, "*b h w c"], kernel: Float[Array, "k k c d"]
) -> Float[Array, "*b h w d"]:
  """A convolution that keeps the size."""
  y = x.reshape(-1, *x.shape[-3:])
  kernel = kernel.astype(x.dtype)
  y = convolution.convolve(y, kernel, padding=kernel.shape[0] // 2)
  return y.reshape(*x.shape[:-1], -1)


class MaskHead(nn.Module):
  """Attention maps to masks at 1/4 of the image, each query on its own.

  Each query has maps of its own: of R50 with 100 queries these are more than
  half of all products, and training at 800 x 1066 pixels holds 47 MB for each
  query and image in float32. `chunk` queries at once, recomputed in the
  backward pass, hold that for so many only.

  The first convolution reads the image's map and the query's: it is the sum of
  two, and that of the image is computed once.

  Attributes:
    chunk: queries at once, a divisor of their number; None: all, and nothing
      is computed twice.
    dtype: of activations and products; statistics and masks are float32.
  """

  chunk: int | None = None
  dtype: str = "float32"

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b h w d"],
    maps: Float[Array, "b q h w k"],
    finer: Sequence[Float[Array, "b _ _ _"]],
    pixel_mask: Bool[Array, "b ih iw"] | None = None,
  ) -> Float[Array, "b q mh mw"]:
    """Logits of the masks.

    Args:
      x: the projected map of the backbone.
      maps: weights of attention.
      finer: the backbone's other maps, the coarsest first; the masks have the
        size of the last.
      pixel_mask: where there is an image; what lies outside changes nothing
        then, and the masks repeat their borders there. None: all is image.
    """
    width, joint = x.shape[-1], x.shape[-1] + maps.shape[-1]
    widths = [joint, *(width // 2 ** (i + 1) for i in range(len(finer) + 1))]
    kernel, bias = _Weights((3, 3, joint, joint), name="conv1")()
    of_image, of_query = jnp.split(kernel, [width], axis=2)
    base = convolve(visible(x.astype(self.dtype), pixel_mask), of_image)
    base = base + bias.astype(self.dtype)
    levels = [
      self.adapted(level, widths[i + 1], f"adapter{i + 1}")
      for i, level in enumerate(finer)
    ]
    norms = [_Scale(n, name=f"gn{i + 1}")() for i, n in enumerate(widths)]
    convs = [
      _Weights((3, 3, *pair), name=f"conv{i + 2}")()
      for i, pair in enumerate(itertools.pairwise(widths))
    ]
    last = _Weights((3, 3, widths[-1], 1), name="out")()

    def conv(y, kernel, bias):
      if pixel_mask is not None:
        inside = nearest(pixel_mask[..., None], y.shape[2:4])
        y = jnp.where(inside[:, None], y, 0)
      return convolve(y, kernel) + bias.astype(self.dtype)

    def normed(y, i):
      return jax.nn.relu(group_norm(y, *norms[i], pixel_mask))

    def refine(maps):
      y = convolve(maps.astype(self.dtype), of_query)
      y = normed(y + base[:, None], 0)
      y = normed(conv(y, *convs[0]), 1)
      for i, level in enumerate(levels):
        y = nearest(y, level.shape[1:3]) + level[:, None]
        y = normed(conv(y, *convs[i + 1]), i + 2)
      return conv(y, *last)[..., 0].astype(wide(self.dtype))

    masks = refine(maps) if self.chunk is None else self.mapped(refine, maps)
    return masks if pixel_mask is None else _extended(masks, pixel_mask)

  def adapted(self, level, features, name):
    """A finer map of the backbone, with fewer channels."""
    kernel, bias = _Weights((1, 1, level.shape[-1], features), name=name)()
    level = convolve(level.astype(self.dtype), kernel)
    return level + bias.astype(self.dtype)

  def mapped(self, refine, maps):
    queries = maps.shape[1]
    if queries % self.chunk:
      raise ValueError(
        f"config.model.mask_chunk = {self.chunk} is no divisor of the "
        f"{queries} queries."
      )
    chunks = maps.reshape(maps.shape[0], -1, self.chunk, *maps.shape[2:])
    masks = jax.lax.map(jax.checkpoint(refine), chunks.swapaxes(0, 1))
    return masks.swapaxes(0, 1).reshape(
      maps.shape[0], queries, *masks.shape[-2:]
    )


def _extended(masks, pixel_mask):
  """Repeats the border of an image outside of it."""
  inside = nearest(pixel_mask[..., None], masks.shape[2:])[..., 0]
  for axis, other in ((2, 2), (3, 1)):
    last = jnp.maximum(inside.any(other).sum(-1) - 1, 0)
    index = jnp.minimum(jnp.arange(masks.shape[axis]), last[:, None])
    index = jnp.expand_dims(index, (1, 5 - axis))
    masks = jnp.take_along_axis(masks, index, axis)
  return masks
