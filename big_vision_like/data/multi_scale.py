"""The multi-scale sampler: each step has one of a few image sizes.

Mehta & Rastegari, "MobileViT" (arXiv 2110.02178), 3.2; reference
apple/ml-cvnets, `data/sampler`. Small images come in larger batches, so that a
step costs about the same. The set of shapes is closed: one compile each.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Int

from big_vision_like.data import planning
from big_vision_like.data.batches import Shard, StackedBatches
from big_vision_like.data.packing import Batch

# (height, width, images in the global batch).
Scale = tuple[int, int, int]
# Of the random numbers that share a seed with those of the examples.
_STREAM = 3


def scales(
  sides: Sequence[int],
  *,
  base: int,
  batch_size: int,
  multiple: int = 1,
  at_least: int = 1,
) -> tuple[Scale, ...]:
  """Squares with as many pixels in a batch as `batch_size` of side `base`.

  The rule of ml-cvnets, whose base is not the largest side. Version 0.1, that
  of the paper's runs, enlarges batches and does not shrink them: at_least =
  batch_size. All batches are rounded to a multiple of `multiple`, and by no
  more than a tenth down.
  """

  def batch(side: int) -> int:
    n = int(round(base * base * batch_size / side**2, 2))
    n = max(at_least, n, 1)
    rounded = max(multiple, (n + multiple // 2) // multiple * multiple)
    return rounded + multiple if rounded < 0.9 * n else rounded

  return tuple((side, side, batch(side)) for side in sides)


def check(scales: Sequence[Sequence[int]]) -> tuple[Scale, ...]:
  """The scales of a config as tuples.

  Raises:
    ValueError: if they are not triples of positive whole numbers, or if two
      are the same.
  """

  def valid(scale: Any) -> bool:
    return (
      isinstance(scale, Sequence)
      and len(scale) == 3
      and all(type(n) is int and n > 0 for n in scale)
    )

  found = tuple(tuple(scale) for scale in scales if valid(scale))
  if not found or len(set(found)) < len(scales):
    raise ValueError(
      f"config.data.scales = {list(scales)}; it is a list of different triples "
      "(height, width, images in the global batch)."
    )
  return found


@dataclasses.dataclass(frozen=True)
class Plan:
  """Which scale each step has, and where in the stream its images begin.

  Attributes:
    batch_sizes: of the scales.
    seed: of the run; every scale is as likely, at every step.
    steps: how many there are; a longer plan begins with the same ones.
  """

  batch_sizes: tuple[int, ...]
  seed: int
  steps: int

  @functools.cached_property
  def choices(self) -> Int[np.ndarray, " steps"]:
    """The index of the scale of each step."""
    rng = planning.random(self.seed, 0, stream=_STREAM)
    # Floats: each takes one number of the generator, so that a prefix stays.
    u = rng.random(self.steps)
    return (u * len(self.batch_sizes)).astype(np.int64)

  @functools.cached_property
  def starts(self) -> Int[np.ndarray, " steps+1"]:
    """Images before each step; at the end, all of them."""
    sizes = np.array(self.batch_sizes, np.int64)[self.choices]
    return np.concatenate([[0], np.cumsum(sizes)])


class MultiScaleBatches(grain.MapDataset):
  """Batches that have the shape of one of `parts`, drawn for each step.

  Element s depends on the seed and s alone, on all hosts; the images follow
  each other in the one shuffled stream of `Shuffle`, whatever the shapes.
  """

  def __init__(self, parts: Sequence[StackedBatches], *, plan: Plan):
    """Takes a dataset for each shape, of which `plan` says the order."""
    super().__init__()
    self.parts, self.plan = tuple(parts), plan

  def __len__(self) -> int:
    return self.plan.steps

  def __str__(self) -> str:
    return f"MultiScaleBatches({self.plan})"

  @property
  def largest(self) -> StackedBatches:
    """The part with the most pixels in a batch."""
    return max(
      self.parts, key=lambda p: p.shard.batch_size * np.prod(p.image_shape)
    )

  def blank(self) -> Batch:
    """A batch of filler rows, of the largest shape."""
    return self.largest.blank()

  @property
  def shard(self) -> Shard:
    """The part of the largest batch that this process makes."""
    return self.largest.shard

  def __getitem__(self, step: int | slice) -> Any:
    if isinstance(step, slice):
      return self.slice(step)
    if not 0 <= step < len(self):
      raise IndexError(
        f"There is no step {step}: the data has {len(self)} steps."
      )
    part = self.parts[self.plan.choices[step]]
    return part.read(part.shard.part(int(self.plan.starts[step])))


def make(
  scales: Sequence[Scale],
  *,
  part: Callable[..., StackedBatches],
  ops: str,
  seed: int,
  steps: int,
) -> MultiScaleBatches:
  """The batches of all scales.

  Args:
    scales: the closed set of shapes.
    part: makes the dataset of one scale from `ops`, `batch_size`, `length`.
    ops: operations on the host with {h} and {w} for the size of the step.
    seed: of the run.
    steps: how many there are.

  Raises:
    ValueError: if the operations do not make images of the sizes.
  """
  plan = Plan(tuple(batch for _, _, batch in scales), seed, steps)
  parts = []
  for h, w, batch_size in scales:
    spec = ops.replace("{h}", str(h)).replace("{w}", str(w))
    one = part(ops=spec, batch_size=batch_size, length=int(plan.starts[-1]))
    if one.image_shape[:2] != (h, w):
      raise ValueError(
        f"data.scales has the size {h} x {w}, for which data.ops makes images "
        f"of {one.image_shape[0]} x {one.image_shape[1]}. Write {{h}}, {{w}} "
        "for the size of the step: random_resized_crop(({h}, {w}))."
      )
    parts.append(one)
  return MultiScaleBatches(parts, plan=plan)
