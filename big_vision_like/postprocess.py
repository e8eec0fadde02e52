"""From what a detector says to the objects and segments of an image.

Reference: facebookresearch/detr @ 29901c5, `PostProcess` in models/detr.py and
`PostProcessPanoptic` in models/segmentation.py. NumPy, on the host.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import cv2
import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image

# A segment of so few pixels is none.
MIN_AREA = 4
# A score from which on an object is shown: DETR's for boxes (its notebook), and
# for segments (its panoptic evaluation).
BOX_THRESHOLD, SEGMENT_THRESHOLD = 0.7, 0.85
_PREDICTED = ("logits", "boxes", "masks")

Detections = tuple[
  Float[np.ndarray, "b q"], Int[np.ndarray, "b q"], Float[np.ndarray, "b q 4"]
]


@dataclasses.dataclass(frozen=True)
class Found:
  """The objects of one image, the surest first.

  Attributes:
    query: int [n], which query each comes from.
    label: int [n], its class.
    score: float [n], its probability.
    box: float [n,4], (x0, y0, x1, y1) in pixels, within the image.
    id_map: int [H,W] of segments, 0 or 1 + the position of one; None of boxes.
  """

  query: np.ndarray
  label: np.ndarray
  score: np.ndarray
  box: np.ndarray
  id_map: np.ndarray | None = None


def detections(
  logits: Float[np.ndarray, "b q c"],
  boxes: Float[np.ndarray, "b q 4"],
  image_hw: Int[np.ndarray, "b 2"],
) -> Detections:
  """Score, class and box of each query.

  The best class counts even where "no object", the last one, is more likely.
  Boxes are (x0, y0, x1, y1) in pixels of images of the size given.
  """
  p = _softmax(logits)[..., :-1]
  center, half = boxes[..., :2], boxes[..., 2:] / 2
  corners = np.concatenate([center - half, center + half], -1)
  hw = image_hw[:, None]
  scale = np.concatenate([hw[..., ::-1], hw[..., ::-1]], -1)
  return p.max(-1), p.argmax(-1), corners * scale


def find(
  one: Mapping[str, np.ndarray],
  canvas: Sequence[int],
  image_hw: Sequence[int],
  *,
  is_thing: Sequence[bool] | None,
  threshold: float | None = None,
) -> Found:
  """Segments where the model has masks, else boxes.

  Args:
    one: of an image, what the task's `predict` gives.
    canvas: (height, width) that it lies on.
    image_hw: (height, width) that is asked for.
    is_thing: see `segments`.
    threshold: of the score; None: SEGMENT_THRESHOLD or BOX_THRESHOLD.
  """
  if "masks" not in one:
    threshold = BOX_THRESHOLD if threshold is None else threshold
    return objects(one["logits"], one["boxes"], image_hw, threshold=threshold)
  return segments(
    one["logits"],
    one["boxes"],
    one["masks"],
    one["size"],
    image_hw,
    stride=canvas[0] // one["masks"].shape[1],
    is_thing=is_thing,
    threshold=SEGMENT_THRESHOLD if threshold is None else threshold,
  )


def are_things(
  label: Int[np.ndarray, " n"], is_thing: Sequence[bool] | None
) -> Bool[np.ndarray, " n"]:
  """Whether classes are things; without knowledge of any, all are.

  Those of a head that the data does not have are stuff.
  """
  if is_thing is None:
    return np.ones(len(label), bool)
  known = np.append(np.asarray(is_thing, bool), False)
  return known[np.minimum(label, len(is_thing))]


def all_names(names: Sequence[str], classes: int) -> list[str]:
  """Names of all classes of a head that may have more than the data."""
  return [*names, *(f"class {k}" for k in range(len(names), classes))]


def check_finite(out: Mapping[str, np.ndarray], name: str) -> None:
  """Refuses predictions of an image that are no numbers."""
  bad = [k for k in _PREDICTED if k in out and not np.isfinite(out[k]).all()]
  if bad:
    raise ValueError(
      f"What is predicted for {name} is no number: {', '.join(bad)}."
    )


def _softmax(logits):
  logits = logits.astype(np.float64)
  p = np.exp(logits - logits.max(-1, keepdims=True))
  return p / p.sum(-1, keepdims=True)


def objects(
  logits: Float[np.ndarray, "q c"],
  boxes: Float[np.ndarray, "q 4"],
  image_hw: Sequence[int],
  *,
  threshold: float,
) -> Found:
  """The queries whose score is above a threshold."""
  score, label, corners = (
    x[0] for x in detections(logits[None], boxes[None], np.array([image_hw]))
  )
  query = np.argsort(-score, kind="stable")
  query = query[score[query] > threshold]
  corners = np.clip(corners[query], 0, np.tile(image_hw[::-1], 2))
  return Found(query, label[query], score[query], corners)


def segments(
  logits: Float[np.ndarray, "q c"],
  boxes: Float[np.ndarray, "q 4"],
  masks: Float[np.ndarray, "q h w"],
  size: Sequence[int],
  image_hw: Sequence[int],
  *,
  stride: int,
  is_thing: Sequence[bool] | None,
  threshold: float,
) -> Found:
  """What each pixel of an image belongs to: DETR's panoptic segmentation.

  Each pixel goes to the largest mask of the queries that are sure of a class.
  Then segments of up to MIN_AREA pixels are left out and the pixels go to the
  others, until none is so small. A class of stuff has one segment, that of its
  first query: as in the published code, all its pixels count for that at first,
  and then the other masks are left out as empty.

  That code resizes the canvas to the size of the image, which is right only
  where they are the same; here the image is cut out of its canvas.

  Args:
    logits, boxes, masks: of one image on its canvas, from the task's `predict`.
    size: (height, width) of the image on the canvas.
    image_hw: (height, width) of the segments that are asked for.
    stride: pixels of the canvas to a mask's.
    is_thing: of each class, others are stuff; None: all are things.
    threshold: of the probability, "no object" being a class too.
  """
  found = objects(logits, boxes, image_hw, threshold=threshold)
  sure = found.query[logits[found.query].argmax(-1) < logits.shape[-1] - 1]
  query = np.sort(sure)
  label = logits[query].argmax(-1)
  fine = at_pixels(masks[query], size, image_hw, stride)
  owner, first = np.arange(len(query)), {}
  for k in np.flatnonzero(~are_things(label, is_thing)):
    owner[k] = first.setdefault(label[k], k)
  id_map = np.zeros(tuple(image_hw), np.int32)
  while len(query):
    winner = owner[fine.argmax(0)]
    large = np.bincount(winner.ravel(), minlength=len(query)) > MIN_AREA
    if large.all():
      # From the order of queries to that of scores.
      order = found.query[np.isin(found.query, query)]
      place = np.zeros(len(query), np.int32)
      place[np.searchsorted(query, order)] = np.arange(1, len(query) + 1)
      id_map = place[winner]
      break
    query, fine = query[large], fine[large]
    owner = np.arange(len(query))
  kept = np.isin(found.query, query)
  parts = (x[kept] for x in (found.query, found.label, found.score, found.box))
  return Found(*parts, id_map)


def at_pixels(
  masks: Float[np.ndarray, "n h w"],
  size: Sequence[int],
  image_hw: Sequence[int],
  stride: int,
) -> Float[np.ndarray, "n h2 w2"]:
  """Maps of a canvas at the pixels of an image: bilinear, then the nearest.

  Args: see `segments`.
  """
  rows, columns = (-(-n // stride) for n in size)
  at = np.ix_(*map(_nearest, size, image_hw))
  fine = np.empty((len(masks), *image_hw), np.float32)
  for out, mask in zip(fine, masks):
    part = np.ascontiguousarray(mask[:rows, :columns], np.float32)
    whole = (columns * stride, rows * stride)
    out[:] = cv2.resize(part, whole, interpolation=cv2.INTER_LINEAR)[at]
  return fine


def _nearest(old: int, new: int) -> Int[np.ndarray, " n"]:
  """Which of `old` pixels are the nearest, by Pillow's rounding."""
  line = Image.fromarray(np.arange(old, dtype=np.int32)[None])
  return np.asarray(line.resize((new, 1), Image.Resampling.NEAREST))[0]
