"""FlexiViT: one ViT for all patch sizes, so for all sequence lengths.

Paper: Beyer et al., arXiv 2212.08013.
Reference: google-research/big_vision @ 0127fb6, models/proj/flexi.
Parameters without a head, with a kernel of 32 x 32 pixels and positions of
7 x 7: S 22,493,568, B 87,454,464, L 305,509,376; with the 16 x 16 and 15 x 15
of timm's models and 1,000 classes: S 22,061,416, B 86,589,160, L 304,355,304.
Deviations:
  - An image that the grid does not divide is refused. The reference rounds
    patches down and gets another grid than it was told, or cuts the borders.
  - The head starts random unless `head_zero_init`, as in models/vit.py.
"""

from collections.abc import Mapping

import flax
import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from big_vision_like.models.layers import memory as memories
from big_vision_like.models.layers import variants
from big_vision_like.models.layers.blocks import BlockConfig
from big_vision_like.models.layers.encoder import Encoder
from big_vision_like.models.layers.resize import pi_resize, resize_table

IMAGE_SIZE = 240
# `patch` is the side of the kernel that is stored.
VARIANTS = {
  "local": dict(width=96, depth=4, mlp=384, heads=3, patch=8),
  "Ti": dict(width=192, depth=12, mlp=768, heads=3, patch=32),
  "S": dict(width=384, depth=12, mlp=1536, heads=6, patch=32),
  "B": dict(width=768, depth=12, mlp=3072, heads=12, patch=32),
  "L": dict(width=1024, depth=24, mlp=4096, heads=16, patch=32),
}
# What the paper trains on: patches of 48 to 8 pixels at IMAGE_SIZE.
GRIDS = (5, 6, 8, 10, 12, 15, 16, 20, 24, 30)

Grid = int | tuple[int, int]


class FlexiPatchEmbed(nn.Module):
  """Cuts an image into a grid of patches of any size: [B,H,W,C] to [B,h,w,D].

  The kernel [P,P,C,D] is resized to the patches of this call, in float32, and
  the gradient passes back through that.
  """

  width: int
  patch: int
  dtype: str = "float32"

  @nn.compact
  def __call__(
    self, image: Float[Array, "b h w c"], grid: Grid
  ) -> Float[Array, "b gh gw d"]:
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    height, width = image.shape[1:3]
    if rows < 1 or columns < 1 or height % rows or width % columns:
      raise ValueError(
        f"An image of {height} x {width} pixels does not divide into a grid "
        f"of {rows} x {columns} patches; resize it, or choose another grid."
      )
    kernel = self.param(
      "kernel",
      nn.initializers.normal(self.width**-0.5),
      (self.patch, self.patch, image.shape[-1], self.width),
    )
    bias = self.param("bias", nn.initializers.zeros, (self.width,))
    kernel = pi_resize(kernel, (height // rows, width // columns))
    patches = rearrange(
      image, "b (gh p) (gw q) c -> b gh gw (p q c)", gh=rows, gw=columns
    )
    kernel = rearrange(kernel, "p q c d -> (p q c) d")
    x = patches.astype(self.dtype) @ kernel.astype(self.dtype)
    return x + bias.astype(self.dtype)


class FlexiViT(nn.Module):
  """Vision Transformer whose grid of patches is an argument.

  Attributes:
    variant: a row of VARIANTS; "B/16" stores a kernel of 16 x 16 pixels.
    num_classes: outputs of the head; None or 0: no head, no logits.
    sizes: replaces entries of the variant's row, as in dict(depth=6).
    grid: the patches a side where a call names no other.
    table: side of the table of positions that is stored.
    head_zero_init: start the head's kernel at 0.
    head_bias: where the head's bias starts, such as -10 for sigmoid losses.
    gelu, ln_eps, dropout, dtype, attention: see layers/blocks.py.
    stochastic_depth, remat, scan: see layers/encoder.py.
  """

  variant: str = "S"
  num_classes: int | None = None
  sizes: Mapping[str, int] | None = None
  grid: Grid = 15
  table: int = 7
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
    return variants.sizes(self.variant, VARIANTS, self.sizes)

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
    grid: Grid | None = None,
    memory: memories.Memory | None = None,
  ) -> dict[str, Array]:
    """Reads images, already normalised.

    Args:
      image: of a size that the grid divides.
      train: whether to drop out.
      grid: patches a side, or (rows, columns); a compile-time constant, drawn
        from `config.static` at each step. None: the attribute's.
      memory: for models/memory.py.

    Returns:
      logits float32 [B,C]; pooled [B,D], the class token behind the last
      LayerNorm; tokens [B,N,D], the patches' in raster order; token/NAME [B,D],
      the class token of each task in `memory`.
    """
    size = self.size
    x = FlexiPatchEmbed(size["width"], size["patch"], self.dtype, name="embed")(
      image, self.grid if grid is None else grid
    )
    x = self.add_positions(x)
    x = nn.Dropout(self.dropout)(x, deterministic=not train)
    encoder = Encoder(
      size["depth"],
      self.block_config,
      self.stochastic_depth,
      self.remat,
      self.scan,
      name="encoder",
    )
    tasks = {}
    if memory is None:
      x = encoder(x, train=train)
    else:
      x, inside = memories.enter(x, memory, own_token=True)
      x, beside = encoder(x, train=train, memory=inside)
      x, tasks = memories.leave(x, memory, beside, own_token=True)
    outputs = {"pooled": x[:, 0], "tokens": x[:, 1:], **tasks}
    if self.num_classes:
      init = nn.initializers.lecun_normal()
      outputs["logits"] = nn.Dense(
        self.num_classes,
        kernel_init=nn.initializers.zeros if self.head_zero_init else init,
        bias_init=nn.initializers.constant(self.head_bias),
        dtype=jnp.float32,
        name="head",
      )(x[:, 0])
    return outputs

  def add_positions(self, x):
    """[B,h,w,D] to tokens with positions, behind a class token without one."""
    batch, rows, columns, width = x.shape
    table = self.param(
      "pos_embed",
      nn.initializers.normal(width**-0.5),
      (1, self.table**2, width),
    )
    table = rearrange(table[0], "(g h) d -> g h d", g=self.table)
    x = x + resize_table(table, (rows, columns)).astype(x.dtype)
    cls = self.param("cls", nn.initializers.zeros, (1, 1, width))
    cls = jnp.broadcast_to(cls.astype(x.dtype), (batch, 1, width))
    return jnp.concatenate([cls, rearrange(x, "b h w d -> b (h w) d")], 1)


Model = FlexiViT
