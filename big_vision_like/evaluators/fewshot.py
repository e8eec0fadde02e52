"""Few-shot linear probe: ridge regression on features of a few images a class.

As in big_vision's `fewshot_lsr.py`: features are whitened by the shots' own
mean and deviation, a large constant stands in for an intercept that is hardly
penalised, targets are +1 and -1, and the solution is in closed form.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import logging
from jaxtyping import Float, Int

from big_vision_like import api
from big_vision_like.evaluators import classification

_BIAS = 100.0


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """`run` gives `<k>shot` for each k: the accuracy, averaged over seeds.

  Examples with one true class take part, others are left out. A class with
  fewer than k examples gives what it has.

  Attributes:
    shots: examples of each class.
    seeds: number of random choices of them.
    l2: weight of the penalty.
    train_split, train_limit: where the shots come from, and how many examples
      of it we extract features of.
  """

  shots: Sequence[int] = (1, 5, 10, 25)
  seeds: int = 3
  l2: float = 2.0**10
  train_split: str = "train"
  train_limit: int = 5000

  def run(
    self, *, predict: api.Predict, batches: api.Batches, folder: Path
  ) -> dict[str, float]:
    del folder
    train, truth = _features(
      predict, batches(split=self.train_split, limit=self.train_limit)
    )
    test, test_truth = _features(predict, batches())
    missing = sorted(set(test_truth.tolist()) - set(truth.tolist()))
    if missing:
      logging.warning(
        "The few-shot probe has no training example of the classes %s among "
        "the first %d: it gets them all wrong. Raise its train_limit.",
        missing,
        self.train_limit,
      )
    found = {k: [] for k in self.shots}
    for seed in range(self.seeds):
      rng = np.random.default_rng(seed)
      order = [
        rng.permutation(np.flatnonzero(truth == c)) for c in np.unique(truth)
      ]
      for k in self.shots:
        chosen = np.concatenate([indices[:k] for indices in order])
        scores = ridge_scores(train[chosen], truth[chosen], test, l2=self.l2)
        predicted = np.unique(truth)[scores.argmax(1)]
        found[k].append(np.mean(predicted == test_truth))
    return {f"{k}shot": float(np.mean(each)) for k, each in found.items()}


def _features(predict, batches) -> tuple[np.ndarray, np.ndarray]:
  data = classification.gather(predict, batches)
  if "features" not in data:
    raise ValueError(
      "The few-shot probe needs predictions with `features`; this task gives "
      f"{sorted(data)}."
    )
  label = data.get("label", np.full(len(data["features"]), -1))
  if "multi_label" in data:
    several = data["multi_label"] > 0
    alone = np.where(several.sum(1) == 1, several.argmax(1), -1)
    label = np.where(label >= 0, label, alone)
  if (label < 0).all():
    raise ValueError(
      "The few-shot probe needs examples of one class, and finds none: each "
      "has several labels, or none."
    )
  return data["features"][label >= 0], label[label >= 0]


def ridge_scores(
  features: Float[np.ndarray, "n d"],
  label: Int[np.ndarray, " n"],
  test: Float[np.ndarray, "m d"],
  *,
  l2: float,
) -> Float[np.ndarray, "m k"]:
  """What a ridge regression on +-1 targets gives `test`, by class in order."""
  features = np.asarray(features, np.float64)
  mean, std = features.mean(0), features.std(0) + 1e-5

  def whiten(x):
    return np.pad((x - mean) / std, ((0, 0), (0, 1)), constant_values=_BIAS)

  x = whiten(features)
  y = np.where(label[:, None] == np.unique(label), 1.0, -1.0)
  n, d = x.shape
  # Two forms of one solution; the smaller system is the quicker one.
  if n >= d:
    weights = np.linalg.solve(x.T @ x + l2 * np.eye(d), x.T @ y)
  else:
    weights = x.T @ np.linalg.solve(x @ x.T + l2 * np.eye(n), y)
  return whiten(test) @ weights
