"""Retrieval: does an image find its text among all, and a text its image?

Captions may be equal. Equal texts are one text with several images: an image
has to find that text among the different ones, and the text any of its images.
(A text counts as equal by the tokens that the model may read of it.)
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from big_vision_like import api
from big_vision_like.evaluators import classification

# Images that are compared with all texts at a time.
_BLOCK = 1024


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """Recall at k of one pass over the evaluation data.

  `run` gives `image_to_text_r<k>` and `text_to_image_r<k>`, the share of images
  and of different texts that find what belongs to them among the k best;
  `examples` and `texts`, how many there are of both. By chance, an image finds
  its text with k / texts. What scores the same as the right answer counts as
  better.

  Attributes:
    ks: where recall is measured.
  """

  ks: Sequence[int] = (1, 5, 10)

  def run(
    self, *, predict: api.Predict, batches: api.Batches, folder: Path
  ) -> dict[str, float]:
    del folder
    zimg, ztxt, text_id = embed_pairs(predict, batches())
    _, first, group = np.unique(text_id, return_index=True, return_inverse=True)
    to_text, to_image = ranks(zimg, ztxt[first], group)
    scores = {}
    for k in self.ks:
      scores[f"image_to_text_r{k}"] = float((to_text < k).mean())
      scores[f"text_to_image_r{k}"] = float((to_image < k).mean())
    return scores | {"examples": float(len(zimg)), "texts": float(len(first))}


def embed_pairs(
  predict: api.Predict, batches: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """zimg [n,E], ztxt [n,E] and text_id [n] of a pass, of whole pairs.

  Raises:
    ValueError: if there is no pair.
  """
  parts = []
  for batch, host in batches:
    out = predict(batch)
    mask = np.asarray(out["mask"], bool)
    if "text_id" not in host or not mask.any():
      continue
    text_id = classification.global_rows(batch, host["text_id"])
    parts.append([out["zimg"][mask], out["ztxt"][mask], text_id[mask]])
  if not parts:
    raise ValueError(
      "Retrieval is scored on images with texts, and the evaluation data has "
      "none: look at its captions and at config.data.text."
    )
  zimg, ztxt, text_id = map(np.concatenate, zip(*parts))
  return zimg, ztxt, text_id


def ranks(
  zimg: Float[np.ndarray, "n e"],
  ztxt: Float[np.ndarray, "t e"],
  group: Int[np.ndarray, " n"],
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " t"]]:
  """How many wrong answers are as good as the right one, or better.

  Args:
    zimg: of the images.
    ztxt: of the different texts.
    group: the text of each image; every text has one.

  Returns:
    For each image among the texts, for each text among the images.
  """
  blocks = [
    np.arange(at, min(at + _BLOCK, len(zimg)))
    for at in range(0, len(zimg), _BLOCK)
  ]
  to_text, own = np.zeros(len(zimg), int), np.zeros(len(zimg), np.float32)
  for block in blocks:
    scores = zimg[block] @ ztxt.T
    own[block] = scores[np.arange(len(block)), group[block]]
    # Not "at least as good", which is never true of NaN.
    to_text[block] = (~(scores < own[block, None])).sum(1) - 1
  best = np.full(len(ztxt), -np.inf, np.float32)
  np.maximum.at(best, group, own)
  to_image = np.zeros(len(ztxt), int)
  for block in blocks:
    good = ~(zimg[block] @ ztxt.T < best)
    good[np.arange(len(block)), group[block]] = False
    to_image += good.sum(0)
  return to_text, to_image
