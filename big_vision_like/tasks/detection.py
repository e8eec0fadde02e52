"""Detection as set prediction: labelled boxes, with masks where there are."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from big_vision_like import api
from big_vision_like.losses import masks, set_prediction
from big_vision_like.metrics import Mean
from big_vision_like.tasks import classification

MASK_AREAS = ("image", "canvas")
_TRUTH = ("boxes", "box_label", "box_id_map")


@dataclasses.dataclass(frozen=True)
class Task:
  """Every object has a query of its own; the others are to say "no object".

  DETR (arXiv 2005.12872): see losses/set_prediction.py and losses/masks.py.

  The loss is no mean over examples: its cross-entropy is divided by a number of
  queries, the rest by a number of objects. So a batch cannot be cut into
  micro-batches (config.accum_steps) without changing it.

  Attributes:
    num_classes: labels are 0 to num_classes - 1; logits have one class more,
      "no object", at the end.
    ce_weight, l1_weight, giou_weight: of the three losses, in every layer.
    mask_weight, dice_weight: of those of masks, in the last layer.
    no_object: the weight of unmatched queries in the cross-entropy.
    label_cost, l1_cost, giou_cost: what a match costs.
    auxiliary: whether all layers of the decoder are trained to predict, or the
      last one alone.
    denominators: "global" divides by what the batch of all devices holds, so
      that the number of devices changes nothing, as in the paper. "device" is
      the published code with one process on each device: cross-entropy is
      averaged on each device first, whatever number of objects it has.
    mask_area: the pixels that the losses of masks count: those of the "image",
      so that its canvas changes nothing, or of the whole "canvas", as in the
      published code.
    mean, std: of the pixels in 0..1, those of ImageNet unless given.
  """

  num_classes: int
  ce_weight: float = 1.0
  l1_weight: float = 5.0
  giou_weight: float = 2.0
  mask_weight: float = 1.0
  dice_weight: float = 1.0
  no_object: float = 0.1
  label_cost: float = 1.0
  l1_cost: float = 5.0
  giou_cost: float = 2.0
  auxiliary: bool = True
  denominators: str = "global"
  mask_area: str = "image"
  mean: float | tuple[float, float, float] = (0.485, 0.456, 0.406)
  std: float | tuple[float, float, float] = (0.229, 0.224, 0.225)

  separable: ClassVar[bool] = False

  def __post_init__(self):
    for key, choices in (
      ("denominators", set_prediction.DENOMINATORS),
      ("mask_area", MASK_AREAS),
    ):
      if getattr(self, key) not in choices:
        raise ValueError(
          f"config.task.{key} = {getattr(self, key)!r}; it is one of {choices}."
        )
    numbers = {
      k: x
      for k, x in vars(self).items()
      if k == "no_object" or k.endswith(("_weight", "_cost"))
    }
    negative = [f"{k} = {x}" for k, x in numbers.items() if not x >= 0]
    if negative:
      raise ValueError(
        f"config.task: {', '.join(negative)}. Weights and costs are positive "
        "numbers, or 0 for none."
      )
    if not any(x for k, x in numbers.items() if k.endswith("_cost")):
      raise ValueError(
        "config.task: label_cost, l1_cost and giou_cost are all 0, so that any "
        "query would suit any object."
      )

  def prepare(
    self, batch: api.Batch, rng: api.Array | None
  ) -> tuple[api.Inputs, api.Targets]:
    """Pixels uint8 -> float32 normalised, and 0 where the canvas is empty.

    Raises:
      ValueError: if images lack the size that they have on their canvas.
    """
    del rng
    if "image" not in batch or "size" not in batch:
      raise ValueError(
        "config.task: detection needs images on canvases, `image` and `size`, "
        f"but the data gives only {sorted(batch)}."
      )
    inputs, mask = classification.image_inputs(
      batch, mean=self.mean, std=self.std
    )
    image, size = inputs["image"], batch["size"]
    pixel_mask = _inside(size, image.shape[1:3])
    image = jnp.where(pixel_mask[..., None], image, 0)
    truth = {k: batch[k] for k in _TRUTH if k in batch}
    return (
      {"image": image, "pixel_mask": pixel_mask},
      {"size": size, "mask": mask, **truth},
    )

  def loss(
    self, outputs: api.Outputs, targets: api.Targets
  ) -> tuple[api.Array, dict[str, api.Metric]]:
    """Sum over layers of the weighted losses.

    Metrics have the reference's names: those of the last layer are not
    weighted, `loss_aux` is what the other layers add to `loss`. Rows that hold
    no image, padding slots and images without objects count as they should. A
    prediction that is not finite, matched or not, or a label that the logits do
    not have, makes the loss NaN.

    Raises:
      ValueError: without boxes, for logits of another number of classes, or
        with room for more objects than there are queries.
    """
    logits, boxes, mask = self._predictions(outputs, targets)
    label = jnp.where(mask[:, None], targets["box_label"], -1)
    truth = label, targets["boxes"].astype(jnp.float32)
    costs = set_prediction.Costs(self.label_cost, self.l1_cost, self.giou_cost)
    target = set_prediction.match(logits, boxes, *truth, costs)
    layers = set_prediction.losses(
      logits,
      boxes,
      *truth,
      target,
      mask,
      no_object=self.no_object,
      denominators=self.denominators,
    )
    total = (
      self.ce_weight * layers.ce
      + self.l1_weight * layers.l1
      + self.giou_weight * layers.giou
    )
    terms = {
      "loss_ce": layers.ce[-1],
      "loss_bbox": layers.l1[-1],
      "loss_giou": layers.giou[-1],
      "loss_aux": total[:-1].sum(),
    }
    loss = total.sum()
    sound = jnp.isfinite(boxes).all() & (label < self.num_classes).all()
    if "masks" in outputs:
      focal, dice, finite = self._masks(outputs, targets, label, target[-1])
      loss += self.mask_weight * focal + self.dice_weight * dice
      terms |= {"loss_mask": focal, "loss_dice": dice}
      sound &= finite
    loss += jnp.where(sound, 0.0, jnp.nan)
    images = mask.sum(dtype=jnp.float32)
    wrong = set_prediction.class_error(logits[-1], label, target[-1])
    missed = set_prediction.cardinality_error(logits[-1], label)
    return loss, {
      **{k: Mean(x * images, images) for k, x in terms.items()},
      "loss": Mean(loss * images, images),
      "class_error": Mean.of(wrong, target[-1] >= 0),
      "cardinality_error": Mean.of(missed, mask),
    }

  def _predictions(self, outputs, targets):
    """float32, and blank in rows without an image; which rows have one."""
    if "boxes" not in targets or "box_label" not in targets:
      raise ValueError(
        "config.task: detection learns from `boxes` and `box_label`, but the "
        f"data gives only {sorted(targets)}."
      )
    classes = outputs["logits"].shape[-1] - 1
    if classes != self.num_classes:
      raise ValueError(
        f"config.task.num_classes = {self.num_classes}, but the model's logits "
        f"are of {classes} classes and of no object."
      )
    mask, layers = targets["mask"], slice(None if self.auxiliary else -1, None)
    rows = mask[None, :, None, None]
    return *(
      jnp.where(rows, outputs[k][layers].astype(jnp.float32), 0)
      for k in ("logits", "boxes")
    ), mask

  def _masks(self, outputs, targets, label, target):
    """Focal and dice loss, and whether all masks are finite."""
    if "box_id_map" not in targets:
      raise ValueError(
        "config.model predicts masks, but the data has none: it gives only "
        f"{sorted(targets)}. Have it carry masks, or leave out the mask head."
      )
    mask, id_map = targets["mask"], targets["box_id_map"]
    predicted = jnp.where(mask[:, None, None, None], outputs["masks"], 0)
    query = set_prediction.query_of(target, label.shape[1])
    inside = jnp.ones(id_map.shape, bool)
    if self.mask_area == "image":
      inside = _inside(targets["size"], id_map.shape[1:])
    pairs = masks.mask_losses(predicted, id_map, query, inside)
    count = set_prediction.number_of_boxes(label, mask, self.denominators)
    focal, dice = (x.sum() / count for x in pairs)
    return focal, dice, jnp.isfinite(predicted).all()

  def predict(
    self, outputs: api.Outputs, targets: api.Targets
  ) -> dict[str, api.Array]:
    """What the last layer says, and the truth under names of its own.

    `logits` [B,Q,C+1], `boxes` [B,Q,4] by centre as fractions of the image,
    `masks` [B,Q,h,w] if there are any, float32; `true_boxes` [B,O,4],
    `box_label` [B,O] and what else the data has of them; `size`, `mask`.
    """
    last = {k: outputs[k][-1] for k in ("logits", "boxes")}
    if "masks" in outputs:
      last["masks"] = outputs["masks"]
    names = {"boxes": "true_boxes"}
    truth = {names.get(k, k): x for k, x in targets.items()}
    return {k: x.astype(jnp.float32) for k, x in last.items()} | truth


def _inside(size, canvas):
  """bool [B,H,W]: the pixels of images of that size, at the top left."""
  rows, columns = (
    jnp.arange(n) < size[:, axis, None] for axis, n in enumerate(canvas)
  )
  return rows[:, :, None] & columns[:, None]
