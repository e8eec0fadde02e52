"""MobileViT: Transformers inside a MobileNet, across pixels of one phase.

Paper: Mehta and Rastegari, arXiv 2110.02178.
Reference: apple/ml-cvnets, tag cvnets-v0.1 and @ 7771756; timm 1.0.31.
Parameters, with 1,000 classes: XXS 1,272,024, XS 2,317,848, S 5,578,632.
Deviations:
  - Convolutions and dense layers start as in ml-cvnets from v0.2 on (torch's
    uniform law; Xavier's for dense layers), not with v0.1's normal laws.
  - "local" is a size of ours.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from big_vision_like.api import INTERMEDIATES
from big_vision_like.models.layers.blocks import (
  BlockConfig,
  MultiHeadAttention,
  shard_batch,
  tokens_dot_general,
)
from big_vision_like.models.layers.convolution import Conv, ConvBN
from big_vision_like.models.layers.mobilenet import (
  InvertedResidual,
  resize_bilinear,
)

# `channels` of the stem and of the five levels, `widths` of the Transformers
# in the last three, `expand` of the inverted residuals, `out` of the last
# convolution.
VARIANTS = {
  "local": dict(
    channels=(8, 8, 16, 24, 32, 48), widths=(32, 40, 48), expand=2, out=192
  ),
  "XXS": dict(
    channels=(16, 16, 24, 48, 64, 80), widths=(64, 80, 96), expand=2, out=320
  ),
  "XS": dict(
    channels=(16, 32, 48, 64, 80, 96), widths=(96, 120, 144), expand=4, out=384
  ),
  "S": dict(
    channels=(16, 32, 64, 96, 128, 160),
    widths=(144, 192, 240),
    expand=4,
    out=640,
  ),
}
IMAGE_SIZE = 256
BLOCKS = (1, 3)  # Inverted residuals in the first two levels.
DEPTHS = (2, 4, 3)  # Transformer layers in the last three.
HEADS = 4
PATCH = 2


class TransformerLayer(nn.Module):
  """x + MHA(LN(x)), then x + FFN(LN(x)), whose activation is SiLU."""

  dropout: float
  dtype: str
  attention: str

  @nn.compact
  def __call__(
    self, x: Float[Array, "b n d"], *, train: bool
  ) -> Float[Array, "b n d"]:
    width = x.shape[-1]
    config = BlockConfig(
      heads=HEADS,
      mlp=2 * width,
      ln_eps=1e-5,
      dtype=self.dtype,
      attention=self.attention,
    )
    drop = nn.Dropout(self.dropout, deterministic=not train)
    y = MultiHeadAttention(config, name="attn")(config.layer_norm("ln1")(x))
    x = x + drop(y)
    y = jax.nn.silu(self.dense(2 * width, "fc1")(config.layer_norm("ln2")(x)))
    x = x + drop(self.dense(width, "fc2")(y))
    self.sow(INTERMEDIATES, "features", x)
    return x

  def dense(self, features, name):
    return nn.Dense(
      features,
      kernel_init=nn.initializers.xavier_uniform(),
      dtype=self.dtype,
      dot_general=tokens_dot_general,
      name=name,
    )


class MobileViTBlock(nn.Module):
  """Local convolutions, Transformers over the map, fusion with the input.

  The map is cut into patches of 2 x 2. Each of the four pixels of a patch
  attends to the pixels at the same place in all patches: four sequences an
  image. A map that is no whole number of patches is resized for that and back.
  """

  width: int
  depth: int
  dropout: float
  fused: bool
  dtype: str
  attention: str

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w c"], *, train: bool
  ) -> Float[Array, "b h w c"]:
    height, width, channels = x.shape[1:]
    settings = dict(fused=self.fused, dtype=self.dtype)
    y = ConvBN(channels, kernel=3, **settings, name="local")(x, train=train)
    y = Conv(self.width, use_bias=False, dtype=self.dtype, name="to_tokens")(
      jax.nn.silu(y)
    )

    even = (height + height % PATCH, width + width % PATCH)
    if even != (height, width):
      y = resize_bilinear(y, *even, align_corners=False)
    y = rearrange(y, "b (h p) (w q) d -> (b p q) (h w) d", p=PATCH, q=PATCH)
    for i in range(self.depth):
      y = TransformerLayer(
        self.dropout, self.dtype, self.attention, name=f"blocks_{i}"
      )(y, train=train)
    y = nn.LayerNorm(1e-5, dtype=self.dtype, name="norm")(y)
    y = rearrange(
      y,
      "(b p q) (h w) d -> b (h p) (w q) d",
      p=PATCH,
      q=PATCH,
      h=even[0] // PATCH,
    )
    if even != (height, width):
      y = resize_bilinear(y, height, width, align_corners=False)

    y = ConvBN(channels, **settings, name="from_tokens")(y, train=train)
    y = jnp.concatenate([x, jax.nn.silu(y)], -1)
    y = ConvBN(channels, kernel=3, **settings, name="fusion")(y, train=train)
    return jax.nn.silu(y)


class MobileViT(nn.Module):
  """MobileViT. Images of any size.

  Attributes:
    variant: a row of VARIANTS.
    num_classes: outputs of the head; None or 0: no head, no logits.
    dropout: in the Transformers, behind attention and behind the FFN; in
      training the paper has 0.05 for XXS, else 0.1.
    head_dropout: before the head; in training the paper has 0.1.
    fused: BatchNorms are folded into convolutions, see convolution.fuse.
    dtype, attention: see layers/blocks.py.
  """

  variant: str = "S"
  num_classes: int | None = None
  dropout: float = 0.0
  head_dropout: float = 0.0
  fused: bool = False
  dtype: str = "float32"
  attention: str = "auto"

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
      logits float32 [B,C]; pooled [B,D], what the head reads; map [B,h,w,D'],
      the last level's at 1/32 of the size, which detectors and segmenters
      read.
    """
    size = VARIANTS[self.variant]
    settings = dict(fused=self.fused, dtype=self.dtype)
    x = ConvBN(
      size["channels"][0], kernel=3, stride=2, **settings, name="stem"
    )(image, train=train)
    x = shard_batch(jax.nn.silu(x))
    for level, channels in enumerate(size["channels"][1:], 1):
      stride, name = 1 if level == 1 else 2, f"level{level}"
      count = BLOCKS[level - 1] if level <= len(BLOCKS) else 1
      for i in range(count):
        x = InvertedResidual(
          channels,
          stride if i == 0 else 1,
          size["expand"],
          **settings,
          name=f"{name}_mv{i}",
        )(x, train=train)
      if level > len(BLOCKS):
        which = level - len(BLOCKS) - 1
        x = MobileViTBlock(
          size["widths"][which],
          DEPTHS[which],
          self.dropout,
          **settings,
          attention=self.attention,
          name=f"{name}_vit",
        )(x, train=train)
      x = shard_batch(x)

    outputs = {"map": x}
    x = ConvBN(size["out"], **settings, name="out")(x, train=train)
    outputs["pooled"] = pooled = jax.nn.silu(x).mean((1, 2))
    if self.num_classes:
      pooled = nn.Dropout(self.head_dropout)(pooled, deterministic=not train)
      outputs["logits"] = nn.Dense(
        self.num_classes,
        kernel_init=nn.initializers.xavier_uniform(),
        dtype=jnp.float32,
        name="head",
      )(pooled)
    return outputs


Model = MobileViT
