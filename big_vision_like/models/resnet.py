"""ResNet: bottleneck blocks of convolutions, each added to its input.

Paper: He et al., arXiv 1512.03385; with GroupNorm and standardised weights
Kolesnikov et al., arXiv 1912.11370 (BiT).
Reference: torchvision 0.28 and timm 1.0.31 (the stride of a block is that of
its 3 x 3 convolution); facebookresearch/detr @ 29901c5 for frozen BatchNorm
and dilation; google-research/vision_transformer @ c6de1e5 for StdResNet.
Parameters, with 1,000 classes: R50 25,557,032, R101 44,549,160.
Deviations:
  - StdResNet has blocks that end in their activation, as the ViT hybrids do;
    BiT's own models normalise first.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from big_vision_like.models.layers.blocks import shard_batch
from big_vision_like.models.layers.convolution import BatchNorm, Conv, max_pool
from big_vision_like.models.layers.resize import visible

# The blocks of each stage; "local" has basic ones, its own WIDTH, and a stem of
# 3 x 3 without a pool: its maps are at 1/4 and 1/8 as well.
VARIANTS = {
  "local": dict(stages=(1, 2), width=32, stem=3, basic=True),
  "R50": dict(stages=(3, 4, 6, 3)),
  "R101": dict(stages=(3, 4, 23, 3)),
}
IMAGE_SIZE = 224
# Channels inside the first stage's blocks; each stage doubles them.
WIDTH = 64
# A block puts out this many times the channels inside it.
EXPANSION = 4
# Google's standardisation adds it to the deviation.
STD_EPS = 1e-5

_he_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Bottleneck(nn.Module):
  """1 x 1 to fewer channels, 3 x 3, 1 x 1 back; then the input is added.

  Attributes:
    features: channels inside.
    stride: of the 3 x 3 convolution, and of the input's projection.
    dilation: of the 3 x 3 convolution.
    frozen, dtype: see layers/convolution.py.
  """

  features: int
  stride: int = 1
  dilation: int = 1
  frozen: bool = False
  dtype: str = "float32"

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b h w c"],
    pixel_mask: Bool[Array, "b ih iw"] | None = None,
    *,
    train: bool,
  ) -> Float[Array, "b oh ow d"]:
    def conv_bn(name, x, features, **kw):
      return _conv_bn(self, name, x, features, train=train, **kw)

    shortcut, out = x, EXPANSION * self.features
    if self.stride > 1 or x.shape[-1] != out:
      shortcut = conv_bn("proj", x, out, stride=self.stride)
    y = jax.nn.relu(conv_bn("conv1", x, self.features))
    y = conv_bn(
      "conv2",
      visible(y, pixel_mask),
      self.features,
      kernel=3,
      stride=self.stride,
      dilation=self.dilation,
    )
    y = conv_bn("conv3", jax.nn.relu(y), out)
    return jax.nn.relu(y + shortcut)


class Basic(nn.Module):
  """Two convolutions of 3 x 3; then the input is added.

  Attributes: those of Bottleneck; there are as many channels inside as outside.
  """

  features: int
  stride: int = 1
  dilation: int = 1
  frozen: bool = False
  dtype: str = "float32"

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b h w c"],
    pixel_mask: Bool[Array, "b ih iw"] | None = None,
    *,
    train: bool,
  ) -> Float[Array, "b oh ow d"]:
    def conv_bn(name, x, stride=1, **kw):
      return _conv_bn(
        self, name, x, self.features, stride=stride, train=train, **kw
      )

    def wide(name, x, stride):
      x = visible(x, pixel_mask)
      return conv_bn(name, x, stride, kernel=3, dilation=self.dilation)

    shortcut = x
    if self.stride > 1 or x.shape[-1] != self.features:
      shortcut = conv_bn("proj", x, self.stride)
    y = jax.nn.relu(wide("conv1", x, self.stride))
    return jax.nn.relu(wide("conv2", y, 1) + shortcut)


def _conv_bn(module, name, x, features, *, train, **kw):
  """A convolution and the BatchNorm behind it, as `module` has them."""
  x = Conv(
    features,
    use_bias=False,
    kernel_init=_he_fan_out,
    dtype=module.dtype,
    name=f"{name}_conv",
    **kw,
  )(x)
  return BatchNorm(frozen=module.frozen, dtype=module.dtype, name=f"{name}_bn")(
    x, train=train
  )


class ResNet(nn.Module):
  """ResNet v1.5. Images of any size.

  The parameters lie under "stem_conv", "stem_bn", "head" and, from stage 0 and
  block 0 on, under "stage0_block0" and so on.

  Attributes:
    variant: a row of VARIANTS.
    num_classes: outputs of the head; None or 0: no head, no logits.
    frozen: BatchNorms are constants that training does not touch.
    dilation: the last stage keeps the size of its input, and dilates its
      3 x 3 convolutions but the first by 2 (DC5).
    dtype: of activations and products; parameters are float32.
  """

  variant: str = "R50"
  num_classes: int | None = None
  frozen: bool = False
  dilation: bool = False
  dtype: str = "float32"

  def __post_init__(self):
    if self.variant not in VARIANTS:
      raise ValueError(
        f"Unknown variant {self.variant!r}. There are: {', '.join(VARIANTS)}."
      )
    super().__post_init__()

  @nn.compact
  def __call__(
    self,
    image: Float[Array, "b h w c"],
    pixel_mask: Bool[Array, "b h w"] | None = None,
    *,
    train: bool,
  ) -> dict[str, Array | list[Array]]:
    """Reads images, normalised by ImageNet's mean and deviation.

    Args:
      image: pixels.
      pixel_mask: where there is an image, in the upper left of a canvas. What
        lies outside is set to 0 before everything that looks beyond a pixel,
        so that an image's maps are those of the image alone, where statistics
        do not move and the canvas is a multiple of 32. Maps are not 0 outside,
        and `pooled` is their mean over the canvas.
      train: see layers/convolution.py's BatchNorm.

    Returns:
      logits float32 [B,C]; stages, the maps C2 to C5 as a list, with 256, 512,
      1024 and 2048 channels at 1/4, 1/8, 1/16 and 1/32 of the image's sides,
      rounded up (C5 at 1/16 with `dilation`), of "local" two of 32 and 64
      channels; pooled [B,2048], the mean of the last, which the head reads.
    """
    size = {"width": WIDTH} | VARIANTS[self.variant]
    x, width = visible(image, pixel_mask), size["width"]
    kernel = size.get("stem", 7)
    x = _conv_bn(self, "stem", x, width, train=train, kernel=kernel, stride=2)
    x = visible(jax.nn.relu(x), pixel_mask)
    pooled = kernel == 7
    if pooled:
      x = max_pool(x, 3, stride=2, padding=1)
    x = shard_batch(x)
    stages, block = [], Basic if size.get("basic") else Bottleneck
    for s, depth in enumerate(size["stages"]):
      dilated = self.dilation and s == len(size["stages"]) - 1
      for b in range(depth):
        x = block(
          width * 2**s,
          stride=1 if b or dilated or (pooled and s == 0) else 2,
          dilation=2 if dilated and b else 1,
          frozen=self.frozen,
          dtype=self.dtype,
          name=f"stage{s}_block{b}",
        )(x, pixel_mask, train=train)
      stages.append(shard_batch(x))
    outputs = {"pooled": x.mean((1, 2)), "stages": stages}
    if self.num_classes:
      outputs["logits"] = nn.Dense(
        self.num_classes, dtype=jnp.float32, name="head"
      )(outputs["pooled"])
    return outputs


class StdConv(nn.Module):
  """A convolution without bias whose kernel is standardised first.

  For each output channel the kernel's mean is taken off and it is divided by
  its deviation, in float32. Padding is TensorFlow's SAME: at stride 2 the odd
  pixel lies below and to the right.
  """

  features: int
  kernel: int = 1
  stride: int = 1
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b oh ow d"]:
    kernel = self.param(
      "kernel",
      nn.initializers.lecun_normal(),
      (self.kernel, self.kernel, x.shape[-1], self.features),
    )
    kernel = kernel - kernel.mean((0, 1, 2))
    kernel = kernel / (kernel.std((0, 1, 2)) + STD_EPS)
    return jax.lax.conv_general_dilated(
      x.astype(self.dtype),
      kernel.astype(self.dtype),
      (self.stride, self.stride),
      "SAME",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


class StdBottleneck(nn.Module):
  """A bottleneck of standardised convolutions, each with a GroupNorm.

  The last scale starts at 0, so that a block starts as its shortcut.
  """

  features: int
  stride: int = 1
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b oh ow d"]:
    def conv_gn(name, x, features, kernel=1, stride=1, **kw):
      conv = StdConv(features, kernel, stride, self.dtype, name=f"{name}_conv")
      return nn.GroupNorm(dtype=self.dtype, name=f"{name}_gn", **kw)(conv(x))

    shortcut, out = x, EXPANSION * self.features
    if self.stride > 1 or x.shape[-1] != out:
      shortcut = conv_gn("proj", x, out, stride=self.stride)
    y = jax.nn.relu(conv_gn("conv1", x, self.features))
    y = jax.nn.relu(conv_gn("conv2", y, self.features, 3, self.stride))
    y = conv_gn("conv3", y, out, scale_init=nn.initializers.zeros)
    return jax.nn.relu(y + shortcut)


class StdResNet(nn.Module):
  """What stands before the Transformer of a ViT hybrid.

  Attributes:
    stages: blocks of each stage; none: the stem alone.
    dtype: of activations and products; parameters are float32.
  """

  stages: Sequence[int]
  dtype: str = "float32"

  @nn.compact
  def __call__(
    self, image: Float[Array, "b h w c"]
  ) -> Float[Array, "b oh ow d"]:
    """The last stage's map; sides are rounded up at each halving."""
    x = StdConv(WIDTH, 7, 2, self.dtype, name="stem_conv")(image)
    x = jax.nn.relu(nn.GroupNorm(dtype=self.dtype, name="stem_gn")(x))
    x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
    for s, depth in enumerate(self.stages):
      for b in range(depth):
        x = StdBottleneck(
          WIDTH * 2**s,
          stride=2 if s and not b else 1,
          dtype=self.dtype,
          name=f"stage{s}_block{b}",
        )(x)
      x = shard_batch(x)
    return x


Model = ResNet
