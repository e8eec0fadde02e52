"""Classification that is learned from a teacher, see models/distill.py.

The teacher and the student see the same pixels: the same crop and flip, the
same mixture of images. From there on each has a size and a normalisation of
its own.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from big_vision_like import api
from big_vision_like.metrics import Mean
from big_vision_like.tasks import classification

KINDS = ("soft", "hard")
_Rgb = float | tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class Task:
  """(1 - weight) * cross-entropy of the labels + weight * that of the teacher.

  With a head of its own for the teacher (the output `distillation_logits`, as
  of EfficientViT and DeiT) the teacher's term reads that head.

  Attributes:
    num_classes: width of the logits.
    kind: "soft": T² KL(softmax(teacher / T) || softmax(student / T)), mean over
      images (FlexiViT has T = 1); "hard": the cross-entropy of the teacher's
      most likely class (DeiT, arXiv 2012.12877, equation 3).
    weight: of the teacher's term. FlexiViT has 1, no labels at all; DeiT and
      EfficientViT 0.5.
    temperature: T.
    labels: the batch key that holds the truth, "label" or "multi_label"; the
      latter for weight 1 only, where it serves evaluation.
    label_smoothing: of the labels.
    mean, std: of the student's pixels in 0..1.
    teacher_mean, teacher_std: of the teacher's; None: the student's.
    image_size, teacher_size: sides that the images of the batch are resized to,
      bilinearly and with antialiasing; None: as they come. So let the data give
      the larger of both.
    mixup, cutmix: see tasks/classification.py.
  """

  num_classes: int
  kind: str = "soft"
  weight: float = 1.0
  temperature: float = 1.0
  labels: str = "label"
  label_smoothing: float = 0.0
  mean: _Rgb = 0.5
  std: _Rgb = 0.5
  teacher_mean: _Rgb | None = None
  teacher_std: _Rgb | None = None
  image_size: int | None = None
  teacher_size: int | None = None
  mixup: float = 0.0
  cutmix: float = 0.0

  separable: ClassVar[bool] = True

  def __post_init__(self):
    if self.kind not in KINDS:
      raise ValueError(
        f"config.task.kind = {self.kind!r}; it is one of {KINDS}."
      )
    if not 0 < self.weight <= 1:
      raise ValueError(
        f"config.task.weight = {self.weight}: the share of the teacher is "
        "above 0 and at most 1."
      )
    if self.temperature <= 0:
      raise ValueError(
        f"config.task.temperature = {self.temperature}; it is positive."
      )
    if self.labels == "multi_label" and self.weight < 1:
      raise ValueError(
        "config.task: images of several labels have no softmax cross-entropy. "
        "Use weight = 1, or labels = 'label'."
      )
    self._student()  # Checks what it takes.

  def _student(self) -> classification.Task:
    several = self.labels == "multi_label"
    return classification.Task(
      self.num_classes,
      loss_name="sigmoid" if several else "softmax",
      labels=self.labels,
      label_smoothing=self.label_smoothing,
      mean=self.mean,
      std=self.std,
      mixup=self.mixup,
      cutmix=self.cutmix,
    )

  def prepare(
    self, batch: api.Batch, rng: api.Array | None
  ) -> tuple[api.Inputs, api.Targets]:
    """`image` and `teacher_image` float32, and soft targets."""
    if "image" not in batch:
      raise ValueError(
        "Distillation reads stacked images: set config.data.pack to None."
      )
    inputs, targets = self._student().prepare(batch, rng)
    image = inputs["image"]
    # Mixing, resizing and normalising are linear: they may change places.
    mean, std = (
      jnp.asarray(x, jnp.float32)
      for x in (
        self.mean if self.teacher_mean is None else self.teacher_mean,
        self.std if self.teacher_std is None else self.teacher_std,
      )
    )
    scale = jnp.asarray(self.std, jnp.float32) / std
    shift = (jnp.asarray(self.mean, jnp.float32) - mean) / std
    return {
      "image": _resized(image, self.image_size),
      "teacher_image": _resized(image, self.teacher_size) * scale + shift,
    }, targets

  def loss(
    self, outputs: api.Outputs, targets: api.Targets
  ) -> tuple[api.Array, dict[str, api.Metric]]:
    """Mean over the images that are there, of all devices.

    The metric `distillation` is the teacher's term alone, `agreement` how
    often the most likely class is the teacher's.
    """
    logits, mask = outputs["logits"].astype(jnp.float32), targets["mask"]
    student = outputs.get("distillation_logits", logits).astype(jnp.float32)
    teacher = outputs["teacher_logits"].astype(jnp.float32)
    from_teacher = self._distance(student, teacher)
    losses = self.weight * from_teacher
    if self.weight < 1:
      labels = optax.softmax_cross_entropy(logits, targets["y"])
      losses = losses + (1 - self.weight) * labels
    mean = Mean.of(losses, mask)
    _, metrics = self._student().loss({"logits": logits}, targets)
    agrees = student.argmax(-1) == teacher.argmax(-1)
    return mean.compute(), {
      "loss": mean,
      "accuracy": metrics["accuracy"],
      "distillation": Mean.of(from_teacher, mask),
      "agreement": Mean.of(agrees, mask),
    }

  def _distance(self, student, teacher):
    if self.kind == "hard":
      labels = teacher.argmax(-1)
      return optax.softmax_cross_entropy_with_integer_labels(student, labels)
    t = self.temperature
    log_p = jax.nn.log_softmax(teacher / t)
    log_q = jax.nn.log_softmax(student / t)
    return t**2 * (jnp.exp(log_p) * (log_p - log_q)).sum(-1)

  def predict(
    self, outputs: api.Outputs, targets: api.Targets
  ) -> dict[str, Any]:
    """Of the student, as in tasks/classification.py."""
    return self._student().predict(outputs, targets)


def _resized(image, size):
  if size is None or image.shape[1:3] == (size, size):
    return image
  shape = (image.shape[0], size, size, image.shape[-1])
  return jax.image.resize(image, shape, "linear")
