"""One checkpoint over token budgets: what does an image cost, what is it worth?

A model that was trained on many resolutions serves any budget. We score the
same examples at several, and cascades between them: every image goes through
a cheap setting, and those that it is least sure of through a dearer one
(NaViT, Patch n' Pack, arXiv 2307.06304, section 3.6).
"""

import csv
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from big_vision_like import api, pictures
from big_vision_like.evaluators import classification

_Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """Scores the evaluation data at each budget, and writes table and plot.

  For each budget t, `run` gives `<t>tokens/accuracy`, `/mAP` (if images have
  several labels), `/calibration_error`, `/images_per_s` and
  `/tokens_per_image`; and `tokens_for_99pct`, the tokens per image of the
  cheapest budget that keeps 99 % of the best score. `folder` gets
  `budget_curve.csv`, `.md` and `.png`; these hold the cascades from each budget
  to the largest too.

  Attributes:
    tokens: the budgets. `batches(tokens=t)` resizes images to the largest grid
      of no more than t tokens that keeps their aspect ratio; none are dropped.
    loss_name: that of the task, "sigmoid" or "softmax".
    bins: of the calibration error.
    points: of each cascade.
  """

  tokens: Sequence[int]
  loss_name: str = "sigmoid"
  bins: int = 30
  points: int = 10

  def __post_init__(self):
    classification.check_loss_name(self.loss_name)
    if not self.tokens or min(self.tokens) < 1:
      raise ValueError(
        "The budget curve needs `tokens`, a list of budgets of at least one "
        f"token an image; got {self.tokens!r}."
      )

  def run(
    self, *, predict: api.Predict, batches: api.Batches, folder: Path
  ) -> dict[str, float]:
    settings = [
      self._measure(predict, batches, budget)
      for budget in sorted(set(self.tokens))
    ]
    rows = [
      self._row(str(s.budget), "", s.tokens, s.seconds, s.answers)
      for s in settings
    ]
    cascades = [
      row
      for cheap in settings[:-1]
      for row in self._cascade(cheap, settings[-1])
    ]
    if jax.process_index() == 0:
      write_tables([*rows, *cascades], folder)
      pictures.budget_curve([*rows, *cascades], folder / "budget_curve.png")
    scores = {
      f"{row['tokens']}tokens/{key}": value
      for row in rows
      for key, value in row.items()
      if key not in ("tokens", "share")
    }
    return {"tokens_for_99pct": _cheapest_good(rows), **scores}

  def _measure(
    self, predict: api.Predict, batches: api.Batches, budget: int
  ) -> "_Setting":
    timed = _Timed(predict)
    data = classification.gather(timed, batches(tokens=budget))
    logits, targets = data["logits"], classification.multi_hot(data)
    answers = {
      "id": data["example_id"],
      "confidence": classification.confidence(logits, self.loss_name),
      "hit": classification.hits(logits, targets, 1),
      "labelled": targets.any(1),
    }
    # For one label an image, we need not keep [n,c] arrays of every budget.
    if "multi_label" in data:
      scores = classification.class_scores(logits, self.loss_name)
      answers |= {"scores": scores, "targets": targets}
    tokens = timed.tokens / timed.images if timed.tokens else float(budget)
    return _Setting(budget, tokens, timed.seconds / timed.images, answers)

  def _cascade(self, cheap: "_Setting", dear: "_Setting") -> list[_Row]:
    """Rows for growing shares of images that take the second step."""
    _, left, right = np.intersect1d(
      cheap.answers["id"], dear.answers["id"], return_indices=True
    )
    first = {k: v[left] for k, v in cheap.answers.items()}
    second = {k: v[right] for k, v in dear.answers.items()}
    unsure = np.argsort(first["confidence"], kind="stable")
    rows = []
    for point in range(1, self.points + 1):
      sent = unsure[: round(len(unsure) * point / self.points)]
      mixed = {k: v.copy() for k, v in first.items()}
      for key, value in second.items():
        mixed[key][sent] = value[sent]
      share = len(sent) / len(unsure)
      rows.append(
        self._row(
          f"{cheap.budget} > {dear.budget}",
          share,
          cheap.tokens + share * dear.tokens,
          cheap.seconds + share * dear.seconds,
          mixed,
        )
      )
    return rows

  def _row(self, name, share, tokens, seconds, answers) -> _Row:
    labelled = answers["labelled"]
    hit = answers["hit"][labelled]
    row = {
      "tokens": name,
      "share": share,
      "tokens_per_image": float(tokens),
      "images_per_s": float(1 / seconds),
      "accuracy": float(hit.mean()),
    }
    if "scores" in answers:
      row["mAP"] = classification.mean_average_precision(
        answers["scores"], answers["targets"]
      )
    row["calibration_error"] = classification.calibration_error(
      answers["confidence"][labelled], hit, bins=self.bins
    )
    return row


@dataclasses.dataclass(frozen=True)
class _Setting:
  """What a budget costs an image, and what the model answers under it."""

  budget: int
  tokens: float
  seconds: float
  answers: dict[str, np.ndarray]


@dataclasses.dataclass
class _Timed:
  """Times `predict` and counts what went through; loading is not timed."""

  predict: api.Predict
  seconds: float = 0.0
  images: int = 0
  tokens: int = 0

  def __call__(self, batch: api.Batch) -> dict[str, Any]:
    if not self.images:
      self.predict(batch)  # compiles and warms up
    start = time.perf_counter()
    predicted = self.predict(batch)
    self.seconds += time.perf_counter() - start
    self.images += int(np.sum(predicted["mask"]))
    if "segment_ids" in batch:
      self.tokens += int(jnp.count_nonzero(batch["segment_ids"]))
    return predicted


def _cheapest_good(rows: Sequence[_Row]) -> float:
  score = "mAP" if "mAP" in rows[0] else "accuracy"
  enough = 0.99 * max(row[score] for row in rows)
  return min(row["tokens_per_image"] for row in rows if row[score] >= enough)


def write_tables(rows: Sequence[_Row], folder: Path) -> None:
  """`budget_curve.csv` with all digits, `budget_curve.md` for people."""
  with (folder / "budget_curve.csv").open("w", newline="") as f:
    writer = csv.DictWriter(f, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
  cells = [list(rows[0]), ["---"] * len(rows[0])]
  cells += [[_cell(k, v) for k, v in row.items()] for row in rows]
  lines = ["| " + " | ".join(line) + " |" for line in cells]
  (folder / "budget_curve.md").write_text("\n".join(lines) + "\n")


def _cell(key: str, value: Any) -> str:
  if isinstance(value, str):
    return value
  if key in ("tokens_per_image", "images_per_s"):
    return f"{value:,.1f}"
  return f"{value:.0%}" if key == "share" else f"{value:.4f}"
