"""Images of all sizes on canvases of a few: one compile each.

Carion et al., "End-to-End Object Detection with Transformers" (arXiv
2005.12872); there, a batch is as large as its largest image. Here it takes the
smallest canvas of a closed set that holds all images of the global batch. Every
host finds it without asking the others: the sizes after the ops follow from
random numbers and from `hw` of the source, and no pixel is read for them.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from big_vision_like.data import ops, planning
from big_vision_like.data.batches import Reader, Shard, within
from big_vision_like.data.packing import Batch

HW = tuple[int, int]


class CanvasBatches(grain.MapDataset):
  """Batches of images with objects, each image top-left on the canvas.

  `order` gives the source's index of each of `length` examples; the reader has
  an `ObjectSpec`, whose canvases these are.
  """

  def __init__(
    self,
    source: Any,
    *,
    order: Callable[[int], int],
    length: int,
    reader: Reader,
    shard: Shard,
    steps: int,
  ):
    super().__init__()
    self.source, self.order, self.length = source, order, length
    self.reader, self.shard, self.steps = reader, shard, steps
    self.spec = reader.objects
    self.canvases = [tuple(canvas) for canvas in self.spec.canvases]

  def __len__(self) -> int:
    return self.steps

  def __str__(self) -> str:
    return f"CanvasBatches({self.canvases}, {self.shard}, steps={self.steps})"

  def blank(self, canvas: HW | None = None, image_hw: HW = (1, 1)) -> Batch:
    """A batch of filler rows, on the largest canvas if none is named.

    `image_hw` holds all images as they were before the ops.
    """
    h, w = canvas or max(self.canvases, key=lambda c: c[0] * c[1])
    n = self.shard.local
    return {
      "image": np.zeros((n, h, w, 3), np.uint8),
      "_mask": np.zeros(n, bool),
      **self.reader.blank(n),
      **self.spec.blank_masks(n, (h, w), image_hw),
    }

  def __getitem__(self, step: int | slice) -> Any:
    if isinstance(step, slice):
      return self.slice(step)
    start = within(step, self.steps) * self.shard.batch_size
    sizes = self.sizes(step)
    image_hw = self.image_hw(step) if self.spec.scores_masks else (1, 1)
    batch = self.blank(self.canvas(step, sizes), image_hw)
    for j, position in enumerate(self.shard.rows(step)):
      if position < self.length:
        self._place(batch, j, position, sizes[position - start])
    return batch

  def sizes(self, step: int) -> list[HW | None]:
    """(height, width) after the ops of each image of the global batch.

    None stands for an image that is known to be broken.
    """
    return [self._size(position) for position in self._positions(step)]

  def image_hw(self, step: int) -> HW:
    """What holds each image of the global batch as the source has it."""
    found = [(1, 1)]
    for position in self._positions(step):
      with contextlib.suppress(ops.BrokenImage):
        found.append(self.source.hw(self.order(position)))
    h, w = zip(*found)
    return max(h), max(w)

  def _positions(self, step: int) -> range:
    start = step * self.shard.batch_size
    return range(start, min(start + self.shard.batch_size, self.length))

  def shares(self, steps: int = 32) -> list[float]:
    """How often the first steps take each of the canvases."""
    steps = range(min(steps, self.steps))
    taken = [self.canvas(step, self.sizes(step)) for step in steps]
    return [taken.count(canvas) / len(taken) for canvas in self.canvases]

  def _size(self, position: int) -> HW | None:
    rng = planning.random(self.reader.seed, position)
    try:
      hw = self.source.hw(self.order(position))
      return self.reader.op.output_hw(hw, rng)
    except ops.BrokenImage:
      return None

  def canvas(self, step: int, sizes: Sequence[HW | None]) -> HW:
    """The smallest canvas that holds the images of a step.

    Raises:
      ValueError: naming an image, if it fits none.
    """
    known = [size for size in sizes if size is not None] or [(0, 0)]
    h, w = (max(sides) for sides in zip(*known))
    canvas = self.spec.smallest((h, w))
    if canvas is not None:
      return canvas
    largest = max(self.canvases, key=lambda c: c[0] * c[1])
    row, size = next(
      (row, size)
      for row, size in enumerate(sizes)
      if size is not None and (size[0] > largest[0] or size[1] > largest[1])
    )
    index = self.order(step * self.shard.batch_size + row)
    raise ValueError(
      f"{self.source.name(index)} is {size[0]} x {size[1]} after the ops, and "
      f"the largest of config.data.objects.canvases is {largest[0]} x "
      f"{largest[1]}. Add a larger one, or limit the sides in config.data.ops "
      "or eval_ops, as with detr_resize(800, 1333)."
    )

  def _place(
    self, batch: Batch, row: int, position: int, size: HW | None
  ) -> None:
    index = self.order(position)
    read = self.reader.read(self.source, index, position)
    if read is None:
      batch["broken_id"][row] = index
      return
    example, _ = read
    h, w = example["image"].shape[:2]
    if (h, w) != size:
      raise ValueError(
        f"{self.source.name(index)} is {h} x {w} after the ops, where {size} "
        "was planned: hw() of its source must give the size that is decoded."
      )
    batch["image"][row, :h, :w] = example["image"]
    batch["_mask"][row] = True
    self.reader.write(batch, row, example)
