"""What the loader costs on one core, beside decoding and resizing alone."""

import dataclasses
import functools
import io
import time
from typing import Any

import numpy as np
from PIL import Image

from big_vision_like.benchmarks import measure
from big_vision_like.data import ops, packing, pipeline
from big_vision_like.data.batches import PackedBatches
from big_vision_like.data.budgets import Drop, Sizes
from big_vision_like.data.sources import digit_scenes

HW = (375, 500)  # 0.19 megapixels, as the photographs of ImageNet
QUALITY = 92


@functools.cache
def _jpegs(count: int) -> tuple[bytes, ...]:
  """Crops of the photographs that ship in installed packages."""
  rng = np.random.default_rng(0)
  photos = digit_scenes._photos()
  files = []
  for i in range(count):
    photo = photos[i % len(photos)]
    box = _draw_box(rng, *photo.shape[:2])
    file = io.BytesIO()
    image = Image.fromarray(ops.resize(photo, *HW, box=box))
    image.save(file, "JPEG", quality=QUALITY)
    files.append(file.getvalue())
  return tuple(files)


def _draw_box(rng, h, w):
  side = rng.uniform(0.7, 1.0) * min(h / HW[0], w / HW[1])
  crop_h, crop_w = int(side * HW[0]), int(side * HW[1])
  y, x = rng.integers(h - crop_h + 1), rng.integers(w - crop_w + 1)
  return x, y, x + crop_w, y + crop_h


@dataclasses.dataclass(frozen=True)
class Photos:
  """A source of JPEGs in memory."""

  count: int = 64
  label_names: tuple[str, ...] = ("photo",)

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, index: int) -> dict[str, Any]:
    return {"image": _jpegs(self.count)[index], "label": 0, "id": index}

  def hw(self, index: int) -> tuple[int, int]:
    del index
    return HW

  def name(self, index: int) -> str:
    return f"photo {index}"


def run(*, rows: int = 16, repeats: int = 7, drop: float = 0.5) -> str:
  """The table; `rows` of 256 tokens a batch, a quarter as many of 1,024."""
  lines = []
  for length, side in ((256, 256), (1024, 512)):
    data = dataset(length, side, rows=rows * 256 // length, drop=drop)
    lines.append(_row(data, repeats))
  note = (
    f"JPEGs of {HW[1]} x {HW[0]} pixels, quality {QUALITY}, in memory; "
    f"resolutions from 64 to 256 pixels in rows of 256 tokens, to 512 in rows "
    f"of 1,024; {drop:.0%} of the tokens dropped on average. Images/s of CPU "
    "time on one core. The share is that of the whole loader in what decoding "
    "and resizing alone would allow; it should be at least 80 %."
  )
  return measure.table("Loader, images/s/core", lines, note)


def dataset(length: int, side: int, *, rows: int, drop: float) -> PackedBatches:
  """Batches of rows as training makes them."""
  return pipeline.train_data(
    Photos(),
    ops="decode",
    pack=packing.PackSpec(length, 16, 32),
    sizes=Sizes(low=64, high=side),
    drop=Drop(law="beta", mean=drop, max=0.9),
    batch_size=rows,
    total_steps=1000,
    seed=0,
    num_classes=1,
  )


def _row(data: PackedBatches, repeats: int) -> dict[str, object]:
  images = slots_of(data)
  decode = lambda: [ops.decode(data.source[s.index]["image"]) for s in images]
  calls = {
    "decode": decode,
    "decode, resize": lambda: resize_all(data),
    "decode, resize, drop, pack": lambda: data[0],
  }
  times = measure.interleaved(
    calls, repeats=repeats, warmup=1, clock=time.process_time
  )
  rates = {name: len(images) / times.median(name) for name in calls}
  _, resized, packed = calls
  share = 1 / times.ratio(packed, resized)
  return {"row": data.spec.length, **rates, "share": f"{share:.1%}"}


def slots_of(data: PackedBatches) -> list[packing.Slot]:
  """The images of the first batch, which all columns read."""
  return [slot for row in data.shard.rows(0) for slot in data.plan(row)]


def resize_all(data: PackedBatches) -> list[np.ndarray]:
  """The images of the first batch, at the sizes that the loader gives them."""
  resized = []
  for slot in slots_of(data):
    image = ops.decode(data.source[slot.index]["image"])
    h, w = slot.grid(*image.shape[:2], spec=data.spec)
    size = h * data.spec.patch, w * data.spec.patch
    resized.append(ops.resize(image, *size))
  return resized
