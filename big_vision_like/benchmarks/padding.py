"""How much of the packed rows is padding, in each way of planning them."""

from collections.abc import Callable, Iterable

import numpy as np

from big_vision_like.benchmarks import measure
from big_vision_like.data import planning
from big_vision_like.data.budgets import Drop, Sizes
from big_vision_like.data.packing import PackSpec

PATCH = 16
LENGTHS = {256: 256, 1024: 512}  # of a row: the largest resolution in it
DROP = Drop(law="beta", mean=0.5, max=0.9)
OPEN_ROWS = (16, 32)


def image_hw(index: int, *, high: int) -> tuple[int, int]:
  """Native sizes: side uniform, aspect ratio from 1:2 to 2:1."""
  rng = np.random.default_rng(index)
  side = rng.uniform(64, high)
  root = np.exp(rng.uniform(-np.log(2), np.log(2)) / 2)
  return round(side * root), round(side / root)


def run(*, rows: int = 1024) -> str:
  """The table, over so many rows of each kind."""
  lines = []
  for name, share, aim in (
    ("planned, with dropping", lambda n: planned(n, rows, DROP), "1 %"),
    ("planned, without dropping", lambda n: planned(n, rows, Drop()), ""),
    ("exact, native sizes, evaluation", lambda n: exact(n, rows), "2 %"),
    *(
      (
        f"best fit over {count} open rows, {what} dropping",
        lambda n, count=count, drop=drop: stream(n, rows, drop, count),
        "",
      )
      for what, drop in (("with", DROP), ("without", Drop()))
      for count in OPEN_ROWS
    ),
  ):
    shares = {f"rows of {n:,}": f"{share(n):.2%}" for n in LENGTHS}
    lines.append({"packing": name, **shares, "at most": aim})
  note = (
    "Sides uniform from 64 to 256 pixels in rows of 256 tokens, to 512 in rows "
    "of 1,024, patches of 16, aspect ratios from 1:2 to 2:1; dropping takes "
    f"{DROP.mean:.0%} of the tokens on average. {rows:,} rows each."
  )
  return measure.table("Padding, share of all tokens", lines, note)


def _spec(length: int) -> PackSpec:
  return PackSpec(length, PATCH, max_images=64)


def _sizes(length: int) -> Sizes:
  return Sizes(low=64, high=LENGTHS[length])


def _hw(length: int) -> Callable[[int], tuple[int, int]]:
  return lambda index: image_hw(index, high=LENGTHS[length])


def _tokens(slot: planning.Slot, hw: tuple[int, int], spec: PackSpec) -> int:
  """What the image fills, as the loader rounds it to whole patches."""
  h, w = slot.grid(*hw, spec=spec)
  return slot.kept if slot.drop else h * w


def planned(length: int, rows: int, drop: Drop) -> float:
  """The share of padding in planned training rows."""
  spec, hw = _spec(length), _hw(length)
  plan = planning.PlannedRows(
    spec,
    sizes=_sizes(length),
    drop=drop,
    seed=0,
    rows=rows,
    order=lambda position: position,
    hw=hw,
  )
  slots = [slot for row in range(rows) for slot in plan(row)]
  used = sum(_tokens(slot, hw(slot.index), spec) for slot in slots)
  return 1 - used / (rows * length)


def exact(length: int, rows: int) -> float:
  """The share of padding when a finite set is packed from its sizes."""
  spec = _spec(length)
  mean = _sizes(length).tokens(np.random.default_rng(0), 4096, patch=PATCH)
  count = round(rows * length / mean.mean())
  plan = planning.ExactRows(spec, indices=range(count), hw=_hw(length))
  used = sum(slot.kept for row in range(len(plan)) for slot in plan(row))
  return 1 - used / (len(plan) * length)


def stream(length: int, rows: int, drop: Drop, count: int) -> float:
  """The share of padding in rows of a stream, best fit over open rows."""
  spec, hw = _spec(length), _hw(length)
  open_rows = planning.OpenRows(spec, count=count)
  tokens: list[int] = []
  closed: list[list[int]] = []
  while len(closed) < rows:
    position = len(tokens)
    slot = planning.draw_slot(
      spec,
      sizes=_sizes(length),
      drop=drop,
      seed=0,
      position=position,
      hw=hw(position),
    )
    tokens.append(_tokens(slot, hw(position), spec))
    closed += open_rows.add(position, tokens[-1])
  return 1 - _sum(tokens, closed) / (len(closed) * length)


def _sum(tokens: list[int], rows: Iterable[list[int]]) -> int:
  return sum(tokens[i] for row in rows for i in row)
