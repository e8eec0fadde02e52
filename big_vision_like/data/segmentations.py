"""Outlines of objects as COCO has them, polygons and RLE, to masks."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from pycocotools import mask as coco_mask


def numbers(values: Sequence[Any]) -> Float[np.ndarray, " n"]:
  """The values as float64, NaN where one is no number."""
  return np.array(
    [v if type(v) in (int, float) else np.nan for v in values], np.float64
  )


def encode(segmentation: Any, hw: tuple[int, int]) -> bytes:
  """Polygons or an RLE as JSON; b"" if it is neither, or of another size."""
  if isinstance(segmentation, dict):
    runs = _runs(segmentation.get("counts"))
    # pycocotools leaves memory as it was where runs end too early.
    whole = sum(runs) == hw[0] * hw[1] and min(runs) >= 0
    sound = whole and segmentation.get("size") == list(hw)
    return json.dumps(runs).encode() if sound else b""
  if not isinstance(segmentation, list):
    return b""
  # pycocotools would take four numbers for a box, and NaN for a pixel.
  polygons = [p for p in segmentation if isinstance(p, list) and len(p) >= 6]
  finite = all(np.isfinite(numbers(p)).all() for p in polygons)
  return json.dumps(polygons).encode() if polygons and finite else b""


def decode(encoded: bytes, h: int, w: int) -> Bool[np.ndarray, "h w"]:
  """The mask of what `encode` gave."""
  outline = json.loads(encoded)
  if isinstance(outline[0], list):
    rle = coco_mask.merge(coco_mask.frPyObjects(outline, h, w))
  else:
    rle = coco_mask.frPyObjects({"size": [h, w], "counts": outline}, h, w)
  return coco_mask.decode(rle).astype(bool)


def _runs(counts: Any) -> list[int]:
  """The lengths of an RLE's runs; [-1] if it is none.

  Compressed, a run takes letters of six bits, 48 being 0: five bits of the
  number, least first, and whether there are more. The highest bit is the sign,
  as from the fourth run on it stands for the difference to the last but one.
  """
  if isinstance(counts, list):
    return counts if counts and all(type(n) is int for n in counts) else [-1]
  runs, number, shift = [], 0, 0
  for letter in counts if isinstance(counts, str) else "":
    bits = ord(letter) - 48
    number |= (bits & 31) << shift
    shift += 5
    if bits & 32:
      continue
    number -= (bits & 16) << shift - 4
    runs.append(number + (runs[-2] if len(runs) > 2 else 0))
    number = shift = 0
  return runs if runs and not shift else [-1]


def instance_mask(
  encoded: Sequence[bytes],
  area: Float[np.ndarray, " o"],
  hw: tuple[int, int],
) -> Int[np.ndarray, "h w"]:
  """0, or 1 + the position of an object; of several, the smallest is on top."""
  mask = np.zeros(hw, id_dtype(len(encoded)))
  for i in np.argsort(-area, kind="stable"):
    mask[decode(encoded[i], *hw)] = i + 1
  return mask


def panoptic_mask(
  png: Int[np.ndarray, "h w 3"], ids: Int[np.ndarray, " o"]
) -> Int[np.ndarray, "h w"]:
  """0, or 1 + the position of a segment; its id is red + 256 green + 256² blue.

  Args:
    png: the colours.
    ids: of the segments.
  """
  if not len(ids):
    return np.zeros(png.shape[:2], id_dtype(0))
  order = np.argsort(ids)
  pixels = png.astype(np.int64) @ np.array([1, 256, 65536])
  place = np.searchsorted(ids[order], pixels).clip(max=len(ids) - 1)
  found = ids[order][place] == pixels
  return np.where(found, order[place] + 1, 0).astype(id_dtype(len(ids)))


def id_dtype(count: int) -> type:
  """The smallest type for the numbers of so many objects."""
  return np.uint8 if count < 256 else np.uint16
