"""From a source to the devices: datasets, workers, the last hop.

`train_data` and `eval_data` make datasets of host-local numpy batches,
`open_iterator` runs one in threads or worker processes, `prefetch_to_device`
puts its batches on the devices ahead of time. The state of an iterator
describes the batches that were handed out, not those made ahead.
"""

import dataclasses
import functools
import hashlib
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import grain
import jax
import numpy as np
from absl import flags

from big_vision_like.api import HOST_KEYS, Batch
from big_vision_like.data import batches, multi_scale, planning
from big_vision_like.data import ops as ops_lib
from big_vision_like.data.batches import (
  PackedBatches,
  StackedBatches,
  TextBatches,
)
from big_vision_like.data.budgets import Drop, Sizes
from big_vision_like.data.canvases import CanvasBatches
from big_vision_like.data.multi_scale import MultiScaleBatches
from big_vision_like.data.objects import ObjectSpec
from big_vision_like.data.packing import PackSpec
from big_vision_like.data.streams import PackedStream
from big_vision_like.data.text import TextSpec

# One integer for planned data, a dict that JSON can hold for streams.
State = int | dict[str, Any]


def train_data(
  source: Any,
  *,
  ops: str,
  pack: PackSpec | None = None,
  sizes: Sizes | None = None,
  drop: Drop | None = None,
  scales: Sequence[multi_scale.Scale] | None = None,
  repeats: int = 1,
  text: TextSpec | None = None,
  objects: ObjectSpec | None = None,
  batch_size: int,
  total_steps: int,
  seed: int,
  num_classes: int | None,
  parts: Sequence[int] = (0,),
  part_count: int = 1,
) -> PackedBatches | StackedBatches | MultiScaleBatches | CanvasBatches:
  """The batches of training: shuffled anew each epoch, without end.

  Args:
    source: an `api.Source`.
    ops: operations on the host, as `ops.parse` reads them.
    pack: the shape of packed rows; None stacks the images.
    sizes: the law of resolutions of packed images; native if None.
    drop: the law of token dropping of packed images.
    scales: for stacked images, (height, width, B) of which one is drawn for
      each step; `ops` then say {h} and {w}.
    repeats: how often an image of the stack comes in a row, see `Shuffle`.
    text: how captions become tokens; None leaves them out.
    objects: for images with boxes, on canvases; None reads labels.
    batch_size: B, rows or images in the global batch; `scales` have their own.
    total_steps: how many batches there are. Only a drop schedule depends on
      it: with any other law, a longer run begins with the same batches.
    seed: of everything that is drawn.
    num_classes: the class count that labels are checked against.
    parts: which of the batch's equal parts this host makes, see `Shard`.
    part_count: how many parts there are.

  Raises:
    ValueError: if the batch cannot be split into the parts, the rows have
      too few slots for the laws, or settings are given for images that are
      packed and are not, or the other way round.
  """
  _check_source(source, seed)
  order = batches.Shuffle(len(source), seed, repeats)

  if objects is not None:
    _check_objects(pack=pack, scales=scales, text=text)
    return CanvasBatches(
      source,
      order=order,
      length=total_steps * batch_size,
      reader=_reader(
        source, ops=ops, seed=seed, num_classes=num_classes, objects=objects
      )[0],
      shard=batches.Shard(batch_size, tuple(parts), part_count),
      steps=total_steps,
    )

  def stacked(*, ops: str, batch_size: int, length: int) -> StackedBatches:
    reader, image_shape = _reader(
      source, ops=ops, seed=seed, num_classes=num_classes, text=text
    )
    return StackedBatches(
      source,
      order=order,
      length=length,
      image_shape=image_shape,
      reader=reader,
      shard=batches.Shard(batch_size, tuple(parts), part_count),
      steps=total_steps,
    )

  if pack is None:
    if sizes or drop:
      raise ValueError(
        "data.sizes and data.drop are laws of packed rows: they need data.pack."
      )
    if scales is not None:
      return multi_scale.make(
        multi_scale.check(scales),
        part=stacked,
        ops=ops,
        seed=seed,
        steps=total_steps,
      )
    length = total_steps * batch_size
    return stacked(ops=ops, batch_size=batch_size, length=length)
  if scales is not None or repeats != 1:
    raise ValueError(
      "data.scales and data.repeats are for stacked images: they need "
      "data.pack = None. Packed rows have data.sizes."
    )
  if text is not None:
    text.check_pack(pack)
  reader, _ = _reader(
    source, ops=ops, seed=seed, num_classes=num_classes, text=text
  )
  shard = batches.Shard(batch_size, tuple(parts), part_count)
  plan = planning.PlannedRows(
    pack,
    sizes=sizes or Sizes(kind="native"),
    drop=drop or Drop(),
    seed=seed,
    rows=total_steps * batch_size,
    order=order,
    hw=functools.partial(_hw, source),
  )
  return PackedBatches(
    source, plan=plan, reader=reader, spec=pack, shard=shard, steps=total_steps
  )


def eval_data(
  source: Any,
  *,
  ops: str,
  pack: PackSpec | None = None,
  tokens: int | None = None,
  text: TextSpec | None = None,
  objects: ObjectSpec | None = None,
  batch_size: int,
  limit: int | None = None,
  num_classes: int | None,
  parts: Sequence[int] = (0,),
  part_count: int = 1,
) -> PackedBatches | StackedBatches | CanvasBatches:
  """The batches of an evaluation: each example once, none dropped.

  Every host has the same number of steps; what is missing is filled up with
  rows whose `_mask` is False. Random operations draw the same each time.

  Args:
    source: an `api.Source`.
    ops: operations on the host, as `ops.parse` reads them.
    pack: the shape of packed rows; None stacks the images.
    tokens: the budget of a packed image, which is resized, up or down, to the
      grid nearest to it and not above; None: that of `pack`, or the native
      size. No image exceeds a row.
    text: how captions become tokens. A packed row has no more images than it
      has room for texts of `length`, so that none is cut for another.
    objects: for images with boxes, on canvases; None reads labels.
    batch_size: B, rows or images in the global batch.
    limit: take only so many examples, spread evenly over the source.
    num_classes: the class count that labels are checked against.
    parts: which of the batch's equal parts this host makes, see `Shard`.
    part_count: how many parts there are.

  Raises:
    ValueError: if the batch cannot be split into the parts, the budget is
      larger than a row, or the limit is less than 1.
  """
  _check_source(source, 0)
  if objects is not None:
    _check_objects(pack=pack, text=text)
    most = max(objects.max_objects, getattr(source, "max_objects", 0))
    objects = dataclasses.replace(objects, max_objects=most, evaluation=True)
  reader, image_shape = _reader(
    source,
    ops=ops,
    seed=0,
    num_classes=num_classes,
    text=text,
    objects=objects,
  )
  shard = batches.Shard(batch_size, tuple(parts), part_count)
  if limit is not None and limit < 1:
    raise ValueError(f"An evaluation needs 1 or more examples, not {limit}.")
  n = min(limit or len(source), len(source))
  indices = [i * len(source) // n for i in range(n)]
  if pack is None and tokens is not None:
    raise ValueError("A token budget needs packed rows: set data.pack.")
  if objects is not None:
    return CanvasBatches(
      source,
      order=indices.__getitem__,
      length=n,
      reader=reader,
      shard=shard,
      steps=-(-n // batch_size),
    )
  if pack is None:
    return StackedBatches(
      source,
      order=indices.__getitem__,
      length=n,
      image_shape=image_shape,
      reader=reader,
      shard=shard,
      steps=-(-n // batch_size),
    )
  planned = pack
  if text is not None:
    text.check_pack(pack)
    planned = dataclasses.replace(pack, max_images=text.whole(pack))
  plan = planning.ExactRows(
    planned,
    indices=indices,
    hw=functools.partial(_hw, source),
    tokens=pack.eval_tokens if tokens is None else tokens,
  )
  return PackedBatches(
    source,
    plan=plan,
    reader=reader,
    spec=pack,
    shard=shard,
    steps=-(-len(plan) // batch_size),
  )


def text_data(
  texts: Sequence[str], *, like: PackedBatches | StackedBatches
) -> TextBatches:
  """Texts without images, in batches of the shapes of an evaluation's.

  Raises:
    ValueError: if those have no texts, or there is nothing to embed.
  """
  if like.reader.text is None:
    raise ValueError(
      "Texts are embedded with the tokenizer of the data: set config.data.text."
    )
  if not texts:
    raise ValueError("There are no texts to embed.")
  return TextBatches(texts, like=like)


def _check_objects(**others: Any) -> None:
  for name, value in others.items():
    if value is not None:
      raise ValueError(
        f"data.objects lays whole images on canvases: it needs data.{name} = "
        "None."
      )


def _check_source(source: Any, seed: int) -> None:
  if not 1 <= len(source) < 2**32:
    raise ValueError(
      f"A data source needs 1 to 2**32 examples; this one has {len(source)}."
    )
  if not 0 <= seed < 2**63:
    raise ValueError(f"A seed is a whole number from 0 to 2**63, not {seed}.")


def _reader(
  source: Any,
  *,
  ops: str,
  seed: int,
  num_classes: int | None,
  text: TextSpec | None = None,
  objects: ObjectSpec | None = None,
) -> tuple[batches.Reader, tuple[int, ...]]:
  """The reader, and the shape of the first image that it reads."""
  reader = batches.Reader(
    ops_lib.parse(ops), seed, num_classes, None, text, objects
  )
  for index in range(min(len(source), 100)):
    if (read := reader.read(source, index, index)) is None:
      continue
    example, _ = read
    if (labels := example.get("multi_label")) is not None:
      width = num_classes or len(labels)
      reader = dataclasses.replace(reader, multi_label=width)
    return reader, example["image"].shape
  raise ValueError(
    f"None of the first images can be read, from {source.name(0)} on."
  )


def _hw(source: Any, index: int) -> tuple[int, int]:
  try:
    return source.hw(index)
  except ops_lib.BrokenImage:
    # It gets a token, and is found broken again where it is read and counted.
    return 1, 1


def fingerprint(source: Any) -> str:
  """A short hash of the source's length, class names and a few examples."""
  digest = hashlib.sha256(repr((len(source), source.label_names)).encode())
  last = len(source) - 1
  for index in sorted({0, last // 3, last // 2, last}):
    try:
      example = source[index]
    except ops_lib.BrokenImage:
      digest.update(b"unreadable")
      continue
    image, label = example["image"], example.get("label", -1)
    digest.update(repr((getattr(image, "shape", None), int(label))).encode())
    digest.update(bytes(example.get("multi_label", b"")))
    digest.update(repr(example.get("caption")).encode(errors="replace"))
    if "label" not in example and "objects" in example:
      digest.update(example["objects"]["boxes"].tobytes())
      digest.update(example["objects"]["label"].tobytes())
    digest.update(bytes(image))
  return digest.hexdigest()[:12]


class BatchIterator:
  """Numpy batches of a dataset, with the position behind the last of them."""

  def __init__(
    self, iterator: grain.DatasetIterator, state: Callable[[int], State]
  ):
    """`state` gives the position after so many batches."""
    self._iterator, self._state, self._count = iterator, state, 0

  def __iter__(self) -> "BatchIterator":
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    batch = next(self._iterator)
    self._count += 1
    return batch

  def get_state(self) -> State:
    """What `open_iterator` takes as `start` to go on from here."""
    return self._state(self._count)

  def close(self) -> None:
    """Ends the workers."""
    self._iterator.close()


def open_iterator(
  dataset: PackedBatches
  | StackedBatches
  | CanvasBatches
  | MultiScaleBatches
  | TextBatches
  | PackedStream,
  *,
  start: State = 0,
  workers: int = 0,
  threads: int = 2,
  prefetch: int = 2,
) -> BatchIterator:
  """Runs a dataset from `start` on.

  Batches are made whole where they are made: in worker processes, or for
  `workers=0` in threads of this one. Worker processes hand them over in shared
  memory, which has to hold workers * (prefetch + 2) batches.

  Args:
    dataset: from `train_data`, `eval_data`, `text_data` or `packed_stream`.
    start: the index of the first batch, or what `get_state` gave.
    workers: processes, which may differ from those of the state, except for
      streams.
    threads: in each process, or in this one without any; streams have none.
    prefetch: batches made ahead, by each worker.

  Raises:
    ValueError: if the state is not one of this dataset.
  """
  if isinstance(dataset, grain.IterDataset):
    return _open_stream(dataset, start, workers, prefetch)
  if not isinstance(start, int) or not 0 <= start <= len(dataset):
    raise ValueError(
      f"Planned data starts at a batch from 0 to {len(dataset)}, not {start}."
    )
  ahead = max(prefetch, threads) if threads else 0
  read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
  iterable = _in_workers(
    dataset[start:].to_iter_dataset(read), workers, prefetch
  )
  return BatchIterator(iter(iterable), lambda count: start + count)


def _open_stream(
  dataset: PackedStream, start: State, workers: int, prefetch: int
) -> BatchIterator:
  iterator = iter(_in_workers(dataset, workers, prefetch))
  if start != 0:
    if not isinstance(start, dict) or start.get("workers") != workers:
      iterator.close()
      raise ValueError(
        "A stream goes on only from its own state, with the same number of "
        f"workers: there are {workers} now, and the state is {start}."
      )
    iterator.set_state(start["stream"])
  return BatchIterator(
    iterator,
    lambda count: {"workers": workers, "stream": iterator.get_state()},
  )


def _in_workers(
  dataset: grain.IterDataset, workers: int, prefetch: int
) -> grain.IterDataset:
  if not workers:
    return dataset
  if not flags.FLAGS.is_parsed():
    # grain reads a flag of its own, also where no absl app is running.
    flags.FLAGS.mark_as_parsed()
  options = grain.MultiprocessingOptions(
    num_workers=workers, per_worker_buffer_size=max(prefetch, 1)
  )
  return dataset.mp_prefetch(options, worker_init_fn=_start_worker)


def _start_worker(index: int, count: int) -> None:
  """Ctrl-C is for the main process; a worker ends with it."""
  del index, count
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  parent = multiprocessing.parent_process()
  if parent is not None:
    threading.Thread(target=_watch, args=(parent.pid,), daemon=True).start()


def _watch(parent: int) -> None:
  # A killed process cannot end its workers, and they would keep their shared
  # memory. Once they are gone too, Python's resource tracker frees it.
  while os.getppid() == parent:
    time.sleep(1)
  os._exit(1)


Dataset = (
  PackedBatches
  | StackedBatches
  | MultiScaleBatches
  | CanvasBatches
  | PackedStream
)


def specs(dataset: Dataset) -> list[dict[str, jax.ShapeDtypeStruct]]:
  """`spec` of every shape that the dataset's batches have."""
  if isinstance(dataset, MultiScaleBatches):
    return [spec(part) for part in dataset.parts]
  if isinstance(dataset, CanvasBatches):
    rows = dataset.shard.batch_size
    return [_spec(dataset.blank(c), rows) for c in dataset.canvases]
  return [spec(dataset)]


def shares(dataset: Dataset) -> list[float]:
  """About how often each of `specs` occurs."""
  if isinstance(dataset, CanvasBatches):
    return dataset.shares()
  count = len(specs(dataset))
  return [1 / count] * count


def spec(dataset: Dataset) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes and dtypes of the dataset's global batches, on the devices.

  Of batches with several shapes, those of the largest.
  """
  return _spec(dataset.blank(), dataset.shard.batch_size)


def _spec(batch: Batch, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
  return {
    key: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype)
    for key, x in batch.items()
    if key not in HOST_KEYS
  }


def to_device(
  batch: dict[str, np.ndarray], sharding: jax.sharding.Sharding
) -> tuple[Batch, dict[str, np.ndarray]]:
  """The global batch on the devices, and what stays on this host.

  Args:
    batch: this host's rows.
    sharding: of the leading axis, for arrays of every rank.
  """
  put = functools.partial(jax.make_array_from_process_local_data, sharding)
  device = {k: put(x) for k, x in batch.items() if k not in HOST_KEYS}
  return device, {k: x for k, x in batch.items() if k in HOST_KEYS}


class DeviceFeed:
  """Batches that a thread has put on the devices ahead of time.

  Attributes:
    waited: seconds that `next` has waited for data so far.
  """

  def __init__(
    self, iterator: BatchIterator, sharding: jax.sharding.Sharding, size: int
  ):
    self.waited = 0.0
    self._iterator, self._sharding = iterator, sharding
    self._state = iterator.get_state()
    self._queue: queue.Queue[Any] = queue.Queue(maxsize=size)
    self._closed = threading.Event()
    self._thread = threading.Thread(target=self._run, daemon=True)
    self._thread.start()

  def _run(self) -> None:
    try:
      while not self._closed.is_set():
        batch = to_device(next(self._iterator), self._sharding)
        self._offer((batch, self._iterator.get_state(), None))
    except Exception as e:  # `next` raises it, the end of the data included.
      self._offer((None, None, e))

  def _offer(self, item: Any) -> None:
    while not self._closed.is_set():
      try:
        return self._queue.put(item, timeout=0.1)
      except queue.Full:
        continue

  def __iter__(self) -> "DeviceFeed":
    return self

  def __next__(self) -> tuple[Batch, dict[str, np.ndarray]]:
    if self._closed.is_set():
      raise ValueError("The feed is closed.")
    start = time.perf_counter()
    batch, state, error = self._queue.get()
    self.waited += time.perf_counter() - start
    if error is not None:
      self.close()
      raise error
    self._state = state
    return batch

  def get_state(self) -> State:
    """The position behind the last batch that was handed out."""
    return self._state

  def close(self) -> None:
    """Ends the thread and the iterator."""
    self._closed.set()
    self._thread.join()
    self._iterator.close()


def prefetch_to_device(
  iterator: BatchIterator, sharding: jax.sharding.Sharding, *, size: int = 2
) -> DeviceFeed:
  """Feeds up to `size` batches to the devices ahead of their use."""
  return DeviceFeed(iterator, sharding, size)
