"""One vector for each image, of single images or of packed rows."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from big_vision_like.models.layers.blocks import (
  MLP,
  BlockConfig,
  MultiHeadAttention,
)


class AttentionPool(nn.Module):
  """The MAP head of Zhai et al. (arXiv 2106.04560): a learned probe attends.

  y = MSA(probe, tokens), then y + MLP(LN(y)). In packed rows each slot's probe
  sees the tokens of its own image only.

  Attributes:
    config: of the attention and the MLP; backends that are for self-attention
      only give way to "auto".
    mlp: False leaves y as it is.
  """

  config: BlockConfig
  mlp: bool = True

  @nn.compact
  def __call__(
    self,
    tokens: Float[Array, "b l d"],
    *,
    train: bool,
    segment_ids: Int[Array, "b l"] | None = None,
    slots: int = 1,
  ) -> Float[Array, "b {slots} d"]:
    """Pools the images 1..slots of each row; slots without tokens get 0."""
    batch, _, width = tokens.shape
    config = self.config
    if config.attention not in ("xla", "blockwise"):
      config = dataclasses.replace(config, attention="auto")
    probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, width))
    probe = probe.astype(tokens.dtype)
    slot_ids = None
    if segment_ids is not None:
      slot_ids = jnp.arange(1, slots + 1, dtype=segment_ids.dtype)
      slot_ids = jnp.broadcast_to(slot_ids, (batch, slots))
    y = MultiHeadAttention(config, name="attn")(
      jnp.broadcast_to(probe, (batch, slots, width)),
      tokens,
      segment_ids=slot_ids,
      kv_segment_ids=segment_ids,
    )
    if self.mlp:
      norm = config.layer_norm("ln")
      y = y + MLP(config, name="mlp")(norm(y), train=train)
    if segment_ids is None:
      return y
    used = (slot_ids[:, :, None] == segment_ids[:, None, :]).any(-1)
    return jnp.where(used[..., None], y, 0)


def mean_pool(
  tokens: Float[Array, "b l d"], segment_ids: Int[Array, "b l"], slots: int
) -> Float[Array, "b {slots} d"]:
  """The mean of each slot's tokens, summed in float32; 0 where it has none."""
  slot_ids = jnp.arange(1, slots + 1, dtype=segment_ids.dtype)
  own = segment_ids[:, None, :] == slot_ids[:, None]
  count = jnp.maximum(own.sum(-1, keepdims=True), 1)
  total = jnp.einsum(
    "bml,bld->bmd",
    own.astype(tokens.dtype),
    tokens,
    preferred_element_type=jnp.promote_types(tokens.dtype, jnp.float32),
    precision="highest",
  )
  return (total / count).astype(tokens.dtype)
