"""The text tower: a Transformer without a causal mask over the tokens of texts.

Papers: Zhai et al., "Sigmoid Loss" (SigLIP, arXiv 2303.15343) and Dehghani et
al., "Patch n' Pack" (arXiv 2307.06304), which packs captions as it packs images
and changes the text tower as it does the image tower: bias=False,
qk_norm="layer", pool="map".
Reference: google-research/big_vision @ 0127fb6, `text_transformer.py`.
Parameters without a projection, 64 tokens: B with a vocabulary of 32,000
109,681,152, L 335,144,960, So400m 448,406,640.
Deviations: none known.
"""

from collections.abc import Mapping

import flax
import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from big_vision_like.models.layers.blocks import BlockConfig
from big_vision_like.models.layers.encoder import Encoder
from big_vision_like.models.layers.pooling import AttentionPool

VARIANTS = {
  "local": dict(width=96, depth=2, mlp=384, heads=3),
  "Ti": dict(width=192, depth=12, mlp=768, heads=3),
  "S": dict(width=384, depth=12, mlp=1536, heads=6),
  "B": dict(width=768, depth=12, mlp=3072, heads=12),
  "L": dict(width=1024, depth=24, mlp=4096, heads=16),
  "So400m": dict(width=1152, depth=27, mlp=4304, heads=16),
}
POOLS = ("last", "map")


def row(variant: str, changes: Mapping[str, int] | None = None):
  """The sizes of a variant, with `changes`.

  Raises:
    ValueError: if there is no such variant, or `changes` has other keys.
  """
  if variant not in VARIANTS:
    raise ValueError(
      f"Unknown variant {variant!r} of a text tower. The sizes are "
      f"{', '.join(VARIANTS)}."
    )
  unknown = set(changes or ()) - set(VARIANTS[variant])
  if unknown:
    raise ValueError(
      f"sizes has no {sorted(unknown)}; it may change "
      f"{sorted(VARIANTS[variant])}."
    )
  return VARIANTS[variant] | dict(changes or {})


class TextTransformer(nn.Module):
  """Text tower, of one text a row or of packed rows.

  Attributes:
    variant: a row of VARIANTS.
    vocab_size: tokens that there are, those of the tokenizer.
    length: positions in the table: the most tokens of a text.
    sizes: replaces entries of the variant's row, as in dict(depth=6).
    pool: "last", the text's last token, or "map", attention pooling.
    bias: biases in attention and LayerNorms.
    qk_norm, gelu, ln_eps, dropout, dtype, attention: see layers/blocks.py.
    stochastic_depth, remat, scan: see layers/encoder.py.
  """

  variant: str = "B"
  vocab_size: int = 32_000
  length: int = 64
  sizes: Mapping[str, int] | None = None
  pool: str = "last"
  bias: bool = True
  qk_norm: str | None = None
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
    text: Int[Array, "b l"],
    *,
    segment_ids: Int[Array, "b l"] | None = None,
    positions: Int[Array, "b l"] | None = None,
    slots: int = 1,
    train: bool,
  ) -> dict[str, Array]:
    """Reads tokens, see api.py.

    One text a row: all tokens are read, those that fill up a text too, as
    SigLIP does. Packed: each of the texts 1..slots sees itself only.

    Returns:
      pooled [B,D], or packed [B,M,D], 0 in slots without a text; tokens
      [B,L,D] after the last LayerNorm.
    """
    if self.pool not in POOLS:
      raise ValueError(f"pool is {self.pool!r}; it is one of {POOLS}.")
    size = row(self.variant, self.sizes)
    config = self.block_config(size)
    x = self.embed(text, positions, size["width"])
    x = nn.Dropout(self.dropout)(x, deterministic=not train)
    x = Encoder(
      size["depth"],
      config,
      self.stochastic_depth,
      self.remat,
      self.scan,
      name="encoder",
    )(x, train=train, segment_ids=segment_ids, max_segments=slots)
    if self.pool == "map":
      pooled = AttentionPool(config, name="pool")(
        x, train=train, segment_ids=segment_ids, slots=slots
      )
    elif segment_ids is None:
      pooled = x[:, -1:]
    else:
      pooled = last_tokens(x, segment_ids, slots)
    if segment_ids is None:
      pooled = pooled[:, 0]
    return {"pooled": pooled, "tokens": x}

  def block_config(self, size):
    return BlockConfig(
      heads=size["heads"],
      mlp=size["mlp"],
      qk_norm=self.qk_norm,
      attention_bias=self.bias,
      norm_bias=self.bias,
      ln_eps=self.ln_eps,
      gelu=self.gelu,
      dropout=self.dropout,
      dtype=self.dtype,
      attention=self.attention,
    )

  def embed(self, text, positions, width):
    """Token and position embeddings [B,L,D]; an id that is none gives NaN."""
    init = nn.initializers.normal(width**-0.5)
    tokens = self.param("embedding", init, (self.vocab_size, width))
    table = self.param("pos_embed", init, (self.length, width))
    if positions is not None:
      x = jnp.take(table, positions, axis=0)
    elif text.shape[1] > self.length:
      raise ValueError(
        f"Texts of {text.shape[1]} tokens, but the text tower has positions "
        f"for {self.length}: set its `length`, or data.text.length."
      )
    else:
      x = table[: text.shape[1]]
    return (jnp.take(tokens, text, axis=0) + x).astype(self.dtype)


def last_tokens(
  tokens: Float[Array, "b l d"], segment_ids: Int[Array, "b l"], slots: int
) -> Float[Array, "b {slots} d"]:
  """The last token of each of the segments 1..slots; 0 where it has none."""
  slot_ids = jnp.arange(1, slots + 1, dtype=segment_ids.dtype)
  own = segment_ids[:, None, :] == slot_ids[:, None]
  index = jnp.where(own, jnp.arange(own.shape[-1]), -1).max(-1)
  last = jnp.take_along_axis(tokens, jnp.maximum(index, 0)[..., None], axis=1)
  return jnp.where((index >= 0)[..., None], last, 0)


Model = TextTransformer
