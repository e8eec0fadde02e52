"""The parts of a pre-norm Transformer: attention over heads, MLP, block."""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from big_vision_like import api
from big_vision_like.models.layers import memory as memories
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
  """Self-attention of `x`, or attention of `x` to the tokens `kv`.

  With `memory`, of one block and normalised, self-attention as layers/memory.py
  has it: the result is what `x` reads, what each class token of a task reads,
  and the keys and values of the cells. It takes no mask besides.
  """

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
    memory: memories.Memory | None = None,
  ) -> Float[Array, "b l d"] | tuple[Float[Array, "b l d"], dict, dict]:
    width, heads = x.shape[-1], self.config.heads
    attends_to_itself = kv is None
    if width % heads:
      raise ValueError(
        f"A width of {width} does not divide into {heads} heads."
      )
    kv = x if kv is None else kv
    features = (heads, width // heads)
    layers = {k: self.dense(features, k) for k in ("query", "key", "value")}
    norms = {}
    if self.config.qk_norm:
      norms = {k: self.config.head_norm(f"{k}_ln") for k in ("query", "key")}

    def project(name, tokens):
      y = checkpoint_name(layers[name](tokens), "qkv")
      return norms[name](y) if name in norms else y

    q, k, v = project("query", x), project("key", kv), project("value", kv)
    if attends_to_itself:
      lend_maps(self, q, k, segment_ids=segment_ids, mask=mask)
    attend = functools.partial(attention, max_segments=max_segments)
    project_out = self.dense(width, "out", axis=(-2, -1))
    if memory is None:
      return project_out(
        attend(
          q,
          k,
          v,
          segment_ids=segment_ids,
          kv_segment_ids=kv_segment_ids,
          mask=mask,
          backend=self.config.attention,
        )
      )
    out, of_tasks, folded = memories.attend(
      project,
      attend,
      memories.Keys(k, v, segment_ids),
      q,
      memory,
      backend=self.config.attention,
      slots=None if segment_ids is None else max_segments,
    )
    of_tasks = {name: project_out(y) for name, y in of_tasks.items()}
    return project_out(out), of_tasks, folded

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

  With `memory`, of this block, `x` is a pair: the tokens, and by task a class
  token that goes through the block beside them; the keys and values of the
  cells are returned too. `train` and `max_segments` are fields, since scanned
  and rematerialised calls take arrays only.
  """

  config: BlockConfig
  train: bool
  max_segments: int | None = None

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b l d"] | tuple[Float[Array, "b l d"], dict],
    drop_rate: Float[Array, ""] | None = None,
    segment_ids: Int[Array, "b l"] | None = None,
    mask: Bool[Array, "#b #k #l #l"] | None = None,
    memory: memories.Memory | None = None,
  ) -> tuple[Float[Array, "b l d"] | tuple[Float[Array, "b l d"], dict], Any]:
    ln1, ln2 = (self.config.layer_norm(name) for name in ("ln1", "ln2"))
    mlp = MLP(self.config, name="mlp")
    attend = functools.partial(
      MultiHeadAttention(self.config, name="attn"),
      segment_ids=segment_ids,
      mask=mask,
      max_segments=self.max_segments,
    )

    def add_branches(x, y):
      y = nn.Dropout(self.config.dropout)(y, deterministic=not self.train)
      x = shard_batch(x + self.drop_branch(y, drop_rate, segment_ids))
      y = mlp(ln2(x), train=self.train)
      return shard_batch(x + self.drop_branch(y, drop_rate, segment_ids))

    if memory is None:
      x = add_branches(x, attend(ln1(x)))
      self.lend(x, segment_ids)
      return x, None
    x, tokens = x
    y, of_tasks, folded = attend(ln1(x), memory=memory.normalised(ln1, tokens))
    tokens = {k: add_branches(t, of_tasks[k]) for k, t in tokens.items()}
    x = add_branches(x, y)
    self.lend(x, segment_ids)
    return (x, tokens), folded

  def lend(self, x, segment_ids):
    """Sows the block's features, see capture.py."""
    self.sow(api.INTERMEDIATES, "features", x)
    if segment_ids is not None:
      self.sow(api.INTERMEDIATES, "segment_ids", segment_ids)

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
