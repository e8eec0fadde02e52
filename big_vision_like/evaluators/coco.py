"""Average precision of boxes as COCO defines it, by its own code.

pycocotools scores one class at a time here, which gives the same numbers as all
at once and keeps in memory what it builds for one class only.
"""

import contextlib
import csv
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from big_vision_like import api, postprocess
from big_vision_like.evaluators import classification, detections

# What pycocotools sums up, in its order.
SCORES = (
  *("AP", "AP50", "AP75", "APs", "APm", "APl"),
  *("AR1", "AR10", "AR100", "ARs", "ARm", "ARl"),
)
_HOST = ("example_id", "image_hw", "box_pixels", "box_area", "box_crowd")


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """Scores the boxes of one pass over the evaluation data.

  Every query gives one box with its best class, "no object" left out: there is
  neither a threshold nor any suppression of others. Boxes are compared in
  pixels of the original image, and small, medium and large objects are those of
  less than 32², of up to 96² and of more of its pixels. Crowds are regions
  where a box is neither right nor wrong.

  `run` gives `AP` (the mean over thresholds of IoU from .5 to .95), `AP50`,
  `AP75`, `APs`, `APm`, `APl`, the recalls `AR1`, `AR10`, `AR100`, `ARs`, `ARm`,
  `ARl`, and `examples`; what no object of the data is for is left out. The
  folder gets `ap_by_class.csv` and, see evaluators/detections.py,
  `detections.png`.

  Attributes:
    images: how many to draw, at most.
  """

  images: int = detections.IMAGES

  def run(
    self, *, predict: api.Predict, batches: api.Batches, folder: Path
  ) -> dict[str, float]:
    found, truth, examples = gather(predict, batches())
    names = batches.label_names
    classes = [score_class(found, truth, k) for k in range(len(names))]
    if jax.process_index() == 0:
      write_table(names, truth, classes, folder / "ap_by_class.csv")
    detections.draw(
      predict=predict,
      batches=batches,
      folder=folder,
      images=self.images,
      threshold=detections.THRESHOLD,
    )
    scores = dict(zip(SCORES, summarize(classes)))
    seen = {k: float(x) for k, x in scores.items() if x >= 0}
    return seen | {"examples": float(examples)}


@dataclasses.dataclass(frozen=True)
class Boxes:
  """Boxes of many images, one a row.

  Attributes:
    image: example_id of the image.
    label: class.
    xywh: left, top, width and height in pixels of the original image.
    score: of a prediction; or
    area, crowd: of an object.
  """

  image: np.ndarray
  label: np.ndarray
  xywh: np.ndarray
  score: np.ndarray | None = None
  area: np.ndarray | None = None
  crowd: np.ndarray | None = None

  def __getitem__(self, rows: np.ndarray) -> "Boxes":
    parts = {k: x if x is None else x[rows] for k, x in vars(self).items()}
    return Boxes(**parts)


def gather(predict: api.Predict, batches: Any) -> tuple[Boxes, Boxes, int]:
  """What is predicted, what is there, and the number of images.

  Raises:
    ValueError: if there are no images, or none with boxes to compare with, or
      if a prediction is no number.
  """
  found, truth, examples = [], [], 0
  for batch, host in batches:
    out = predict(batch)
    missing = sorted({*_HOST} - {*host} | {"box_label"} - {*out})
    if missing:
      raise ValueError(
        "COCO's scores compare with the boxes of the original image, but the "
        f"evaluation data lacks {missing}: look at config.data.objects."
      )
    host = {k: classification.global_rows(batch, host[k]) for k in _HOST}
    rows = np.flatnonzero(np.asarray(out["mask"], bool))
    out = {k: np.asarray(x)[rows] for k, x in out.items()}
    host = {k: x[rows] for k, x in host.items()}
    examples += len(rows)
    found.append(_found(out, host))
    truth.append(_truth(out, host))
  if not examples:
    raise ValueError(
      "There is nothing to evaluate: no image of the evaluation data can be "
      "read. Look at its split and limit in config.evals."
    )
  return _concatenate(found), _concatenate(truth), examples


def _found(out, host):
  parts = postprocess.detections(out["logits"], out["boxes"], host["image_hw"])
  bad = ~np.isfinite(parts[0]).all(1) | ~np.isfinite(parts[2]).all((1, 2))
  if bad.any():
    raise ValueError(
      "Boxes or scores that are no numbers are predicted for the examples "
      f"{host['example_id'][bad].tolist()}."
    )
  score, label, boxes = (x.reshape(-1, *x.shape[2:]) for x in parts)
  image = np.repeat(host["example_id"], parts[0].shape[1])
  return Boxes(image, label, _xywh(boxes), score=score)


def _truth(out, host):
  there = out["box_label"] >= 0
  return Boxes(
    host["example_id"][np.nonzero(there)[0]],
    out["box_label"][there],
    _xywh(host["box_pixels"][there]),
    area=host["box_area"][there],
    crowd=host["box_crowd"][there],
  )


def _xywh(corners):
  corners = corners.astype(np.float64)
  return np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)


def _concatenate(parts):
  columns = zip(*(vars(part).values() for part in parts))
  return Boxes(*(None if c[0] is None else np.concatenate(c) for c in columns))


# -- pycocotools --------------------------------------------------------------


def score_class(
  found: Boxes, truth: Boxes, label: int
) -> dict[str, np.ndarray]:
  """The library's precision and recall of one class, at all settings."""
  found, truth = (x[x.label == label] for x in (found, truth))
  images = np.union1d(found.image, truth.image).tolist()
  # It prints what it does.
  with contextlib.redirect_stdout(io.StringIO()):
    run = COCOeval(
      _dataset(images, truth, area=truth.area, iscrowd=truth.crowd),
      _dataset(
        images, found, area=found.xywh[:, 2:].prod(1), score=found.score
      ),
      "bbox",
    )
    run.params.catIds = [0]
    run.evaluate()
    run.accumulate()
  return {key: run.eval[key] for key in ("precision", "recall")}


def _dataset(images: list[int], boxes: Boxes, **fields: np.ndarray) -> COCO:
  rows = zip(
    boxes.image.tolist(),
    boxes.xywh.tolist(),
    *(values.tolist() for values in fields.values()),
  )
  data = COCO()
  data.dataset = {
    "images": [{"id": i} for i in images],
    "categories": [{"id": 0}],
    # An id of 0 would count as no match.
    "annotations": [
      {"id": k, "image_id": image, "category_id": 0, "bbox": xywh, "iscrowd": 0}
      | dict(zip(fields, values))
      for k, (image, xywh, *values) in enumerate(rows, 1)
    ],
  }
  data.createIndex()
  return data


def summarize(classes: Sequence[dict[str, np.ndarray]]) -> np.ndarray:
  """SCORES over all classes, by the library; -1 where there is no object."""
  whole = COCOeval(iouType="bbox")
  whole.eval = {
    key: np.concatenate([c[key] for c in classes], axis)
    for key, axis in (("precision", 2), ("recall", 1))
  }
  with contextlib.redirect_stdout(io.StringIO()):
    whole.summarize()
  return whole.stats


def write_table(
  names: Sequence[str],
  truth: Boxes,
  classes: Sequence[dict[str, np.ndarray]],
  path: Path,
) -> None:
  """A row for each class that has objects."""
  with path.open("w", newline="") as f:
    writer = csv.writer(f)
    writer.writerow(["class", "objects", *SCORES])
    for k, (name, one) in enumerate(zip(names, classes)):
      count = int(((truth.label == k) & ~truth.crowd).sum())
      if count:
        scores = summarize([one])
        cells = [x if x >= 0 else "" for x in scores.tolist()]
        writer.writerow([name, count, *cells])
