"""Panoptic quality: by hand, by its definition, and over batches."""

import csv
import re

import numpy as np
import pytest

from big_vision_like.evaluators import panoptic

NAMES = ("ant", "bee", "sky")
IS_THING = (True, True, False)


def segments(*parts):
  """A row of pixels: how many of which segment."""
  return np.concatenate([[k] * n for k, n in parts])[None].astype(int)


def test_counts_by_hand():
  """With void and crowds; an IoU of one half is no match."""
  true = segments((1, 10), (0, 6), (2, 6), (3, 8), (0, 5))
  label, crowd = np.array([0, 1, 0, -1]), np.array([0, 0, 1, 0], bool)
  found = segments(
    (1, 8),  # 8 of 10 of the first, and 2 of nobody's: IoU .8
    (2, 2),  # wrong: on two pixels of the first
    (1, 2),
    (0, 4),
    (3, 3),  # half of the second: wrong, and the second is missed
    (0, 3),
    (4, 5),  # mostly on the crowd of its class: neither right nor wrong
    (5, 3),  # as much on it, but of another class: wrong
    (4, 1),
    (6, 4),  # nobody's pixels: neither
  )
  counts = panoptic.compare(
    found, np.array([0, 1, 1, 0, 1, 2]), true, label, crowd, 4
  )
  assert counts.tolist() == [[1, 0, 0, 0.8], [0, 3, 1, 0], [0] * 4, [0] * 4]
  scores = panoptic.summarize(counts, (True, False, False))
  want = dict(PQ=0.4, SQ=0.4, RQ=0.5, PQ_things=0.8, SQ_things=0.8)
  want |= dict(RQ_things=1, PQ_stuff=0, SQ_stuff=0, RQ_stuff=0)
  assert scores == pytest.approx(want, abs=1e-15)


def by_definition(found, found_label, true, true_label, crowd, classes):
  """Pair by pair, with sets of pixels."""
  pixels = lambda m, k: set(np.flatnonzero(m.ravel() == k))
  t = {k: pixels(true, k + 1) for k in range(len(true_label))}
  f = {k: pixels(found, k + 1) for k in range(len(found_label))}
  void, counts = pixels(true, 0), np.zeros((classes, 4))
  hit_t, hit_f = set(), set()
  for i, a in t.items():
    for j, b in f.items():
      if true_label[i] != found_label[j] or crowd[i]:
        continue
      iou = len(a & b) / max(len(a | (b - void)), 1)
      if iou > 0.5:
        counts[true_label[i]] += 1, 0, 0, iou
        hit_t.add(i)
        hit_f.add(j)
  for i, a in t.items():
    if a and i not in hit_t and not crowd[i]:
      counts[true_label[i], 2] += 1
  for j, b in f.items():
    excused = void.union(
      *(t[i] for i in t if crowd[i] and true_label[i] == found_label[j])
    )
    if j not in hit_f and not len(b & excused) / len(b) > 0.5:
      counts[found_label[j], 1] += 1
  return counts


def test_counts_are_those_of_the_definition():
  rng, total = np.random.default_rng(0), 0
  for _ in range(60):
    true = np.repeat(np.repeat(rng.integers(0, 6, (4, 4)), 3, 0), 3, 1)
    true_label = rng.integers(0, 3, 6)
    crowd = rng.random(6) < 0.2
    # Moved by a pixel, and here and there another.
    found = np.roll(true, rng.integers(-1, 2, 2), (0, 1))
    found = np.where(rng.random(true.shape) < 0.15, 0, found)
    found_label = true_label[:5].copy()
    found_label[rng.integers(5)] = rng.integers(3)
    left = np.flatnonzero([(found == k + 1).any() for k in range(5)])
    new = np.zeros(7, int)
    new[left + 1] = np.arange(1, len(left) + 1)
    args = new[found], found_label[left], true, true_label, crowd, 3
    counts = panoptic.compare(*args)
    np.testing.assert_allclose(counts, by_definition(*args), atol=1e-12)
    total = total + counts
  assert (total > 10).all()  # Each kind occurs.


class Data:
  """Batches of three rows, the second without an image.

  Masks are those of the truth at half its size, on a wider canvas.
  """

  label_names, is_thing = NAMES, IS_THING

  def __init__(self):
    rng = np.random.default_rng(0)
    true = np.repeat(np.repeat(rng.integers(1, 4, (5, 2, 3)), 4, 1), 4, 2)
    small = true[:, ::2, ::2]
    masks = np.full((5, 4, 8, 8), -9.0, np.float32)
    masks[:, :3, :4, :6] = 9.0 * (
      small[:, None] == np.array([[[1]], [[2]], [[3]]])
    )
    self.device = dict(
      image=np.zeros((5, 8, 8, 3), np.uint8),
      logits=np.tile(9 * np.eye(4, dtype=np.float32), (5, 1, 1)),
      boxes=np.full((5, 4, 4), 0.5, np.float32),
      masks=masks,
      box_label=np.tile(np.array([0, 1, 2, -1]), (5, 1)),
      size=np.tile(np.array([4, 6]), (5, 1)),
    )
    whole = np.zeros((5, 9, 13), np.uint8)
    whole[:, :8, :12] = true
    self.host = dict(
      example_id=np.arange(5) + 10,
      image_hw=np.tile(np.array([8, 12]), (5, 1)),
      box_crowd=np.zeros((5, 4), bool),
      original_id_map=whole,
    )

  def __call__(self, **_):
    for rows in ([0, 1, 2], [3, 1, 4]):
      batch = {k: x[rows] for k, x in self.device.items()}
      batch["mask"] = np.array([True, False, True])
      yield batch, {k: x[rows] for k, x in self.host.items()}


def run(data, folder, **settings):
  evaluator = panoptic.Evaluator(images=0, **settings)
  return evaluator.run(predict=lambda x: x, batches=data, folder=folder)


def test_right_segments_score_one(tmp_path):
  data = Data()
  scores = run(data, tmp_path)
  kinds = ("", "_things", "_stuff")
  names = [f"{s}{k}" for k in kinds for s in panoptic.SCORES]
  assert scores == dict.fromkeys(names, 1.0) | {"examples": 4}
  with (tmp_path / "pq_by_class.csv").open() as f:
    rows = list(csv.DictReader(f))
  assert [(r["class"], r["kind"]) for r in rows] == [
    *(("ant", "thing"), ("bee", "thing"), ("sky", "stuff"))
  ]
  there = [(data.host["original_id_map"][i] == 1).any() for i in (0, 2, 3, 4)]
  assert int(rows[0]["tp"]) == sum(there)
  data.is_thing = None
  assert set(run(data, tmp_path)) == {*panoptic.SCORES, "examples"}


def test_a_mislabelled_query_costs_two_classes(tmp_path):
  data = Data()
  data.device["logits"][:, 1] = data.device["logits"][:, 0]
  scores = run(data, tmp_path)
  assert scores["RQ_stuff"] == 1
  with (tmp_path / "pq_by_class.csv").open() as f:
    ant, bee, _ = csv.DictReader(f)
  assert int(ant["fp"]) == int(bee["fn"]) > 0
  assert scores["PQ"] == pytest.approx((float(ant["PQ"]) + 1) / 3)
  # Above the threshold, nothing is found.
  assert run(data, tmp_path, threshold=1.0)["PQ"] == 0


def refused(data, sentence):
  with pytest.raises(ValueError, match=re.escape(sentence)):
    run(data, None)


def test_refusals():
  data = Data()
  data.device["masks"][3, 1, 2, 2] = np.nan
  refused(data, "predicted for example 13 is no number: masks")
  data = Data()
  del data.device["masks"]
  refused(data, "config.model predicts none: it needs a mask head")
  data = Data()
  del data.host["original_id_map"]
  refused(data, "lacks ['original_id_map']: set config.data.objects.masks")

  class Unread(Data):
    def __call__(self):
      for batch, host in super().__call__():
        yield batch | {"mask": batch["mask"] & False}, host

  refused(Unread(), "There is nothing to evaluate")
