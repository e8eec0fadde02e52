"""The images of the training benchmark, and our own step on them."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from big_vision_like.benchmarks import training
from big_vision_like.data import packing, planning
from big_vision_like.models import navit
from big_vision_like.tasks import classification

CLASSES = 10
PATCH = 16
# The longest image in tokens; what NaFlexViT pads all of them to.
LONGEST = 256


@dataclasses.dataclass(frozen=True)
class Size:
  """Of the Transformer that all programs train."""

  width: int = 192
  depth: int = 6
  heads: int = 3
  mlp: int = 768


SIZE = Size()


@dataclasses.dataclass(frozen=True)
class Workload:
  """Images of whole patches, their labels, and the share of dropped tokens.

  Attributes:
    images: uint8 [h,w,3] each.
    labels: int [n].
    drop: the same share for each image, as vit-pytorch's constant is.
  """

  images: list[np.ndarray]
  labels: np.ndarray
  drop: float = 0.0

  @functools.cached_property
  def lengths(self) -> np.ndarray:
    """Tokens that each image keeps, by vit-pytorch's way of rounding."""
    full = [im.shape[0] * im.shape[1] // PATCH**2 for im in self.images]
    return np.array([max(1, int(n * (1 - self.drop))) for n in full])


def make_workload(
  count: int = 32,
  *,
  low: int = 64,
  high: int = 256,
  drop: float = 0.0,
  seed: int = 0,
) -> Workload:
  """Random pixels; sides evenly spread, aspect ratios from 2:3 to 3:2."""
  rng = np.random.default_rng(seed)
  spec = packing.PackSpec(LONGEST, PATCH, 1)
  images = []
  for side in rng.permutation(np.linspace(low, high, count)):
    tokens = (side / PATCH) ** 2
    aspect = np.exp(rng.uniform(-np.log(1.5), np.log(1.5)))
    h, w = packing.choose_grid(
      round(100 * aspect), 100, tokens, at_most=LONGEST, spec=spec
    )
    shape = (h * PATCH, w * PATCH, 3)
    images.append(rng.integers(0, 256, shape, dtype=np.uint8))
  return Workload(images, rng.integers(0, CLASSES, count), drop)


def fill_rows(work: Workload, length: int) -> Workload:
  """A workload of more images: as many as fill rows of `length`.

  A row that stays half empty would measure the choice of the images.
  """
  rows = Packer(work, length).rows
  more = work
  while Packer(more, length).rows == rows:
    work = more
    more = make_workload(len(work.images) + 1, drop=work.drop)
  return work


class Packer:
  """Packs a workload into rows of `length`, dropping anew at each call.

  Attributes:
    rows: of each batch.
    slots: of each batch, padding included.
  """

  def __init__(self, work: Workload, length: int):
    self.work = work
    self.members = planning.best_fit_decreasing(
      work.lengths, length=length, max_images=len(work.images)
    )
    self.rows = len(self.members)
    self.slots = self.rows * length
    most = max(map(len, self.members))
    self.spec = packing.PackSpec(length, PATCH, most)
    self.rng = np.random.default_rng(1)

  def __call__(self) -> packing.Batch:
    batch = packing.blank(self.spec, self.rows)
    label = np.full((self.rows, self.spec.max_images), -1, np.int32)
    for row, members in enumerate(self.members):
      start = 0
      for slot, i in enumerate(members):
        label[row, slot] = self.work.labels[i]
        start += self._put(batch, row, slot, start, i)
    return {k: x for k, x in batch.items() if k != "num_tokens"} | {
      "label": label
    }

  def _put(self, batch, row, slot, start, i):
    image, keep = self.work.images[i], None
    if self.work.drop:
      full = image.shape[0] * image.shape[1] // PATCH**2
      keep = packing.choose_kept(full, self.work.lengths[i], self.rng)
    return packing.put(
      batch, row, slot, start, image=image, keep=keep, spec=self.spec
    )


def our_step(
  work: Workload, length: int, *, size: Size, dtype: str
) -> tuple[training.Training, Callable[[], float]]:
  """Our step; a call packs, moves to the device, trains and has the loss."""
  pack = Packer(work, length)
  model = navit.Model(
    variant=f"Ti/{PATCH}",
    num_classes=CLASSES,
    sizes=dataclasses.asdict(size),
    dtype=dtype,
    scan=False,
  )
  task = classification.Task(num_classes=CLASSES, loss_name="softmax")
  example = jax.tree.map(jnp.asarray, pack())
  trained = training.Training(model, task, example, clip=1.0)
  return trained, lambda: float(trained(pack())["loss"].compute())
