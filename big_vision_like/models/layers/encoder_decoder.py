"""The encoder-decoder Transformer of DETR (arXiv 2005.12872, section A.3).

Positions are added in every layer, to queries and keys and not to values.
Reference: facebookresearch/detr @ 29901c5, `models/transformer.py`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from big_vision_like.api import INTERMEDIATES, SCANNED
from big_vision_like.models.layers.attention import attention, attention_weights
from big_vision_like.models.layers.blocks import (
  lend_maps,
  shard_batch,
  tokens_dot_general,
)
from big_vision_like.models.layers.encoder import REMAT

# torch keeps query, key and value in one matrix, and so draws them as one.
_PACKED_XAVIER = nn.initializers.variance_scaling(0.5, "fan_avg", "uniform")
_XAVIER = nn.initializers.xavier_uniform()


def uniform_bias(
  fan_in: int,
) -> Callable[..., Array]:
  """torch's default for biases: U(-1, 1) / sqrt(fan in)."""

  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -1.0, 1.0) * fan_in**-0.5

  return init


@dataclasses.dataclass(frozen=True)
class LayerConfig:
  """What a layer is made of.

  Attributes:
    heads: attention heads; they share the width equally.
    mlp: hidden width of the FFN.
    pre_norm: normalise what enters a branch, and the end of a stack, instead
      of each sum.
    dropout: behind attention, and inside and behind the FFN.
    attention_dropout: of attention's weights. In training it needs them all,
      so that `attention` has no choice.
    dtype: of activations and products; parameters are float32.
    attention: the encoder's backend, see attention.py.
  """

  heads: int
  mlp: int
  pre_norm: bool = False
  dropout: float = 0.1
  attention_dropout: float = 0.1
  dtype: str = "float32"
  attention: str = "auto"

  def layer_norm(self, name: str) -> nn.LayerNorm:
    """A normalisation of the width."""
    return nn.LayerNorm(1e-5, dtype=self.dtype, name=name)


class Attention(nn.Module):
  """Attention over heads whose keys are not what its values are.

  Attributes:
    config: of the layer.
    train: whether to drop weights.
    backend: see attention.py.
  """

  config: LayerConfig
  train: bool
  backend: str = "xla"

  @nn.compact
  def __call__(
    self,
    query: Float[Array, "b l d"],
    key: Float[Array, "b s d"],
    value: Float[Array, "b s d"],
    mask: Bool[Array, "b s"] | None = None,
  ) -> Float[Array, "b l d"]:
    """Reads the values whose `mask` is True; where none is, the bias is left.

    With another backend than "xla", what is not True reads its likes.
    """
    width, heads = query.shape[-1], self.config.heads
    if width % heads:
      raise ValueError(
        f"A width of {width} does not divide into {heads} heads."
      )
    features = (heads, width // heads)
    q, k, v = (
      checkpoint_name(self.dense(features, name, _PACKED_XAVIER)(x), "qkv")
      for name, x in (("query", query), ("key", key), ("value", value))
    )
    seen = None if mask is None else mask[:, None, None, :]
    lend_maps(self, q, k, mask=seen)
    if self.train and self.config.attention_dropout:
      out = self.dropped(q, k, v, seen)
    elif self.backend == "xla" or mask is None:
      out = attention(q, k, v, mask=seen, backend=self.backend)
    else:
      ids = mask.astype(jnp.int32)
      out = attention(
        q, k, v, segment_ids=ids, backend=self.backend, max_segments=1
      )
    return self.dense(width, "out", _XAVIER, axis=(-2, -1))(out)

  def dropped(self, q, k, v, mask):
    weights = attention_weights(q, k, mask=mask)
    rate = self.config.attention_dropout
    weights = nn.Dropout(rate)(weights, deterministic=False)
    out = jnp.einsum(
      "bkls,bskd->blkd",
      weights.astype(v.dtype),
      v,
      preferred_element_type=weights.dtype,
    )
    return checkpoint_name(out.astype(v.dtype), "attn_out")

  def dense(self, features, name, init, axis=-1):
    return nn.DenseGeneral(
      features,
      axis,
      kernel_init=init,
      dtype=self.config.dtype,
      dot_general=tokens_dot_general,
      name=name,
    )


class FFN(nn.Module):
  """Two dense layers around a ReLU."""

  config: LayerConfig
  train: bool

  @nn.compact
  def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
    h = checkpoint_name(self.dense(self.config.mlp, "fc1", x), "mlp_h")
    drop = nn.Dropout(self.config.dropout, deterministic=not self.train)
    return self.dense(x.shape[-1], "fc2", drop(jax.nn.relu(h)))

  def dense(self, features, name, x):
    return nn.Dense(
      features,
      kernel_init=_XAVIER,
      bias_init=uniform_bias(x.shape[-1]),
      dtype=self.config.dtype,
      dot_general=tokens_dot_general,
      name=name,
    )(x)


class _Layer(nn.Module):
  """What both kinds of layer have. `train` is a field, since scanned and
  rematerialised calls take arrays only."""

  config: LayerConfig
  train: bool

  def add(self, norm, x, branch):
    """The sum with a branch, and the LayerNorm before it or behind it."""
    norm = self.config.layer_norm(norm)
    drop = nn.Dropout(self.config.dropout, deterministic=not self.train)
    if self.config.pre_norm:
      return shard_batch(x + drop(branch(norm(x))))
    return shard_batch(norm(x + drop(branch(x))))


class EncoderLayer(_Layer):
  """Self-attention and FFN over the tokens of an image."""

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b n d"],
    position: Float[Array, "#b n d"],
    mask: Bool[Array, "b n"] | None,
  ) -> tuple[Float[Array, "b n d"], None]:
    backend = self.config.attention
    attend = Attention(self.config, self.train, backend, name="attn")

    def attention_of(x):
      return attend(x + position, x + position, x, mask)

    x = self.add("ln1", x, attention_of)
    x = self.add("ln2", x, FFN(self.config, self.train, name="mlp"))
    self.sow(INTERMEDIATES, "features", x)
    return x, None


class DecoderLayer(_Layer):
  """Attention among the queries, theirs to the image's tokens, and FFN.

  Both attentions have few queries, so all their weights are at hand.
  """

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b q d"],
    query_position: Float[Array, "q d"],
    key: Float[Array, "b n d"],
    memory: Float[Array, "b n d"],
    mask: Bool[Array, "b n"] | None,
  ) -> tuple[Float[Array, "b q d"], Float[Array, "b q d"]]:
    among = Attention(self.config, self.train, name="self_attn")
    across = Attention(self.config, self.train, name="cross_attn")

    def attention_of(x):
      return among(x + query_position, x + query_position, x)

    def reading_of(x):
      return across(x + query_position, key, memory, mask)

    x = self.add("ln1", x, attention_of)
    x = self.add("ln2", x, reading_of)
    x = self.add("ln3", x, FFN(self.config, self.train, name="mlp"))
    self.sow(INTERMEDIATES, "features", x)
    return x, x


class _Stack(nn.Module):
  """Attributes: those of `Encoder` and `Decoder`."""

  depth: int
  config: LayerConfig
  remat: str = "none"
  scan: bool = True

  def run(self, layer: type[nn.Module], train: bool, x: Array, *args: Any):
    """The last layer's output, and what each puts out besides, stacked."""
    if self.remat not in REMAT:
      raise ValueError(f"remat is {self.remat!r}; it is one of {list(REMAT)}.")
    if self.remat != "none":
      # A scan's body cannot be merged with its own recomputation anyway.
      policy = REMAT[self.remat]
      layer = nn.remat(layer, policy=policy, prevent_cse=not self.scan)
    x, settings = shard_batch(x), dict(config=self.config, train=train)
    if self.scan:
      return nn.scan(
        layer,
        variable_axes={"params": 0, INTERMEDIATES: 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(nn.broadcast,) * len(args),
        length=self.depth,
      )(**settings, name=SCANNED)(x, *args)
    each = []
    for i in range(self.depth):
      x, y = layer(**settings, name=f"{SCANNED}_{i}")(x, *args)
      each.append(y)
    return x, jax.tree.map(lambda *y: jnp.stack(y), *each)


class Encoder(_Stack):
  """`depth` layers over the tokens of an image, and a LayerNorm if `pre_norm`.

  Parameters lie as those of layers/encoder.py.

  Attributes:
    depth: number of layers; 0 leaves the tokens as they are.
    config: what they are made of.
    remat, scan: see layers/encoder.py.
  """

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b n d"],
    position: Float[Array, "#b n d"],
    mask: Bool[Array, "b n"] | None = None,
    *,
    train: bool,
  ) -> Float[Array, "b n d"]:
    """What padding, False in `mask`, becomes means nothing."""
    if self.depth:
      x, _ = self.run(EncoderLayer, train, x, position, mask)
    return self.config.layer_norm("norm")(x) if self.config.pre_norm else x


class Decoder(_Stack):
  """`depth` layers over the queries, which start at 0.

  One LayerNorm makes each layer's output its prediction; the next layer goes on
  from what is not normalised.

  Attributes: as those of `Encoder`; at least one layer.
  """

  @nn.compact
  def __call__(
    self,
    query_position: Float[Array, "q d"],
    memory: Float[Array, "b n d"],
    position: Float[Array, "#b n d"],
    mask: Bool[Array, "b n"] | None = None,
    *,
    train: bool,
  ) -> Float[Array, "layers b q d"]:
    x = jnp.zeros((memory.shape[0], *query_position.shape), memory.dtype)
    key = memory + position
    _, each = self.run(
      DecoderLayer, train, x, query_position, key, memory, mask
    )
    return self.config.layer_norm("norm")(each)
