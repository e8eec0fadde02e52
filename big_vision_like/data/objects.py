"""The objects of an image: boxes that are checked, padded and counted.

Whatever the source, a box is (x0, y0, x1, y1) in pixels of its image, the right
and lower edges exclusive, and looked at before an op moves it. What lies beyond
the image is cut off; what is then no box is dropped. Training also goes without
crowds, regions of many objects that are not told apart, as DETR does.

What is dropped is counted in the batch, and said on the host.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from absl import logging
from jaxtyping import Bool, Float, Int

from big_vision_like.api import Example
from big_vision_like.data import ops
from big_vision_like.data.packing import Batch
from big_vision_like.data.segmentations import id_dtype

# Bits of what is wrong with a box, and what is said of it. All but the last
# have the box dropped.
NOT_FINITE, INVERTED, EMPTY, OUTSIDE, FIRST_PIXEL, CLIPPED = 1, 2, 4, 8, 16, 32
FLAGS = {
  NOT_FINITE: "hold what is no finite number: dropped",
  INVERTED: "are inverted, with a negative width or height: dropped",
  EMPTY: "are empty, without width or height: dropped",
  OUTSIDE: "lie outside of their image: dropped",
  FIRST_PIXEL: "lie within the first pixel, perhaps because they are "
  "fractions where pixels are expected: dropped",
  CLIPPED: "reach more than a pixel beyond their image: clipped",
}
_CUT = (
  "are more than config.data.objects.max_objects in an image, of which the "
  "largest are kept: dropped"
)
_TEXTS = {**FLAGS, 0: _CUT}
# Columns of `object_counts`: boxes seen, with each flag, and cut.
_COLUMNS = 2 + len(FLAGS)
# Boxes overhang by rounding: COCO's, by up to half a pixel.
_TOLERANCE = 1.0


def check_boxes(
  boxes: Float[np.ndarray, "n 4"], hw: Int[np.ndarray, "*n 2"]
) -> tuple[Float[np.ndarray, "n 4"], Int[np.ndarray, " n"]]:
  """The boxes within their images, and the flags of what is wrong with each.

  Args:
    boxes: (x0, y0, x1, y1) in pixels.
    hw: (height, width) of the image, or of that of each box.
  """
  with np.errstate(over="ignore"):
    boxes = boxes.astype(np.float32)
  size = np.broadcast_to(np.asarray(hw)[..., ::-1], (len(boxes), 2))
  limit = np.concatenate([size, size], axis=1).astype(np.float32)
  finite = np.isfinite(boxes).all(axis=1)
  boxes = np.where(finite[:, None], boxes, np.float32(0))
  clipped = np.clip(boxes, 0, limit)
  side = boxes[:, 2:] - boxes[:, :2]
  inverted = finite & (side < 0).any(axis=1)
  empty = finite & ~inverted & (side == 0).any(axis=1)
  sound = finite & ~inverted & ~empty
  outside = sound & ~(clipped[:, 2:] > clipped[:, :2]).all(axis=1)
  sound &= ~outside
  first = sound & (boxes <= 1).all(axis=1) & (size > 2).all(axis=1)
  beyond = (np.abs(boxes - clipped) > _TOLERANCE).any(axis=1)
  flags = (
    NOT_FINITE * ~finite
    + INVERTED * inverted
    + EMPTY * empty
    + OUTSIDE * outside
    + FIRST_PIXEL * first
    + CLIPPED * (sound & ~first & beyond)
  )
  return clipped, flags


def is_sound(flags: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
  """Whether a box with these flags is kept."""
  return (flags & ~CLIPPED) == 0


@dataclasses.dataclass(frozen=True)
class ObjectSpec:
  """What a batch has of objects, and the canvases that its images lie on.

  Attributes:
    canvases: (height, width) of what the images of a batch are placed on, in
      multiples of 32 pixels; one holds all others.
    max_objects: O, the most objects of an image. In training, the largest are
      kept; an evaluation refuses to lose any.
    masks: whether there is `box_id_map`, from the examples' `instance_mask`.
    window: batches among which images are sorted by the canvas that they need.
    evaluation: whether crowds are kept, and what scores need is written.
  """

  canvases: Sequence[Sequence[int]]
  max_objects: int = 100
  masks: bool = False
  window: int = 1
  evaluation: bool = False

  def __post_init__(self) -> None:
    canvases = [tuple(c) for c in self.canvases if isinstance(c, Sequence)]
    valid = all(
      len(c) == 2 and all(type(n) is int and n > 0 and n % 32 == 0 for n in c)
      for c in canvases
    )
    if not canvases or not valid or len(set(canvases)) < len(self.canvases):
      raise ValueError(
        f"config.data.objects.canvases = {self.canvases}; it is a list of "
        "different pairs (height, width) in multiples of 32 pixels."
      )
    largest = tuple(max(sides) for sides in zip(*canvases))
    if largest not in canvases:
      raise ValueError(
        f"config.data.objects.canvases = {self.canvases} lacks one for a batch "
        f"with images of all shapes: add {largest}."
      )
    if type(self.window) is not int or self.window < 1:
      raise ValueError(
        "config.data.objects.window is a number of batches, 1 or more, not "
        f"{self.window}."
      )
    if type(self.max_objects) is not int or not 1 <= self.max_objects < 2**16:
      raise ValueError(
        "config.data.objects.max_objects is a whole number from 1 to 65535, "
        f"not {self.max_objects}."
      )

  @property
  def keys(self) -> tuple[str, ...]:
    """What is kept of an example, beside its image."""
    masks = ("instance_mask",) if self.masks else ()
    return ("id", "objects", *masks)

  @property
  def scores_masks(self) -> bool:
    """Whether masks are kept as they are before the ops."""
    return self.masks and self.evaluation

  def smallest(self, hw: tuple[int, int]) -> tuple[int, int] | None:
    """The canvas of the fewest pixels that holds images up to this size."""
    holding = [(h, w) for h, w in self.canvases if h >= hw[0] and w >= hw[1]]
    return min(holding, key=lambda c: (c[0] * c[1], c), default=None)

  def prepare(self, example: Example, name: Callable[[], str]) -> Example:
    """The example with sound boxes alone, and `object_counts` of the rest."""
    missing = [key for key in self.keys if key not in example]
    if missing:
      raise ValueError(
        f"config.data.objects needs examples with {', '.join(missing)}, and "
        f"{name()} has {', '.join(sorted(example))}."
      )
    objects = example["objects"]
    if not {"boxes", "label"} <= objects.keys():
      raise ValueError(
        f"The objects of {name()} need boxes and label, and have "
        f"{', '.join(sorted(objects))}."
      )
    boxes, flags = check_boxes(objects["boxes"], example["image"].shape[:2])
    kept = is_sound(flags)
    if not self.evaluation and "is_crowd" in objects:
      kept &= ~objects["is_crowd"]
    counts = [len(boxes), *((flags & flag > 0).sum() for flag in FLAGS), 0]
    objects = {**objects, "boxes": boxes, "pixels": boxes}
    example = {**example, "objects": objects}
    example["object_counts"] = np.array(counts, np.int32)
    example = ops.keep_objects(example, kept)
    if self.scores_masks:
      example["original_id_map"] = example["instance_mask"]
    return example

  def check(
    self, example: Example, num_classes: int | None, name: Callable[[], str]
  ) -> None:
    """Refuses objects of a class that there is not, and too many to lose."""
    labels = example["objects"]["label"]
    if num_classes and len(labels):
      worst = labels.min() if labels.min() < 0 else labels.max()
      if not 0 <= worst < num_classes:
        raise ValueError(
          f"The class {worst} of an object of {name()} is outside the class "
          f"count: there are {num_classes} classes."
        )
    if self.evaluation and len(labels) > self.max_objects:
      raise ValueError(
        f"{name()} has {len(labels)} objects, of which an evaluation must not "
        f"lose any: raise config.data.objects.max_objects={self.max_objects}."
      )

  def blank(self, *shape: int) -> Batch:
    """Empty places for the objects of stacked images, but for their masks."""
    room = (*shape, self.max_objects)
    arrays = {
      "size": np.zeros((*shape, 2), np.int32),
      "boxes": np.zeros((*room, 4), np.float32),
      "box_label": np.full(room, -1, np.int32),
      "object_counts": np.zeros((*shape, _COLUMNS), np.int32),
    }
    if self.evaluation:
      arrays["box_pixels"] = np.zeros((*room, 4), np.float32)
      arrays["box_area"] = np.zeros(room, np.float32)
      arrays["box_crowd"] = np.zeros(room, bool)
    return arrays

  def blank_masks(
    self, n: int, canvas: tuple[int, int], image_hw: tuple[int, int]
  ) -> Batch:
    """Empty places for the masks of n images, if there are any.

    Args:
      n: images.
      canvas: that they lie on.
      image_hw: that holds all of them as they were decoded.
    """
    shapes = {"box_id_map": canvas} if self.masks else {}
    if self.scores_masks:
      shapes["original_id_map"] = image_hw
    dtype = id_dtype(self.max_objects)
    return {k: np.zeros((n, *hw), dtype) for k, hw in shapes.items()}

  def write(self, batch: Batch, row: int, example: Example) -> None:
    """Writes the objects of an image, whose ops are done, and their masks."""
    example, cut = self._largest(example)
    h, w = example["image"].shape[:2]
    objects = example["objects"]
    n = len(objects["boxes"])
    x0, y0, x1, y1 = (objects["boxes"] / np.array([w, h] * 2, np.float32)).T
    boxes = [(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0]
    batch["size"][row] = h, w
    batch["boxes"][row, :n] = np.stack(boxes, axis=1)
    batch["box_label"][row, :n] = objects["label"]
    batch["object_counts"][row] = example["object_counts"]
    batch["object_counts"][row, -1] = cut
    if self.masks:
      batch["box_id_map"][row, :h, :w] = example["instance_mask"]
    if self.scores_masks:
      whole = example["original_id_map"]
      batch["original_id_map"][row, : len(whole), : whole.shape[1]] = whole
    if self.evaluation:
      pixels = objects["pixels"]
      area = (pixels[:, 2:] - pixels[:, :2]).prod(axis=1)
      batch["box_pixels"][row, :n] = pixels
      batch["box_area"][row, :n] = objects.get("area", area)
      batch["box_crowd"][row, :n] = objects.get("is_crowd", False)

  def _largest(self, example: Example) -> tuple[Example, int]:
    """The example with its largest objects, and how many are left out."""
    boxes = example["objects"]["boxes"]
    if (cut := len(boxes) - self.max_objects) <= 0:
      return example, 0
    area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    kept = np.ones(len(boxes), bool)
    kept[np.argsort(-area, kind="stable")[self.max_objects :]] = False
    return ops.keep_objects(example, kept), cut


class ObjectFaults:
  """Counts what is wrong with the boxes, and says so now and then.

  Attributes:
    images: how many have been seen.
    boxes: how many boxes they have.
    counts: how many of those have each flag; by 0, how many were cut.
  """

  def __init__(
    self,
    name: Callable[[int], str],
    *,
    required: bool,
    patience: int = 100,
    empty: int = 1000,
  ):
    """Sets the limits.

    Args:
      name: of an image, by its id: the source's.
      required: whether there is no task without any box.
      patience: how many boxes to see before it is asked how many are dropped.
      empty: how many images to see before there has to be a box.
    """
    self._name, self._required = name, required
    self._patience, self._empty = patience, empty
    self.images = self.boxes = 0
    self.counts = dict.fromkeys(_TEXTS, 0)

  def update(self, host: dict[str, np.ndarray]) -> None:
    """Takes the host's part of a batch; logs at 1, 10, 100, ... of a kind.

    Raises:
      ValueError: if more than half of the boxes had to be dropped, or boxes
        are required and no image has one.
    """
    there = host["example_id"] >= 0
    seen, *columns = host["object_counts"][there].T
    self.images += int(there.sum())
    self.boxes += int(seen.sum())
    for flag, column in zip(_TEXTS, columns):
      before = self.counts[flag]
      total = self.counts[flag] = before + int(column.sum())
      if total and (before == 0 or len(str(total)) > len(str(before))):
        first = self._name(int(host["example_id"][there][column > 0][0]))
        logging.warning(
          "%d of %d boxes %s. Such a one is in %s.",
          total,
          self.boxes,
          _TEXTS[flag],
          first,
        )
    self._check()

  def _check(self) -> None:
    kinds = [f for f in FLAGS if f != CLIPPED]
    dropped = {f: self.counts[f] for f in kinds if self.counts[f]}
    if self.boxes >= self._patience and sum(dropped.values()) > self.boxes / 2:
      why = "; ".join(f"{n} {FLAGS[f]}" for f, n in dropped.items())
      raise ValueError(
        f"Of {self.boxes} boxes of config.data.source, {why}. Boxes are in "
        "pixels of their image; only TFDS has fractions."
      )
    if self._required and self.images >= self._empty and not self.boxes:
      raise ValueError(
        f"None of the first {self.images} images has a box: look at the "
        "annotations of config.data.source."
      )
