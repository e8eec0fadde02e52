"""What attention costs against the number of tokens: time and memory.

MobileViT v2's separable attention (arXiv 2206.02680, figure 1) grows with the
tokens, multi-head self-attention with their square; computed in blocks its
memory grows linearly too. A layer with its projections, forward.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from big_vision_like.benchmarks import measure
from big_vision_like.models.layers.blocks import (
  BlockConfig,
  MultiHeadAttention,
)
from big_vision_like.models.mobilevit_v2 import SeparableAttention

TOKENS = (64, 256, 1024, 4096, 16384)
LAYERS = ("separable", "MHSA", "MHSA blockwise")


def run(
  *,
  tokens: Sequence[int] = TOKENS,
  width: int = 512,
  heads: int = 8,
  repeats: int = 5,
  memory: float = 4e9,
) -> str:
  """The table, and the laws that fit its columns.

  Args:
    tokens: of an image; squares of even numbers, for v2's patches of 2 x 2.
    width: of the layer, the paper's 512.
    heads: of multi-head attention.
    repeats: interleaved rounds.
    memory: bytes; what needs more is compiled, not run.
  """
  rows, times, spaces = [], {k: {} for k in LAYERS}, {k: {} for k in LAYERS}
  for n in tokens:
    compiled = {k: _compile(k, n, width, heads) for k in LAYERS}
    for name, (_, space) in compiled.items():
      spaces[name][n] = space
    calls = {k: call for k, (call, space) in compiled.items() if space < memory}
    measured = measure.interleaved(calls, repeats=repeats, warmup=1)
    for name in calls:
      times[name][n] = measured.median(name) * 1e3
    row = {"tokens": f"{n:,}"}
    row |= {f"{k}, ms": times[k].get(n, "not run") for k in LAYERS}
    row |= {f"{k}, MB": spaces[k][n] / 1e6 for k in LAYERS}
    rows.append(row)
  note = (
    f"Width {width}, {heads} heads, one image, float32, on "
    f"{jax.device_count()} x {jax.devices()[0].device_kind}. Memory is what "
    "the compiled layer needs besides its parameters, its input and its output."
  )
  costs = {f"time of {k}": (times[k], "ms") for k in LAYERS}
  for k in LAYERS:
    megabytes = {n: x / 1e6 for n, x in spaces[k].items()}
    costs[f"memory of {k}"] = megabytes, "MB"
  # Two points fit any law.
  laws = [fit(k, *cost) for k, cost in costs.items() if len(cost[0]) > 2]
  table = measure.table("Cost against tokens", rows, note)
  return table + "\n\n" + measure.table("Fits", laws, FIT_NOTE)


FIT_NOTE = (
  "n in thousands of tokens. Least squares of the relative error; `error` is "
  "its root mean square. The law that fits with the smaller error is the "
  "nearer one; `power` is the slope between the two largest n, log to log."
)


def fit(
  name: str, cost: Mapping[int, float], unit: str
) -> dict[str, str | float]:
  """Fits a + b n and a + b n², n in thousands, to costs by tokens."""
  n = np.array(list(cost), float) / 1000
  y = np.array(list(cost.values()), float)
  row: dict[str, str | float] = {"cost": name}
  for law, power in (("linear", 1), ("quadratic", 2)):
    terms = np.stack([np.ones_like(n), n**power], 1) / y[:, None]
    (a, b), *_ = np.linalg.lstsq(terms, np.ones_like(y), rcond=None)
    error = np.sqrt(np.mean((terms @ (a, b) - 1) ** 2))
    symbol = "n" if power == 1 else "n²"
    row[law] = f"{a:.3g} + {b:.3g} {symbol} {unit}"
    row[f"{law} error"] = f"{error:.0%}"
  row["power"] = math.log(y[-1] / y[-2]) / math.log(n[-1] / n[-2])
  return row


def _compile(
  name: str, tokens: int, width: int, heads: int
) -> tuple[Callable[[], object], int]:
  """A call of the layer, and the bytes it needs while it runs."""
  side = math.isqrt(tokens)
  if side * side != tokens or side % 2:
    raise ValueError(
      f"{tokens} tokens are no square of an even number, so v2's layer has no "
      "map of them."
    )
  x = jax.random.normal(jax.random.key(0), (1, tokens, width))
  if name == "separable":
    layer = SeparableAttention("float32")
    x = x.reshape(1, side, side, width)
  else:
    backend = "blockwise" if name.endswith("blockwise") else "xla"
    layer = MultiHeadAttention(
      BlockConfig(heads=heads, mlp=width, attention=backend)
    )
  # Parameters do not depend on the tokens; few make them quickly.
  few = x[:, :2, :2] if x.ndim == 4 else x[:, :4]
  variables = layer.init(jax.random.key(1), few)
  compiled = jax.jit(layer.apply).lower(variables, x).compile()
  space = compiled.memory_analysis().temp_size_in_bytes
  return lambda: jax.block_until_ready(compiled(variables, x)), space
