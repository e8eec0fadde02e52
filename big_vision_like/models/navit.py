"""NaViT: images of any size and aspect ratio, packed into rows of tokens.

Paper: Dehghani et al., "Patch n' Pack", arXiv 2307.06304. The authors' code is
not public; attention follows ViT-22B (arXiv 2302.05442), which the paper
builds on, and the pooling Zhai et al. (arXiv 2106.04560).
Parameters without a head: B/32 94,543,232, B/16 92,773,760, L/16 315,674,752.
Deviations: none known from what the paper says. Where it is silent:
  - LayerNorm centres; it has a scale and no bias. Attention has no biases, its
    output projection included; MLP, patch projection and head have theirs.
  - Position tables have 64 entries a side, see `max_grid`.
  - The last patch of n has the fractional coordinate (n-1)/n.
"""

from collections.abc import Mapping

import flax
import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from big_vision_like.models.layers import variants
from big_vision_like.models.layers.blocks import BlockConfig, tokens_dot_general
from big_vision_like.models.layers.encoder import Encoder
from big_vision_like.models.layers.pooling import AttentionPool
from big_vision_like.models.layers.position import PositionEmbedding

VARIANTS = {
  "local": dict(width=96, depth=4, mlp=384, heads=3, patch=4),
  "Ti": dict(width=192, depth=12, mlp=768, heads=3),
  "S": dict(width=384, depth=12, mlp=1536, heads=6),
  "B": dict(width=768, depth=12, mlp=3072, heads=12),
  "L": dict(width=1024, depth=24, mlp=4096, heads=16),
}


class NaViT(nn.Module):
  """Native-resolution ViT on packed rows.

  Attributes:
    variant: a row of VARIANTS with a patch size, such as "B/16".
    num_classes: outputs of the head; None or 0: no head, no logits.
    sizes: replaces entries of the variant's row, as in dict(depth=6).
    position, fractional, max_grid: see layers/position.py. No size of image
      is refused: one with more than `max_grid` patches a side reads the tables
      between their entries.
    patch_norm: LayerNorms before and after the patch projection (Kumar et al.,
      arXiv 2302.01327).
    pool_mlp: the MLP of the pooling; False: attention alone.
    head_zero_init: start the head's kernel at 0, as for fine-tuning.
    head_bias: where the head's bias starts, such as -10 for sigmoid losses.
    qk_norm, gelu, ln_eps, dropout, dtype, attention: see layers/blocks.py.
    stochastic_depth, remat, scan: see layers/encoder.py.
  """

  variant: str = "B/16"
  num_classes: int | None = None
  sizes: Mapping[str, int] | None = None
  position: str = "factorised_add"
  fractional: bool = False
  max_grid: int = 64
  patch_norm: bool = False
  pool_mlp: bool = True
  head_zero_init: bool = False
  head_bias: float = 0.0
  qk_norm: str | None = "layer"
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

  @nn.compact
  def __call__(
    self,
    *,
    patches: Float[Array, "b l c"],
    segment_ids: Int[Array, "b l"],
    positions: Int[Array, "b l 2"],
    grid_hw: Int[Array, "b m 2"],
    example_mask: Bool[Array, "b m"],
    train: bool,
  ) -> dict[str, Array]:
    """Reads packed rows, see api.py; patches are already normalised.

    Returns:
      logits float32 [B,M,C] and pooled [B,M,D], 0 in slots without an image;
      tokens [B,L,D] after the last LayerNorm.
    """
    size = variants.sizes(self.variant, VARIANTS, self.sizes)
    slots = grid_hw.shape[1]
    config = self.block_config(size)
    x = self.embed(patches, size, config)
    embedding = PositionEmbedding(
      self.position,
      size["width"],
      self.max_grid,
      self.fractional,
      name="pos_embed",
    )(positions, grid_hw, segment_ids)
    x = x + embedding.astype(x.dtype)
    x = nn.Dropout(self.dropout)(x, deterministic=not train)
    x = Encoder(
      size["depth"],
      config,
      self.stochastic_depth,
      self.remat,
      self.scan,
      name="encoder",
    )(x, train=train, segment_ids=segment_ids, max_segments=slots)
    pooled = AttentionPool(config, self.pool_mlp, name="pool")(
      x, train=train, segment_ids=segment_ids, slots=slots
    )
    pooled = jnp.where(example_mask[..., None], pooled, 0)
    outputs = {"pooled": pooled, "tokens": x}
    if self.num_classes:
      logits = self.head(pooled)
      outputs["logits"] = jnp.where(example_mask[..., None], logits, 0)
    return outputs

  def block_config(self, size):
    return BlockConfig(
      heads=size["heads"],
      mlp=size["mlp"],
      qk_norm=self.qk_norm,
      attention_bias=False,
      norm_bias=False,
      ln_eps=self.ln_eps,
      gelu=self.gelu,
      dropout=self.dropout,
      dtype=self.dtype,
      attention=self.attention,
    )

  def embed(self, patches, size, config):
    """Projects patches, checking that they are what the variant expects."""
    values = 3 * size["patch"] ** 2
    if patches.shape[-1] != values:
      raise ValueError(
        f"Patches of {patches.shape[-1]} values do not fit variant "
        f"{self.variant!r}: {size['patch']} x {size['patch']} pixels of 3 "
        f"colours have {values}. Give the data the model's patch size."
      )
    if self.patch_norm:
      patches = config.layer_norm("patch_ln")(patches)
    x = nn.Dense(
      size["width"],
      dtype=self.dtype,
      dot_general=tokens_dot_general,
      name="embed",
    )(patches)
    return config.layer_norm("embed_ln")(x) if self.patch_norm else x

  def head(self, pooled):
    init = nn.initializers.lecun_normal()
    return nn.Dense(
      self.num_classes,
      kernel_init=nn.initializers.zeros if self.head_zero_init else init,
      bias_init=nn.initializers.constant(self.head_bias),
      dtype=jnp.float32,
      name="head",
    )(pooled)


Model = NaViT
