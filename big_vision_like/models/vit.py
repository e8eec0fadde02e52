"""ViT: an image is a sequence of patches, read by a plain Transformer.

Paper: Dosovitskiy et al., arXiv 2010.11929; the sizes Ti and S are from
Steiner et al., arXiv 2106.10270, the pooling by attention and g, G from Zhai
et al., arXiv 2106.04560. Hybrids read the map of a ResNet: R50+B and R50+L are
from the first paper, R+Ti and R26+S from the second.
Reference: google-research/vision_transformer @ c6de1e5, and
google-research/big_vision @ 0127fb6 for pooling and sin-cos positions.
Parameters, with 1,000 classes at 224 pixels: Ti/16 5,717,416, S/16 22,050,664,
B/16 86,567,656, L/16 304,326,632, H/14 632,045,800; R+Ti/16 6,337,704,
R26+S/32 36,431,912, R50+B/16 98,659,112, R50+L/32 328,994,856.
Deviations:
  - R+Ti/16 reads patches of 32 pixels, as all code for it does: the papers
    count only one of the two halvings before its patches of 8.
  - The head starts random unless `head_zero_init`, so that every parameter has
    a gradient from the first step. Google's code starts all heads at 0.
  - `pool="tok"` with `position="sincos2d"` gives the class token no position.
"""

from collections.abc import Mapping

import flax
import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from big_vision_like.models.layers import memory as memories
from big_vision_like.models.layers import position, variants
from big_vision_like.models.layers.blocks import BlockConfig
from big_vision_like.models.layers.encoder import Encoder
from big_vision_like.models.layers.pooling import AttentionPool
from big_vision_like.models.resnet import StdResNet

VARIANTS = {
  "local": dict(width=96, depth=4, mlp=384, heads=3, patch=8),
  "Ti": dict(width=192, depth=12, mlp=768, heads=3),
  "S": dict(width=384, depth=12, mlp=1536, heads=6),
  "B": dict(width=768, depth=12, mlp=3072, heads=12),
  "L": dict(width=1024, depth=24, mlp=4096, heads=16),
  "So400m": dict(width=1152, depth=27, mlp=4304, heads=16),
  "H": dict(width=1280, depth=32, mlp=5120, heads=16),
  "g": dict(width=1408, depth=40, mlp=6144, heads=16),
  "G": dict(width=1664, depth=48, mlp=8192, heads=16),
  "g-opt": dict(width=1536, depth=40, mlp=6144, heads=16),  # of SigLIP 2
}
# Hybrids: what may stand before "+", by the number behind the slash. The blocks
# of the ResNet's stages, and the side of a patch on its map. R50 at 16 has the
# blocks of its last stage in the one before.
STEMS = {
  "R": {16: dict(stages=(), patch=8)},
  "R26": {32: dict(stages=(2, 2, 2, 2), patch=1)},
  "R50": {
    16: dict(stages=(3, 4, 9), patch=1),
    32: dict(stages=(3, 4, 6, 3), patch=1),
  },
}
IMAGE_SIZE = 224
# Variants with published weights -> the side of their images.
_PLAIN = ("Ti/16", "S/32", "S/16", "B/32", "B/16", "B/8", "L/16", "H/14")
_HYBRID = ("R+Ti/16", "R26+S/32", "R50+B/16", "R50+L/32")
PUBLISHED = dict.fromkeys((*_PLAIN, *_HYBRID), IMAGE_SIZE)
POOLS = ("tok", "gap", "map")
POSITIONS = ("learn", "sincos2d")


def row(variant: str, changes: Mapping[str, int] | None = None):
  """The row of a variant with its `patch`; of hybrids, also `stages`.

  Raises:
    ValueError: if there is no such variant, or `changes` has other keys.
  """
  stem, plus, name = variant.rpartition("+")
  size = variants.sizes(name, VARIANTS, changes)
  if not plus:
    return size
  if size["patch"] not in STEMS.get(stem, {}):
    known = [f"{s}+B/{n}" for s, strides in STEMS.items() for n in strides]
    raise ValueError(
      f"Unknown variant {variant!r}. Hybrids are as in {', '.join(known)}, "
      "with any size for the B."
    )
  return size | STEMS[stem][size["patch"]]


class PatchEmbed(nn.Module):
  """Cuts an image into patches and projects each: [B,H,W,C] to [B,h,w,D].

  A convolution whose stride is its kernel [P,P,C,D], written as the one matrix
  product that it is.
  """

  width: int
  patch: int
  dtype: str = "float32"

  @nn.compact
  def __call__(
    self, image: Float[Array, "b h w c"]
  ) -> Float[Array, "b gh gw d"]:
    p, (height, width) = self.patch, image.shape[1:3]
    if height % p or width % p:
      raise ValueError(
        f"An image (or a map) of {height} x {width} pixels is no whole number "
        f"of {p} x {p} patches; resize it, or choose another patch size."
      )
    kernel = self.param(
      "kernel",
      nn.initializers.lecun_normal(),
      (p, p, image.shape[-1], self.width),
    )
    bias = self.param("bias", nn.initializers.zeros, (self.width,))
    patches = rearrange(image, "b (gh p) (gw q) c -> b gh gw (p q c)", p=p, q=p)
    kernel = rearrange(kernel, "p q c d -> (p q c) d")
    x = patches.astype(self.dtype) @ kernel.astype(self.dtype)
    return x + bias.astype(self.dtype)


class ViT(nn.Module):
  """Vision Transformer.

  Attributes:
    variant: a row of VARIANTS with a patch size, such as "B/16"; behind one of
      STEMS for a hybrid, such as "R50+B/16".
    num_classes: outputs of the head; None or 0: no head, no logits.
    sizes: replaces entries of the variant's row, as in dict(depth=6).
    pool: what the head reads: "tok" a class token, "gap" the mean over tokens
      after the last LayerNorm, "map" attention pooling.
    position: "learn", a table for the grid that it is initialised on, or
      "sincos2d".
    rep_size: width of a hidden layer with tanh in the head; True: the model's
      width; False: none.
    head_zero_init: start the head's kernel at 0, as for fine-tuning.
    head_bias: where the head's bias starts, such as -10 for sigmoid losses.
    gelu, ln_eps, dropout, dtype, attention: see layers/blocks.py.
    stochastic_depth, remat, scan: see layers/encoder.py.
  """

  variant: str = "S/16"
  num_classes: int | None = None
  sizes: Mapping[str, int] | None = None
  pool: str = "tok"
  position: str = "learn"
  rep_size: int | bool = False
  head_zero_init: bool = False
  head_bias: float = 0.0
  gelu: str = "tanh"
  ln_eps: float = 1e-6
  dropout: float = 0.0
  stochastic_depth: float = 0.0
  dtype: str = "float32"
  attention: str = "auto"
  remat: str = "none"
  scan: bool = True

  def __post_init__(self):
    if self.sizes is not None:
      self.sizes = flax.core.FrozenDict(self.sizes)  # Models are hashable.
    super().__post_init__()

  @property
  def size(self) -> dict:
    """The row of the variant."""
    return row(self.variant, self.sizes)

  @property
  def block_config(self) -> BlockConfig:
    return BlockConfig(
      heads=self.size["heads"],
      mlp=self.size["mlp"],
      ln_eps=self.ln_eps,
      gelu=self.gelu,
      dropout=self.dropout,
      dtype=self.dtype,
      attention=self.attention,
    )

  @nn.compact
  def __call__(
    self,
    image: Float[Array, "b h w c"],
    *,
    train: bool,
    memory: memories.Memory | None = None,
  ) -> dict[str, Array]:
    """Reads images, already normalised; `memory` is for models/memory.py.

    Returns:
      logits float32 [B,C]; pooled [B,D], what the head's last layer reads;
      tokens [B,N,D], the patches' after the last LayerNorm, in raster order;
      token/NAME [B,D], the class token of each task in `memory`.
    """
    if self.pool not in POOLS:
      raise ValueError(f"pool is {self.pool!r}; it is one of {POOLS}.")
    if self.position not in POSITIONS:
      raise ValueError(
        f"position is {self.position!r}; it is one of {POSITIONS}."
      )
    size, config = self.size, self.block_config
    x = image
    if "stages" in size:
      x = StdResNet(size["stages"], self.dtype, name="resnet")(x)
    x = PatchEmbed(size["width"], size["patch"], self.dtype, name="embed")(x)
    x = self.add_positions(x)
    x = nn.Dropout(self.dropout)(x, deterministic=not train)
    encoder = Encoder(
      size["depth"],
      config,
      self.stochastic_depth,
      self.remat,
      self.scan,
      name="encoder",
    )
    own_token, tasks = self.pool == "tok", {}
    if memory is None:
      x = encoder(x, train=train)
    else:
      x, inside = memories.enter(x, memory, own_token=own_token)
      x, beside = encoder(x, train=train, memory=inside)
      x, tasks = memories.leave(x, memory, beside, own_token=own_token)

    if self.pool == "tok":
      pooled, x = x[:, 0], x[:, 1:]
    elif self.pool == "gap":
      pooled = x.mean(1)
    else:
      pooled = AttentionPool(config, name="pool")(x, train=train)[:, 0]
    if self.rep_size:
      features = size["width"] if self.rep_size is True else self.rep_size
      pooled = nn.Dense(features, dtype=self.dtype, name="pre_logits")(pooled)
      pooled = jnp.tanh(pooled)
    outputs = {"pooled": pooled, "tokens": x, **tasks}
    if self.num_classes:
      outputs["logits"] = self.head(pooled)
    return outputs

  def add_positions(self, x):
    """[B,h,w,D] to tokens in raster order, behind a class token if any."""
    batch, height, width, features = x.shape
    x = rearrange(x, "b h w d -> b (h w) d")
    if self.position == "sincos2d":
      grid = position.grid_coordinates(height, width)
      x = x + position.sincos2d(grid, features).astype(x.dtype)
    if self.pool == "tok":
      cls = self.param("cls", nn.initializers.zeros, (1, 1, features))
      cls = jnp.broadcast_to(cls.astype(x.dtype), (batch, 1, features))
      x = jnp.concatenate([cls, x], 1)
    if self.position == "learn":
      table = self.param(
        "pos_embed", nn.initializers.normal(0.02), (1, *x.shape[1:])
      )
      x = x + table.astype(x.dtype)
    return x

  def head(self, pooled):
    init = nn.initializers.lecun_normal()
    return nn.Dense(
      self.num_classes,
      kernel_init=nn.initializers.zeros if self.head_zero_init else init,
      bias_init=nn.initializers.constant(self.head_bias),
      dtype=jnp.float32,
      name="head",
    )(pooled)


Model = ViT
