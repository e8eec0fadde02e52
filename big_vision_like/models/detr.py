"""DETR: objects as a set, read from an image by queries.

Paper: Carion et al., arXiv 2005.12872. Reference: facebookresearch/detr @
29901c5. The task is detection, its losses are set_prediction.py and masks.py.
Parameters, with 91 classes and without the constants of frozen BatchNorms: R50
and R50-DC5 41,524,768, R101 and R101-DC5 60,464,672; R50-panoptic, with 250
classes, 42,899,288. The paper counts those that it trains: all but the stem's
and the first stage's, see config.optim.frozen.
Deviations:
  - What a convolution sees beside an image is 0, unless `mask_padding=False`:
    the reference's sees what biases have made of the padding, so that its boxes
    change with the canvas.
  - The FFNs' biases, which the reference starts equal in all layers, are drawn
    for each layer.
  - A GroupNorm whose channels do not divide into 8 groups has fewer.
"""

import inspect
import math
from collections.abc import Hashable, Mapping

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float

from big_vision_like import resolve
from big_vision_like.models.layers.blocks import tokens_dot_general
from big_vision_like.models.layers.encoder_decoder import (
  Decoder,
  Encoder,
  LayerConfig,
  uniform_bias,
)
from big_vision_like.models.layers.mask_head import (
  AttentionMaps,
  MaskHead,
  wide,
)
from big_vision_like.models.layers.resize import nearest

_SIZE = dict(width=256, heads=8, mlp=2048, encoder_depth=6, decoder_depth=6)
VARIANTS = {
  "local": dict(
    width=96,
    heads=4,
    mlp=192,
    encoder_depth=1,
    decoder_depth=2,
    backbone="local",
  ),
  "R50": dict(_SIZE, backbone="R50"),
  "R50-DC5": dict(_SIZE, backbone="R50", dilation=True),
  "R101": dict(_SIZE, backbone="R101"),
  "R101-DC5": dict(_SIZE, backbone="R101", dilation=True),
  "R50-panoptic": dict(_SIZE, backbone="R50", masks=True),
  "R50-DC5-panoptic": dict(_SIZE, backbone="R50", dilation=True, masks=True),
  "R101-panoptic": dict(_SIZE, backbone="R101", masks=True),
}
# Height and width of a typical image of COCO, and the classes published.
IMAGE_SIZE = (800, 1066)
CLASSES = {v: 250 if "masks" in row else 91 for v, row in VARIANTS.items()}
POSITIONS = ("sine", "learned")
# Rows, and columns, of the tables of learned positions.
MAX_GRID = 50


def sine_positions(
  mask: Bool[Array, "b h w"],
  width: int,
  *,
  temperature: float = 10_000.0,
  scale: float = 2 * math.pi,
) -> Float[Array, "b h w {width}"]:
  """Sines and cosines of how far down and how far right a cell is, float32.

  Of an image's h cells the first is at scale / h and the last at `scale`. The
  first half of the features is of rows, the second of columns; both alternate
  sine and cosine of the same phase, slower and slower down to 1/`temperature`.

  Args:
    mask: where the image is.
    width: features, divisible by 4.
    temperature, scale: see above.
  """
  if width % 4:
    raise ValueError(
      f"Sine positions need a width divisible by 4, not {width}."
    )
  half = width // 2
  slower = temperature ** (2 * (jnp.arange(half) // 2) / half)

  def features(axis):
    count = jnp.cumsum(mask, axis, dtype=float)
    last = jax.lax.slice_in_dim(count, mask.shape[axis] - 1, None, axis=axis)
    phase = (count / (last + 1e-6) * scale)[..., None] / slower
    return jnp.where(jnp.arange(half) % 2, jnp.cos(phase), jnp.sin(phase))

  return jnp.concatenate([features(1), features(2)], -1)


class LearnedPositions(nn.Module):
  """The embedding of a cell's column, then that of its row."""

  width: int

  @nn.compact
  def __call__(
    self, height: int, width: int
  ) -> Float[Array, "1 {height} {width} {self.width}"]:
    if max(height, width) > MAX_GRID:
      raise ValueError(
        f'config.model.position = "learned" has {MAX_GRID} rows and columns, '
        f"and the map has {height} x {width} cells; take smaller images or "
        '"sine".'
      )
    shape, uniform = (MAX_GRID, self.width // 2), nn.initializers.uniform(1.0)
    rows = self.param("rows", uniform, shape)[:height, None]
    columns = self.param("columns", uniform, shape)[None, :width]
    grid = (height, width, self.width // 2)
    both = [jnp.broadcast_to(x, grid) for x in (columns, rows)]
    return jnp.concatenate(both, -1)[None]


class DETR(nn.Module):
  """A backbone, an encoder of its map, and a decoder of queries.

  A backbone with `frozen=False` moves its statistics by padding too.

  Attributes:
    variant: a row of VARIANTS.
    num_classes: C of the head, which has one more output, the last: no object.
      None or 0: there is no head.
    num_queries: the most objects that an image can have.
    backbone: settings of its model, `name` among them: any model of images
      that returns `stages`; None: the variant's. Its parameters lie under
      "backbone", for config.init_into.
    stage: which of the backbone's maps is read, from 0 on; None: the last.
    sizes: replaces entries of the variant's row, as in dict(encoder_depth=3).
    masks: whether there is a mask head; None: as the variant has it.
    mask_chunk: see layers/mask_head.py.
    mask_padding: an image's boxes and masks are the same whatever canvas it
      lies in, if the canvas is a multiple of the map's stride. False is the
      published arithmetic.
    position: one of POSITIONS.
    temperature, scale: of the sines.
    pre_norm, dropout, attention_dropout, attention: see
      layers/encoder_decoder.py.
    dtype: of activations and products, the backbone's too unless it has its
      own; parameters are float32.
    remat, scan: of the encoder and the decoder, see layers/encoder.py.
  """

  variant: str = "R50"
  num_classes: int | None = None
  num_queries: int = 100
  backbone: Mapping[str, Hashable] | None = None
  stage: int | None = None
  sizes: Mapping[str, int] | None = None
  masks: bool | None = None
  mask_chunk: int | None = None
  mask_padding: bool = True
  position: str = "sine"
  temperature: float = 10_000.0
  scale: float = 2 * math.pi
  pre_norm: bool = False
  dropout: float = 0.1
  attention_dropout: float = 0.1
  attention: str = "auto"
  dtype: str = "float32"
  remat: str = "none"
  scan: bool = True

  def __post_init__(self):
    for name in ("backbone", "sizes"):  # Models are hashable.
      if getattr(self, name) is not None:
        settings = flax.core.FrozenDict(getattr(self, name))
        object.__setattr__(self, name, settings)
    self.check()
    super().__post_init__()

  def check(self):
    if self.variant not in VARIANTS:
      raise ValueError(
        f"Unknown variant {self.variant!r}. There are: {', '.join(VARIANTS)}."
      )
    unknown = set(self.sizes or ()) - set(_SIZE)
    if unknown:
      raise ValueError(
        f"sizes has no {sorted(unknown)}; it may change {sorted(_SIZE)}."
      )
    if self.position not in POSITIONS:
      raise ValueError(
        f"position is {self.position!r}; it is one of {POSITIONS}."
      )

  @property
  def size(self) -> dict:
    """The row of the variant."""
    return VARIANTS[self.variant] | dict(self.sizes or {})

  @property
  def has_masks(self) -> bool:
    own = VARIANTS[self.variant].get("masks", False)
    return own if self.masks is None else self.masks

  def depth(self, stack: str) -> int:
    """Layers of the "encoder" or the "decoder"."""
    return self.size[f"{stack}_depth"]

  @property
  def layer_config(self) -> LayerConfig:
    return LayerConfig(
      heads=self.size["heads"],
      mlp=self.size["mlp"],
      pre_norm=self.pre_norm,
      dropout=self.dropout,
      attention_dropout=self.attention_dropout,
      dtype=self.dtype,
      attention=self.attention,
    )

  @nn.compact
  def __call__(
    self,
    image: Float[Array, "b h w c"],
    pixel_mask: Bool[Array, "b h w"] | None = None,
    *,
    train: bool,
  ) -> dict[str, Array]:
    """Reads images, normalised by ImageNet's mean and deviation.

    Args:
      image: each in the upper left of a canvas, which is 0 elsewhere.
      pixel_mask: True where the image is; None: everywhere. A canvas without
        an image has finite outputs.
      train: whether to drop.

    Returns:
      Of all L layers of the decoder, logits float32 [L,B,Q,C+1], the last for
      no object, and boxes float32 [L,B,Q,4]: (cx, cy, w, h) as fractions of
      the image, not of the canvas. With a mask head, of the last layer, masks
      float32 [B,Q,h,w], logits at 1/4 of the canvas. Outside of the image they
      repeat its border, or, without `mask_padding`, mean nothing.
    """
    seen = pixel_mask if self.mask_padding else None
    *finer, x = self.maps(image, seen, train=train)
    x = self.dense(self.size["width"], "input_proj", dtype=self.dtype)(x)
    grid = x.shape[1:3]
    mask = None
    if pixel_mask is not None:
      mask = nearest(pixel_mask[..., None], grid)[..., 0]
    position = self.positions(x, mask).astype(x.dtype)
    tokens, position = (
      rearrange(y, "b h w d -> b (h w) d") for y in (x, position)
    )
    if mask is not None:
      mask = rearrange(mask, "b h w -> b (h w)")
    memory = self.make_stack(Encoder)(tokens, position, mask, train=train)
    queries = self.param(
      "query_embed",
      nn.initializers.normal(1.0),
      (self.num_queries, x.shape[-1]),
    ).astype(x.dtype)
    decoded = self.make_stack(Decoder)(
      queries, memory, position, mask, train=train
    )
    outputs = {"boxes": self.boxes(decoded)}
    if self.num_classes:
      head = self.dense(self.num_classes + 1, "class_head")
      outputs["logits"] = head(decoded)
    if self.has_masks:
      attention = AttentionMaps(
        self.size["heads"], self.dtype, name="mask_attn"
      )
      maps = attention(decoded[-1], memory, mask)
      maps = rearrange(maps, "b q (h w) k -> b q h w k", h=grid[0])
      head = MaskHead(self.mask_chunk, self.dtype, name="mask_head")
      outputs["masks"] = head(x, maps, finer[::-1], seen)
    return outputs

  def maps(self, image, pixel_mask, *, train):
    """The backbone's maps up to the one that is read."""
    backbone = self.make_backbone(name="backbone")
    name, inputs = self.backbone_settings["name"], {}
    if pixel_mask is not None:
      inputs["pixel_mask"] = pixel_mask
      takes = inspect.signature(type(backbone).__call__).parameters
      if "pixel_mask" not in takes:
        raise ValueError(
          f"config.model.backbone: {name!r} takes no pixel_mask, which "
          "mask_padding needs; resnet does."
        )
    outputs = backbone(image, **inputs, train=train)
    if "stages" not in outputs:
      raise ValueError(
        f"config.model.backbone: {name!r} returns no maps, `stages`; resnet "
        "does."
      )
    return outputs["stages"][: None if self.stage is None else self.stage + 1]

  @property
  def backbone_settings(self) -> dict:
    settings = self.backbone
    if settings is None:
      row = VARIANTS[self.variant]
      settings = dict(
        name="resnet",
        variant=row["backbone"],
        dilation=row.get("dilation", False),
        frozen=True,
      )
    if resolve.takes("models", settings["name"], "Model", "dtype"):
      return {"dtype": self.dtype, **settings}
    return dict(settings)

  def make_backbone(self, **extra) -> nn.Module:
    """The backbone; with `parent=None` it is no part of this model."""
    settings, section = self.backbone_settings, "config.model.backbone"
    return resolve.make("models", "Model", section, settings, **extra)

  def make_stack(self, stack):
    name = stack.__name__.lower()
    return stack(
      self.depth(name), self.layer_config, self.remat, self.scan, name=name
    )

  def positions(self, x, mask):
    if self.position == "learned":
      return LearnedPositions(x.shape[-1], name="position")(*x.shape[1:3])
    if mask is None:
      mask = jnp.ones((1, *x.shape[1:3]), bool)
    return sine_positions(
      mask, x.shape[-1], temperature=self.temperature, scale=self.scale
    )

  def dense(self, features, name, dtype=None):
    """A dense layer as torch starts it, by fan in; float32 unless given."""

    def uniform(key, shape, dtype=jnp.float32):
      return uniform_bias(shape[0])(key, shape, dtype)

    def layer(x):
      return nn.Dense(
        features,
        kernel_init=uniform,
        bias_init=uniform_bias(x.shape[-1]),
        dtype=dtype or wide(self.dtype),
        dot_general=tokens_dot_general,
        name=name,
      )(x)

    return layer

  def boxes(self, x):
    for i in (1, 2):
      x = jax.nn.relu(self.dense(x.shape[-1], f"box_fc{i}")(x))
    return jax.nn.sigmoid(self.dense(4, "box_head")(x))


Model = DETR
