"""A picture of held-out images with what is true beside what is found.

The scores of a detector say how much it errs, pictures what it errs on. The
evaluators `coco` and `panoptic` draw it too.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from big_vision_like import api, object_pictures, postprocess
from big_vision_like.evaluators import predictions

IMAGES = 12
# Early in training, no query is surer than this of anything.
THRESHOLD = 0.5

Pair = tuple[np.ndarray, object_pictures.Drawn, object_pictures.Drawn]


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """Draws `detections.png`; gives no score.

  Attributes:
    images: how many, at most. Of several hosts, the first draws what it holds.
    threshold: of the probability of what is drawn.
  """

  images: int = IMAGES
  threshold: float = THRESHOLD

  def run(
    self, *, predict: api.Predict, batches: api.Batches, folder: Path
  ) -> dict[str, float]:
    draw(
      predict=predict,
      batches=batches,
      folder=folder,
      images=self.images,
      threshold=self.threshold,
    )
    return {}


def draw(
  *,
  predict: api.Predict,
  batches: api.Batches,
  folder: Path,
  images: int,
  threshold: float,
) -> None:
  """Draws a sample that is spread over the evaluation data; none of 0."""
  if not images:
    return
  pairs: list[Pair] = []
  for batch, _ in batches(limit=images):
    out = predict(batch)
    names = postprocess.all_names(
      batches.label_names, out["logits"].shape[-1] - 1
    )
    pairs.extend(_pairs(batch, out, names, batches.is_thing, threshold))
  if pairs and jax.process_index() == 0:
    object_pictures.compared(pairs, folder / "detections.png")


def _pairs(batch, out, names, is_thing, threshold) -> Iterator[Pair]:
  """This host's images, as the model sees them, each with both."""
  held = predictions.held_rows(batch["image"])
  for row in np.flatnonzero(out["mask"]):
    if row not in held:
      continue
    one = {k: np.asarray(x[row]) for k, x in out.items()}
    h, w = size = tuple(one["size"].tolist())
    canvas = held[row].shape[:2]
    found = postprocess.find(
      one, canvas, size, is_thing=is_thing, threshold=threshold
    )
    truth = object_pictures.true_objects(one, names)
    yield held[row][:h, :w], truth, object_pictures.found_objects(found, names)
