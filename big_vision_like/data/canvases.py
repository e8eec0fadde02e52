"""Images of all sizes on canvases of a few: one compile each.

Carion et al., "End-to-End Object Detection with Transformers" (arXiv
2005.12872); there, a batch is as large as its largest image. Here it takes the
smallest canvas of a closed set that holds all images of the global batch. Every
host finds it without asking the others: the sizes after the ops follow from
random numbers and from `hw` of the source, and no pixel is read for them.

A large batch has images of all shapes, so that all would lie on the largest
canvas. Hence the images of a window of several batches are first sorted by the
canvas that each needs; the order of the window's batches is drawn anew.
"""

from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from big_vision_like.data import ops, planning
from big_vision_like.data.batches import Reader, Shard, within
from big_vision_like.data.packing import Batch

HW = tuple[int, int]
# A position in the stream, and (height, width) of its image after the ops.
Placed = tuple[int, HW | None]


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
    self._window: tuple[int, list[list[Placed]]] | None = None

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
    first = within(step, self.steps) * self.shard.batch_size
    placed = self.placed(step)
    image_hw = self.image_hw(placed) if self.spec.scores_masks else (1, 1)
    batch = self.blank(self.canvas(placed), image_hw)
    for j, row in enumerate(self.shard.rows(step)):
      position, size = placed[row - first]
      if position < self.length:
        self._place(batch, j, position, size)
    return batch

  def placed(self, step: int) -> list[Placed]:
    """Of each row of the global batch, its position and the image's size.

    The size is that after the ops, None of an image that is known to be broken
    or where the data has ended.
    """
    number, offset = divmod(step, self.spec.window)
    window = self._window
    # Threads that meet here find the same.
    if window is None or window[0] != number:
      self._window = window = number, self._sort(number)
    return window[1][offset]

  def _sort(self, number: int) -> list[list[Placed]]:
    """The batches of a window."""
    b, w = self.shard.batch_size, self.spec.window
    w = min(w, self.steps - number * w)
    first = number * self.spec.window * b
    placed = [(p, self._size(p)) for p in range(first, first + w * b)]
    if w == 1:
      return [placed]
    placed.sort(key=self._rank)
    order = planning.random(self.reader.seed, first).permutation(w)
    return [placed[i * b : (i + 1) * b] for i in order]

  def _rank(self, placed: Placed) -> tuple[bool, int, int]:
    """The end of the data last, else by the canvas that the image needs."""
    position, size = placed
    h, w = (size and self.spec.smallest(size)) or (0, 0)
    return position >= self.length, h * w, h

  def image_hw(self, placed: Sequence[Placed]) -> HW:
    """What holds each image of a batch as the source has it."""
    found = [(1, 1)]
    for position, size in placed:
      if size is not None:
        found.append(self.source.hw(self.order(position)))
    h, w = zip(*found)
    return max(h), max(w)

  def shares(self, steps: int = 32) -> list[float]:
    """How often the first steps take each of the canvases."""
    steps = range(min(steps, self.steps))
    taken = [self.canvas(self.placed(step)) for step in steps]
    return [taken.count(canvas) / len(taken) for canvas in self.canvases]

  def _size(self, position: int) -> HW | None:
    if position >= self.length:
      return None
    rng = planning.random(self.reader.seed, position)
    try:
      hw = self.source.hw(self.order(position))
      return self.reader.op.output_hw(hw, rng)
    except ops.BrokenImage:
      return None

  def canvas(self, placed: Sequence[Placed]) -> HW:
    """The smallest canvas that holds the images of a batch.

    Raises:
      ValueError: naming an image, if it fits none.
    """
    known = [size for _, size in placed if size is not None] or [(0, 0)]
    h, w = (max(sides) for sides in zip(*known))
    canvas = self.spec.smallest((h, w))
    if canvas is not None:
      return canvas
    largest = max(self.canvases, key=lambda c: c[0] * c[1])
    position, size = next(
      (position, size)
      for position, size in placed
      if size is not None and (size[0] > largest[0] or size[1] > largest[1])
    )
    index = self.order(position)
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
