"""What the batch of a step is, as random-access datasets.

Element s of a dataset here is the host-local numpy batch of step s, a pure
function of the seed and s. Row i of the global batch is row s * B + i of the
data, on whichever host the mesh puts it, so that the global batch does not
depend on the number of hosts, nor any batch on the number of workers and
threads that make it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np
from absl import logging
from jaxtyping import Int, UInt8

from big_vision_like.api import Example
from big_vision_like.data import ops as ops_lib
from big_vision_like.data import packing, planning
from big_vision_like.data.objects import ObjectFaults, ObjectSpec
from big_vision_like.data.packing import Batch, PackSpec, Slot
from big_vision_like.data.text import Text, TextFaults, TextSpec


@dataclasses.dataclass(frozen=True)
class Shuffle:
  """The endless training stream: a new permutation of n examples each epoch.

  A Feistel network over the digits of i in base a, a x b >= n, which walks on
  while it lands beyond n: any position is found without those before it.
  (grain's shuffle takes 0.6 ms an index for a hundred examples.)

  Repeated augmentation (Hoffer et al. 2020; arXiv 2012.12877) gives each image
  `repeats` times in a row, in n positions the first n / repeats images of the
  permutation, as the sampler of DeiT does over all its processes.
  """

  n: int
  seed: int
  repeats: int = 1

  def __post_init__(self) -> None:
    if self.repeats < 1:
      raise ValueError(f"data.repeats is 1 or more, not {self.repeats}.")

  def __call__(self, position: int) -> int:
    """The source's index at a position of the stream."""
    epoch, i = divmod(position, self.n)
    i //= self.repeats
    a = math.isqrt(self.n - 1) + 1
    b = -(-self.n // a)
    while True:
      left, right = i % a, i // a
      for even, odd in _round_keys(self.seed, epoch):
        left = (left + _mix(right ^ even)) % a
        right = (right + _mix(left ^ odd)) % b
      i = left + a * right
      if i < self.n:
        return i


@functools.lru_cache(maxsize=64)
def _round_keys(seed: int, epoch: int) -> list[list[int]]:
  # With seed + epoch, epoch 1 of seed 0 would be epoch 0 of seed 1.
  state = np.random.SeedSequence([seed, epoch]).generate_state(8, np.uint64)
  return state.reshape(4, 2).tolist()


def _mix(x: int) -> int:
  """A hash of 64 bits, by the finaliser of SplitMix64 (Steele et al. 2014)."""
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
  return x ^ (x >> 31)


@dataclasses.dataclass(frozen=True)
class Shard:
  """The rows of the global batch that this process makes.

  The batch is cut into `count` equal parts, and this process makes those whose
  numbers are in `parts`, in ascending order. A mesh that follows the wires of a
  pod may give a process parts that are no neighbours, and several processes the
  same ones; `sharding.held_parts` reads them off the mesh.
  """

  batch_size: int
  parts: tuple[int, ...] = (0,)
  count: int = 1

  def __post_init__(self) -> None:
    if self.batch_size < 1 or self.batch_size % self.count:
      raise ValueError(
        f"The batch size {self.batch_size} is not divisible by the "
        f"{self.count} parts that the mesh cuts a batch into."
      )

  @property
  def local(self) -> int:
    """Rows of a batch on this process."""
    return self.batch_size // self.count * len(self.parts)

  def rows(self, step: int) -> list[int]:
    """The global rows of a step on this process."""
    return self.part(step * self.batch_size)

  def part(self, start: int) -> list[int]:
    """The global rows on this process of a batch that begins at `start`."""
    size = self.batch_size // self.count
    return [
      start + part * size + row for part in self.parts for row in range(size)
    ]


# What classification needs beside the pixels. Ops would have to move boxes and
# masks along, and some cannot.
_KEPT = ("id", "label", "multi_label")


@dataclasses.dataclass(frozen=True)
class Reader:
  """Decodes and augments one example, and vouches for its labels.

  Attributes:
    op: the operations on the host, from `ops.parse`.
    seed: with an example's position, the key of its random numbers.
    num_classes: the class count; None asks no questions.
    multi_label: the width of `multi_label`; None if the source has none.
    text: how captions become tokens; None leaves them out.
    objects: what is read in the place of labels; None reads labels.
  """

  op: ops_lib.Ops
  seed: int
  num_classes: int | None
  multi_label: int | None
  text: TextSpec | None = None
  objects: ObjectSpec | None = None

  def read(
    self, source: Any, index: int, position: int
  ) -> tuple[Example, np.random.Generator] | None:
    """`prepare` for an example of a source."""
    try:
      example = source[index]
    except ops_lib.BrokenImage:
      return None
    return self.prepare(example, position, lambda: source.name(index))

  def prepare(
    self, example: Example, position: int, name: Callable[[], str]
  ) -> tuple[Example, np.random.Generator] | None:
    """The example with pixels and `image_hw`, and the rest of its randomness.

    With texts, it has a `Text` besides.

    Returns:
      None if the image is broken.

    Raises:
      ValueError: naming the example, if its labels are outside the classes.
    """
    rng = planning.random(self.seed, position)
    try:
      image = ops_lib.decode(example["image"])
      caption = example.get("caption")
      keys = _KEPT if self.objects is None else self.objects.keys
      example = {k: example[k] for k in keys if k in example}
      example["image"] = image
      if self.objects is not None:
        example = self.objects.prepare(example, name)
      example = self.op(example, rng)
    except ops_lib.BrokenImage:
      return None
    self._check(example, name)
    example = {**example, "image_hw": image.shape[:2]}
    if self.text is not None:
      example["text"] = self.text.read(caption, rng)
    return example, rng

  def _check(self, example: Example, name: Callable[[], str]) -> None:
    if self.objects is not None:
      return self.objects.check(example, self.num_classes, name)
    label = example.get("label", -1)
    if self.num_classes and not -1 <= label < self.num_classes:
      raise ValueError(
        f"The label {label} of {name()} is outside the class count: there "
        f"are {self.num_classes} classes, and -1 stands for no label."
      )
    if self.multi_label is None:
      return
    width = len(example["multi_label"])
    if width != self.multi_label:
      raise ValueError(
        f"The multi_label of {name()} is outside the class count: it has "
        f"{width} entries for {self.multi_label} classes."
      )

  def blank(self, *shape: int) -> Batch:
    """Empty places for what `write` writes."""
    arrays = {
      "example_id": np.full(shape, -1, np.int64),
      "image_hw": np.zeros((*shape, 2), np.int32),
      "broken_id": np.full(shape, -1, np.int64),
    }
    if self.objects is not None:
      return arrays | self.objects.blank(*shape)
    arrays["label"] = np.full(shape, -1, np.int32)
    if self.multi_label is not None:
      arrays["multi_label"] = np.zeros((*shape, self.multi_label), np.uint8)
    if self.text is not None:
      arrays |= self.text.blank(*shape)
    return arrays

  def write(self, batch: Batch, at: Any, example: Example) -> None:
    """Copies to the place `at` of a batch what is neither pixels nor text."""
    batch["example_id"][at] = example["id"]
    batch["image_hw"][at] = example["image_hw"]
    if self.objects is not None:
      return self.objects.write(batch, at, example)
    batch["label"][at] = example.get("label", -1)
    if self.multi_label is not None:
      batch["multi_label"][at] = example["multi_label"]

  def write_texts(
    self, batch: Batch, row: int, examples: dict[int, Example]
  ) -> None:
    """Writes the texts of a packed row, given its examples by image slot."""
    if self.text is not None:
      texts = {slot: example["text"] for slot, example in examples.items()}
      self.text.write_row(batch, row, texts)


class Faults:
  """All that is counted of a pass over the data because it is not right."""

  def __init__(
    self, name: Callable[[int], str], *, max_broken: float, training: bool
  ):
    """Sets the limits, see the parts; `training` needs texts, or boxes."""
    self.images = BrokenImages(name, max_broken=max_broken)
    self.texts = TextFaults(required=training)
    self.objects = ObjectFaults(name, required=training)

  def update(self, host: dict[str, np.ndarray]) -> None:
    """Takes the host's part of a batch; raises where there is too much."""
    self.images.update(host)
    if "text_flags" in host:
      self.texts.update(host)
    if "object_counts" in host:
      self.objects.update(host)


class BrokenImages:
  """Names the images that could not be read, and stops if they are many.

  Attributes:
    images: how many images have been seen, broken ones included.
    broken: how many of them could not be read.
  """

  def __init__(
    self, name: Callable[[int], str], *, max_broken: float, patience: int = 100
  ):
    """Sets the limit.

    Args:
      name: of an image, by its id: the source's.
      max_broken: the largest share of broken images.
      patience: how many images to see before the share is looked at.
    """
    self._name, self._max, self._patience = name, max_broken, patience
    self._ids: dict[int, None] = {}
    self.images = self.broken = 0

  def update(self, host: dict[str, np.ndarray]) -> None:
    """Takes the host's part of a batch.

    Raises:
      ValueError: if more than the permitted share of images is broken.
    """
    broken = host["broken_id"][host["broken_id"] >= 0].tolist()
    for index in broken:
      if index not in self._ids:
        logging.warning("Cannot read the image %s.", self._name(index))
      self._ids[index] = None
    self.broken += len(broken)
    self.images += len(broken) + int((host["example_id"] >= 0).sum())
    if self.images >= self._patience and self.broken > self._max * self.images:
      first = ", ".join(self._name(i) for i in list(self._ids)[:3])
      raise ValueError(
        f"{self.broken} of {self.images} images could not be read, more than "
        f"the share data.max_broken={self._max}. Among them: {first}."
      )


def blank_packed(reader: Reader, spec: PackSpec, rows: int) -> Batch:
  """A packed batch of filler rows."""
  return packing.blank(spec, rows) | reader.blank(rows, spec.max_images)


def fit(
  image: UInt8[np.ndarray, "h w 3"],
  slot: Slot,
  rng: np.random.Generator,
  *,
  spec: PackSpec,
) -> tuple[UInt8[np.ndarray, "h2 w2 3"], Int[np.ndarray, " n"] | None]:
  """The image at the size of its slot, and which of its tokens to keep."""
  rows, columns = slot.grid(*image.shape[:2], spec=spec)
  image = ops_lib.resize(
    image,
    rows * spec.patch,
    columns * spec.patch,
    interpolation=spec.interpolation,
  )
  if not slot.drop:
    return image, None
  return image, packing.choose_kept(rows * columns, slot.kept, rng)


class PackedBatches(grain.MapDataset):
  """Batches of packed rows; `plan` gives the slots of each global row."""

  def __init__(
    self,
    source: Any,
    *,
    plan: Callable[[int], list[Slot]],
    reader: Reader,
    spec: PackSpec,
    shard: Shard,
    steps: int,
  ):
    super().__init__()
    self.source, self.plan, self.reader = source, plan, reader
    self.spec, self.shard, self.steps = spec, shard, steps

  def __len__(self) -> int:
    return self.steps

  def __str__(self) -> str:
    return f"PackedBatches({self.spec}, {self.shard}, steps={self.steps})"

  def blank(self) -> Batch:
    """A batch of filler rows."""
    return blank_packed(self.reader, self.spec, self.shard.local)

  def __getitem__(self, step: int | slice) -> Any:
    if isinstance(step, slice):
      return self.slice(step)
    batch = self.blank()
    for j, row in enumerate(self.shard.rows(within(step, self.steps))):
      start, examples = 0, {}
      for number, slot in enumerate(self.plan(row)):
        read = self.reader.read(self.source, slot.index, slot.position)
        if read is None:
          batch["broken_id"][j, number] = slot.index
          continue
        examples[number], rng = read
        image, keep = fit(examples[number]["image"], slot, rng, spec=self.spec)
        self.reader.write(batch, (j, number), examples[number])
        start += packing.put(
          batch, j, number, start, image=image, keep=keep, spec=self.spec
        )
      self.reader.write_texts(batch, j, examples)
    return batch


class StackedBatches(grain.MapDataset):
  """Batches of images that the ops have brought to one size.

  `order` gives the source's index of each of `length` examples, and
  `image_shape` is what the ops make of all images.
  """

  def __init__(
    self,
    source: Any,
    *,
    order: Callable[[int], int],
    length: int,
    image_shape: tuple[int, ...],
    reader: Reader,
    shard: Shard,
    steps: int,
  ):
    super().__init__()
    self.source, self.order, self.length = source, order, length
    self.reader, self.shard, self.steps = reader, shard, steps
    self.image_shape = image_shape

  def __len__(self) -> int:
    return self.steps

  def __str__(self) -> str:
    return f"StackedBatches({self.shard}, steps={self.steps})"

  def blank(self) -> Batch:
    """A batch of filler rows."""
    n = self.shard.local
    image = np.zeros((n, *self.image_shape), np.uint8)
    return {"image": image, "_mask": np.zeros(n, bool)} | self.reader.blank(n)

  def __getitem__(self, step: int | slice) -> Any:
    if isinstance(step, slice):
      return self.slice(step)
    return self.read(self.shard.rows(within(step, self.steps)))

  def read(self, positions: Sequence[int]) -> Batch:
    """The batch of these positions of the stream."""
    batch = self.blank()
    for j, position in enumerate(positions):
      if position < self.length:
        self._place(batch, j, self.order(position), position)
    return batch

  def _place(self, batch: Batch, row: int, index: int, position: int) -> None:
    read = self.reader.read(self.source, index, position)
    if read is None:
      batch["broken_id"][row] = index
      return
    example, _ = read
    if example["image"].shape != self.image_shape:
      raise ValueError(
        "Images of different sizes cannot be stacked: "
        f"{self.source.name(index)} is {example['image'].shape[:2]} after "
        f"data.ops, others are {self.image_shape[:2]}. Add an op such as "
        "resize(224) to data.ops, or pack the images with data.pack."
      )
    batch["image"][row] = example["image"]
    batch["_mask"][row] = True
    self.reader.write(batch, row, example)
    if self.reader.text is not None:
      self.reader.text.write(batch, row, example["text"])


class TextBatches(grain.MapDataset):
  """Texts alone, in batches of the shapes that `like` has.

  Their images are blank, so that a program that reads pairs reads these too;
  `example_id` is the number of the text.
  """

  def __init__(
    self, texts: Sequence[str], *, like: "PackedBatches | StackedBatches"
  ):
    super().__init__()
    spec, pack = like.reader.text, getattr(like, "spec", None)
    rng = np.random.default_rng(0)
    self.texts = [spec.read(text, rng) for text in texts]
    self.like, self.shard = like, like.shard
    self.in_row = 1 if pack is None else spec.whole(pack)
    self.steps = -(-len(texts) // (self.in_row * self.shard.batch_size))

  def __len__(self) -> int:
    return self.steps

  def __str__(self) -> str:
    return f"TextBatches({len(self.texts)}, {self.like})"

  def blank(self) -> Batch:
    """A batch of filler rows."""
    return self.like.blank()

  def __getitem__(self, step: int | slice) -> Any:
    if isinstance(step, slice):
      return self.slice(step)
    batch = self.blank()
    for j, row in enumerate(self.shard.rows(within(step, self.steps))):
      first = row * self.in_row
      texts = dict(enumerate(self.texts[first : first + self.in_row]))
      self._write(batch, j, first, texts)
    return batch

  def _write(
    self, batch: Batch, row: int, first: int, texts: dict[int, Text]
  ) -> None:
    spec = self.like.reader.text
    if batch["example_id"].ndim == 1:
      for text in texts.values():
        spec.write(batch, row, text)
        batch["example_id"][row] = first
      return
    spec.write_row(batch, row, texts)
    batch["example_id"][row, : len(texts)] = first + np.arange(len(texts))


def within(step: int, steps: int) -> int:
  """The step, or an IndexError if there is none such."""
  if not 0 <= step < steps:
    raise IndexError(f"There is no step {step}: the data has {steps} steps.")
  return step
