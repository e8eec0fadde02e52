"""EfficientViT: few attention layers, whose heads feed each other.

Paper: Liu et al., arXiv 2305.07027 (the EfficientViT of MSRA; MIT's, of linear
attention, is another model).
Reference: microsoft/Cream @ 4a13c40, folder EfficientViT.
Parameters, with 1,000 classes at 224 pixels, and after `fuse`:
  M0  2,349,436   2,334,916    M3   6,900,722   6,875,890
  M1  2,980,560   2,964,256    M4   8,804,228   8,776,340
  M2  4,187,554   4,168,338    M5  12,473,772  12,436,260
Deviations:
  - Any image size: the reference takes the one that it was built for. The
    windows are those of the images that the model is initialised on.
  - The biases of squeeze-and-excitation start at 0, not random.
"""

import math
from collections.abc import Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

from big_vision_like.api import INTERMEDIATES
from big_vision_like.models.layers import convolution
from big_vision_like.models.layers.convolution import BatchNorm, Conv, ConvBN

# Three stages; `kernels` are those of the convolutions on the queries, by head.
VARIANTS = {
  "local": dict(
    widths=(48, 64, 96), depths=(1, 1, 2), heads=(3, 4, 4), kernels=(5, 5, 3, 3)
  ),
  "M0": dict(
    widths=(64, 128, 192),
    depths=(1, 2, 3),
    heads=(4, 4, 4),
    kernels=(5, 5, 5, 5),
  ),
  "M1": dict(
    widths=(128, 144, 192),
    depths=(1, 2, 3),
    heads=(2, 3, 3),
    kernels=(7, 5, 3, 3),
  ),
  "M2": dict(
    widths=(128, 192, 224),
    depths=(1, 2, 3),
    heads=(4, 3, 2),
    kernels=(7, 5, 3, 3),
  ),
  "M3": dict(
    widths=(128, 240, 320),
    depths=(1, 2, 3),
    heads=(4, 3, 4),
    kernels=(5, 5, 5, 5),
  ),
  "M4": dict(
    widths=(128, 256, 384),
    depths=(1, 2, 3),
    heads=(4, 4, 4),
    kernels=(7, 5, 3, 3),
  ),
  "M5": dict(
    widths=(192, 288, 384),
    depths=(1, 3, 4),
    heads=(3, 3, 4),
    kernels=(7, 5, 3, 3),
  ),
}
IMAGE_SIZE = 224
KEY_WIDTH = 16
WINDOW = 7


class FFN(nn.Module):
  """A hidden layer of twice the width with ReLU, on each pixel."""

  fused: bool = False
  dtype: str = "float32"

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w c"], *, train: bool
  ) -> Float[Array, "b h w c"]:
    width, kw = x.shape[-1], dict(fused=self.fused, dtype=self.dtype)
    x = ConvBN(2 * width, name="pw1", **kw)(x, train=train)
    x = nn.relu(x)
    # Zero: this residual branch starts as nothing, as others below do.
    zeros = nn.initializers.zeros
    return ConvBN(width, scale_init=zeros, name="pw2", **kw)(x, train=train)


class PatchMerging(nn.Module):
  """An inverted residual without residual: half the sides, a new width."""

  features: int
  fused: bool = False
  dtype: str = "float32"

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w c"], *, train: bool
  ) -> Float[Array, "b oh ow d"]:
    hidden, kw = 4 * x.shape[-1], dict(fused=self.fused, dtype=self.dtype)
    x = nn.relu(ConvBN(hidden, name="conv1", **kw)(x, train=train))
    x = ConvBN(hidden, 3, 2, groups=hidden, name="conv2", **kw)(x, train=train)
    x = nn.relu(x)
    y = x.mean((1, 2), keepdims=True)
    # A quarter, to the nearest multiple of 8.
    squeezed = max(8, (hidden // 4 + 4) // 8 * 8)
    y = nn.relu(Conv(squeezed, dtype=self.dtype, name="squeeze")(y))
    y = Conv(hidden, dtype=self.dtype, name="excite")(y)
    x = x * nn.sigmoid(y)
    return ConvBN(self.features, name="conv3", **kw)(x, train=train)


def offsets(side: int) -> Int[np.ndarray, "n n"]:
  """Where in the table the bias between two pixels of a window stands.

  It depends on the distances along both axes: entry |dy| side + |dx|.
  """
  y, x = np.divmod(np.arange(side**2), side)
  return np.abs(y[:, None] - y) * side + np.abs(x[:, None] - x)


class CascadedGroupAttention(nn.Module):
  """Each head reads its share of the channels plus the last head's output.

  Attention is over the pixels of a window of at most 7 x 7, with a learned bias
  by distance. A map that is no whole number of windows is padded with zeros
  below and on the right, which attend and are attended to like any pixel. The
  table of biases tells the side of the windows, so that a trained model keeps
  its windows on other images.

  Attributes:
    heads: shares of the channels; their values are as wide as they are.
    kernels: sides of the depthwise convolutions on the queries, by head.
    fused, dtype: see ConvBN.
  """

  heads: int
  kernels: tuple[int, ...]
  fused: bool = False
  dtype: str = "float32"

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w c"], *, train: bool
  ) -> Float[Array, "b h w c"]:
    height, width = x.shape[1:3]
    side = min(WINDOW, height, width)
    if self.has_variable("params", "attention_biases"):
      table = self.get_variable("params", "attention_biases")
      side = math.isqrt(table.shape[1])
    if height == width == side:
      return self.within_windows(x, train)
    below, right = -height % side, -width % side
    x = jnp.pad(x, ((0, 0), (0, below), (0, right), (0, 0)))
    rows, columns = (height + below) // side, (width + right) // side
    x = rearrange(x, "b (y r) (x s) c -> (b y x) r s c", r=side, s=side)
    x = self.within_windows(x, train)
    x = rearrange(x, "(b y x) r s c -> b (y r) (x s) c", y=rows, x=columns)
    return x[:, :height, :width]

  def within_windows(self, x, train):
    """[B,r,r,C] to the same; the queries' convolutions end at the edges."""
    side, width = x.shape[2:]
    kw = dict(fused=self.fused, dtype=self.dtype)
    zeros = nn.initializers.zeros
    table = self.param("attention_biases", zeros, (self.heads, side**2))
    bias = table[:, offsets(side)]
    outputs, y = [], 0
    for i, share in enumerate(jnp.split(x, self.heads, -1)):
      qkv = ConvBN(2 * KEY_WIDTH + width // self.heads, name=f"qkv{i}", **kw)
      y = qkv(share + y, train=train)
      q, k, v = jnp.split(y, (KEY_WIDTH, 2 * KEY_WIDTH), -1)
      dw = ConvBN(
        KEY_WIDTH, self.kernels[i], groups=KEY_WIDTH, name=f"dw{i}", **kw
      )
      q = dw(q, train=train)
      q, k, v = (rearrange(z, "b h w c -> b (h w) c") for z in (q, k, v))
      weights = attention_weights(q, k, bias[i])
      self.sow(INTERMEDIATES, "maps", weights[:, None])
      y = jnp.einsum("bqk,bkc->bqc", weights.astype(v.dtype), v)
      y = y.reshape(share.shape)
      outputs.append(y)
    x = nn.relu(jnp.concatenate(outputs, -1))
    # Zero: this residual branch starts as nothing.
    return ConvBN(width, scale_init=zeros, name="proj", **kw)(x, train=train)


def attention_weights(
  q: Float[Array, "b n k"], k: Float[Array, "b n k"], bias: Float[Array, "n n"]
) -> Float[Array, "b n n"]:
  """softmax(q kᵀ / sqrt(k) + bias), float32 or wider."""
  scores = jnp.einsum(
    "bqd,bkd->bqk",
    q * q.shape[-1] ** -0.5,
    k,
    preferred_element_type=jnp.promote_types(q.dtype, jnp.float32),
  )
  return jax.nn.softmax(scores + bias)


class Sandwich(nn.Module):
  """A mixer between layers that are cheap in memory, all but it residual.

  Attributes:
    mixer: attention, added to its input, or a PatchMerging, which is not.
    fused, dtype: see ConvBN.
  """

  mixer: nn.Module
  fused: bool = False
  dtype: str = "float32"

  @nn.compact
  def __call__(
    self, x: Float[Array, "b h w c"], *, train: bool
  ) -> Float[Array, "b oh ow d"]:
    merges = isinstance(self.mixer, PatchMerging)
    kw = dict(fused=self.fused, dtype=self.dtype)
    ones, zeros = nn.initializers.ones, nn.initializers.zeros

    def around(x, i):
      c = x.shape[-1]
      init = ones if merges else zeros
      dw = ConvBN(c, 3, groups=c, scale_init=init, name=f"dw{i}", **kw)
      x = x + dw(x, train=train)
      return x + FFN(name=f"ffn{i}", **kw)(x, train=train)

    x = around(x, 0)
    y = self.mixer(x, train=train)
    x = around(y if merges else x + y, 1)
    if not merges:
      self.sow(INTERMEDIATES, "features", x)
    return x


class Head(nn.Module):
  """BatchNorm and a linear layer, or both in one."""

  num_classes: int
  fused: bool = False

  @nn.compact
  def __call__(
    self, x: Float[Array, "b d"], *, train: bool
  ) -> Float[Array, "b c"]:
    if not self.fused:
      x = BatchNorm(name="bn")(x, train=train)
    return nn.Dense(
      self.num_classes,
      kernel_init=nn.initializers.normal(0.02),
      dtype=x.dtype,
      name="linear",
    )(x)


class EfficientViT(nn.Module):
  """EfficientViT.

  Attributes:
    variant: a row of VARIANTS.
    num_classes: outputs of the head; None or 0: no head, no logits.
    sizes: replaces entries of the variant's row, as in dict(depths=(1, 1, 1)).
    distillation: a second head, to be trained on a teacher's labels.
    fused: the model without BatchNorms whose parameters `fuse` gives.
    dtype: of the activations.
  """

  variant: str = "M0"
  num_classes: int | None = None
  sizes: Mapping[str, Any] | None = None
  distillation: bool = False
  fused: bool = False
  dtype: str = "float32"

  def __post_init__(self):
    if self.sizes is not None:
      sizes = {k: tuple(v) for k, v in self.sizes.items()}
      self.sizes = flax.core.FrozenDict(sizes)  # Models are hashable.
    super().__post_init__()

  def row(self) -> dict[str, tuple[int, ...]]:
    """The variant's row of VARIANTS, with `sizes`.

    Raises:
      ValueError: for an unknown variant, or sizes that do not fit together.
    """
    if self.variant not in VARIANTS:
      raise ValueError(
        f"Unknown variant {self.variant!r}. There are: {', '.join(VARIANTS)}."
      )
    row = VARIANTS[self.variant]
    unknown = set(self.sizes or ()) - set(row)
    if unknown:
      raise ValueError(
        f"sizes has no {sorted(unknown)}; it may change {sorted(row)}."
      )
    row = row | dict(self.sizes or {})
    if {len(row[k]) for k in ("widths", "depths", "heads")} != {3}:
      raise ValueError(f"Three stages have three of each size; got {row}.")
    for width, heads in zip(row["widths"], row["heads"]):
      if width % heads or heads > len(row["kernels"]):
        raise ValueError(
          f"{width} channels in {heads} heads, with kernels {row['kernels']}: "
          "heads divide the channels, and each has a kernel."
        )
    return row

  @nn.compact
  def __call__(
    self, image: Float[Array, "b h w 3"], *, train: bool
  ) -> dict[str, Array]:
    """Reads images, already normalised.

    Returns:
      logits float32 [B,C], in evaluation the mean of both heads if there are
      two; distillation_logits float32 [B,C], of the second head; pooled
      float32 [B,D], the mean of map [B,h,w,D], the last stage's output.
    """
    row = self.row()
    kw = dict(fused=self.fused, dtype=self.dtype)
    x = image
    for i in range(4):
      features = row["widths"][0] // 2 ** (3 - i)
      x = ConvBN(features, 3, 2, name=f"stem{i}", **kw)(x, train=train)
      x = nn.relu(x) if i < 3 else x
    stages = zip(row["widths"], row["depths"], row["heads"])
    for s, (width, depth, heads) in enumerate(stages):
      if s:
        merging = PatchMerging(width, parent=None, **kw)
        x = Sandwich(merging, name=f"down{s}", **kw)(x, train=train)
      for i in range(depth):
        attention = CascadedGroupAttention(
          heads, row["kernels"], parent=None, **kw
        )
        block = Sandwich(attention, name=f"stage{s}_block{i}", **kw)
        x = block(x, train=train)

    pooled = x.astype(jnp.promote_types(x.dtype, jnp.float32)).mean((1, 2))
    outputs = {"pooled": pooled, "map": x}
    if self.num_classes:
      head = lambda name: Head(self.num_classes, self.fused, name=name)
      logits = head("head")(pooled, train=train)
      if self.distillation:
        second = head("head_dist")(pooled, train=train)
        outputs["distillation_logits"] = second
        logits = logits if train else (logits + second) / 2
      outputs["logits"] = logits
    return outputs


def fuse(variables: dict[str, Any]) -> dict[str, Any]:
  """Folds all BatchNorms into the layers beside them, for inference.

  Args:
    variables: "params" and "batch_stats" of a model.

  Returns:
    The variables of the same model with `fused=True`, only "params".
  """
  stats = variables["batch_stats"]
  params = dict(convolution.fuse(variables)["params"])
  for name in set(params) & {"head", "head_dist"}:
    norm, linear = params[name]["bn"], params[name]["linear"]
    stat = stats[name]["bn"]
    # This norm comes before its layer, so it scales the rows of the kernel.
    factor = norm["scale"] / jnp.sqrt(stat["var"] + 1e-5)
    shift = norm["bias"] - stat["mean"] * factor
    bias = linear["bias"] + shift @ linear["kernel"]
    kernel = factor[:, None] * linear["kernel"]
    params[name] = {"linear": {"kernel": kernel, "bias": bias}}
  return {"params": params}


Model = EfficientViT
