"""Scores against scikit-learn and closed forms."""

import numpy as np
import optax
import pytest
from sklearn import calibration, metrics

from big_vision_like.evaluators import classification as c

N, C = 211, 7


@pytest.fixture
def rng():
  return np.random.default_rng(5)


def make_logits(rng, n=N, classes=C):
  return rng.normal(0, 2, (n, classes)).astype(np.float32)


def make_multi_label(rng, logits):
  """Labels that go with the logits, some images without any."""
  return logits + rng.normal(0, 2, logits.shape) > 1.5


@pytest.mark.parametrize("decimals", [7, 0])
def test_average_precision_is_that_of_sklearn(rng, decimals):
  """With rounded logits there are ties in plenty."""
  logits = make_logits(rng).round(decimals)
  targets = make_multi_label(rng, logits)
  targets[:, 3] = False  # sklearn would count a class that never occurs as 0
  occurs = targets.any(0)
  expected = metrics.average_precision_score(
    targets[:, occurs], logits[:, occurs], average="macro"
  )
  ours = c.mean_average_precision(logits, targets)
  # Both sum some hundred float64 terms.
  np.testing.assert_allclose(ours, expected, rtol=1e-12)


def test_calibration_error_is_that_of_sklearns_curve(rng):
  confidence = rng.beta(5, 2, 997)
  correct = rng.random(997) < confidence**2
  rate, mean = calibration.calibration_curve(correct, confidence, n_bins=30)
  counts, _ = np.histogram(confidence, bins=30, range=(0, 1))
  counts = counts[counts > 0]
  expected = np.sum(counts * np.abs(rate - mean)) / 997
  ours = c.calibration_error(confidence, correct, bins=30)
  np.testing.assert_allclose(ours, expected, rtol=1e-12)


def test_calibration_error_of_two_bins_by_hand():
  confidence = np.array([0.6, 0.9, 0.2, 1.0])
  correct = np.array([True, False, True, True])
  # (0.2: |1 - .2|) and (0.6, 0.9, 1.0: |2 - 2.5|), over four examples.
  ours = c.calibration_error(confidence, correct, bins=2)
  np.testing.assert_allclose(ours, (0.8 + 0.5) / 4, rtol=1e-12)


@pytest.mark.parametrize("loss_name", ["sigmoid", "softmax"])
def test_losses_are_those_of_optax(rng, loss_name):
  logits = make_logits(rng)
  label = rng.integers(0, C, N)
  targets = label[:, None] == np.arange(C)
  if loss_name == "sigmoid":
    expected = optax.sigmoid_binary_cross_entropy(logits, targets).sum(-1)
  else:
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, label)
  ours = c.losses(logits, targets, loss_name)
  np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_losses_stay_finite_for_extreme_logits():
  logits = np.array([[1e4, -1e4], [-1e4, 1e4]], np.float32)
  targets = np.array([[True, False], [True, False]])
  np.testing.assert_allclose(c.losses(logits, targets, "sigmoid"), [0, 2e4])
  np.testing.assert_allclose(c.losses(logits, targets, "softmax"), [0, 2e4])
  np.testing.assert_array_equal(c.confidence(logits, "sigmoid"), [1, 1])


@pytest.mark.parametrize("k", [1, 5])
def test_hits_are_those_of_sklearn(rng, k):
  logits, label = make_logits(rng), rng.integers(0, C, N)
  expected = metrics.top_k_accuracy_score(label, logits, k=k)
  ours = c.hits(logits, label[:, None] == np.arange(C), k).mean()
  np.testing.assert_allclose(ours, expected, rtol=1e-12)


def packed_pass(logits, labels, *, key):
  """Two packed batches of rows with 3 slots each, some slots empty."""
  rows, slots, batches, at = 5, 3, [], 0
  empty = np.random.default_rng(1).random((99, rows, slots)) < 0.3
  for hole in empty:
    if at == len(logits):
      break
    mask = ~hole
    take = np.flatnonzero(mask.ravel())[: len(logits) - at]
    mask = np.isin(np.arange(rows * slots), take)

    def fill(values, value, take=take, at=at):
      out = np.full((rows * slots, *values.shape[1:]), value, values.dtype)
      out[take] = values[at : at + len(take)]
      return out.reshape(rows, slots, *values.shape[1:])

    predicted = {
      "logits": fill(logits, np.nan),
      key: fill(labels, 1),
      "mask": mask.reshape(rows, slots),
    }
    ids = fill(np.arange(len(logits)), -1)
    batches.append((predicted, {"example_id": ids}))
    at += len(take)
  return batches


def run(evaluator, batches):
  return evaluator.run(
    predict=lambda batch: batch, batches=lambda: iter(batches), folder=None
  )


def test_packed_slots_are_flattened_and_empty_ones_left_out(rng):
  logits = make_logits(rng)
  batches = packed_pass(logits, make_multi_label(rng, logits), key="x")
  data = c.gather(lambda batch: batch, batches)
  np.testing.assert_array_equal(data["logits"], logits)
  np.testing.assert_array_equal(data["example_id"], np.arange(N))
  assert "mask" not in data


def test_scores_of_multi_label_rows(rng):
  logits = make_logits(rng)
  targets = make_multi_label(rng, logits)
  batches = packed_pass(logits, targets.astype(np.uint8), key="multi_label")
  scores = run(c.Evaluator(), batches)
  best = targets[np.arange(N), logits.argmax(1)]
  assert scores["examples"] == N
  np.testing.assert_allclose(
    scores["accuracy"], best[targets.any(1)].mean(), rtol=1e-12
  )
  expected = metrics.average_precision_score(targets, logits, average="macro")
  np.testing.assert_allclose(scores["mAP"], expected, rtol=1e-12)
  assert 0 < scores["calibration_error"] < 1
  assert scores["top5_accuracy"] > scores["accuracy"]


def test_scores_of_single_labels_by_softmax(rng):
  logits, label = make_logits(rng, classes=5), rng.integers(0, 5, N)
  batch = {"logits": logits, "label": label, "mask": np.ones(N, bool)}
  scores = run(c.Evaluator(loss_name="softmax"), [(batch, {})])
  probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
  expected = metrics.average_precision_score(
    label[:, None] == np.arange(5), probabilities, average="macro"
  )
  np.testing.assert_allclose(scores["mAP"], expected, rtol=1e-6)
  np.testing.assert_allclose(
    scores["loss"], metrics.log_loss(label, probabilities), rtol=1e-5
  )
  expected = c.calibration_error(
    probabilities.max(1), probabilities.argmax(1) == label
  )
  # Float32 rounding may move an example into the next bin.
  np.testing.assert_allclose(scores["calibration_error"], expected, atol=1 / N)
  assert "top5_accuracy" not in scores


def test_images_that_show_nothing_count_only_against_false_alarms():
  batch = {
    "logits": np.eye(3, dtype=np.float32) * 4 - 2,
    "multi_label": np.array([[1, 0, 0], [0, 0, 1], [0, 0, 0]], np.uint8),
    "mask": np.ones(3, bool),
  }
  scores = run(c.Evaluator(), [(batch, {})])
  assert scores["accuracy"] == 0.5
  assert scores["examples"] == 3
  # Class 0 comes first; class 2 is behind the empty image only.
  np.testing.assert_allclose(scores["mAP"], (1 + 1 / 3) / 2)
  sure = 1 / (1 + np.exp(-2))
  np.testing.assert_allclose(
    scores["calibration_error"], abs(1 - 2 * sure) / 2, rtol=1e-6
  )


def test_unlabelled_examples_are_left_out():
  scores = run(c.Evaluator(), stacked(label=np.array([0, -1, 0, -1])))
  assert scores["examples"] == 2


def stacked(**changes):
  batch = {
    "logits": np.zeros((4, 3), np.float32),
    "label": np.arange(4) % 3,
    "mask": np.ones(4, bool),
  }
  return [(batch | changes, {})]


def test_refusals():
  with pytest.raises(ValueError, match="label 3, but the model's logits have"):
    run(c.Evaluator(), stacked(label=np.array([0, 1, 2, 3])))
  with pytest.raises(ValueError, match="data has 5 classes, the model's logi"):
    run(c.Evaluator(), stacked(multi_label=np.ones((4, 5), np.uint8)))
  with pytest.raises(ValueError, match="can be read and carries a label"):
    run(c.Evaluator(), stacked(label=np.full(4, -1)))
  without = stacked()
  del without[0][0]["label"]
  with pytest.raises(ValueError, match=r"these have ..logits.."):
    run(c.Evaluator(), without)
  with pytest.raises(ValueError, match="nothing to evaluate"):
    run(c.Evaluator(), stacked(mask=np.zeros(4, bool)))
  with pytest.raises(ValueError, match="nothing to evaluate"):
    run(c.Evaluator(), [])
  with pytest.raises(ValueError, match="got 'hinge'"):
    c.Evaluator(loss_name="hinge")
