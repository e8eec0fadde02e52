"""Panoptic quality: how well segments cover things and stuff, pixel by pixel.

Kirillov et al., "Panoptic Segmentation" (arXiv 1801.00868). Reference:
cocodataset/panopticapi, `evaluation.py`, which is not on PyPI. Segments are
those of DETR (see postprocess.py), at the size of the original image.
"""

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from big_vision_like import api, postprocess
from big_vision_like.evaluators import classification, detections

SCORES = ("PQ", "SQ", "RQ")
_HOST = ("example_id", "image_hw", "box_crowd", "original_id_map")


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """Scores the segments of one pass over the evaluation data.

  A segment found and a true one of its class match if their IoU is above 1/2.
  A class has SQ, the mean IoU of its matches, RQ = TP / (TP + FP/2 + FN/2), and
  PQ = SQ * RQ. Pixels that belong to no true segment do not count, nor does a
  segment found that lies for more than half on them and on crowds of its class.

  `run` gives `PQ`, `SQ` and `RQ`, the means over the classes that are there or
  found, for data that tells things and stuff apart also those of either, as in
  `PQ_things` and `PQ_stuff`, and `examples`. The folder gets `pq_by_class.csv`
  and, see evaluators/detections.py, `detections.png`.

  Attributes:
    threshold: of the probability of a segment.
    images: how many to draw, at most.
  """

  threshold: float = postprocess.SEGMENT_THRESHOLD
  images: int = detections.IMAGES

  def run(
    self, *, predict: api.Predict, batches: api.Batches, folder: Path
  ) -> dict[str, float]:
    is_thing = batches.is_thing
    counts, examples = self.count(predict, batches)
    names = postprocess.all_names(batches.label_names, len(counts))
    if jax.process_index() == 0:
      write_table(names, is_thing, counts, folder / "pq_by_class.csv")
    detections.draw(
      predict=predict,
      batches=batches,
      folder=folder,
      images=self.images,
      threshold=self.threshold,
    )
    return summarize(counts, is_thing) | {"examples": float(examples)}

  def count(
    self, predict: api.Predict, batches: Any
  ) -> tuple[Float[np.ndarray, "c 4"], int]:
    """The sum of `compare` over all images, and their number.

    Raises:
      ValueError: if there are no images, or none with segments to compare with,
        or if a prediction is no number.
    """
    counts, examples = 0, 0
    for batch, host in batches():
      out = predict(batch)
      _check(out, host)
      host = {k: classification.global_rows(batch, host[k]) for k in _HOST}
      classes = max(len(batches.label_names), out["logits"].shape[-1] - 1)
      for row in np.flatnonzero(out["mask"]):
        one = {k: np.asarray(x[row]) for k, x in {**out, **host}.items()}
        postprocess.check_finite(one, f"example {one['example_id']}")
        h, w = one["image_hw"]
        found = postprocess.find(
          one,
          batch["image"].shape[1:3],
          (h, w),
          is_thing=batches.is_thing,
          threshold=self.threshold,
        )
        counts = counts + compare(
          found.id_map,
          found.label,
          one["original_id_map"][:h, :w],
          one["box_label"],
          one["box_crowd"],
          classes,
        )
        examples += 1
    if not examples:
      raise ValueError(
        "There is nothing to evaluate: no image of the evaluation data can be "
        "read. Look at its split and limit in config.evals."
      )
    return counts, examples


def _check(out, host):
  if "masks" not in out:
    raise ValueError(
      "Panoptic quality is that of masks, and config.model predicts none: it "
      "needs a mask head, as DETR has with masks=True."
    )
  missing = sorted({*_HOST} - {*host} | {"box_label"} - {*out})
  if missing:
    raise ValueError(
      "Panoptic quality compares with the segments of the original image, but "
      f"the evaluation data lacks {missing}: set config.data.objects.masks."
    )


def compare(
  found_map: Int[np.ndarray, "h w"],
  found_label: Int[np.ndarray, " n"],
  true_map: Int[np.ndarray, "h w"],
  true_label: Int[np.ndarray, " o"],
  crowd: Bool[np.ndarray, " o"],
  classes: int,
) -> Float[np.ndarray, "classes 4"]:
  """Of one image, TP, FP, FN and the sum of the matches' IoU, by class.

  Maps are 0, or 1 + the position of a segment in the labels; a true segment
  without a pixel is none. Of several crowds of a class, which COCO does not
  have, all count; in panopticapi the last.
  """
  rows, columns = len(true_label) + 1, len(found_label) + 1
  pairs = true_map.astype(np.int64) * columns + found_map
  both = np.bincount(pairs.ravel(), minlength=rows * columns)
  both = both.reshape(rows, columns)
  true_area, found_area = both[1:].sum(1), both[:, 1:].sum(0)
  void, overlap = both[0, 1:], both[1:, 1:]
  same = true_label[:, None] == found_label
  union = true_area[:, None] + found_area - void - overlap
  # More than half: no segment matches twice.
  match = same & ~crowd[:, None] & (2 * overlap > union)
  missed = ~match.any(1) & ~crowd & (true_area > 0)
  excused = void + (overlap * (same & crowd[:, None])).sum(0)
  wrong = ~match.any(0) & (2 * excused <= found_area)
  at, of = np.nonzero(match)
  counted = (
    (true_label[at], None),
    (found_label[wrong], None),
    (true_label[missed], None),
    (true_label[at], overlap[at, of] / union[at, of]),
  )
  counts = [np.bincount(k, weights, classes) for k, weights in counted]
  return np.stack(counts, 1).astype(np.float64)


def qualities(
  counts: Float[np.ndarray, "c 4"],
) -> tuple[Float[np.ndarray, "c 3"], Bool[np.ndarray, " c"]]:
  """PQ, SQ and RQ of each class, and whether it is there or found."""
  tp, fp, fn, iou = counts.T
  total = tp + fp / 2 + fn / 2
  seen = total > 0
  sq, rq = iou / np.maximum(tp, 1), tp / np.where(seen, total, 1)
  return np.stack([sq * rq, sq, rq], 1), seen


def summarize(
  counts: Float[np.ndarray, "c 4"], is_thing: Sequence[bool] | None
) -> dict[str, float]:
  """The means over classes, without what has none."""
  values, seen = qualities(counts)
  groups = {"": seen}
  if is_thing is not None:
    thing = postprocess.are_things(np.arange(len(counts)), is_thing)
    groups |= {"_things": seen & thing, "_stuff": seen & ~thing}
  return {
    f"{score}{name}": float(value)
    for name, group in groups.items()
    if group.any()
    for score, value in zip(SCORES, values[group].mean(0))
  }


def write_table(
  names: Sequence[str],
  is_thing: Sequence[bool] | None,
  counts: Float[np.ndarray, "c 4"],
  path: Path,
) -> None:
  """A row for each class that is there or found."""
  values, seen = qualities(counts)
  thing = postprocess.are_things(np.arange(len(counts)), is_thing)
  with path.open("w", newline="") as f:
    writer = csv.writer(f)
    writer.writerow(["class", "kind", *SCORES, "tp", "fp", "fn"])
    for k in np.flatnonzero(seen):
      kind = "thing" if thing[k] else "stuff"
      cells = [*values[k].tolist(), *map(int, counts[k, :3])]
      writer.writerow([names[k], kind, *cells])
