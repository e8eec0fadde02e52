"""The few-shot probe against scikit-learn's ridge regression."""

import numpy as np
import pytest
from sklearn import linear_model

from big_vision_like.evaluators import fewshot

CLASSES, D = 7, 11


def make_data(n, *, noise=1.5, seed=0):
  centres = np.random.default_rng(99).normal(3, 1, (CLASSES, D))
  rng = np.random.default_rng(seed)
  label = rng.permutation(n) % CLASSES
  features = centres[label] + noise * rng.normal(size=(n, D))
  return features.astype(np.float32), label


def sklearn_scores(features, label, test, l2):
  features = features.astype(np.float64)
  mean, std = features.mean(0), features.std(0) + 1e-5
  ridge = linear_model.Ridge(alpha=l2, fit_intercept=False)

  def prepare(x):
    return np.column_stack([(x - mean) / std, np.full(len(x), 100.0)])

  classes = np.unique(label)
  ridge.fit(prepare(features), 2.0 * (label[:, None] == classes) - 1)
  return ridge.predict(prepare(test))


@pytest.mark.parametrize("n", [98, 7])  # more and fewer than the dimensions
@pytest.mark.parametrize("l2", [2.0**10, 3.0])
def test_ridge_is_that_of_sklearn(n, l2):
  features, label = make_data(n, noise=3)
  kept = (label > 2) | (np.arange(n) % 5 == 0)  # unequal classes
  features, label = features[kept], label[kept]
  test, _ = make_data(499, noise=3, seed=1)
  ours = fewshot.ridge_scores(features, label, test, l2=l2)
  theirs = sklearn_scores(features, label, test, l2)
  # Both solve in float64 systems of condition 1e6 at most.
  np.testing.assert_allclose(ours, theirs, rtol=1e-7, atol=1e-9)


class Data:
  """Lends batches of ready-made features, and remembers what was asked."""

  def __init__(self, train, validation, **kinds):
    self.splits = {"train": train, None: validation}
    self.kinds, self.asked = kinds, []

  def __call__(self, *, split=None, **overrides):
    self.asked.append((split, overrides))
    features, label = self.splits[split]
    for at in range(0, len(label), 50):
      part = slice(at, at + 50)
      batch = {
        "features": features[part],
        "label": label[part],
        "mask": np.ones(len(label[part]), bool),
      }
      for key, make in self.kinds.items():
        batch[key] = make(batch.get(key, label[part]))
      yield batch, {}


def run(evaluator, data):
  return evaluator.run(predict=lambda x: x, batches=data, folder=None)


def test_accuracy_is_the_mean_over_seeds_of_the_closed_form():
  data = Data(make_data(300), make_data(400, seed=1))
  scores = run(fewshot.Evaluator(shots=(1, 5, 10), train_limit=300), data)
  assert data.asked == [("train", {"limit": 300}), (None, {})]
  features, label = data.splits["train"]
  test, truth = data.splits[None]
  for k in (1, 5, 10):
    accuracies = []
    for seed in range(3):
      rng = np.random.default_rng(seed)
      order = [
        rng.permutation(np.flatnonzero(label == c)) for c in range(CLASSES)
      ]
      chosen = np.concatenate([indices[:k] for indices in order])
      scores_of = sklearn_scores(features[chosen], label[chosen], test, 2.0**10)
      accuracies.append(np.mean(scores_of.argmax(1) == truth))
    assert np.std(accuracies) > 0
    np.testing.assert_allclose(scores[f"{k}shot"], np.mean(accuracies))
  assert 1.5 / CLASSES < scores["1shot"] < scores["10shot"] <= 1


def test_images_of_several_classes_are_left_out():
  def several(label):
    """Each third image of a batch shows two more classes."""
    hot = label[:, None] == np.arange(CLASSES)
    hot[::3, :2] = True
    hot[::3, 5] = True
    return hot.astype(np.uint8)

  def without_third(data):
    kept = np.arange(len(data[1])) % 50 % 3 > 0
    return data[0][kept], data[1][kept]

  splits = make_data(300), make_data(400, seed=1)
  mixed = Data(
    *splits,
    multi_label=several,
    label=lambda label: np.full_like(label, -1),
  )
  single = Data(*map(without_third, splits))
  evaluator = fewshot.Evaluator(shots=(2, 10))
  assert run(evaluator, mixed) == run(evaluator, single)


def test_a_class_without_training_examples_is_named(caplog):
  features, label = make_data(300)
  kept = label != 4
  data = Data((features[kept], label[kept]), make_data(400, seed=1))
  scores = run(fewshot.Evaluator(shots=(5,)), data)
  assert "no training example of the classes [4]" in caplog.text
  assert 0 < scores["5shot"] < 0.95


def test_refusals():
  data = Data(make_data(50), make_data(50))

  def without_features(batch):
    return {k: v for k, v in batch.items() if k != "features"}

  with pytest.raises(ValueError, match=r"gives \['label'\]"):
    fewshot.Evaluator().run(predict=without_features, batches=data, folder=None)
  data.kinds = {
    "multi_label": lambda label: np.ones((len(label), CLASSES), np.uint8),
    "label": lambda label: np.full_like(label, -1),
  }
  with pytest.raises(ValueError, match="finds none: each has several labels"):
    run(fewshot.Evaluator(), data)
