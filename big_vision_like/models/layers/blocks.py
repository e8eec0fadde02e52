"""The parts of a pre-norm Transformer: attention over heads, MLP, block."""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from big_vision_like import api
from big_vision_like.models.layers.attention import (
  attention,
  attention_weights,
  batch_axes,
)

GELUS = ("tanh", "exact")
QK_NORMS = (None, "layer", "rms")


@dataclasses.dataclass(frozen=True)
class BlockConfig:
  """What a block is made of. The defaults are ViT's, as Google's code has it.

  Attributes:
    heads: attention heads; they share the width equally.
    mlp: hidden width of the MLP.
    qk_norm: normalise queries and keys over each head's features: "layer", a
      LayerNorm without bias (ViT-22B, arXiv 2302.05442), or "rms". One scale
      for all heads. The factor 1/sqrt(features) stays.
    attention_bias: biases in the four projections of attention.
    mlp_bias: biases in the MLP.
    norm_bias: biases in the LayerNorms.
    ln_eps: the constant in all normalisations.
    gelu: "tanh" as Google's code computes it, "exact" as timm and torch do.
    dropout: after every dense layer but those of queries, keys and values.
    dtype: of activations and products; parameters are float32.
    attention: the attention backend, see attention.py.
  """

  heads: int
  mlp: int
  qk_norm: str | None = None
  attention_bias: bool = True
  mlp_bias: bool = True
  norm_bias: bool = True
  ln_eps: float = 1e-6
  gelu: str = "tanh"
  dropout: float = 0.0
  dtype: str = "float32"
  attention: str = "auto"

  def __post_init__(self):
    if self.gelu not in GELUS:
      raise ValueError(f"gelu is {self.gelu!r}; it is one of {GELUS}.")
    if self.qk_norm not in QK_NORMS:
      raise ValueError(f"qk_norm is {self.qk_norm!r}; it is one of {QK_NORMS}.")

  def layer_norm(self, name: str) -> nn.LayerNorm:
    """A normalisation of the width."""
    return nn.LayerNorm(
      self.ln_eps, use_bias=self.norm_bias, dtype=self.dtype, name=name
    )

  def head_norm(self, name: str) -> nn.Module:
    """A normalisation of each head's queries or keys."""
    if self.qk_norm == "rms":
      return nn.RMSNorm(self.ln_eps, dtype=self.dtype, name=name)
    return nn.LayerNorm(
      self.ln_eps, use_bias=False, dtype=self.dtype, name=name
    )


def shard_batch(x: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
  """Keeps activations split over the batch axes of the mesh, if one is set.

  Without it the compiler may leave sharded weights where they are and gather
  the batch on every device instead.
  """
  batch = batch_axes(x.shape[0])
  return jax.lax.with_sharding_constraint(x, P(batch)) if batch else x


def lend_maps(
  module: nn.Module,
  q: Float[Array, "b l k d"],
  k: Float[Array, "b s k d"],
  *,
  segment_ids: Int[Array, "b l"] | None = None,
  mask: Bool[Array, "#b #k #l #s"] | None = None,
) -> None:
  """Sows the weights of `attention`, see capture.py; computes none unasked."""
  if not module.is_mutable_collection(api.INTERMEDIATES):
    return
  weights = attention_weights(q, k, segment_ids=segment_ids, mask=mask)
  module.sow(api.INTERMEDIATES, "maps", weights)
  if segment_ids is not None:
    module.sow(api.INTERMEDIATES, "segment_ids", segment_ids)


def tokens_dot_general(
  x: Float[Array, "..."],
  w: Float[Array, "..."],
  dimension_numbers: tuple,
  precision: Any = None,
  preferred_element_type: Any = None,
) -> Float[Array, "..."]:
  """x's last axes times w's first ones, as a product of two matrices.

  The same as `lax.dot_general`, for flax's dense layers. Over all tokens as
  one axis, the gradient of w needs no transposed copy of the activations,
  which XLA otherwise makes on a CPU.
  """
  n = len(dimension_numbers[0][0])
  tokens, features = x.shape[:-n], w.shape[n:]
  y = jax.lax.dot(
    x.reshape(-1, math.prod(x.shape[-n:])),
    w.reshape(math.prod(w.shape[:n]), -1),
    precision=precision,
    preferred_element_type=preferred_element_type,
  )
  return y.reshape(*tokens, *features)


class MultiHeadAttention(nn.Module):
  """Self-attention of `x`, or attention of `x` to the tokens `kv`."""

  config: BlockConfig

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b l d"],
    kv: Float[Array, "b s d"] | None = None,
    *,
    segment_ids: Int[Array, "b l"] | None = None,
    kv_segment_ids: Int[Array, "b s"] | None = None,
    mask: Bool[Array, "#b #k #l #s"] | None = None,
    max_segments: int | None = None,
  ) -> Float[Array, "b l d"]:
    width, heads = x.shape[-1], self.config.heads
    attends_to_itself = kv is None
    if width % heads:
      raise ValueError(
        f"A width of {width} does not divide into {heads} heads."
      )
    kv = x if kv is None else kv
    features = (heads, width // heads)
    q, k, v = (
      checkpoint_name(self.dense(features, name)(tokens), "qkv")
      for name, tokens in (("query", x), ("key", kv), ("value", kv))
    )
    if self.config.qk_norm:
      q = self.config.head_norm("query_ln")(q)
      k = self.config.head_norm("key_ln")(k)
    if attends_to_itself:
      lend_maps(self, q, k, segment_ids=segment_ids, mask=mask)
    out = attention(
      q,
      k,
      v,
      segment_ids=segment_ids,
      kv_segment_ids=kv_segment_ids,
      mask=mask,
      backend=self.config.attention,
      max_segments=max_segments,
    )
    return self.dense(width, "out", axis=(-2, -1))(out)

  def dense(self, features, name, axis=-1):
    return nn.DenseGeneral(
      features,
      axis,
      use_bias=self.config.attention_bias,
      kernel_init=nn.initializers.xavier_uniform(),
      dtype=self.config.dtype,
      dot_general=tokens_dot_general,
      name=name,
    )


class MLP(nn.Module):
  """Two dense layers around a GELU."""

  config: BlockConfig

  @nn.compact
  def __call__(
    self, x: Float[Array, "*b d"], *, train: bool
  ) -> Float[Array, "*b d"]:
    def dense(features, name):
      return nn.Dense(
        features,
        use_bias=self.config.mlp_bias,
        kernel_init=nn.initializers.xavier_uniform(),
        bias_init=nn.initializers.normal(1e-6),
        dtype=self.config.dtype,
        dot_general=tokens_dot_general,
        name=name,
      )

    h = checkpoint_name(dense(self.config.mlp, "fc1")(x), "mlp_h")
    h = jax.nn.gelu(h, approximate=self.config.gelu == "tanh")
    h = nn.Dropout(self.config.dropout)(h, deterministic=not train)
    h = dense(x.shape[-1], "fc2")(h)
    return nn.Dropout(self.config.dropout)(h, deterministic=not train)


class Block(nn.Module):
  """x + MSA(LN(x)), then x + MLP(LN(x)) (ViT, equations 2 and 3).

  `train` and `max_segments` are fields, since scanned and rematerialised calls
  take arrays only.
  """

  config: BlockConfig
  train: bool
  max_segments: int | None = None

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b l d"],
    drop_rate: Float[Array, ""] | None = None,
    segment_ids: Int[Array, "b l"] | None = None,
    mask: Bool[Array, "#b #k #l #l"] | None = None,
  ) -> tuple[Float[Array, "b l d"], None]:
    y = MultiHeadAttention(self.config, name="attn")(
      self.config.layer_norm("ln1")(x),
      segment_ids=segment_ids,
      mask=mask,
      max_segments=self.max_segments,
    )
    y = nn.Dropout(self.config.dropout)(y, deterministic=not self.train)
    x = shard_batch(x + self.drop_branch(y, drop_rate, segment_ids))
    y = MLP(self.config, name="mlp")(
      self.config.layer_norm("ln2")(x), train=self.train
    )
    x = shard_batch(x + self.drop_branch(y, drop_rate, segment_ids))
    self.sow(api.INTERMEDIATES, "features", x)
    if segment_ids is not None:
      self.sow(api.INTERMEDIATES, "segment_ids", segment_ids)
    return x, None

  def drop_branch(self, y, rate, segment_ids):
    """Stochastic depth: leaves the branch out for some of the images."""
    if rate is None or not self.train:
      return y
    batch, length, _ = y.shape
    images = 1 if segment_ids is None else length + 1
    key = self.make_rng("dropout")
    keep = jax.random.bernoulli(key, 1 - rate, (batch, images))
    if segment_ids is not None:
      keep = jnp.take_along_axis(keep, segment_ids, 1)
    scale = jnp.where(keep, 1 / (1 - rate), 0)
    return y * scale[..., None].astype(y.dtype)
