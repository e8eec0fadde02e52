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
NaFlex models are the same layers in other settings, with padded images in
their own code and packed ones here: the vision towers of SigLIP 2 (Tschannen
et al., arXiv 2502.14786; transformers 5.23, timm 1.0.31) and timm's NaFlexViT.
weights/navit.py has the settings. Their parameters: B/16 92,930,304, So400m/16
427,888,064.
"""

import functools
from collections.abc import Mapping

import flax
import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from big_vision_like.models.layers import memory as memories
from big_vision_like.models.layers import variants
from big_vision_like.models.layers.blocks import BlockConfig, tokens_dot_general
from big_vision_like.models.layers.encoder import Encoder
from big_vision_like.models.layers.pooling import AttentionPool, mean_pool
from big_vision_like.models.layers.position import PositionEmbedding

VARIANTS = {
  "local": dict(width=96, depth=4, mlp=384, heads=3, patch=4),
  "Ti": dict(width=192, depth=12, mlp=768, heads=3),
  "S": dict(width=384, depth=12, mlp=1536, heads=6),
  "B": dict(width=768, depth=12, mlp=3072, heads=12),
  "L": dict(width=1024, depth=24, mlp=4096, heads=16),
  "So400m": dict(width=1152, depth=27, mlp=4304, heads=16),
}
POOLS = ("map", "gap", "tok")


class NaViT(nn.Module):
  """Native-resolution ViT on packed rows.

  Attributes:
    variant: a row of VARIANTS with a patch size, such as "B/16".
    num_classes: outputs of the head; None or 0: no head, no logits.
    sizes: replaces entries of the variant's row, as in dict(depth=6).
    position, fractional, keep_aspect, max_grid: see layers/position.py. No
      size of image is refused: one with more than `max_grid` patches a side
      reads the tables between their entries.
    patch_norm: LayerNorms before and after the patch projection (Kumar et al.,
      arXiv 2302.01327).
    bias: biases in attention and LayerNorms, as in ViT.
    registers: learned tokens that each image has besides its patches (Darcet
      et al., arXiv 2309.16588), without positions and not pooled. A row grows
      by this number for each of its image slots.
    pool: what the head reads: "map" attention pooling, "gap" the mean over an
      image's patches after the last LayerNorm, "tok" a class token, which is
      one more token like the registers.
    fc_norm: the last LayerNorm comes after the mean of pool="gap", instead of
      before it; tokens have none then. The name is timm's.
    pool_mlp: the MLP of the attention pooling; False: attention alone.
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
  keep_aspect: bool = False
  max_grid: int = 64
  patch_norm: bool = False
  bias: bool = False
  registers: int = 0
  pool: str = "map"
  fc_norm: bool = False
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

  @property
  def size(self) -> dict:
    """The row of the variant."""
    return variants.sizes(self.variant, VARIANTS, self.sizes)

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
    memory: memories.Memory | None = None,
  ) -> dict[str, Array]:
    """Reads packed rows, see api.py; patches are already normalised.

    `memory` is for models/memory.py. The images of a row share its cells, and
    each has the class tokens of all tasks.

    Returns:
      logits float32 [B,M,C] and pooled [B,M,D], 0 in slots without an image;
      tokens [B,L,D] after the last LayerNorm; token/NAME [B,M,D], the class
      tokens of each task in `memory`.
    """
    self.check()
    size = self.size
    slots = grid_hw.shape[1]
    config = self.block_config
    x = self.embed(patches, size, config)
    embedding = PositionEmbedding(
      self.position,
      size["width"],
      self.max_grid,
      self.fractional,
      self.keep_aspect,
      name="pos_embed",
    )(positions, grid_hw, segment_ids)
    x = x + embedding.astype(x.dtype)
    added, own_token = self.own_tokens(size["width"]), self.pool == "tok"
    if memory is not None:
      added, inside = memories.enter(added, memory, own_token=own_token)
    x, ids, order = add_tokens(x, added, segment_ids, example_mask)
    x = nn.Dropout(self.dropout)(x, deterministic=not train)
    encoder = Encoder(
      size["depth"],
      config,
      self.stochastic_depth,
      self.remat,
      self.scan,
      not self.fc_norm,
      name="encoder",
    )
    encode = functools.partial(
      encoder, train=train, segment_ids=ids, max_segments=slots
    )
    tasks = {}
    if memory is None:
      added, x = take_tokens(encode(x), order, added.shape[1], slots)
    else:
      beside = memories.in_slots(inside.tokens, len(x), slots, x.dtype)
      x, beside = encode(x, memory=inside.replace(tokens=beside))
      added, x = take_tokens(x, order, added.shape[1], slots)
      added, tasks = memories.leave(added, memory, beside, own_token=own_token)
    if self.pool == "map":
      pooled = AttentionPool(config, self.pool_mlp, name="pool")(
        x, train=train, segment_ids=segment_ids, slots=slots
      )
    elif self.pool == "gap":
      pooled = mean_pool(x, segment_ids, slots)
      if self.fc_norm:
        pooled = config.layer_norm("fc_norm")(pooled)
    else:
      pooled = added[:, :, 0]
    pooled = jnp.where(example_mask[..., None], pooled, 0)
    outputs = {"pooled": pooled, "tokens": x, **tasks}
    if self.num_classes:
      logits = self.head(pooled)
      outputs["logits"] = jnp.where(example_mask[..., None], logits, 0)
    return outputs

  def check(self):
    if self.pool not in POOLS:
      raise ValueError(f"pool is {self.pool!r}; it is one of {POOLS}.")
    if self.fc_norm and self.pool != "gap":
      raise ValueError(
        f"fc_norm is for pool='gap', the mean over patches, not {self.pool!r}."
      )

  @property
  def block_config(self) -> BlockConfig:
    return BlockConfig(
      heads=self.size["heads"],
      mlp=self.size["mlp"],
      qk_norm=self.qk_norm,
      attention_bias=self.bias,
      norm_bias=self.bias,
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

  def own_tokens(self, width):
    """The class token and the registers, [1,R,D]."""
    own = [jnp.zeros((1, 0, width))]
    if self.pool == "tok":
      own.append(self.param("cls", nn.initializers.zeros, (1, 1, width)))
    if self.registers:
      # Equal registers would stay equal.
      init, shape = nn.initializers.normal(0.02), (1, self.registers, width)
      own.append(self.param("registers", init, shape))
    return jnp.concatenate(own, 1)

  def head(self, pooled):
    init = nn.initializers.lecun_normal()
    return nn.Dense(
      self.num_classes,
      kernel_init=nn.initializers.zeros if self.head_zero_init else init,
      bias_init=nn.initializers.constant(self.head_bias),
      dtype=jnp.float32,
      name="head",
    )(pooled)


def add_tokens(x, added, segment_ids, example_mask):
  """Puts tokens [1,R,D] before the patches of each image.

  Returns:
    tokens [B,L+MR,D]; their segment ids; what `take_tokens` needs. Without
    such tokens: what is given, and None.
  """
  (batch, slots), number = example_mask.shape, added.shape[1]
  if not number:
    return x, segment_ids, None
  added = jnp.tile(added.astype(x.dtype), (batch, slots, 1))
  ids = jnp.where(example_mask, jnp.arange(1, slots + 1), 0)
  ids = jnp.repeat(ids.astype(segment_ids.dtype), number, axis=1)
  ids = jnp.concatenate([ids, segment_ids], 1)
  # Kernels of attention are fast, or right, where equal ids are neighbours.
  last = jnp.iinfo(ids.dtype).max
  order = jnp.argsort(jnp.where(ids == 0, last, ids), axis=1, stable=True)
  x = jnp.concatenate([added, x], 1)
  x = jnp.take_along_axis(x, order[..., None], 1)
  return x, jnp.take_along_axis(ids, order, 1), order


def take_tokens(x, order, number, slots):
  """The added tokens [B,M,R,D] and the patches' [B,L,D], in their places."""
  if order is None:
    return x[:, :0].reshape(len(x), slots, 0, x.shape[-1]), x
  x = jnp.take_along_axis(x, jnp.argsort(order, axis=1)[..., None], 1)
  added, x = jnp.split(x, [slots * number], 1)
  return added.reshape(len(x), slots, number, -1), x


Model = NaViT
