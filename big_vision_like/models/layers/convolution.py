"""Convolutions and batch normalisation, with torch's arithmetic.

Maps are [B,H,W,C], kernels [kh,kw,C/groups,C']. Padding is symmetric and given
in pixels, as the published models have it; flax's "SAME" pads differently at
stride 2.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from big_vision_like.models.layers.attention import target_platform

# Below it, what is under a kernel is dear to collect for what it computes.
_FEW_CHANNELS = 8


def convolve(
  x: Float[Array, "b h w c"],
  kernel: Float[Array, "kh kw c d"],
  *,
  stride: int = 1,
  padding: int = 0,
  dilation: int = 1,
) -> Float[Array, "b oh ow d"]:
  """Convolves, all channels with all.

  On a CPU the kernel's gradient is a product of two matrices: the convolution
  that XLA has for it takes twice as long there.
  """
  if target_platform() != "cpu" or x.shape[-1] < _FEW_CHANNELS:
    return _plain(x, kernel, stride, padding, dilation)
  return _on_cpu(x, kernel, stride, padding, dilation)


def _plain(x, kernel, stride, padding, dilation, groups=1):
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    ((padding, padding), (padding, padding)),
    rhs_dilation=(dilation, dilation),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=groups,
  )


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def _on_cpu(x, kernel, stride, padding, dilation):
  return _plain(x, kernel, stride, padding, dilation)


def _derivative(stride, padding, dilation, primals, tangents):
  settings = stride, padding, dilation
  (x, kernel), (dx, dkernel) = primals, tangents
  changes = []  # Images and frozen kernels do not change.
  if not isinstance(dx, SymbolicZero):
    changes.append(_plain(dx, kernel, *settings))
  if not isinstance(dkernel, SymbolicZero):
    changes.append(_product(x, dkernel, *settings))
  return _plain(x, kernel, *settings), sum(changes)


_on_cpu.defjvp(_derivative, symbolic_zeros=True)


def _product(x, kernel, stride, padding, dilation):
  """The convolution as a matrix product of what is under the kernel."""
  pad = (padding, padding)
  x = jnp.pad(x, ((0, 0), pad, pad, (0, 0)))
  taps = list(_taps(x, kernel.shape[:2], stride, dilation))
  return jnp.concatenate(taps, -1) @ kernel.reshape(-1, kernel.shape[-1])


def depthwise(
  x: Float[Array, "b h w c"],
  kernel: Float[Array, "kh kw 1 c"],
  *,
  stride: int = 1,
  padding: int = 0,
  dilation: int = 1,
) -> Float[Array, "b oh ow c"]:
  """Convolves each channel with its own kernel.

  On a CPU as one multiply-add for each tap: XLA's grouped convolution is tens
  of times slower there.
  """
  if target_platform() != "cpu":
    return _plain(x, kernel, stride, padding, dilation, groups=x.shape[-1])
  return _shifted(x, kernel, stride, padding, dilation)


def _shifted(x, kernel, stride, padding, dilation):
  kh, kw = kernel.shape[:2]
  x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
  taps = _taps(x, (kh, kw), stride, dilation)
  weights = kernel.reshape(kh * kw, -1)
  return sum(tap * weight for tap, weight in zip(taps, weights))


def _taps(x, kernel, stride, dilation):
  """The pixels under each place of a kernel, row by row."""
  kh, kw = kernel
  height = (x.shape[1] - (kh - 1) * dilation - 1) // stride + 1
  width = (x.shape[2] - (kw - 1) * dilation - 1) // stride + 1
  for i in range(kh):
    for j in range(kw):
      top, left = i * dilation, j * dilation
      yield x[
        :,
        top : top + (height - 1) * stride + 1 : stride,
        left : left + (width - 1) * stride + 1 : stride,
      ]


def max_pool(
  x: Float[Array, "b h w c"], kernel: int, *, stride: int, padding: int
) -> Float[Array, "b oh ow c"]:
  """The largest value under a square of `kernel` pixels; padding is -inf.

  On a CPU as one comparison for each tap: XLA's gradient of a pool, which
  scatters, takes several times longer there. Of equal values in a window, the
  taps share the gradient then; elsewhere the first has it.
  """
  pad = (padding, padding)
  if target_platform() != "cpu":
    window, strides = (kernel, kernel), (stride, stride)
    return nn.max_pool(x, window, strides=strides, padding=(pad, pad))
  x = jnp.pad(x, ((0, 0), pad, pad, (0, 0)), constant_values=-jnp.inf)
  return functools.reduce(jnp.maximum, _taps(x, (kernel, kernel), stride, 1))


def _torch_uniform(key, shape, dtype=jnp.float32):
  """torch's default for convolutions: U(-1, 1) / sqrt(fan in)."""
  fan_in = shape[0] * shape[1] * shape[2]
  return jax.random.uniform(key, shape, dtype, -1.0, 1.0) * fan_in**-0.5


class Conv(nn.Module):
  """A 2-D convolution.

  Attributes:
    features: output channels.
    kernel: side of the kernel.
    stride, dilation: in pixels.
    padding: pixels on each side; None: as many as keep the size at stride 1.
    groups: groups of channels that do not mix.
    use_bias: add a bias.
    kernel_init, dtype: of the kernel, of the activations.
  """

  features: int
  kernel: int = 1
  stride: int = 1
  padding: int | None = None
  dilation: int = 1
  groups: int = 1
  use_bias: bool = True
  kernel_init: Callable[..., Array] = _torch_uniform
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b oh ow d"]:
    channels, k = x.shape[-1], self.kernel
    if channels % self.groups or self.features % self.groups:
      raise ValueError(
        f"{channels} channels to {self.features} do not divide into "
        f"{self.groups} groups."
      )
    shape = (k, k, channels // self.groups, self.features)
    kernel = self.param("kernel", self.kernel_init, shape).astype(self.dtype)
    x = x.astype(self.dtype)
    padding = self.padding
    if padding is None:
      padding = self.dilation * (k - 1) // 2
    if k == 1 and self.stride == 1 and self.groups == 1 and padding == 0:
      # Over all pixels as one axis, the gradient of the kernel needs no
      # transposed copy of the map on a CPU.
      pixels = x.reshape(-1, channels) @ kernel[0, 0]
      x = pixels.reshape(*x.shape[:-1], self.features)
    elif self.groups > 1 and not self.groups == channels == self.features:
      x = _plain(x, kernel, self.stride, padding, self.dilation, self.groups)
    else:
      x = (depthwise if self.groups > 1 else convolve)(
        x,
        kernel,
        stride=self.stride,
        padding=padding,
        dilation=self.dilation,
      )
    if self.use_bias:
      bias = self.param("bias", nn.initializers.zeros, (self.features,))
      x = x + bias.astype(self.dtype)
    return x


class BatchNorm(nn.Module):
  """torch's BatchNorm over all axes but the last.

  Training normalises by the batch's biased variance and moves the running
  statistics, of which the variance is unbiased, by `momentum`. Under a mesh
  the batch is the global one. Statistics are float32, or float64 for such maps.

  Attributes:
    momentum: weight of the new batch, as torch counts it.
    eps: the constant under the root.
    scale_init: of the scale.
    frozen: scale, bias and statistics are constants in "batch_stats" that
      nothing trains or moves (torchvision's FrozenBatchNorm2d).
    dtype: of the activations.
  """

  momentum: float = 0.1
  eps: float = 1e-5
  scale_init: Callable[..., Array] = nn.initializers.ones
  frozen: bool = False
  dtype: str = "float32"

  @nn.compact
  def __call__(
    self, x: Float[Array, "*b c"], *, train: bool
  ) -> Float[Array, "*b c"]:
    shape = (x.shape[-1],)
    zeros, ones = (lambda: jnp.zeros(shape)), (lambda: jnp.ones(shape))
    mean = self.variable("batch_stats", "mean", zeros)
    var = self.variable("batch_stats", "var", ones)
    if self.frozen:
      scale = self.variable("batch_stats", "scale", ones).value
      bias = self.variable("batch_stats", "bias", zeros).value
    else:
      scale = self.param("scale", self.scale_init, shape)
      bias = self.param("bias", nn.initializers.zeros, shape)
    center, spread = mean.value, var.value
    wide = jnp.promote_types(x.dtype, jnp.float32)
    if train and not self.frozen:
      axes = tuple(range(x.ndim - 1))
      count = x.size // x.shape[-1]
      values = x.astype(wide)
      center = values.mean(axes)
      # The variance does not change with the mean that it is taken around, so
      # that the backward pass need not sum what comes to nothing.
      fixed = jax.lax.stop_gradient(center)
      spread = jnp.square(values - fixed).mean(axes)
      if not self.is_initializing():
        unbiased = spread * (count / max(count - 1, 1))
        mean.value += self.momentum * (center - mean.value)
        var.value += self.momentum * (unbiased - var.value)
    factor = scale * jax.lax.rsqrt(spread + self.eps)
    x = x.astype(wide) * factor + (bias - center * factor)
    return x.astype(self.dtype)


class ConvBN(nn.Module):
  """A convolution without bias and a BatchNorm, or both in one.

  Attributes:
    fused: a convolution with bias whose parameters `fuse` has folded.
    eps, momentum, scale_init: see BatchNorm; the others: see Conv.
  """

  features: int
  kernel: int = 1
  stride: int = 1
  padding: int | None = None
  dilation: int = 1
  groups: int = 1
  eps: float = 1e-5
  momentum: float = 0.1
  scale_init: Callable[..., Array] = nn.initializers.ones
  fused: bool = False
  dtype: str = "float32"

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w c"], *, train: bool
  ) -> Float[Array, "b oh ow d"]:
    x = Conv(
      self.features,
      self.kernel,
      self.stride,
      self.padding,
      self.dilation,
      self.groups,
      use_bias=self.fused,
      dtype=self.dtype,
      name="conv",
    )(x)
    if self.fused:
      return x
    return BatchNorm(
      self.momentum, self.eps, self.scale_init, dtype=self.dtype, name="bn"
    )(x, train=train)


def fuse(variables: dict[str, Any], *, eps: float = 1e-5) -> dict[str, Any]:
  """Folds each ConvBN's BatchNorm into its convolution, for inference.

  Args:
    variables: "params" and "batch_stats" of a model.
    eps: of its BatchNorms.

  Returns:
    The variables of the same model with `fused=True`.
  """

  def fold(params, stats):
    if set(params) == {"conv", "bn"}:
      norm, kernel = params["bn"], params["conv"]["kernel"]
      factor = norm["scale"] / jnp.sqrt(stats["bn"]["var"] + eps)
      bias = norm["bias"] - stats["bn"]["mean"] * factor
      return {"conv": {"kernel": kernel * factor, "bias": bias}}, {}
    # Statistics of a BatchNorm that follows no convolution stay.
    new_params = {}
    new_stats = {k: x for k, x in stats.items() if k not in params}
    for name, value in params.items():
      inner = stats.get(name, {})
      if isinstance(value, dict):
        value, inner = fold(value, inner)
      new_params[name] = value
      if inner:
        new_stats[name] = inner
    return new_params, new_stats

  params, stats = fold(variables["params"], variables.get("batch_stats", {}))
  return {"params": params, **({"batch_stats": stats} if stats else {})}
