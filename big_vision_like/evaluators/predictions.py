"""A picture of held-out images with what the model says and what is true.

Numbers say how often a model errs, pictures what it errs on. The images are
put together again from the batches, so they are shown as the model sees them:
resized, cropped, cut to whole patches.
"""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from einops import rearrange
from jaxtyping import Bool, Float, Int, UInt8

from big_vision_like import api, pictures
from big_vision_like.evaluators import classification

# Of several labels, a model names those of at least this probability.
THRESHOLD = 0.5

Drawn = tuple[np.ndarray, Bool[np.ndarray, " c"], Bool[np.ndarray, " c"]]


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """Draws `predictions.png`; gives no score.

  Attributes:
    images: how many, at most. Of several hosts, the first draws what it holds.
  """

  images: int = 24

  def run(
    self, *, predict: api.Predict, batches: api.Batches, folder: Path
  ) -> dict[str, float]:
    """Draws a sample that is spread over the evaluation data."""
    drawn: list[Drawn] = []
    for batch, _ in batches(limit=self.images):
      drawn.extend(_draw(batch, predict(batch)))
    if drawn and jax.process_index() == 0:
      images, predicted, truth = zip(*drawn)
      pictures.predictions(
        images,
        predicted,
        truth,
        batches.label_names,
        folder / "predictions.png",
      )
    return {}


def _draw(batch: api.Batch, out: dict[str, Any]) -> Iterator[Drawn]:
  """The images of this host's rows, with predicted and true classes."""
  keys = ("patches", "segment_ids", "positions", "grid_hw", "image")
  rows = {key: held_rows(batch[key]) for key in keys if key in batch}
  held = next(iter(rows.values()))
  for row, *slot in np.argwhere(np.asarray(out["mask"])):
    if row not in held:
      continue
    one = {key: values[row] for key, values in rows.items()}
    image = unpack(**one, slot=slot[0]) if slot else one["image"]
    labels = {k: v[(row, *slot)][None] for k, v in out.items()}
    truth = classification.multi_hot(labels)[0]
    yield image, named(labels["logits"][0], "multi_label" in labels), truth


def held_rows(array: jax.Array) -> dict[int, np.ndarray]:
  """The rows of a global array that this host's devices hold, by number."""
  return {
    (shard.index[0].start or 0) + i: row
    for shard in array.addressable_shards
    for i, row in enumerate(np.asarray(shard.data))
  }


def named(
  logits: Float[np.ndarray, " c"], several: bool
) -> Bool[np.ndarray, " c"]:
  """The classes that the model names: the best, or all of THRESHOLD and up."""
  best = np.arange(len(logits)) == logits.argmax()
  if not several:
    return best
  return best | (logits >= math.log(THRESHOLD / (1 - THRESHOLD)))


def unpack(
  *,
  patches: UInt8[np.ndarray, "l d"],
  segment_ids: Int[np.ndarray, " l"],
  positions: Int[np.ndarray, "l 2"],
  grid_hw: Int[np.ndarray, "m 2"],
  slot: int,
) -> UInt8[np.ndarray, "h w 3"]:
  """The image in a slot of a packed row; dropped tokens are black."""
  side = math.isqrt(patches.shape[1] // 3)
  canvas = np.zeros((*grid_hw[slot], patches.shape[1]), np.uint8)
  mine = segment_ids == slot + 1
  canvas[tuple(positions[mine].T)] = patches[mine]
  return rearrange(canvas, "h w (p q c) -> (h p) (w q) c", p=side, q=side, c=3)
