"""Images a second of single models, against timm's on the same cores.

Forward passes in evaluation, of ours with BatchNorms folded, against the best
of what torch offers: eager, channels last, compiled. Training steps are forward
and backward passes with AdamW.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from big_vision_like import flops, resolve
from big_vision_like.benchmarks import measure, peak, training
from big_vision_like.models.layers import convolution
from big_vision_like.tasks import classification

CLASSES = 1000
MODES = ("eager", "channels last", "compiled")
_SIDE = 2048


@dataclasses.dataclass(frozen=True)
class Pair:
  """A model of ours and the same one of timm's."""

  name: str
  variant: str
  timm: str
  pixels: int
  aim: float = 1.0


PAIRS = (
  Pair("efficientvit", "M2", "efficientvit_m2", 224),
  Pair("mobilevit", "S", "mobilevit_s", 256),
  Pair("mobilevit_v2", "1.0", "mobilevitv2_100", 256),
  Pair("vit", "S/16", "vit_small_patch16_224", 224, aim=1.5),
)
TRAINED = ("vit", "efficientvit")


def run(
  *,
  pairs: Sequence[Pair] = PAIRS,
  batches: Sequence[int] = (1, 16),
  repeats: int = 7,
  modes: Sequence[str] = MODES,
) -> str:
  """The table.

  Args:
    pairs: the models.
    batches: sizes of the batch, each a row.
    repeats: interleaved rounds.
    modes: how torch runs; the fastest counts.
  """
  if not importlib.util.find_spec("timm"):
    return "### Models\n\nNot measured: timm is not installed."
  import torch

  top = peak.of_products(_SIDE, "float32", repeats=repeats)
  rows = []
  for pair in pairs:
    for batch in batches:
      _, ours, count = compiled_forward(pair, batch)
      calls = {"ours": ours}
      calls |= {mode: their_forward(pair, batch, mode) for mode in modes}
      limit = batch * top / count
      rows.append(_row(pair, "forward", batch, calls, limit, repeats))
    if pair.name in TRAINED:
      batch = max(batches)
      trained, ours = our_training(pair, batch)
      calls = {"ours": ours}
      eager = [mode for mode in modes if mode != "compiled"]
      calls |= {mode: their_training(pair, batch, mode) for mode in eager}
      limit = batch * top / trained.flops()
      rows.append(_row(pair, "training", batch, calls, limit, repeats))
  aims = ", ".join(f"{p.aim:g} for {p.name} {p.variant}" for p in pairs)
  note = (
    f"float32, on {jax.device_count()} x {jax.devices()[0].device_kind} and "
    f"{torch.get_num_threads()} threads of torch, whose fastest of "
    f"{', '.join(modes)} counts (training is not compiled). The ratio is the "
    "median over interleaved rounds. The limit is that of the products alone, "
    f"at the {top / 1e9:.0f} GFLOP/s that products of {_SIDE} x {_SIDE} "
    f"matrices reach. Aims for forward passes: {aims}; for training 1."
  )
  return measure.table("Models, images/s", rows, note)


def _row(pair, what, batch, calls, limit, repeats):
  times = measure.interleaved(calls, repeats=repeats)
  modes = [name for name in calls if name != "ours"]
  best = min(modes, key=times.median)
  return {
    "model": f"{pair.name} {pair.variant}",
    "what": what,
    "batch": batch,
    "ours": batch / times.median("ours"),
    "timm": batch / times.median(best),
    "its mode": best,
    "ours / timm": times.ratio(best, "ours"),
    "limit": limit,
  }


def _model(pair: Pair, **more: Any):
  settings = dict(name=pair.name, variant=pair.variant, num_classes=CLASSES)
  return resolve.make("models", "Model", "models", settings | more)


def _image(pair: Pair, batch: int) -> np.ndarray:
  shape = (batch, pair.pixels, pair.pixels, 3)
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def compiled_forward(
  pair: Pair, batch: int
) -> tuple[jax.stages.Compiled, Callable[[], None], float]:
  """The forward pass, a call of it, and its FLOPs (see flops.py).

  BatchNorms are folded where there are any.
  """
  model = _model(pair)
  more = {"scan": False} if hasattr(model, "scan") else {}
  model = model.clone(**more)
  image = jnp.asarray(_image(pair, batch))
  init = functools.partial(model.init, train=False)
  variables = jax.jit(init)(jax.random.key(0), image)
  if hasattr(model, "fused"):
    module = resolve.resolve("models", pair.name, "Model").__module__
    fold = getattr(__import__(module, fromlist=["fuse"]), "fuse", None)
    variables = (fold or convolution.fuse)(variables)
    model = model.clone(fused=True)
  forward = jax.jit(lambda v, x: model.apply(v, x, train=False)["logits"])
  compiled = forward.lower(variables, image).compile()
  call = lambda: compiled(variables, image).block_until_ready()
  return compiled, call, flops.count_flops(forward, variables, image)


def their_forward(pair: Pair, batch: int, mode: str) -> Callable[[], None]:
  """timm's forward pass in evaluation."""
  import torch

  from big_vision_like.benchmarks import peers

  model, image = _theirs(pair, batch, mode)
  model.eval()
  if mode == "compiled":
    model = torch.compile(model)

  def run() -> None:
    with torch.inference_mode():
      model(image)
    peers.wait()

  return run


def _theirs(pair, batch, mode):
  import torch

  from big_vision_like.benchmarks import peers, torchvision_ops

  torchvision_ops.declare()
  import timm

  model = timm.create_model(pair.timm, num_classes=CLASSES).to(peers.device())
  image = torch.from_numpy(_image(pair, batch)).to(peers.device())
  image = image.permute(0, 3, 1, 2)
  if mode == "channels last":
    model = model.to(memory_format=torch.channels_last)
    return model, image.contiguous(memory_format=torch.channels_last)
  return model, image.contiguous()


def our_training(
  pair: Pair, batch: int, *, dtype: str = "float32"
) -> tuple[training.Training, Callable[[], None]]:
  """Our step, with activations in `dtype`, and a call of it."""
  model = _model(pair, dtype=dtype)
  more = {"scan": False} if hasattr(model, "scan") else {}
  task = classification.Task(num_classes=CLASSES, loss_name="softmax")
  pixels = np.random.default_rng(0).integers(
    0, 256, (batch, pair.pixels, pair.pixels, 3), dtype=np.uint8
  )
  data = {
    "image": jnp.asarray(pixels),
    "label": jnp.arange(batch, dtype=jnp.int32),
    "_mask": jnp.ones(batch, bool),
  }
  trained = training.Training(model.clone(**more), task, data)
  return trained, lambda: trained(data)


def their_training(
  pair: Pair, batch: int, mode: str, *, dtype: str = "float32"
) -> Callable[[], float]:
  """timm's model, torch's AdamW."""
  import torch

  from big_vision_like.benchmarks import peers

  model, image = _theirs(pair, batch, mode)
  forward = torch.compile(model) if mode == "compiled" else model
  labels = np.arange(batch)
  return peers.train(model, lambda: forward(image), labels, dtype)
