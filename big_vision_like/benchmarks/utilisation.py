"""Utilisation of an accelerator in training, beside torch on the same one.

Model FLOPs of our step (see flops.py) over the time that it takes, as a share
of what a large matrix product reaches on the same device in the same run. In
bfloat16; torch by autocast. timm's ViTs run as `torch.compile` makes them, and
vit-pytorch's NaViT, which packs in its forward pass, as it is.
"""

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import jax

from big_vision_like.benchmarks import measure, models, peak, training, workload

OURS, TORCH = "ours", "torch"
DTYPE = "bfloat16"
# Batches that fill the devices and fit 80 GB.
VITS = (
  (models.Pair("vit", "B/16", "vit_base_patch16_224", 224), 128),
  (models.Pair("vit", "L/16", "vit_large_patch16_224", 224), 64),
)
NAVIT = workload.Size(width=768, depth=12, heads=12, mlp=3072)
IMAGES, LENGTHS = 512, (256, 1024)
_SIDE = 8192

Calls = tuple[training.Training, dict[str, Callable[[], Any]], int]


def run(*, repeats: int = 7) -> str:
  """The table, where there is an accelerator."""
  if jax.default_backend() == "cpu":
    return "### Utilisation\n\nNot measured: it needs a GPU or a TPU."
  cases = {f"ViT-{p.variant}": vit(p, batch) for p, batch in VITS}
  for length in LENGTHS:
    work = workload.fill_rows(workload.make_workload(IMAGES), length)
    cases[f"NaViT-B/16, rows of {length}"] = navit(work, length)
  return table(cases, repeats=repeats)


def table(
  cases: Mapping[str, Callable[[], Calls]],
  *,
  repeats: int,
  side: int = _SIDE,
) -> str:
  """A row for each case, which is made, measured and forgotten.

  Args:
    cases: by name, what makes our training, the calls, and a call's images.
    repeats: interleaved rounds.
    side: of the matrices whose product is the peak.
  """
  top = peak.of_products(side, DTYPE, repeats=repeats)
  rows = []
  for name, make in cases.items():
    trained, calls, images = make()
    times = measure.interleaved(calls, repeats=repeats, warmup=3)
    rate = trained.flops() / times.median(OURS)
    row = {
      "model": name,
      "images": images,
      OURS: images / times.median(OURS),
      "TFLOP/s": rate / 1e12,
      "of the peak": f"{rate / top:.1%}",
    }
    if TORCH in calls:
      row |= {
        TORCH: images / times.median(TORCH),
        f"{OURS} / {TORCH}": times.ratio(TORCH, OURS),
      }
    rows.append(row)
  note = (
    f"{DTYPE}, AdamW, on {jax.devices()[0].device_kind}. The peak is "
    f"{top / 1e12:.3g} TFLOP/s, of products of {side} x {side} matrices. "
    "torch: timm's ViT compiled, vit-pytorch's NaViT."
  )
  return measure.table("Utilisation in training, images/s", rows, note)


def vit(pair: models.Pair, batch: int) -> Callable[[], Calls]:
  """A ViT beside timm's."""

  def make() -> Calls:
    trained, ours = models.our_training(pair, batch, dtype=DTYPE)
    calls = {OURS: ours}
    if _comparable("timm"):
      theirs = models.their_training(pair, batch, "compiled", dtype=DTYPE)
      calls[TORCH] = theirs
    return trained, calls, batch

  return make


def navit(
  work: workload.Workload, length: int, size: workload.Size = NAVIT
) -> Callable[[], Calls]:
  """A NaViT beside vit-pytorch's."""

  def make() -> Calls:
    settings = dict(size=size, dtype=DTYPE)
    trained, ours = workload.our_step(work, length, **settings)
    calls = {OURS: ours}
    if _comparable("vit_pytorch"):
      from big_vision_like.benchmarks import peers

      calls[TORCH] = peers.vit_pytorch_step(work, length, **settings)
    return trained, calls, len(work.images)

  return make


def _comparable(package: str) -> bool:
  """Whether torch and a package of its are here, on the same device."""
  if not all(map(importlib.util.find_spec, ("torch", package))):
    return False
  from big_vision_like.benchmarks import peers

  device = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
  return peers.device().type == device
