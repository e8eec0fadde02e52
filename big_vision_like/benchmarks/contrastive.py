"""Time and memory of the contrastive losses, chunked and dense.

On simulated devices, whose number has to be set before JAX starts: each number
of devices is measured in a process of its own.
"""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from big_vision_like import allocator, api, sharding
from big_vision_like.benchmarks import measure
from big_vision_like.losses import contrastive

ROOT = Path(__file__).parents[2]
LOSSES = ("softmax", "sigmoid")
RING, GATHER, DENSE, PEER = "ring", "gather", "dense", "open_clip"
# Of the machine's memory, what the timed programs may take, and what they and
# the peer together may, which has this many matrices of logits at once. What we
# have freed stays ours, see allocator.py.
_SHARE, _SHARE_WITH_PEER, _PEER_MATRICES = 0.45, 0.7, 5
# From so many pairs on, a call takes a minute: two rounds, of warm programs or
# not, tell as much.
_LONG = 16_384


def run(
  *,
  batches: Sequence[int] = (4096, 32768, 131072),
  devices: int = 8,
  pairs: int = 512,
  width: int = 768,
  repeats: int = 5,
) -> str:
  """Two tables: growing batches on the same devices, and on more devices.

  Args:
    batches: pairs on all devices together.
    devices: simulated ones of the first table.
    pairs: on each device of the second table.
    width: of the embeddings.
    repeats: interleaved rounds.
  """
  settings = dict(width=width, repeats=repeats)
  first = [
    row
    for name in LOSSES  # Each in a process that has the memory for itself.
    for row in _measure(
      devices=devices, names=[name], batches=batches, **settings
    )
  ]
  settings = dict(width=width, repeats=0)
  second = [
    row
    for batch in batches
    for row in _measure(
      devices=batch // pairs, names=LOSSES, batches=[batch], **settings
    )
  ]
  note = (
    f"Loss and all gradients, float32, embeddings of width {width}, chunks of "
    f"{contrastive.CHUNK:,}. MB are XLA's temporary memory of one device, up "
    f"to {contrastive.KEEP_MB} of them logits that the softmax keeps. Dense is "
    "the matrix of all logits, its rows split over the devices; it is timed, "
    f"and we with it, where it takes less than {_SHARE:.0%} of this machine's "
    "memory. open_clip's losses run in one process, where there is room for "
    "them as well. Aim: at most 1.1 x dense."
  )
  note_2 = f"{pairs} pairs on each device; the rest is as above."
  return "\n\n".join(
    [
      measure.table(f"Contrastive losses on {devices} devices", first, note),
      measure.table("Contrastive losses on more devices", second, note_2),
    ]
  )


def _measure(devices: int, **settings: Any) -> list[dict[str, Any]]:
  """The rows of `rows`, from a process that sees this number of devices."""
  count = f"--xla_force_host_platform_device_count={devices}"
  done = subprocess.run(
    [sys.executable, "-m", __name__, json.dumps(settings)],
    cwd=ROOT,
    env=os.environ | {"XLA_FLAGS": count, "JAX_PLATFORMS": "cpu"},
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  )
  return json.loads(done.stdout.splitlines()[-1])


def rows(
  *, names: Sequence[str], batches: Sequence[int], width: int, repeats: int
) -> list[dict[str, Any]]:
  """A row for each loss of `names` and batch, on all devices that there are."""
  allocator.keep_freed_memory()
  mesh = sharding.make_mesh({"data": -1})
  with jax.set_mesh(mesh):
    return [
      _row(name, batch, width, repeats, mesh)
      for name in names
      for batch in batches
    ]


def _row(name, batch, width, repeats, mesh):
  programs = {
    form: _compile(name, form, batch, width, mesh)
    for form in (RING, GATHER, DENSE)
  }
  memory = {
    form: program.memory_analysis().temp_size_in_bytes
    for form, program in programs.items()
  }
  row = {"loss": name, "batch": batch, "devices": mesh.size}
  total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  timed, with_peer = fit(memory[DENSE] * mesh.size, batch, total)
  if repeats and timed:
    rounds = dict(repeats=repeats, warmup=1)
    if batch >= _LONG:
      rounds = dict(repeats=min(repeats, 2), warmup=0)
    with_peer &= installed()
    row |= _times(name, programs, with_peer, batch, width, mesh, rounds)
  return row | {f"{form}, MB": x / 1e6 for form, x in memory.items()}


def fit(dense: int, batch: int, total: int) -> tuple[bool, bool]:
  """Whether `total` bytes hold our programs, and open_clip's beside them.

  `dense` are the temporary bytes of the dense loss on all devices.
  """
  peer = _PEER_MATRICES * batch**2 * np.dtype(np.float32).itemsize
  return dense < _SHARE * total, dense + peer < _SHARE_WITH_PEER * total


def _times(name, programs, with_peer, batch, width, mesh, rounds):
  args = embeddings(batch, width)
  placed = _arguments(*args, name, mesh)
  calls = {
    form: functools.partial(_wait, program, placed)
    for form, program in programs.items()
  }
  if with_peer:
    from big_vision_like.benchmarks import peers

    calls[PEER] = peers.contrastive_loss(name, *args)
  times = measure.interleaved(calls, **rounds)
  ratios = {
    f"{form} / dense": times.ratio(form, DENSE) for form in (RING, GATHER)
  }
  return {f"{form}, s": times.median(form) for form in calls} | ratios


def installed() -> bool:
  """Whether open_clip's losses can be measured here."""
  return importlib.util.find_spec("open_clip") is not None


def _wait(program, args):
  return jax.block_until_ready(program(*args))


def embeddings(batch: int, width: int) -> tuple[np.ndarray, np.ndarray]:
  """Unit vectors float32 [batch, width] of images and of their texts."""
  rng = np.random.default_rng(0)
  zimg, noise = rng.normal(size=(2, batch, width)).astype(np.float32)
  unit = lambda z: z / np.linalg.norm(z, axis=-1, keepdims=True)
  return unit(zimg), unit(zimg + noise)


def _arguments(zimg, ztxt, name, mesh):
  rows, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  scalars = (10.0,) if name == "softmax" else (10.0, -10.0)
  return (
    *(jax.device_put(z, rows) for z in (zimg, ztxt)),
    *(jax.device_put(np.float32(x), everywhere) for x in scalars),
  )


def _compile(name, form, batch, width, mesh):
  loss = dense(name) if form == DENSE else chunked(name, form)
  z = np.broadcast_to(np.float32(0), (batch, width))
  specs = jax.eval_shape(lambda: _arguments(z, z, name, mesh))
  rows, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
  places = (rows, rows, *(everywhere,) * (len(specs) - 2))
  grad = jax.value_and_grad(loss, tuple(range(len(specs))))
  step = jax.jit(grad, in_shardings=places, out_shardings=(everywhere, places))
  return step.lower(*specs).compile()


def chunked(name: str, exchange: str) -> Callable[..., api.Array]:
  """Our loss of (zimg, ztxt, t[, b])."""
  function = getattr(contrastive, f"{name}_loss")

  def loss(zimg, *rest):
    mask = jnp.ones(zimg.shape[:1], bool)
    return function(zimg, *rest, mask, exchange=exchange)[0]

  return loss


def dense(name: str) -> Callable[..., api.Array]:
  """The same loss from the matrix of all logits, by differentiation."""

  def loss(zimg, ztxt, t, b=0.0):
    logits = t * zimg @ ztxt.T + b
    logits = jax.lax.with_sharding_constraint(logits, P(api.BATCH_AXES))
    if name == "sigmoid":
      signs = 2 * jnp.eye(len(logits)) - 1
      return -jax.nn.log_sigmoid(signs * logits).sum(1).mean()
    own = t * (zimg * ztxt).sum(1)
    lse = jax.nn.logsumexp(logits, 1) + jax.nn.logsumexp(logits, 0)
    return (lse / 2 - own).mean()

  return loss


if __name__ == "__main__":
  print(json.dumps(rows(**json.loads(sys.argv[1]))))
