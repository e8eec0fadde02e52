"""What the MobileViTs share: MobileNetV2's block, and resizing of maps.

Source: Sandler et al., arXiv 1801.04381; apple/ml-cvnets @ 7771756.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from big_vision_like.models.layers.convolution import ConvBN


def make_divisible(value: int | float, divisor: int = 8) -> int:
  """The multiple of `divisor` nearest to `value`, but at least 0.9 of it."""
  near = max(divisor, int(value + divisor / 2) // divisor * divisor)
  return near + divisor if near < 0.9 * value else near


class InvertedResidual(nn.Module):
  """Widens by a 1 x 1 convolution, filters each channel, narrows again.

  Attributes:
    features: output channels.
    stride: of the 3 x 3 convolution; at 1, with as many channels going in as
      out, the input is added.
    expand: hidden channels for each input channel.
    fused, dtype: see layers/convolution.py.
  """

  features: int
  stride: int
  expand: int
  fused: bool = False
  dtype: str = "float32"

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w c"], *, train: bool
  ) -> Float[Array, "b oh ow d"]:
    settings = dict(fused=self.fused, dtype=self.dtype)
    hidden = make_divisible(x.shape[-1] * self.expand)
    y = ConvBN(hidden, **settings, name="expand")(x, train=train)
    y = ConvBN(
      hidden,
      kernel=3,
      stride=self.stride,
      groups=hidden,
      **settings,
      name="depthwise",
    )(jax.nn.silu(y), train=train)
    y = ConvBN(self.features, **settings, name="reduce")(
      jax.nn.silu(y), train=train
    )
    return x + y if x.shape == y.shape else y


def resize_bilinear(
  x: Float[Array, "b h w c"], height: int, width: int, *, align_corners: bool
) -> Float[Array, "b oh ow c"]:
  """torch's bilinear interpolation: four neighbours, no antialiasing.

  Args:
    x: the map.
    height: of the result.
    width: of the result.
    align_corners: the centres of the corner pixels stay in place; else the
      outer edges do.
  """
  rows = _interpolation(x.shape[1], height, align_corners)
  columns = _interpolation(x.shape[2], width, align_corners)
  x = jnp.einsum("oh,bhwc->bowc", rows.astype(x.dtype), x)
  return jnp.einsum("ow,bhwc->bhoc", columns.astype(x.dtype), x)


def _interpolation(size, new_size, align_corners):
  """Weights [new_size, size] of linear interpolation along one axis."""
  if align_corners:
    at = np.linspace(0, size - 1, new_size)
  else:
    at = (np.arange(new_size) + 0.5) * size / new_size - 0.5
    at = np.clip(at, 0, size - 1)
  return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(size)))
