"""Classification, one label or many, of stacked images or packed rows."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import optax
from einops import rearrange

from big_vision_like import api
from big_vision_like.metrics import Mean

LOSSES = ("sigmoid", "softmax")


@dataclasses.dataclass(frozen=True)
class Task:
  """Sigmoid or softmax cross-entropy, averaged over the images of the batch.

  Attributes:
    num_classes: width of the logits.
    loss_name: "sigmoid" sums over classes as for JFT (Beyer et al. 2020) and
      takes several labels an image; "softmax" takes one.
    labels: the batch key that holds the truth, "label" or "multi_label".
    label_smoothing: share of the target spread over all classes.
    mean, std: of the pixels in 0..1, a number for all channels or one each.
    mixup, cutmix: alpha of the law Beta(alpha, alpha) of the mixing share of
      a training batch; 0 is off, and of two one is chosen for each batch.
  """

  num_classes: int
  loss_name: str = "sigmoid"
  labels: str = "label"
  label_smoothing: float = 0.0
  mean: float | tuple[float, float, float] = 0.5
  std: float | tuple[float, float, float] = 0.5
  mixup: float = 0.0
  cutmix: float = 0.0

  separable: ClassVar[bool] = True

  def __post_init__(self):
    if self.loss_name not in LOSSES:
      raise ValueError(
        f"config.task.loss_name = {self.loss_name!r}; it is one of {LOSSES}."
      )
    if self.labels not in ("label", "multi_label"):
      raise ValueError(
        f"config.task.labels = {self.labels!r}; it names the batch key that "
        "holds the truth: 'label' or 'multi_label'."
      )
    if self.loss_name == "softmax" and self.labels == "multi_label":
      raise ValueError(
        "config.task: softmax takes one label an image. Use "
        "loss_name = 'sigmoid' for multi_label targets, or labels = 'label'."
      )
    if min(self.mixup, self.cutmix) < 0:
      raise ValueError(
        f"config.task: mixup = {self.mixup} and cutmix = {self.cutmix} are the "
        "alphas of Beta laws: positive numbers, or 0 for none."
      )

  def prepare(
    self, batch: api.Batch, rng: api.Array | None
  ) -> tuple[api.Inputs, api.Targets]:
    """Pixels uint8 -> float32 normalised; labels -> soft targets.

    Raises:
      ValueError: if packed rows are to be mixed.
    """
    mixes = self.mixup > 0 or self.cutmix > 0
    if mixes and "patches" in batch:
      raise ValueError(
        f"config.task: mixup = {self.mixup} and cutmix = {self.cutmix} mix "
        "images of one size, and packed rows hold images of many. Set both to "
        "0, or data.pack to None."
      )
    inputs, mask = image_inputs(batch, mean=self.mean, std=self.std)
    targets = self._targets(batch, mask)
    if mixes and rng is not None:
      self._mix(inputs, targets, rng)
    return inputs, targets

  def _mix(self, inputs, targets, rng):
    """Mixes image i with image B - 1 - i where both are there (in place).

    As in the batch mode of timm's Mixup, the batch shares one choice of the
    two, one share and one box. With micro-batches, each is a batch.
    """
    image, mask = inputs["image"], targets["mask"]
    weight, share = self._draw(rng, *image.shape[1:3])
    both = mask & mask[::-1]
    inputs["image"] = _blend(
      image, jnp.where(both[:, None, None, None], weight[..., None], 1.0)
    )
    targets["y"] = _blend(targets["y"], jnp.where(both[:, None], share, 1.0))

  def _draw(self, rng, h, w):
    """The weight of each own pixel [H,W], and that of the own label []."""
    choice_rng, share_rng, box_rng = jax.random.split(rng, 3)
    chance = 0.5 if self.mixup and self.cutmix else float(self.cutmix > 0)
    cut = jax.random.bernoulli(choice_rng, chance)
    alpha = jnp.where(cut, self.cutmix, self.mixup)
    share = jax.random.beta(share_rng, alpha, alpha)
    y, x = jax.random.randint(box_rng, (2,), 0, jnp.array([h, w]))
    own = 1.0 - cutmix_box(share, y, x, h=h, w=w).astype(jnp.float32)
    return jnp.where(cut, own, share), jnp.where(cut, own.mean(), share)

  def _targets(self, batch, mask):
    truth = {k: batch[k] for k in ("label", "multi_label") if k in batch}
    if self.labels not in batch:
      raise ValueError(
        f"config.task.labels = {self.labels!r}, but the data source gives only "
        f"{sorted(truth) or 'no labels'}."
      )
    if self.labels == "multi_label":
      soft = batch["multi_label"].astype(jnp.float32)
    else:
      label = batch["label"]
      mask = mask & (label >= 0)
      soft = jax.nn.one_hot(label, self.num_classes, dtype=jnp.float32)
    if self.label_smoothing:
      uniform = self.label_smoothing / self.num_classes
      soft = soft * (1.0 - self.label_smoothing) + uniform
    return truth | {"y": soft, "mask": mask}

  def loss(
    self, outputs: api.Outputs, targets: api.Targets
  ) -> tuple[api.Array, dict[str, api.Metric]]:
    """Mean over the images that are there, of all devices."""
    logits, y, mask = outputs["logits"], targets["y"], targets["mask"]
    logits = logits.astype(jnp.float32)
    if self.loss_name == "sigmoid":
      losses = optax.sigmoid_binary_cross_entropy(logits, y).sum(-1)
    else:
      losses = optax.softmax_cross_entropy(logits, y)
    mean = Mean.of(losses, mask)
    best = jnp.take_along_axis(y, logits.argmax(-1)[..., None], -1)[..., 0]
    hit = best >= y.max(-1)
    metrics = {"loss": mean, "accuracy": Mean.of(hit, mask)}
    return mean.compute(), metrics

  def predict(
    self, outputs: api.Outputs, targets: api.Targets
  ) -> dict[str, api.Array]:
    """`logits`, `features` and the truth, [B, ...] or packed [B,M, ...].

    A model without a head has logits of no class; one that answers several
    tasks also has logits/NAME of each.
    """
    truth = {k: v for k, v in targets.items() if k != "y"}
    features = outputs["pooled"].astype(jnp.float32)
    logits = {k: v for k, v in outputs.items() if k.startswith("logits")}
    logits.setdefault("logits", features[..., :0])
    return {
      **{k: v.astype(jnp.float32) for k, v in logits.items()},
      "features": features,
      **truth,
    }


def image_inputs(
  batch: api.Batch,
  *,
  mean: float | tuple[float, float, float],
  std: float | tuple[float, float, float],
) -> tuple[api.Inputs, api.Array]:
  """What a model reads of images, and which of them are there.

  Args:
    batch: stacked or packed.
    mean: of the pixels in 0..1, a number for all channels or one each.
    std: likewise.

  Returns:
    The model's keywords, pixels float32 and normalised; bool [B] or [B,M].
  """
  if "patches" not in batch:
    return {"image": _normalise(batch["image"], mean, std)}, batch["_mask"]
  inputs = {k: batch[k] for k in PACKED_INPUTS}
  inputs["patches"] = _normalise(batch["patches"], mean, std)
  return inputs, batch["example_mask"]


def _normalise(pixels, mean, std):
  """(pixels / 255 - mean) / std, as one multiply-add on channel-last data."""
  shape = pixels.shape
  # A float for all channels needs no view by channel.
  scale = 1.0 / (255.0 * jnp.asarray(std, jnp.float32))
  shift = -jnp.asarray(mean, jnp.float32) / jnp.asarray(std)
  if scale.ndim or shift.ndim:
    pixels = rearrange(pixels, "... (n c) -> ... n c", c=3)
  return (pixels.astype(jnp.float32) * scale + shift).reshape(shape)


def cutmix_box(
  share: api.Array, y: api.Array, x: api.Array, *, h: int, w: int
) -> api.Array:
  """bool [h,w]: the box around (y, x) whose area is 1 - share of the image.

  The image's border cuts it off.
  """
  ratio = jnp.sqrt(1.0 - share)

  def span(center, side):
    length = jnp.int32(side * ratio)
    at = jnp.arange(side)
    return (at >= center - length // 2) & (at < center + (length + 1) // 2)

  return span(y, h)[:, None] & span(x, w)


def _blend(x, weight):
  """Of each row and of its partner from the other end of the batch."""
  return x * weight + x[::-1] * (1.0 - weight)


PACKED_INPUTS = (
  "patches",
  "segment_ids",
  "positions",
  "grid_hw",
  "example_mask",
)
