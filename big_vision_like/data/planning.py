"""Which images share a packed row.

Rows are planned before a pixel is read, in three ways for three kinds of data:
`PlannedRows` for training (row r is a pure function of the seed and r),
`ExactRows` for finite evaluation sets whose sizes are known, `OpenRows` for
streams whose lengths come one by one.
"""

import bisect
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int

from big_vision_like.data import budgets
from big_vision_like.data.packing import PackSpec, Slot, choose_grid

# Blocks are planned as a whole: more rows fill better and cost more to plan.
BLOCK = 32
# Images that a finite set is packed from at a time.
WINDOW = 1024
# Streams of random numbers that share a seed and an index.
_EXAMPLE, _BLOCK, _SIZE = 0, 1, 2


def random(
  seed: int, index: int, *, stream: int = _EXAMPLE
) -> np.random.Generator:
  """Random numbers of one example, whatever was drawn for others."""
  return np.random.Generator(
    np.random.Philox(key=[seed, index], counter=[0, 0, 0, stream])
  )


def best_fit_decreasing(
  lengths: Int[np.ndarray, " n"],
  *,
  length: int,
  max_images: int,
  rows: int | None = None,
) -> list[list[int]] | None:
  """Packs all lengths, longest first, each into the fullest row with room.

  Returns:
    The members of each row, or None if more than `rows` rows are needed.
  """
  members: list[list[int]] = []
  room: list[tuple[int, int]] = []  # (free tokens, row), sorted
  for i in np.argsort(-lengths, kind="stable").tolist():
    n = int(lengths[i])
    at = bisect.bisect_left(room, (n, -1))
    if at < len(room):
      free, row = room.pop(at)
    elif len(members) == rows:
      return None
    else:
      free, row = length, len(members)
      members.append([])
    members[row].append(i)
    if free > n and len(members[row]) < max_images:
      bisect.insort(room, (free - n, row))
  return members


def plan_block(
  kept: Float[np.ndarray, " n"], *, rows: int, spec: PackSpec
) -> tuple[list[list[int]], Int[np.ndarray, " n"]]:
  """Packs all images of a block into exactly `rows` rows, and fills them.

  The wanted lengths are scaled until they fit; what is then left of a row is
  given to its images in proportion. On average a length moves by a few per
  cent, and no token is padding.

  Returns:
    The members of each row, and the length of each image.
  """
  scale = min(2.0, rows * spec.length / kept.sum())
  while True:
    lengths = np.clip(np.floor(kept * scale), 1, spec.length).astype(int)
    members = best_fit_decreasing(
      lengths, length=spec.length, max_images=spec.max_images, rows=rows
    )
    if members is not None:
      break
    scale *= 0.99
  for row in members:
    grown = lengths[row] * (spec.length / lengths[row].sum())
    lengths[row] = np.floor(grown)
    lengths[row[0]] += spec.length - lengths[row].sum()
  return members, lengths


def make_slot(
  *, position: int, index: int, kept: int, tokens: float, rate: float
) -> Slot:
  """A slot of `kept` tokens, for an image with this area and drop rate.

  `kept` may differ from what was drawn; the rate then stays and the resolution
  gives way.
  """
  ratio = tokens / max(tokens * (1 - rate), 1.0)
  full = max(kept * ratio, kept)
  return Slot(position, index, kept=kept, full=full, drop=rate > 0)


def draw_slot(
  spec: PackSpec,
  *,
  sizes: budgets.Sizes,
  drop: budgets.Drop,
  seed: int,
  position: int,
  hw: tuple[int, int],
) -> Slot:
  """The slot of an image of a stream, which takes what it needs of a row."""
  rng = random(seed, position, stream=_SIZE)
  if sizes.kind == "native":
    tokens = budgets.native_tokens(np.array([hw]), patch=spec.patch)
  else:
    tokens = sizes.tokens(rng, 1, patch=spec.patch)
  rate = drop.rates(rng, tokens, seen=np.zeros(1))
  kept = budgets.kept_tokens(tokens, rate, length=spec.length).item()
  if rate.item() == 0:
    return Slot(position, -1, kept=spec.length, full=kept, drop=False)
  return make_slot(
    position=position,
    index=-1,
    kept=round(kept),
    tokens=tokens.item(),
    rate=rate.item(),
  )


class PlannedRows:
  """The rows of training: row r is a pure function of the seed and r.

  The images of a stream without end fill blocks of 32 rows in order; within a
  block they are arranged so that the rows are full. Planning costs about 20 us
  an image and reads no pixel; native sizes need `hw`.
  """

  def __init__(
    self,
    spec: PackSpec,
    *,
    sizes: budgets.Sizes,
    drop: budgets.Drop,
    seed: int,
    rows: int,
    order: Callable[[int], int],
    hw: Callable[[int], tuple[int, int]],
  ):
    """Solves how many images a block takes.

    Args:
      spec: the shape of the rows.
      sizes: the law of the resolutions.
      drop: the law of token dropping.
      seed: of all draws.
      rows: rows in the whole of training, which a schedule is stretched over.
      order: from a position in the stream to an index of the source.
      hw: the size of an image of the source.
    """
    self.spec, self.sizes, self.drop, self.seed = spec, sizes, drop, seed
    self.order, self.hw = order, hw
    self._plans: dict[int, list[list[Slot]]] = {}
    # Native sizes cost a look into each file.
    count = 1 << (12 if sizes.kind == "native" else 16)
    sample = self._tokens(random(0, 0, stream=_BLOCK), range(count))
    self.stairs = budgets.plan_staircase(
      sample,
      drop,
      capacity=BLOCK * spec.length,
      length=spec.length,
      max_count=BLOCK * spec.max_images,
      blocks=-(-rows // BLOCK),
    )

  def __call__(self, row: int) -> list[Slot]:
    """The slots of a row, in order."""
    block, i = divmod(row, BLOCK)
    plan = self._plans.get(block)
    if plan is None:
      plan = self._plan(block)
      if len(self._plans) >= 8:
        self._plans.clear()
      self._plans[block] = plan
    return plan[i] if i < len(plan) else []

  def _tokens(
    self, rng: np.random.Generator, positions: Sequence[int]
  ) -> Float[np.ndarray, " n"]:
    if self.sizes.kind != "native":
      return self.sizes.tokens(rng, len(positions), patch=self.spec.patch)
    hw = np.array([self.hw(self.order(p)) for p in positions])
    return budgets.native_tokens(hw, patch=self.spec.patch)

  def _plan(self, block: int) -> list[list[Slot]]:
    start, count = self.stairs(block)
    rng = random(self.seed, block, stream=_BLOCK)
    tokens = self._tokens(rng, range(start, start + count))
    seen = np.minimum((start + np.arange(count)) / self.stairs.total, 1.0)
    rates = self.drop.rates(rng, tokens, seen=seen)
    kept = budgets.kept_tokens(tokens, rates, length=self.spec.length)
    members, lengths = plan_block(kept, rows=BLOCK, spec=self.spec)
    return [
      [
        make_slot(
          position=start + i,
          index=self.order(start + i),
          kept=int(lengths[i]),
          tokens=float(tokens[i]),
          rate=float(rates[i]),
        )
        for i in row
      ]
      for row in members
    ]


class ExactRows:
  """The rows of a finite set of known sizes; every image comes once.

  Nothing is random and nothing is dropped. An image keeps its native size, or
  is resized, up or down, to the grid nearest to `tokens` patches and not above
  it; none exceeds a row.
  """

  def __init__(
    self,
    spec: PackSpec,
    *,
    indices: Sequence[int],
    hw: Callable[[int], tuple[int, int]],
    tokens: int | None = None,
  ):
    if tokens is not None and not 1 <= tokens <= spec.length:
      raise ValueError(
        f"Images of {tokens} tokens do not fit rows of {spec.length}: the "
        "token budget has to be from 1 to data.pack.length."
      )
    self._rows: list[list[Slot]] = []
    for start in range(0, len(indices), WINDOW):
      # What the last row of a window holds is packed anew with the next.
      slots = self._rows.pop() if self._rows else []
      slots += [
        self._slot(k, indices[k], hw=hw, tokens=tokens, spec=spec)
        for k in range(start, min(start + WINDOW, len(indices)))
      ]
      members = best_fit_decreasing(
        np.array([slot.kept for slot in slots]),
        length=spec.length,
        max_images=spec.max_images,
      )
      self._rows += [[slots[i] for i in row] for row in members]

  @staticmethod
  def _slot(
    position: int,
    index: int,
    *,
    hw: Callable[[int], tuple[int, int]],
    tokens: int | None,
    spec: PackSpec,
  ) -> Slot:
    h, w = hw(index)
    native = max(1.0, h * w / spec.patch**2)
    full = float(tokens or min(native, spec.length))
    most = tokens or spec.length
    rows, columns = choose_grid(h, w, full, at_most=most, spec=spec)
    return Slot(position, index, kept=rows * columns, full=full, drop=False)

  def __len__(self) -> int:
    return len(self._rows)

  def __call__(self, row: int) -> list[Slot]:
    """The slots of a row; rows beyond the last are empty."""
    return self._rows[row] if row < len(self._rows) else []


class OpenRows:
  """Best fit over a few open rows, for lengths that come one by one.

  `open` holds (key, length) of what is in each open row. A row that has been
  open for `16 * count` additions is closed, so that little has to be read
  again when a stream is continued.
  """

  def __init__(self, spec: PackSpec, *, count: int):
    self.spec, self.count = spec, count
    self.open: list[list[tuple[int, int]]] = [[] for _ in range(count)]

  def add(self, key: int, n: int) -> list[list[int]]:
    """Places a length; keys have to rise. Returns the rows this closes."""
    closed = [
      self._close(r)
      for r, row in enumerate(self.open)
      if row and row[0][0] <= key - 16 * self.count
    ]
    free = [self.spec.length - sum(m for _, m in row) for row in self.open]
    fits = [
      (free[r], r)
      for r, row in enumerate(self.open)
      if free[r] >= n and len(row) < self.spec.max_images
    ]
    if fits:
      r = min(fits)[1]
    else:
      r = free.index(min(free))
      closed.append(self._close(r))
      free[r] = self.spec.length
    self.open[r].append((key, n))
    if free[r] == n and n > 0:
      closed.append(self._close(r))
    return closed

  def flush(self) -> list[list[int]]:
    """Closes every row that holds something."""
    return [self._close(r) for r, row in enumerate(self.open) if row]

  def _close(self, r: int) -> list[int]:
    keys = [key for key, _ in self.open[r]]
    self.open[r] = []
    return keys
