"""DeepViT: attention maps are mixed across heads before they read the values.

Paper: Zhou et al., arXiv 2103.11886.
Reference: zhoudaquan/dvit_repo @ 1ccb152.
Parameters, with 1,000 classes at 224 pixels: 16B 24,426,664, 24B 36,261,448,
32B 48,096,232, S 27,312,632, L 58,883,708. The paper says 55M for L; these are
the sizes of the authors' code.
Deviations: none known. Of the reference, with what it computes unchanged:
  - S and L halve what enters a branch and double what leaves it. LayerNorm
    undoes the halving up to its eps, so the eps is 4 times as large instead.
  - BatchNorm's statistics are those of the global batch, not of each GPU's 32
    images.
"""

from collections.abc import Mapping

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from big_vision_like.api import INTERMEDIATES, SCANNED
from big_vision_like.models.layers import variants
from big_vision_like.models.layers.attention import attention
from big_vision_like.models.layers.blocks import (
  lend_maps,
  shard_batch,
  tokens_dot_general,
)
from big_vision_like.models.layers.convolution import BatchNorm, Conv, ConvBN
from big_vision_like.models.layers.encoder import REMAT

IMAGE_SIZE = 224
# mixing: how many of the blocks, the last ones, mix heads; stem: convolutions
# in front of the patches; branch: what each branch is multiplied by;
# scale_maps: divide mixed maps by the root of the head's width.
_TRANSFORMER = dict(
  width=384, heads=12, mlp=1152, patch=16, stem=0, branch=1, scale_maps=0
)
_CONVOLUTIONAL = dict(heads=12, patch=16, stem=1, branch=2)
VARIANTS = {
  "local": dict(
    width=96,
    depth=8,
    mlp=288,
    heads=6,
    patch=8,
    mixing=8,
    stem=0,
    branch=1,
    scale_maps=0,
  ),
  "16B": dict(depth=16, mixing=16, **_TRANSFORMER),
  "24B": dict(depth=24, mixing=24, **_TRANSFORMER),
  "32B": dict(depth=32, mixing=32, **_TRANSFORMER),
  "S": dict(
    width=396, depth=16, mlp=1188, mixing=5, scale_maps=1, **_CONVOLUTIONAL
  ),
  "L": dict(
    width=420, depth=32, mlp=1260, mixing=12, scale_maps=0, **_CONVOLUTIONAL
  ),
}
# timm's truncated normal cuts at 2, which is 100 deviations.
_INIT = nn.initializers.normal(0.02)


def _dense(features, name, dtype, axis=-1):
  return nn.DenseGeneral(
    features,
    axis,
    kernel_init=_INIT,
    dtype=dtype,
    dot_general=tokens_dot_general,
    name=name,
  )


class Embed(nn.Module):
  """Patches to tokens [B,h,w,D], behind two convolutions if there is a stem.

  The first convolution has stride 2, so the patches are half as large then.
  """

  width: int
  patch: int
  stem: bool
  dtype: str = "float32"

  @nn.compact
  def __call__(
    self, image: Float[Array, "b h w c"], *, train: bool
  ) -> Float[Array, "b gh gw d"]:
    p, (height, width) = self.patch, image.shape[1:3]
    if height % p or width % p or (self.stem and p % 2):
      raise ValueError(
        f"An image of {height} x {width} pixels is no whole number of "
        f"{p} x {p} patches{', of even size' if self.stem else ''}; resize "
        "it, or choose another patch size."
      )
    x = image
    if self.stem:
      conv = ConvBN(64, 7, 2, padding=3, dtype=self.dtype, name="conv1")
      x = nn.relu(conv(x, train=train))
      conv = ConvBN(64, 3, padding=1, dtype=self.dtype, name="conv2")
      x = nn.relu(conv(x, train=train))
      p //= 2
    return Conv(self.width, p, p, padding=0, dtype=self.dtype, name="proj")(x)


class ReAttention(nn.Module):
  """Self-attention whose maps are mixed across heads and normalised.

  Norm(Θᵀ softmax(q kᵀ / sqrt(d))) v, with BatchNorm over the heads. Rows of a
  softmax sum to 1, so each head of the mixed map has the same sum in all rows,
  and in training the normalised rows sum to N times the bias: the result is a
  contrast between tokens and no average of them.

  Attributes:
    heads: of attention.
    scale_maps: divide the normalised maps by sqrt(d).
    dropout: of the softmax, before mixing.
    dtype: of queries, keys and values. Maps stay float32 up to their product
      with the values: their deviation is a thousandth of their mean, which
      bfloat16 cannot hold, and their variance far below BatchNorm's eps.
  """

  heads: int
  scale_maps: bool = False
  dropout: float = 0.0
  dtype: str = "float32"

  @nn.compact
  def __call__(
    self, x: Float[Array, "b n d"], *, train: bool
  ) -> Float[Array, "b n d"]:
    width = x.shape[-1]
    features = (self.heads, width // self.heads)
    q, k, v = (
      checkpoint_name(_dense(features, name, self.dtype)(x), "qkv")
      for name in ("query", "key", "value")
    )
    scale = features[1] ** -0.5
    scores = jnp.einsum(
      "bqhd,bkhd->bhqk", q * scale, k, preferred_element_type=jnp.float32
    )
    maps = jax.nn.softmax(scores, axis=-1)
    self.sow(INTERMEDIATES, "softmax", maps)
    maps = nn.Dropout(self.dropout)(maps, deterministic=not train)
    maps = HeadMix(name="mix")(maps)
    maps = BatchNorm(name="norm")(maps, train=train)
    if self.scale_maps:
      maps = maps * scale
    self.sow(INTERMEDIATES, "maps", maps.transpose(0, 3, 1, 2))
    out = jnp.einsum("bqkh,bkhd->bqhd", maps.astype(self.dtype), v)
    return _dense(width, "out", self.dtype, (-2, -1))(out)


class HeadMix(nn.Module):
  """Maps [B,K,Q,S] to linear combinations of their heads, [B,Q,S,K]."""

  @nn.compact
  def __call__(self, maps: Float[Array, "b k q s"]) -> Float[Array, "b q s k"]:
    heads = maps.shape[1]
    uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    kernel = self.param("kernel", uniform, (heads, heads))
    bound = heads**-0.5
    bias = self.param(
      "bias",
      lambda key, shape: jax.random.uniform(key, shape, minval=-bound) * bound,
      (heads,),
    )
    mixed = jnp.einsum(
      "bkqs,kg->bqsg", maps, kernel, precision=jax.lax.Precision.HIGHEST
    )
    return mixed + bias


class PlainAttention(nn.Module):
  """Self-attention as in ViT, with the projections of ReAttention."""

  heads: int
  backend: str = "auto"
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    width = x.shape[-1]
    features = (self.heads, width // self.heads)
    q, k, v = (
      checkpoint_name(_dense(features, name, self.dtype)(x), "qkv")
      for name in ("query", "key", "value")
    )
    lend_maps(self, q, k)
    out = attention(q, k, v, backend=self.backend)
    return _dense(width, "out", self.dtype, (-2, -1))(out)


class Block(nn.Module):
  """x + a f(LN(x)) with attention for f, then the same with an MLP.

  Attributes:
    heads, mlp: attention heads, hidden width of the MLP.
    branch: a.
    mixing: ReAttention, not PlainAttention.
    scale_maps, dropout: see ReAttention; dropout also follows each dense layer
      but those of queries, keys and values.
    train: fields, not arguments, since scanned calls take arrays only.
  """

  heads: int
  mlp: int
  branch: int
  mixing: bool
  scale_maps: bool
  train: bool
  dropout: float = 0.0
  dtype: str = "float32"
  attention: str = "auto"

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b n d"],
    drop_rate: Float[Array, ""] | None = None,
  ) -> tuple[Float[Array, "b n d"], None]:
    y = self.layer_norm("ln1")(x)
    if self.mixing:
      attn = ReAttention(
        self.heads, self.scale_maps, self.dropout, self.dtype, name="attn"
      )
      y = attn(y, train=self.train)
    else:
      attn = PlainAttention(self.heads, self.attention, self.dtype, name="attn")
      y = attn(y)
    x = self.add(x, self.drop(y), drop_rate)
    y = _dense(self.mlp, "fc1", self.dtype)(self.layer_norm("ln2")(x))
    y = jax.nn.gelu(checkpoint_name(y, "mlp_h"), approximate=False)
    y = _dense(x.shape[-1], "fc2", self.dtype)(self.drop(y))
    x = self.add(x, self.drop(y), drop_rate)
    self.sow(INTERMEDIATES, "features", x)
    return x, None

  def layer_norm(self, name):
    # LN(x / a) with eps is LN(x) with a² eps.
    return nn.LayerNorm(1e-6 * self.branch**2, dtype=self.dtype, name=name)

  def drop(self, y):
    return nn.Dropout(self.dropout)(y, deterministic=not self.train)

  def add(self, x, y, rate):
    """Adds a branch; stochastic depth leaves it out for some images."""
    y = self.branch * y
    if rate is not None and self.train:
      keep = jax.random.bernoulli(
        self.make_rng("dropout"), 1 - rate, (x.shape[0], 1, 1)
      )
      y = y * jnp.where(keep, 1 / (1 - rate), 0).astype(y.dtype)
    return shard_batch(x + y)


class Blocks(nn.Module):
  """Equal blocks, one after the other; scanned ones lie under "blocks".

  `rates` are those of stochastic depth for each block; the other fields are
  Block's settings and those of layers/encoder.py.
  """

  depth: int
  settings: Mapping[str, int | float | str]
  rates: tuple[float, ...] | None = None
  remat: str = "none"
  scan: bool = True

  @nn.compact
  def __call__(
    self, x: Float[Array, "b n d"], *, train: bool
  ) -> Float[Array, "b n d"]:
    block = Block
    if self.remat != "none":
      block = nn.remat(
        Block, policy=REMAT[self.remat], prevent_cse=not self.scan
      )
    rates = None if self.rates is None else jnp.asarray(self.rates)
    if self.scan:
      x, _ = nn.scan(
        block,
        variable_axes={"params": 0, "batch_stats": 0, INTERMEDIATES: 0},
        split_rngs={"params": True, "dropout": True},
        length=self.depth,
      )(**self.settings, train=train, name=SCANNED)(x, rates)
      return x
    for i in range(self.depth):
      rate = None if rates is None else rates[i]
      name = f"{SCANNED}_{i}"
      x, _ = block(**self.settings, train=train, name=name)(x, rate)
    return x


class DeepViT(nn.Module):
  """Deep Vision Transformer with re-attention.

  Attributes:
    variant: a row of VARIANTS; "16B/8" changes the patch size.
    num_classes: outputs of the head; None or 0: no head, no logits.
    sizes: replaces entries of the variant's row, as in dict(depth=6, mixing=3).
    dropout: see Block.
    stochastic_depth: rate at which the last block's branches are left out; it
      grows linearly from 0 at the first block.
    dtype: of the activations; attention maps are float32 in any case.
    attention: backend of the blocks that do not mix heads.
    remat, scan: see layers/encoder.py.
  """

  variant: str = "S"
  num_classes: int | None = None
  sizes: Mapping[str, int] | None = None
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
    self, image: Float[Array, "b h w c"], *, train: bool
  ) -> dict[str, Array]:
    """Reads images, already normalised.

    Returns:
      logits float32 [B,C]; pooled [B,D], the class token behind the last
      LayerNorm; tokens [B,N,D], the patches' in raster order.
    """
    size = variants.sizes(self.variant, VARIANTS, self.sizes)
    self.check(size)
    x = Embed(
      size["width"], size["patch"], bool(size["stem"]), self.dtype, name="embed"
    )(image, train=train)
    x = self.add_positions(rearrange(x, "b h w d -> b (h w) d"))
    x = nn.Dropout(self.dropout)(x, deterministic=not train)
    x = shard_batch(x)
    plain = size["depth"] - size["mixing"]
    for name, depth, first in (
      ("plain", plain, 0),
      ("mixing", size["mixing"], plain),
    ):
      if depth:
        x = self.blocks(name, depth, first, size)(x, train=train)
    x = nn.LayerNorm(1e-6, dtype=self.dtype, name="norm")(x)
    outputs = {"pooled": x[:, 0], "tokens": x[:, 1:]}
    if self.num_classes:
      outputs["logits"] = nn.Dense(
        self.num_classes, kernel_init=_INIT, dtype=jnp.float32, name="head"
      )(x[:, 0])
    return outputs

  def check(self, size):
    if not 0 <= size["mixing"] <= size["depth"]:
      raise ValueError(
        f"{size['mixing']} of {size['depth']} blocks cannot mix heads."
      )
    if size["width"] % size["heads"]:
      raise ValueError(
        f"A width of {size['width']} does not divide into {size['heads']} "
        "heads."
      )
    if self.remat not in REMAT:
      raise ValueError(f"remat is {self.remat!r}; it is one of {list(REMAT)}.")
    if not 0 <= self.stochastic_depth < 1:
      raise ValueError(
        f"stochastic_depth is {self.stochastic_depth}; it is a rate in [0, 1)."
      )

  def add_positions(self, x):
    """Puts a class token in front and adds the learned table."""
    batch, _, width = x.shape
    cls = self.param("cls", _INIT, (1, 1, width)).astype(x.dtype)
    x = jnp.concatenate([jnp.broadcast_to(cls, (batch, 1, width)), x], 1)
    table = self.param("pos_embed", _INIT, (1, *x.shape[1:]))
    return x + table.astype(x.dtype)

  def blocks(self, name, depth, first, size):
    rates = None
    if self.stochastic_depth:
      step = self.stochastic_depth / max(size["depth"] - 1, 1)
      rates = tuple(step * i for i in range(first, first + depth))
    settings = flax.core.FrozenDict(
      heads=size["heads"],
      mlp=size["mlp"],
      branch=size["branch"],
      mixing=name == "mixing",
      scale_maps=bool(size["scale_maps"]),
      dropout=self.dropout,
      dtype=self.dtype,
      attention=self.attention,
    )
    return Blocks(depth, settings, rates, self.remat, self.scan, name=name)


Model = DeepViT
