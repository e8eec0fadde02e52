"""MobileViT v2: MobileViT with attention that costs O(N).

Paper: Mehta and Rastegari, arXiv 2206.02680.
Reference: apple/ml-cvnets @ 7771756; timm 1.0.31.
Parameters, with 1,000 classes: 0.5 1,370,593, 0.75 2,866,009, 1.0 4,901,841,
1.25 7,478,089, 1.5 10,594,753, 1.75 14,251,833, 2.0 18,449,329.
Deviations:
  - Keys are averaged before they are projected, not after: the same sum with
    one product a sequence instead of one a token (see SeparableAttention).
  - "local" is a size of ours: 0.25 of the widths.
The paper's Table 5 has three inverted residuals at 1/4 of the size. Its code
and its parameter counts have two, and so have we.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from big_vision_like.api import INTERMEDIATES
from big_vision_like.models.layers.blocks import shard_batch, tokens_dot_general
from big_vision_like.models.layers.convolution import Conv, ConvBN
from big_vision_like.models.layers.mobilenet import (
  InvertedResidual,
  make_divisible,
  resize_bilinear,
)

# `scale` multiplies _CHANNELS and _WIDTHS, and the 32 channels of the stem.
VARIANTS = {
  "local": dict(scale=0.25),
  "0.5": dict(scale=0.5),
  "0.75": dict(scale=0.75),
  "1.0": dict(scale=1.0),
  "1.25": dict(scale=1.25),
  "1.5": dict(scale=1.5),
  "1.75": dict(scale=1.75),
  "2.0": dict(scale=2.0),
}
IMAGE_SIZE = 256
BLOCKS = (1, 2)  # Inverted residuals in the first two levels.
DEPTHS = (2, 4, 3)  # Transformer layers in the last three.
PATCH = 2
_CHANNELS = (64, 128, 256, 384, 512)  # Of the levels, at width 1.
_WIDTHS = (128, 192, 256)  # Of the Transformers, at width 1.


def _torch_uniform(fan_in):
  """torch's law for weights and biases of a layer: U(-1, 1) / sqrt(fan in)."""

  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -1.0, 1.0) * fan_in**-0.5

  return init


def dense(x: Array, features: int, dtype: str, name: str) -> Array:
  """The paper's 1 x 1 convolution, which has a bias."""
  init = _torch_uniform(x.shape[-1])
  return nn.Dense(
    features,
    kernel_init=init,
    bias_init=init,
    dtype=dtype,
    dot_general=tokens_dot_general,
    name=name,
  )(x)


def global_norm(dtype: str, name: str) -> nn.LayerNorm:
  """Statistics over a whole image, scale and bias by channel: GroupNorm with
  one group."""
  return nn.LayerNorm(1e-5, dtype, reduction_axes=(1, 2, 3), name=name)


class SeparableAttention(nn.Module):
  """Separable self-attention (equation 3 of the paper), for each phase p.

    c = softmax over patches (x w_I + b_I)
    y = (relu(x W_V + b_V) * sum of c_n (x_n W_K + b_K)) W_O + b_O

  A phase is a place within the patches of 2 x 2; its sequence are the pixels
  at that place in all patches. As the weights c sum to 1, the sum of projected
  keys is the projection of sum c_n x_n, which is what we compute.
  """

  dtype: str

  @nn.compact
  def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
    features = x.shape[-1]
    phases = dict(p=PATCH, q=PATCH)
    scores = dense(x, 1, self.dtype, "scores")[..., 0]
    scores = rearrange(scores, "b (h p) (w q) -> b h p w q", **phases)
    weights = jax.nn.softmax(scores.astype(jnp.float32), (1, 3))
    weights = weights.astype(self.dtype)[..., None]
    tokens = rearrange(x, "b (h p) (w q) d -> b h p w q d", **phases)
    context = (weights * tokens).sum((1, 3), keepdims=True)
    context = dense(context, features, self.dtype, "key")
    value = jax.nn.relu(dense(x, features, self.dtype, "value"))
    value = value.reshape(tokens.shape) * context
    value = value.reshape(x.shape)
    return dense(value, features, self.dtype, "out")


class TransformerLayer(nn.Module):
  """x + Attention(Norm(x)), then x + FFN(Norm(x)), whose activation is SiLU."""

  dtype: str

  @nn.compact
  def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
    width = x.shape[-1]
    y = global_norm(self.dtype, "norm1")(x)
    x = x + SeparableAttention(self.dtype, name="attn")(y)
    y = global_norm(self.dtype, "norm2")(x)
    y = jax.nn.silu(dense(y, 2 * width, self.dtype, "fc1"))
    x = x + dense(y, width, self.dtype, "fc2")
    self.sow(INTERMEDIATES, "features", x)
    return x


class MobileViTBlock(nn.Module):
  """A depthwise convolution and Transformers over the map.

  A map that is no whole number of patches is first resized to one, and stays
  so: 7 x 7 becomes 8 x 8.
  """

  width: int
  depth: int
  fused: bool
  dtype: str

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w c"], *, train: bool
  ) -> Float[Array, "b oh ow c"]:
    height, width, channels = x.shape[1:]
    settings = dict(fused=self.fused, dtype=self.dtype)
    even = (height + height % PATCH, width + width % PATCH)
    if even != (height, width):
      x = resize_bilinear(x, *even, align_corners=True)
    x = ConvBN(channels, kernel=3, groups=channels, **settings, name="local")(
      x, train=train
    )
    x = Conv(self.width, use_bias=False, dtype=self.dtype, name="to_tokens")(
      jax.nn.silu(x)
    )
    for i in range(self.depth):
      x = TransformerLayer(self.dtype, name=f"blocks_{i}")(x)
    x = global_norm(self.dtype, "norm")(x)
    return ConvBN(channels, **settings, name="from_tokens")(x, train=train)


class MobileViTV2(nn.Module):
  """MobileViT v2. Images of any size.

  Attributes:
    variant: a row of VARIANTS.
    num_classes: outputs of the head; None or 0: no head, no logits.
    fused: BatchNorms are folded into convolutions, see convolution.fuse.
    dtype: of activations and products; parameters are float32.
  """

  variant: str = "1.0"
  num_classes: int | None = None
  fused: bool = False
  dtype: str = "float32"

  def __post_init__(self):
    if self.variant not in VARIANTS:
      raise ValueError(
        f"Unknown variant {self.variant!r}. There are: {', '.join(VARIANTS)}."
      )
    super().__post_init__()

  @nn.compact
  def __call__(
    self, image: Float[Array, "b h w c"], *, train: bool
  ) -> dict[str, Array]:
    """Reads images, with pixels in 0..1 as the published weights have them.

    Returns:
      logits float32 [B,C]; map [B,h,w,D], the last level's at 1/32 of the
      size, rounded up to whole patches; pooled [B,D], its mean, which the head
      reads.
    """
    scale = VARIANTS[self.variant]["scale"]
    settings = dict(fused=self.fused, dtype=self.dtype)
    stem = make_divisible(min(max(32 * scale, 16), 64))
    x = ConvBN(stem, kernel=3, stride=2, **settings, name="stem")(
      image, train=train
    )
    x = shard_batch(jax.nn.silu(x))
    for level, channels in enumerate(_CHANNELS, 1):
      stride, name = 1 if level == 1 else 2, f"level{level}"
      count = BLOCKS[level - 1] if level <= len(BLOCKS) else 1
      for i in range(count):
        x = InvertedResidual(
          make_divisible(channels * scale, 16 if level == 1 else 8),
          stride if i == 0 else 1,
          expand=2,
          **settings,
          name=f"{name}_mv{i}",
        )(x, train=train)
      if level > len(BLOCKS):
        which = level - len(BLOCKS) - 1
        x = MobileViTBlock(
          make_divisible(_WIDTHS[which] * scale),
          DEPTHS[which],
          **settings,
          name=f"{name}_vit",
        )(x, train=train)
      x = shard_batch(x)

    outputs = {"map": x, "pooled": x.mean((1, 2))}
    if self.num_classes:
      outputs["logits"] = nn.Dense(
        self.num_classes,
        kernel_init=nn.initializers.xavier_uniform(),
        dtype=jnp.float32,
        name="head",
      )(outputs["pooled"])
    return outputs


Model = MobileViTV2
