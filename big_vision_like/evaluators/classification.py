"""Classification scores: accuracy, average precision, loss, calibration.

Scores are computed on the host from the predictions of a whole pass, in
numpy. An image may carry one label or several; it counts as classified
correctly if its highest logit is one of its labels.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Bool, Float, Shaped

from big_vision_like import api

LOSSES = ("sigmoid", "softmax")


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """Scores the logits of one pass over the evaluation data.

  `run` gives `accuracy`, `top5_accuracy` (if there are more than five classes),
  `mAP`, `loss`, `calibration_error` and `examples`.

  Attributes:
    loss_name: "sigmoid" (summed over classes) or "softmax".
    bins: of the calibration error.
  """

  loss_name: str = "sigmoid"
  bins: int = 30

  def __post_init__(self):
    check_loss_name(self.loss_name)

  def run(
    self, *, predict: api.Predict, batches: api.Batches, folder: Path
  ) -> dict[str, float]:
    del folder
    data = gather(predict, batches())
    logits, targets = data["logits"], multi_hot(data)
    # Images that show nothing have no right class: they count elsewhere.
    labelled = targets.any(1)
    hit = hits(logits, targets, 1)[labelled]
    scores = {
      "accuracy": float(hit.mean()),
      "mAP": mean_average_precision(
        class_scores(logits, self.loss_name), targets
      ),
      "loss": float(losses(logits, targets, self.loss_name).mean()),
      "calibration_error": calibration_error(
        confidence(logits, self.loss_name)[labelled], hit, bins=self.bins
      ),
      "examples": float(len(logits)),
    }
    if logits.shape[1] > 5:
      hit = hits(logits, targets, 5)[labelled]
      scores["top5_accuracy"] = float(hit.mean())
    return scores


def check_loss_name(loss_name: str) -> None:
  if loss_name not in LOSSES:
    raise ValueError(
      f"The loss_name of an evaluator is that of the task, one of {LOSSES}; "
      f"got {loss_name!r}."
    )


def gather(predict: api.Predict, batches: Any) -> dict[str, np.ndarray]:
  """The predictions of a pass, one row per real example.

  Packed predictions [B,M,...] and stacked ones [B,...] both become [n,...]:
  what `mask` marks is kept, in order, but where there is only `label`, a
  negative one takes its example out. `example_id` comes from the host's half
  of the batches.

  Raises:
    ValueError: if no example is left.
  """
  parts: dict[str, list[np.ndarray]] = {}
  for batch, host in batches:
    predicted = dict(predict(batch))
    mask = np.asarray(predicted.pop("mask"), bool)
    if "label" in predicted and "multi_label" not in predicted:
      mask = mask & (np.asarray(predicted["label"]) >= 0)
    if "example_id" in host:
      predicted["example_id"] = global_rows(batch, host["example_id"])
    for key, value in predicted.items():
      parts.setdefault(key, []).append(np.asarray(value)[mask])
  data = {key: np.concatenate(values) for key, values in parts.items()}
  if not data or not len(next(iter(data.values()))):
    raise ValueError(
      "There is nothing to evaluate: no example of the evaluation data can be "
      "read and carries a label. Look at its split and limit in config.evals."
    )
  return data


def global_rows(
  batch: api.Batch, rows: Shaped[np.ndarray, "b ..."]
) -> Shaped[np.ndarray, "c ..."]:
  """Host rows of all processes, in the order of the global batch."""
  if jax.process_count() == 1:
    return rows
  array = next(iter(batch.values()))
  held = {
    row
    for shard in array.addressable_shards
    for row in range(*shard.index[0].indices(len(array)))
  }
  # JAX would cut numbers of 64 bits to 32.
  raw = np.ascontiguousarray(rows)[..., None].view(np.uint8)
  at, raw = multihost_utils.process_allgather(
    (np.array(sorted(held), np.int32), raw), tiled=True
  )
  out = np.empty((len(array), *rows.shape[1:]), rows.dtype)
  out[at] = np.ascontiguousarray(raw).view(rows.dtype)[..., 0]
  return out


def multi_hot(data: dict[str, np.ndarray]) -> Bool[np.ndarray, "n c"]:
  """The true classes of each example; `multi_label` goes before `label`.

  Raises:
    ValueError: if labels are missing, or do not fit the logits.
  """
  classes = data["logits"].shape[1]
  if "multi_label" in data:
    if data["multi_label"].shape[1] != classes:
      raise ValueError(
        f"The data has {data['multi_label'].shape[1]} classes, the model's "
        f"logits {classes}."
      )
    return data["multi_label"] > 0
  if "label" not in data:
    raise ValueError(
      "Classification is scored on predictions with `label` or `multi_label`; "
      f"these have {sorted(data)}."
    )
  if data["label"].max() >= classes:
    raise ValueError(
      f"The evaluation data has a label {data['label'].max()}, but the model's "
      f"logits have only {classes} classes, 0 to {classes - 1}."
    )
  return data["label"][:, None] == np.arange(classes)


def hits(
  logits: Float[np.ndarray, "n c"], targets: Bool[np.ndarray, "n c"], k: int
) -> Bool[np.ndarray, " n"]:
  """Is one of the k highest logits a true class?"""
  top = np.argpartition(-logits, k - 1, axis=1)[:, :k]
  return np.take_along_axis(targets, top, axis=1).any(1)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
  logits = logits - logits.max(1, keepdims=True)
  return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def class_scores(
  logits: Float[np.ndarray, "n c"], loss_name: str
) -> Float[np.ndarray, "n c"]:
  """Scores that rank examples as the probabilities do, without their ties."""
  return logits if loss_name == "sigmoid" else _log_softmax(logits)


def losses(
  logits: Float[np.ndarray, "n c"],
  targets: Bool[np.ndarray, "n c"],
  loss_name: str,
) -> Float[np.ndarray, " n"]:
  """Cross-entropy of each example; softmax shares it among true classes."""
  if loss_name == "sigmoid":
    return np.logaddexp(0, np.where(targets, -logits, logits)).sum(1)
  share = targets / np.maximum(targets.sum(1, keepdims=True), 1)
  return -(share * _log_softmax(logits)).sum(1)


def confidence(
  logits: Float[np.ndarray, "n c"], loss_name: str
) -> Float[np.ndarray, " n"]:
  """Probability of the class with the highest logit."""
  top = class_scores(logits, loss_name).max(1)
  if loss_name == "sigmoid":
    return np.exp(-np.logaddexp(0, -top))
  return np.exp(top)


def average_precision(
  scores: Float[np.ndarray, " n"], targets: Bool[np.ndarray, " n"]
) -> float:
  """Area under precision over recall as a sum of steps, one class.

  Examples of equal score are taken together, as in scikit-learn.
  """
  order = np.argsort(-scores)
  scores, found = scores[order], np.cumsum(targets[order])
  last = np.append(scores[1:] != scores[:-1], True)
  gained = np.diff(found[last], prepend=0)
  taken = np.flatnonzero(last) + 1
  return float((gained * found[last] / taken).sum() / found[-1])


def mean_average_precision(
  scores: Float[np.ndarray, "n c"], targets: Bool[np.ndarray, "n c"]
) -> float:
  """Mean of the average precision over the classes that occur."""
  occurs = np.flatnonzero(targets.any(0))
  each = [average_precision(scores[:, c], targets[:, c]) for c in occurs]
  return float(np.mean(each)) if each else 0.0


def calibration_error(
  confidence: Float[np.ndarray, " n"],
  correct: Bool[np.ndarray, " n"],
  *,
  bins: int = 30,
) -> float:
  """L1 distance of confidence and accuracy over equal bins of confidence.

  Bins count by the examples in them (Guo et al. 2017); NaViT (table 4) has 30.
  """
  edges = np.linspace(0, 1, bins + 1)[1:-1]
  index = np.digitize(confidence, edges, right=True)
  gap = np.asarray(correct, np.float64) - confidence
  return float(np.abs(np.bincount(index, gap, bins)).sum() / len(gap))
