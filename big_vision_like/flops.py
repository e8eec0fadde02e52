"""Counts the FLOPs that a traced program asks for, and says what devices peak.

XLA's own cost analysis counts the body of a scan once and sees nothing in a
Pallas kernel, so that it is of no use for layers that are scanned. We walk the
jaxpr instead and count multiplications and additions of matrix products and
convolutions; everything elementwise is left out, as is usual.

What we call model FLOPs is the count of the step with the plain `xla` attention
backend and without rematerialisation: its attention is dense over the row, and
nothing is computed twice. Blockwise backends skip blocks by the values of the
segment ids, which no trace can know; their step is measured against that same
count. So for utilisation trace the plain step, whatever step is run.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

# Dense bfloat16 FLOP/s of one jax device (float16 where a chip has no
# bfloat16), from the vendors' data sheets; the first match wins. TPU v2, v3 and
# 7x show up as two devices a chip.
_PEAKS: tuple[tuple[str, float], ...] = (
  (r"TPU v2", 45e12 / 2),
  (r"TPU v3", 123e12 / 2),
  (r"TPU v4 lite", 138e12),
  (r"TPU v4", 275e12),
  (r"TPU v5 ?(lite|e)", 197e12),
  (r"TPU v5p?$", 459e12),
  (r"TPU v6 ?(lite|e)", 918e12),
  (r"TPU ?v?7x?", 2307e12 / 2),
  (r"\bG?B200\b", 2250e12),
  (r"\bH100 PCIe\b", 756e12),
  (r"\bH[12]00 NVL\b", 835e12),
  (r"\bG?H[12]00\b", 989e12),
  (r"\bA100\b", 312e12),
  (r"\bA30\b", 165e12),
  (r"\bA10G\b", 70e12),
  (r"\bA10\b", 125e12),
  (r"\bL40S\b", 362e12),
  (r"\bL40\b", 181e12),
  (r"\bL4\b", 121e12),
  (r"\bT4\b", 65e12),
  (r"\bV100-PCIE\b", 112e12),
  (r"\bV100\b", 125e12),
  (r"\bRTX 4090\b", 165e12),
  (r"\bRTX 3090\b", 71e12),
)


def count_flops(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
  """FLOPs of matrix products and convolutions in one call of `fn`.

  `fn` is traced, not run: arguments may be `jax.ShapeDtypeStruct`. The count
  is that of all devices together. A scan counts once per iteration, `cond` as
  its dearest branch, recomputed layers as often as they are computed, and a
  Pallas kernel as its own cost estimate (0 if it has none). The number of
  iterations of a `while` is not in the program: its body counts once.
  """
  return count_jaxpr(jax.make_jaxpr(fn)(*args, **kwargs))


def count_jaxpr(jaxpr: Any, *, padding: bool = False) -> float:
  """The count of `count_flops` for a program that is already traced.

  With `padding`, convolutions count the zeros around the image too, as the
  tables of papers do.
  """
  return float(_count(jaxpr, padding))


def peak_flops(device: jax.Device) -> float | None:
  """Peak dense bfloat16 FLOP/s of a device; None if we do not know it."""
  return peak_of_kind(device.device_kind)


def peak_of_kind(kind: str) -> float | None:
  """`peak_flops` of devices that are not here, by their `device_kind`."""
  for regex, peak in _PEAKS:
    if re.search(regex, kind):
      return peak
  return None


def peak_flops_of(devices: Sequence[jax.Device]) -> float | None:
  """Peak of all devices together; None if one of them is unknown."""
  peaks = [peak_flops(device) for device in devices]
  return None if None in peaks else sum(peaks)


def _count(jaxpr: Any, padding: bool) -> int:
  return sum(_count_equation(eqn, padding) for eqn in jaxpr.eqns)


def _count_equation(eqn: Any, padding: bool) -> int:
  name, params = eqn.primitive.name, eqn.params
  if name == "dot_general":
    return _dot_general(eqn)
  if name == "conv_general_dilated":
    return _conv(eqn, padding)
  if name == "pallas_call":
    estimate = params.get("cost_estimate")
    return int(estimate.flops) if estimate is not None else 0
  inner = [
    _count(jaxpr, padding) for jaxpr in _inner_jaxprs(tuple(params.values()))
  ]
  if name == "cond":
    return max(inner)
  return _repeats(name, params) * sum(inner)


def _inner_jaxprs(value: Any) -> Iterator[Any]:
  if hasattr(value, "eqns"):
    yield value
  elif isinstance(value, tuple | list):
    for item in value:
      yield from _inner_jaxprs(item)


def _repeats(name: str, params: dict[str, Any]) -> int:
  """How often the inner programs of an equation run."""
  if name == "scan":
    return params["length"]
  if name == "shard_map":
    # The inner program is that of one shard. The parameter that names the axes
    # it is split over is called differently in different versions of JAX.
    sizes = params["mesh"].shape
    axes = params.get("newly_manual_axes") or params.get("manual_axes") or sizes
    return math.prod(sizes[axis] for axis in axes)
  return 1


def _dot_general(eqn: Any) -> int:
  (contracted, _), _ = eqn.params["dimension_numbers"]
  lhs = eqn.invars[0].aval.shape
  depth = math.prod(lhs[axis] for axis in contracted)
  return 2 * math.prod(eqn.outvars[0].aval.shape) * depth


def _conv(eqn: Any, padding: bool) -> int:
  """Counts products with real input, no dilation holes; padding if asked."""
  params = eqn.params
  dims = params["dimension_numbers"]
  lhs, rhs = (v.aval.shape for v in eqn.invars[:2])
  out = eqn.outvars[0].aval.shape
  products = out[dims.out_spec[0]] * out[dims.out_spec[1]]
  products *= rhs[dims.rhs_spec[1]]  # input channels of one group
  for i, axis in enumerate(dims.out_spec[2:]):
    places = np.arange(out[axis])[:, None] * params["window_strides"][i]
    taps = np.arange(rhs[dims.rhs_spec[2 + i]]) * params["rhs_dilation"][i]
    read = places + taps - params["padding"][i][0]
    hole = params["lhs_dilation"][i]
    last = (lhs[dims.lhs_spec[2 + i]] - 1) * hole
    real = read % hole == 0
    if not padding:
      real &= (read >= 0) & (read <= last)
    products *= int(real.sum())
  return 2 * products
