"""The packed row: its shape, the grid of each image, the layout of patches.

Which images share a row is decided in `planning.py`, which hands out `Slot`s;
`put` writes an image into its slot. The letters and the layout are those of
`api.py`.
"""

import dataclasses
import math
from typing import NamedTuple, get_args

import numpy as np
from jaxtyping import Int, UInt8

from big_vision_like.data.augment import Interpolation

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class PackSpec:
  """The fixed shape of packed rows.

  Attributes:
    length: L, tokens in a row.
    patch: P, side of a patch in pixels.
    max_images: M, image slots in a row.
    max_side: the most patches along one side of an image, for models whose
      position tables end there; None is no limit.
    interpolation: how images are resized to their grid.
    eval_tokens: patches that an image is resized to in evaluation, where
      nothing else is asked for; None keeps the native size.
  """

  length: int
  patch: int
  max_images: int
  max_side: int | None = None
  interpolation: Interpolation = "bilinear"
  eval_tokens: int | None = None

  def __post_init__(self) -> None:
    if self.interpolation not in get_args(Interpolation):
      raise ValueError(
        f"data.pack.interpolation is {self.interpolation!r}; it is one of "
        f"{', '.join(get_args(Interpolation))}."
      )
    if not 1 <= self.max_images <= self.length or self.patch < 1:
      raise ValueError(
        "data.pack needs 1 <= max_images <= length and patch >= 1, not "
        f"length={self.length}, patch={self.patch}, "
        f"max_images={self.max_images}."
      )
    if self.max_side is not None and self.max_side**2 < self.length:
      raise ValueError(
        f"data.pack.max_side={self.max_side} allows {self.max_side**2} "
        f"patches in an image, fewer than the {self.length} tokens of a row."
      )


class Slot(NamedTuple):
  """The place of one image in a row.

  Attributes:
    position: in the stream of examples; the key of its randomness.
    index: in the source.
    kept: tokens reserved in the row.
    full: tokens of the whole image, the target of the resize.
    drop: whether tokens are dropped down to `kept`.
  """

  position: int
  index: int
  kept: int
  full: float
  drop: bool

  def grid(self, h: int, w: int, *, spec: PackSpec) -> tuple[int, int]:
    """The patch grid for an image of h x w pixels."""
    if self.drop:
      return choose_grid(h, w, self.full, at_least=self.kept, spec=spec)
    return choose_grid(h, w, self.full, at_most=self.kept, spec=spec)


def choose_grid(
  h: int,
  w: int,
  tokens: float,
  *,
  spec: PackSpec,
  at_least: int = 1,
  at_most: int | None = None,
) -> tuple[int, int]:
  """The patch grid nearest to an area and to the aspect ratio of h x w.

  Args:
    h: height of the image in pixels.
    w: width of the image in pixels.
    tokens: the wanted area, in patches.
    spec: gives the limit on the sides.
    at_least: the fewest patches allowed.
    at_most: the most patches allowed.

  Returns:
    rows and columns, that minimise |log aspect error| + |log area error|.
  """
  if h > w:
    rows, columns = choose_grid(
      w, h, tokens, spec=spec, at_least=at_least, at_most=at_most
    )
    return columns, rows
  side = spec.max_side or 1 << 30
  ideal = math.sqrt(tokens * h / w)
  best, best_error = None, math.inf
  for wanted in (math.floor(ideal) - 1, math.floor(ideal), math.ceil(ideal)):
    rows = min(max(wanted, 1, -(-at_least // side)), side)
    for columns in (math.floor(tokens / rows), math.ceil(tokens / rows)):
      n = min(max(columns, 1), side)
      if not at_least <= rows * n <= (at_most or math.inf):
        continue
      aspect, area = rows * w / (n * h), rows * n / tokens
      error = max(aspect, 1 / aspect) * max(area, 1 / area)
      if error < best_error:
        best, best_error = (rows, n), error
  if best is None:  # The wanted area is out of bounds.
    bound = float(max(at_least, min(tokens, at_most or tokens)))
    return choose_grid(
      h, w, bound, spec=spec, at_least=at_least, at_most=at_most
    )
  return best


def blank(spec: PackSpec, rows: int) -> Batch:
  """Empty rows."""
  L, M = spec.length, spec.max_images
  return {
    "patches": np.zeros((rows, L, 3 * spec.patch**2), np.uint8),
    "segment_ids": np.zeros((rows, L), np.int32),
    "positions": np.zeros((rows, L, 2), np.int32),
    "grid_hw": np.zeros((rows, M, 2), np.int32),
    "example_mask": np.zeros((rows, M), bool),
    "num_tokens": np.zeros(rows, np.int32),
    "_mask": np.zeros(rows, bool),
  }


def choose_kept(
  n: int, kept: int, rng: np.random.Generator
) -> Int[np.ndarray, " kept"]:
  """`kept` of n tokens, uniformly without replacement, in raster order."""
  return np.sort(rng.permutation(n)[:kept])


def put(
  batch: Batch,
  row: int,
  slot: int,
  start: int,
  *,
  image: UInt8[np.ndarray, "h w 3"],
  keep: Int[np.ndarray, " n"] | None,
  spec: PackSpec,
) -> int:
  """Writes an image's tokens into a row, from token `start` on.

  Args:
    batch: the packed batch to write into.
    row: which row of it.
    slot: which image slot of the row, from 0.
    start: the row's first token for this image.
    image: resized, so that both sides are multiples of the patch.
    keep: the tokens that are not dropped, in raster order; None is all.
    spec: the shape of the rows.

  Returns:
    How many tokens that are.
  """
  P = spec.patch
  gh, gw = image.shape[0] // P, image.shape[1] // P
  r, c = np.divmod(np.arange(gh * gw) if keep is None else keep, gw)
  # Lines of a patch as single elements: this doubles the speed of the gather.
  line = np.dtype(f"V{3 * P}")
  lines = np.ascontiguousarray(image).reshape(gh, P, gw, 3 * P).view(line)
  span = slice(start, start + len(r))
  batch["patches"][row, span].view(line)[...] = lines[r, :, c, 0]
  batch["positions"][row, span, 0] = r
  batch["positions"][row, span, 1] = c
  batch["segment_ids"][row, span] = slot + 1
  batch["grid_hw"][row, slot] = gh, gw
  batch["example_mask"][row, slot] = True
  batch["num_tokens"][row] += len(r)
  batch["_mask"][row] = True
  return len(r)
