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
  """

  num_classes: int
  loss_name: str = "sigmoid"
  labels: str = "label"
  label_smoothing: float = 0.0
  mean: float | tuple[float, float, float] = 0.5
  std: float | tuple[float, float, float] = 0.5

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

  def prepare(
    self, batch: api.Batch, rng: api.Array | None
  ) -> tuple[api.Inputs, api.Targets]:
    """Pixels uint8 -> float32 normalised; labels -> soft targets."""
    del rng
    if "patches" in batch:
      inputs = {k: batch[k] for k in PACKED_INPUTS}
      inputs["patches"] = self._normalise(batch["patches"])
      mask = batch["example_mask"]
    else:
      inputs = {"image": self._normalise(batch["image"])}
      mask = batch["_mask"]
    return inputs, self._targets(batch, mask)

  def _normalise(self, pixels):
    """(pixels / 255 - mean) / std, as one multiply-add on channel-last data."""
    shape = pixels.shape
    # A float for all channels needs no view by channel.
    scale = 1.0 / (255.0 * jnp.asarray(self.std, jnp.float32))
    shift = -jnp.asarray(self.mean, jnp.float32) / jnp.asarray(self.std)
    if scale.ndim or shift.ndim:
      pixels = rearrange(pixels, "... (n c) -> ... n c", c=3)
    return (pixels.astype(jnp.float32) * scale + shift).reshape(shape)

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
    """`logits`, `features` and the truth, [B, ...] or packed [B,M, ...]."""
    truth = {k: v for k, v in targets.items() if k != "y"}
    return {
      "logits": outputs["logits"].astype(jnp.float32),
      "features": outputs["pooled"].astype(jnp.float32),
      **truth,
    }


PACKED_INPUTS = (
  "patches",
  "segment_ids",
  "positions",
  "grid_hw",
  "example_mask",
)
