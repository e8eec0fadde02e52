"""What all tables share: interleaved timing, and markdown."""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class Times:
  """Seconds by name, one for each round.

  The rounds of all names interleave, so that a machine that is busy for a
  while slows all of them. A ratio is the median over the rounds of the ratio
  within a round.
  """

  seconds: Mapping[str, Sequence[float]]

  def median(self, name: str) -> float:
    """Seconds that one call took."""
    return statistics.median(self.seconds[name])

  def ratio(self, slow: str, fast: str) -> float:
    """How many times longer `slow` takes than `fast`."""
    pairs = zip(self.seconds[slow], self.seconds[fast])
    return statistics.median(a / b for a, b in pairs)


def interleaved(
  calls: Mapping[str, Callable[[], object]],
  *,
  repeats: int,
  warmup: int = 2,
  clock: Callable[[], float] = time.perf_counter,
) -> Times:
  """Times each call `repeats` times, all of them in each round.

  What was measured goes to stderr at once: a table is printed when it is whole,
  and some take minutes.
  """
  seconds = {name: [] for name in calls}
  for call in calls.values():
    for _ in range(warmup):
      call()
  for _ in range(repeats):
    for name, call in calls.items():
      start = clock()
      call()
      seconds[name].append(clock() - start)
  times = Times(seconds)
  found = (f"{name} {1e3 * times.median(name):.4g} ms" for name in calls)
  print(f"  {', '.join(found)}", file=sys.stderr, flush=True)
  return times


def table(title: str, rows: Sequence[Mapping[str, object]], note: str) -> str:
  """A markdown table under a title, with a note below it."""
  columns = list(dict.fromkeys(key for row in rows for key in row))
  cells = [columns, *([_cell(row.get(c, "")) for c in columns] for row in rows)]
  widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
  lines = [
    "| " + " | ".join(f"{x:{n}}" for x, n in zip(row, widths)) + " |"
    for row in cells
  ]
  rule = "|" + "|".join("-" * (n + 2) for n in widths) + "|"
  return "\n".join([f"### {title}", "", lines[0], rule, *lines[1:], "", note])


def _cell(value: object) -> str:
  if isinstance(value, float):
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
  return str(value)
