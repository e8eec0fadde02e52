"""COCO's scores: those of the library on the same boxes in its own files."""

import contextlib
import csv
import io
import json
import re

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from big_vision_like import postprocess
from big_vision_like.evaluators import coco

CLASSES, QUERIES, SLOTS = 4, 23, 6
NAMES = ("ant", "bee", "cat", "dog")


class Data:
  """Batches of four rows, the last of each without an image.

  Boxes of all sizes, crowds, images without an object or with several of a
  class over one another; predictions near the truth and far from it.
  """

  label_names = NAMES

  def __init__(self, images=18, seed=0, classes=CLASSES):
    rng = np.random.default_rng(seed)
    self.hw = rng.integers(300, 640, (images, 2))
    count = rng.integers(0, SLOTS + 1, images)
    self.label = np.where(
      np.arange(SLOTS) < count[:, None],
      rng.integers(0, classes, (images, SLOTS)),
      -1,
    )
    self.crowd = rng.random((images, SLOTS)) < 0.15
    # Sides of 8 to some 250 pixels.
    sides = np.exp(rng.uniform(2, 5.5, (images, SLOTS, 2)))
    low = rng.uniform(0, 1, sides.shape) * (self.hw[:, None, ::-1] - sides)
    self.pixels = np.concatenate([low, low + sides], -1).astype(np.float32)
    # That of a mask, not of the box.
    self.area = (sides.prod(-1) * rng.uniform(0.5, 1, sides.shape[:2])).astype(
      np.float32
    )
    near = rng.integers(0, SLOTS, (images, QUERIES))
    pixels = np.take_along_axis(self.pixels, near[..., None], 1)
    side = pixels[..., 2:] - pixels[..., :2]
    noise = rng.normal(size=pixels.shape) * np.concatenate([side, side], -1)
    pixels = pixels + noise * rng.choice([0.02, 0.1, 0.5], (images, QUERIES, 1))
    x0, y0, x1, y1 = np.moveaxis(pixels, -1, 0)
    w, h = self.hw[:, 1:], self.hw[:, :1]
    boxes = [(x0 + x1) / w / 2, (y0 + y1) / h / 2, (x1 - x0) / w, (y1 - y0) / h]
    self.boxes = np.stack(boxes, -1).astype(np.float32)
    logits = rng.normal(size=(images, QUERIES, CLASSES + 1))
    label = np.take_along_axis(self.label, near, 1)
    hit = (label >= 0) & (rng.random(near.shape) < 0.7)
    logits += 3 * np.eye(CLASSES + 1)[np.where(hit, label, CLASSES)]
    # Few digits: scores tie, within images and between them.
    self.logits = np.round(logits).astype(np.float32)
    # Not in the order of the batches.
    self.id = rng.permutation(1000)[:images]

  def __call__(self):
    for at in range(0, len(self.id), 3):
      rows = np.minimum(np.arange(at, at + 4), len(self.id) - 1)
      mask = np.arange(at, at + 4) < min(at + 3, len(self.id))
      device = dict(logits=self.logits, boxes=self.boxes, box_label=self.label)
      host = dict(
        example_id=self.id,
        image_hw=self.hw,
        box_pixels=self.pixels,
        box_area=self.area,
        box_crowd=self.crowd,
      )
      batch = {k: x[rows] for k, x in device.items()} | {"mask": mask}
      yield batch, {k: x[rows] for k, x in host.items()}


def run(data, folder):
  evaluator = coco.Evaluator(images=0)
  return evaluator.run(predict=lambda x: x, batches=data, folder=folder)


def by_files(data, folder):
  """The twelve numbers from files as COCO has them, with category ids."""
  to_list = lambda x: np.asarray(x, np.float64).tolist()
  annotations, results = [], []
  # Scores that are equal in theory differ in the last bit by how they are
  # computed; they have a test of their own.
  score, label, _ = postprocess.detections(data.logits, data.boxes, data.hw)
  for i, image in enumerate(data.id.tolist()):
    for slot in np.flatnonzero(data.label[i] >= 0):
      x0, y0, x1, y1 = to_list(data.pixels[i, slot])
      annotations.append(
        {
          "id": len(annotations) + 1,
          "image_id": image,
          "category_id": 10 * int(data.label[i, slot]) + 7,
          "bbox": [x0, y0, x1 - x0, y1 - y0],
          "area": float(data.area[i, slot]),
          "iscrowd": int(data.crowd[i, slot]),
        }
      )
    scale = to_list(data.hw[i, [1, 0, 1, 0]])
    for query in range(QUERIES):
      cx, cy, w, h = to_list(data.boxes[i, query] * scale)
      results.append(
        {
          "image_id": image,
          "category_id": 10 * int(label[i, query]) + 7,
          "bbox": [cx - w / 2, cy - h / 2, w, h],
          "score": float(score[i, query]),
        }
      )
  file = {
    "images": [{"id": i} for i in data.id.tolist()],
    "categories": [{"id": 10 * k + 7, "name": n} for k, n in enumerate(NAMES)],
    "annotations": annotations,
  }
  (folder / "truth.json").write_text(json.dumps(file))
  (folder / "found.json").write_text(json.dumps(results))
  with contextlib.redirect_stdout(io.StringIO()):
    truth = COCO(folder / "truth.json")
    whole = COCOeval(truth, truth.loadRes(str(folder / "found.json")), "bbox")
    whole.evaluate()
    whole.accumulate()
    whole.summarize()
  return whole


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_the_librarys(seed, tmp_path, capsys):
  data = Data(seed=seed)
  scores = run(data, tmp_path)
  assert capsys.readouterr().out == ""
  want = by_files(data, tmp_path)
  assert scores.pop("examples") == len(data.id)
  assert list(scores) == list(coco.SCORES)
  np.testing.assert_allclose(list(scores.values()), want.stats, atol=1e-12)
  assert 0.05 < scores["AP"] < 0.95
  assert len(set(scores.values())) > 8
  with (tmp_path / "ap_by_class.csv").open() as f:
    rows = list(csv.DictReader(f))
  assert [row["class"] for row in rows] == list(NAMES)
  for k, row in enumerate(rows):
    precision = want.eval["precision"][:, :, k, 0, 2]
    np.testing.assert_allclose(float(row["AP"]), precision.mean(), atol=1e-12)
    there = (data.label == k) & ~data.crowd
    assert int(row["objects"]) == there.sum()


def test_perfect_boxes_score_one(tmp_path):
  data = Data()
  data.crowd[:] = False
  first = data.label[:, :1]
  data.label[:, 1:] = -1
  data.logits[:] = -5
  data.logits[..., -1] = (
    9  # All queries say "no object", and count all the same.
  )
  np.put_along_axis(data.logits[:, 3], np.maximum(first, 0), 5, 1)
  data.logits[first[:, 0] < 0, :, :-1] = -5
  low, high = data.pixels[:, 0, :2], data.pixels[:, 0, 2:]
  wh = data.hw[:, ::-1]
  box = np.concatenate([(low + high) / 2 / wh, (high - low) / wh], -1)
  data.boxes[:] = 0.5
  data.boxes[:, 3] = box
  scores = run(data, tmp_path)
  assert scores["AP"] > 0.999


def test_what_no_object_is_for_is_left_out(tmp_path):
  data = Data(classes=2)
  data.area[:] = 10.0
  data.pixels[..., 2:] = data.pixels[..., :2] + 3
  scores = run(data, tmp_path)
  assert {"APs", "ARs", "AP"} <= set(scores)
  assert not {"APm", "APl", "ARm", "ARl"} & set(scores)
  text = (tmp_path / "ap_by_class.csv").read_text()
  assert text.count("\n") == 3
  assert "cat" not in text
  data.label[:] = -1
  assert set(run(data, tmp_path)) == {"examples"}


def test_detections_of_the_published_code():
  """The first image of tests/losses/test_set_prediction.py, by DETR's code."""
  q, c = np.meshgrid(np.arange(6), np.arange(5), indexing="ij")
  logits = 2 * np.sin(1 + 2 * q + 0.7 * c * (q + 1))
  boxes = np.array([[0.5, 0.8, 0.2, 0.35]])
  score, label, corners = postprocess.detections(
    logits[None], np.broadcast_to(boxes, (1, 6, 4)), np.array([[480, 640]])
  )
  # atol: the published figures have five digits.
  want = [0.40620, 0.44042, 0.40729, 0.50264, 0.46245, 0.34480]
  np.testing.assert_allclose(score[0], want, atol=6e-6)
  assert label[0].tolist() == [1, 3, 1, 0, 3, 2]
  np.testing.assert_allclose(corners[0, 0], [256, 300, 384, 468], atol=1e-9)


def refused(data, sentence):
  with pytest.raises(ValueError, match=re.escape(sentence)):
    run(data, None)


def test_refusals():
  data = Data(images=5)
  data.boxes[4, 2, 1] = np.nan
  refused(
    data,
    "Boxes or scores that are no numbers are predicted for the examples "
    f"[{data.id[4]}].",
  )
  data = Data(images=5)
  data.logits[1, 3, 0] = np.inf
  with np.errstate(invalid="ignore"):
    refused(data, f"predicted for the examples [{data.id[1]}].")

  class Bare(Data):
    def __call__(self):
      for batch, host in super().__call__():
        yield batch, {"example_id": host["example_id"]}

  refused(
    Bare(),
    "lacks ['box_area', 'box_crowd', 'box_pixels', 'image_hw']: look at "
    "config.data.objects.",
  )

  class Unread(Data):
    def __call__(self):
      for batch, host in super().__call__():
        yield batch | {"mask": batch["mask"] & False}, host

  refused(Unread(), "There is nothing to evaluate")
