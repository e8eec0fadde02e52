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


def encode(segmentation: Any, hw: Sequence[int]) -> bytes:
  """Polygons or an RLE as JSON; b"" if it is neither, or of another size."""
  if isinstance(segmentation, dict):
    size = segmentation.get("size")
    fits = size == list(hw) and "counts" in segmentation
    return json.dumps(segmentation).encode() if fits else b""
  if not isinstance(segmentation, list):
    return b""
  # pycocotools would take four numbers for a box, and NaN for a pixel.
  polygons = [p for p in segmentation if isinstance(p, list) and len(p) >= 6]
  finite = all(np.isfinite(numbers(p)).all() for p in polygons)
  return json.dumps(polygons).encode() if polygons and finite else b""


def decode(encoded: bytes, h: int, w: int) -> Bool[np.ndarray, "h w"]:
  """The mask of what `encode` gave."""
  rle = json.loads(encoded)
  if isinstance(rle, list):
    rle = coco_mask.merge(coco_mask.frPyObjects(rle, h, w))
  elif isinstance(rle["counts"], list):
    rle = coco_mask.frPyObjects(rle, h, w)
  return coco_mask.decode(rle).astype(bool)


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
