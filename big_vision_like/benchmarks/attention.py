"""Attention over packed rows by backend: time and memory against their length.

Forward and backward of `layers/attention.py` for rows that are full of images
of `IMAGE` tokens. Only the plain backend computes what foreign tokens would
have to say to each other.
"""

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from big_vision_like.benchmarks import measure
from big_vision_like.models.layers import attention, cudnn, splash

LENGTHS = (256, 1024, 4096, 16384)
# Tokens of an image: 14 x 14 patches.
IMAGE = 196
PEER = "torch"


def run(
  *,
  lengths: Sequence[int] = LENGTHS,
  heads: int = 6,
  head: int = 64,
  dtype: str | None = None,
  repeats: int = 5,
  memory: float = 4e9,
) -> str:
  """The table.

  Args:
    lengths: of the rows; each batch has as many rows as make up the longest.
    heads, head: of the layer, and of one of them; ViT-S has 6 of 64.
    dtype: of queries, keys and values; None: bfloat16, on a CPU float32.
    repeats: interleaved rounds.
    memory: bytes; what needs more is compiled, not run.
  """
  platform = jax.default_backend()
  dtype = dtype or ("float32" if platform == "cpu" else "bfloat16")
  kernels = {"tpu": ("splash",), "gpu": ("cudnn",)}.get(platform, ())
  names = ("xla", "blockwise", *kernels)
  rows = []
  for length in lengths:
    shape = (max(lengths) // length, length, heads, head)
    ids = segments(*shape[:2])
    compiled = {
      name: _compile(name, shape, dtype, ids)
      for name in names
      if name not in kernels or _refusal(name, shape, dtype) is None
    }
    calls = {k: call for k, (call, space) in compiled.items() if space < memory}
    # torch's mask, scores and gradients need as much as ours do.
    if importlib.util.find_spec("torch") and "xla" in calls:
      calls[PEER] = _torch(shape, dtype, ids)
    times = measure.interleaved(calls, repeats=repeats, warmup=1)
    row: dict[str, Any] = {"row": f"{length:,}", "rows": shape[0]}
    for name in (*names, PEER):
      known = name in calls
      row[f"{name}, ms"] = times.median(name) * 1e3 if known else "not run"
    row |= {f"{k}, MB": space / 1e6 for k, (_, space) in compiled.items()}
    chosen = attention.choose(
      *[jax.ShapeDtypeStruct(shape, dtype)] * 2, packed=True, mask=None
    )
    row["auto"] = chosen
    if chosen in calls:
      for other in ("xla", PEER):
        if other in calls:
          row[f"auto / {other}"] = times.ratio(other, chosen)
    rows.append(row)
  return measure.table("Attention over packed rows", rows, _note(dtype))


def _note(dtype):
  missing = ", ".join(
    name
    for name, platform in (("splash", "tpu"), ("cudnn", "gpu"))
    if platform != jax.default_backend()
  )
  return (
    f"Forward and backward, {dtype}, images of {IMAGE} tokens, on "
    f"{jax.device_count()} x {jax.devices()[0].device_kind}. torch is its "
    "scaled_dot_product_attention under the same mask, on the CPU. Memory is "
    "what the compiled program needs besides its arguments and results. Ratios "
    "are of speeds, the median over interleaved rounds. Not run here: "
    f"{missing}."
  )


def segments(rows: int, length: int) -> np.ndarray:
  """int32 [rows, length]: whole images, and padding where none fits."""
  ids = np.arange(length) // IMAGE + 1
  ids[length // IMAGE * IMAGE :] = 0 if length >= IMAGE else 1
  return np.broadcast_to(ids, (rows, length)).astype(np.int32)


def _refusal(name, shape, dtype):
  q = jax.ShapeDtypeStruct(shape, dtype)
  return {"splash": splash, "cudnn": cudnn}[name].refusal(q, q)


def _inputs(shape, dtype):
  rng = np.random.default_rng(0)
  return [jnp.asarray(rng.normal(size=shape), dtype) for _ in range(3)]


def _compile(
  name: str, shape: tuple[int, ...], dtype: str, ids: np.ndarray
) -> tuple[Callable[[], object], int]:
  """A call, and the bytes it needs while it runs."""
  attend = functools.partial(
    attention.attention,
    segment_ids=jnp.asarray(ids),
    backend=name,
    max_segments=int(ids.max()),
  )

  def total(q, k, v):
    return (attend(q, k, v).astype(jnp.float32) ** 2).sum()

  inputs = _inputs(shape, dtype)
  program = jax.jit(jax.grad(total, (0, 1, 2))).lower(*inputs).compile()
  space = program.memory_analysis().temp_size_in_bytes
  return lambda: jax.block_until_ready(program(*inputs)), space


def _torch(shape, dtype, ids):
  import torch

  q, k, v = (
    torch.from_numpy(np.array(x, np.float32))
    .to(getattr(torch, dtype))
    .permute(0, 2, 1, 3)
    .contiguous()
    .requires_grad_()
    for x in _inputs(shape, dtype)
  )
  ids = torch.from_numpy(np.array(ids))
  mask = (ids[:, :, None] == ids[:, None, :])[:, None]

  def call() -> None:
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)
    torch.autograd.grad((out.float() ** 2).sum(), (q, k, v))

  return call
