"""The budget curve and its cascades against counts by hand."""

import csv
import time

import numpy as np
import pytest
from matplotlib import image
from sklearn import metrics

from big_vision_like.evaluators import budget_curve, classification

N, C, ROWS, LENGTH = 60, 5, 4, 31
LABEL = np.arange(N) % C
MULTI = (LABEL[:, None] == np.arange(C)) | (
  np.random.default_rng(8).random((N, C)) < 0.2
)


def logits_at(budget):
  """The larger the budget, the less noise."""
  noise = np.random.default_rng(7).normal(size=(N, C))
  return (4 * MULTI - 2 + 20 / budget * noise).astype(np.float32)


class Data:
  """Packed batches of ten images, in an order that depends on the budget."""

  def __init__(self, *, multi_label, packed=True):
    self.multi_label, self.packed = multi_label, packed
    self.asked, self.calls = [], []

  def batches(self, *, split=None, **overrides):
    self.asked.append((split, overrides))
    budget = overrides["tokens"]
    order = np.random.default_rng(budget).permutation(N)
    for ids in order.reshape(-1, 10):
      batch = {"budget": budget, "ids": ids}
      if self.packed:
        # 10 images of budget - 1 tokens each, and padding.
        segments = np.zeros((ROWS, 10 * LENGTH), np.int32)
        segments.ravel()[: 10 * (budget - 1)] = 1
        batch["segment_ids"] = segments
      yield batch, {"example_id": self.spread(ids, -1)}

  def predict(self, batch):
    self.calls.append((batch["budget"], tuple(batch["ids"])))
    time.sleep(batch["budget"] * 1e-5)
    ids = batch["ids"]
    out = {
      "logits": self.spread(logits_at(batch["budget"])[ids], np.nan),
      "label": self.spread(LABEL[ids], -1),
      "mask": self.spread(np.ones(10, bool), False),
    }
    if self.multi_label:
      out["multi_label"] = self.spread(MULTI[ids].astype(np.uint8), 0)
    return out

  @staticmethod
  def spread(values, empty):
    """[10, ...] -> [4 rows, 3 slots, ...] with two empty slots."""
    out = np.full((12, *values.shape[1:]), empty, values.dtype)
    out[np.arange(12) % 6 != 4] = values
    return out.reshape(ROWS, 3, *values.shape[1:])


def run(data, folder, **settings):
  return budget_curve.Evaluator(**settings).run(
    predict=data.predict, batches=data.batches, folder=folder
  )


def read_table(folder):
  with (folder / "budget_curve.csv").open() as f:
    return list(csv.DictReader(f))


def test_each_budget_is_scored_like_a_classification(tmp_path):
  data = Data(multi_label=True)
  scores = run(data, tmp_path, tokens=(25, 9))
  assert data.asked == [(None, {"tokens": 9}), (None, {"tokens": 25})]
  for budget in (9, 25):
    logits = logits_at(budget)
    one = {"logits": logits, "multi_label": MULTI, "mask": np.ones(N, bool)}
    expected = classification.Evaluator().run(
      predict=lambda batch: batch,
      batches=lambda one=one: [(one, {})],
      folder=None,
    )
    for key in ("accuracy", "mAP", "calibration_error"):
      np.testing.assert_allclose(
        scores[f"{budget}tokens/{key}"], expected[key], rtol=1e-6
      )
    assert scores[f"{budget}tokens/tokens_per_image"] == budget - 1
  assert scores["9tokens/mAP"] < 0.99 * scores["25tokens/mAP"]
  assert scores["tokens_for_99pct"] == 24
  scores = run(data, tmp_path, tokens=(9, 200, 100))
  assert scores["100tokens/mAP"] == scores["200tokens/mAP"] == 1
  assert scores["tokens_for_99pct"] == 99


def test_the_first_batch_is_a_warm_up_and_is_timed_afterwards(tmp_path):
  data = Data(multi_label=False)
  scores = run(data, tmp_path, tokens=(9, 400))
  first, second, third = data.calls[:3]
  assert first == second != third
  assert len(data.calls) == 2 * (6 + 1)
  # predict sleeps 4 ms a batch of 10 images at 400 tokens: 2,500 images/s.
  assert 100 < scores["400tokens/images_per_s"] <= 2500
  assert scores["9tokens/images_per_s"] > scores["400tokens/images_per_s"]


def test_cascade_sends_the_least_sure_images_on(tmp_path):
  run(Data(multi_label=False), tmp_path, tokens=(9, 16, 25), points=4)
  table = read_table(tmp_path)
  assert [row["tokens"] for row in table] == (
    ["9", "16", "25"] + ["9 > 25"] * 4 + ["16 > 25"] * 4
  )
  single = {row["tokens"]: row for row in table[:3]}
  cheap, dear = logits_at(9), logits_at(25)
  order = np.argsort(cheap.max(1))  # sigmoid grows with the logit
  seconds = {k: 1 / float(row["images_per_s"]) for k, row in single.items()}
  for row, sent in zip(table[3:7], (15, 30, 45, 60)):
    mixed = cheap.copy()
    mixed[order[:sent]] = dear[order[:sent]]
    alpha = sent / N
    hit = mixed.argmax(1) == LABEL
    np.testing.assert_allclose(float(row["share"]), alpha)
    np.testing.assert_allclose(float(row["tokens_per_image"]), 8 + alpha * 24)
    np.testing.assert_allclose(
      1 / float(row["images_per_s"]),
      seconds["9"] + alpha * seconds["25"],
      rtol=1e-9,
    )
    np.testing.assert_allclose(float(row["accuracy"]), hit.mean())
    np.testing.assert_allclose(
      float(row["calibration_error"]),
      classification.calibration_error(1 / (1 + np.exp(-mixed.max(1))), hit),
      rtol=1e-5,
    )
  # All images sent on: the accuracy of the dear setting, at both costs.
  assert table[6]["accuracy"] == single["25"]["accuracy"]
  assert "mAP" not in table[0]


def test_cascade_of_several_labels_mixes_scores(tmp_path):
  run(Data(multi_label=True), tmp_path, tokens=(9, 25), points=2)
  row = read_table(tmp_path)[2]
  cheap, dear = logits_at(9), logits_at(25)
  sent = np.argsort(cheap.max(1))[: N // 2]
  cheap[sent] = dear[sent]
  expected = metrics.average_precision_score(MULTI, cheap, average="macro")
  np.testing.assert_allclose(float(row["mAP"]), expected, rtol=1e-9)


def test_table_for_people_and_plot(tmp_path):
  run(Data(multi_label=True), tmp_path, tokens=(9, 25), points=2)
  head, rule, first, *_, last = (
    (tmp_path / "budget_curve.md").read_text().splitlines()
  )
  assert head.startswith("| tokens | share | tokens_per_image | images_per_s |")
  assert head.count("|") == rule.count("|") == first.count("|")
  assert first.startswith("| 9 |  | 8.0 | ")
  assert last.startswith("| 9 > 25 | 100% | 32.0 | ")
  assert image.imread(tmp_path / "budget_curve.png")[..., :3].std() > 0.01


def test_stacked_images_cost_the_budget(tmp_path):
  data = Data(multi_label=False, packed=False)
  scores = run(data, tmp_path, tokens=(9,))
  assert scores["9tokens/tokens_per_image"] == 9
  assert len(read_table(tmp_path)) == 1


def test_refusals():
  for tokens in ((), (16, 0)):
    with pytest.raises(ValueError, match="at least one token an image"):
      budget_curve.Evaluator(tokens=tokens)
  with pytest.raises(ValueError, match="got 'hinge'"):
    budget_curve.Evaluator(tokens=(4,), loss_name="hinge")
