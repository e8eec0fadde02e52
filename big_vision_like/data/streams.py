"""Packed rows from a stream, where only a stream exists.

Best fit over a few open rows, as a grain dataset whose state is exact: the
parent's state at the oldest image that has not been handed out, and where each
image since then went. Continuing reads those images again. Unlike planned
data, the rows depend on the numbers of workers and of hosts.
"""

import copy
from typing import Any, NamedTuple

import grain
import numpy as np

from big_vision_like.api import Example
from big_vision_like.data import batches, packing, planning
from big_vision_like.data import ops as ops_lib
from big_vision_like.data.budgets import Drop, Sizes
from big_vision_like.data.packing import Batch, PackSpec
from big_vision_like.data.text import TextSpec


class PackedStream(grain.IterDataset):
  """Batches of packed rows of the undecoded examples of `parent`."""

  def __init__(
    self,
    parent: grain.IterDataset,
    *,
    reader: batches.Reader,
    spec: PackSpec,
    sizes: Sizes,
    drop: Drop,
    shard: batches.Shard,
    open_rows: int,
  ):
    super().__init__(parent)
    self.reader, self.spec, self.sizes, self.drop = reader, spec, sizes, drop
    self.shard, self.open_rows = shard, open_rows

  def __str__(self) -> str:
    return f"PackedStream({self.spec}, open_rows={self.open_rows})"

  def __iter__(self) -> grain.DatasetIterator:
    return _PackedStreamIterator(iter(self._parent), self)

  def blank(self) -> Batch:
    """A batch of filler rows."""
    return batches.blank_packed(self.reader, self.spec, self.shard.local)


class _Held(NamedTuple):
  """An image on its way into a batch; without an example if it is broken."""

  id: int
  state: dict[str, Any]  # of the parent, before this image
  example: Example | None = None
  keep: np.ndarray | None = None
  tokens: int = 0


class _PackedStreamIterator(grain.DatasetIterator):
  """Images are numbered in the order of the parent, from 0."""

  def __init__(self, parent: grain.DatasetIterator, dataset: PackedStream):
    super().__init__(parent)
    self._dataset = dataset
    self._held: dict[int, _Held] = {}
    self._open = planning.OpenRows(dataset.spec, count=dataset.open_rows)
    self._closed: list[list[int]] = []
    self._next = 0
    self._ended = False

  def __next__(self) -> Batch:
    batch = self._dataset.blank()
    rows = self._dataset.shard.local
    while len(self._closed) < rows and not self._ended:
      self._advance()
    if not self._closed:
      raise StopIteration
    for row, numbers in enumerate(self._closed[:rows]):
      self._write(batch, row, [self._held.pop(i) for i in numbers])
    del self._closed[:rows]
    return batch

  def _advance(self) -> None:
    state = copy.deepcopy(self._parent.get_state())
    try:
      example = next(self._parent)
    except StopIteration:
      self._closed += self._open.flush()
      self._ended = True
      return
    held = self._held[self._next] = self._hold(self._next, example, state)
    self._closed += self._open.add(self._next, held.tokens)
    self._next += 1

  def _hold(
    self, number: int, example: Example, state: dict[str, Any]
  ) -> _Held:
    d, id_ = self._dataset, int(example["id"])
    read = d.reader.prepare(example, number, lambda: f"example {id_}")
    if read is None:
      return _Held(id_, state)
    example, rng = read
    slot = planning.draw_slot(
      d.spec,
      sizes=d.sizes,
      drop=d.drop,
      seed=d.reader.seed,
      position=number,
      hw=example["image"].shape[:2],
    )
    image, keep = batches.fit(example["image"], slot, rng, spec=d.spec)
    area = image.shape[0] * image.shape[1] // d.spec.patch**2
    tokens = area if keep is None else len(keep)
    return _Held(id_, state, {**example, "image": image}, keep, tokens)

  def _write(self, batch: Batch, row: int, images: list[_Held]) -> None:
    start, examples = 0, {}
    for number, held in enumerate(images):
      if held.example is None:
        batch["broken_id"][row, number] = held.id
        continue
      examples[number] = held.example
      self._dataset.reader.write(batch, (row, number), held.example)
      start += packing.put(
        batch,
        row,
        number,
        start,
        image=held.example["image"],
        keep=held.keep,
        spec=self._dataset.spec,
      )
    self._dataset.reader.write_texts(batch, row, examples)

  def get_state(self) -> dict[str, Any]:
    first = min(self._held, default=self._next)
    held = self._held.get(first)
    return {
      "parent": held.state if held else self._parent.get_state(),
      "first": first,
      "next": self._next,
      "open": [[list(image) for image in row] for row in self._open.open],
      "closed": [list(row) for row in self._closed],
      "ended": self._ended,
    }

  def set_state(self, state: dict[str, Any]) -> None:
    self._parent.set_state(state["parent"])
    self._open.open = [[(i, n) for i, n in row] for row in state["open"]]
    self._closed = [list(row) for row in state["closed"]]
    held = {i for row in self._open.open for i, _ in row}
    held |= {i for row in self._closed for i in row}
    self._held = {}
    for number in range(state["first"], state["next"]):
      before = copy.deepcopy(self._parent.get_state())
      example = next(self._parent)
      if number in held:
        self._held[number] = self._hold(number, example, before)
    self._next, self._ended = state["next"], state["ended"]


def packed_stream(
  examples: grain.IterDataset,
  *,
  ops: str,
  pack: PackSpec,
  sizes: Sizes | None = None,
  drop: Drop | None = None,
  batch_size: int,
  seed: int,
  num_classes: int | None,
  multi_label: bool = False,
  open_rows: int = 32,
  text: TextSpec | None = None,
  process_count: int = 1,
) -> PackedStream:
  """Batches of packed rows of a stream, where there is no random access.

  Args:
    examples: undecoded examples, as a source has them: this host's share.
    ops: operations on the host, as `ops.parse` reads them.
    pack: the shape of packed rows.
    sizes: the law of resolutions; native if None.
    drop: the law of token dropping.
    batch_size: B, rows in the global batch.
    seed: of everything that is drawn.
    num_classes: the class count that labels are checked against.
    multi_label: whether examples have `multi_label`.
    open_rows: how many rows are filled at a time. 16 leave about 2.5 % padding
      without dropping, 32 about 2 %.
    text: how captions become tokens; None leaves them out.
    process_count: how many hosts there are.

  Raises:
    ValueError: for a drop schedule, which needs to know where training ends.
  """
  if drop is not None and drop.law == "schedule":
    raise ValueError(
      "data.drop: the law 'schedule' needs to know how many images training "
      "takes, which a stream does not say."
    )
  if text is not None:
    text.check_pack(pack)
  width = num_classes if multi_label else None
  return PackedStream(
    examples,
    reader=batches.Reader(ops_lib.parse(ops), seed, num_classes, width, text),
    spec=pack,
    sizes=sizes or Sizes(kind="native"),
    drop=drop or Drop(),
    shard=batches.Shard(batch_size, count=process_count),
    open_rows=open_rows,
  )
