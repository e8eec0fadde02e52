"""DETR: matching against scipy's, and steps against transformers' model.

Both models train what the paper trains (all but the stem and the first stage)
with the losses of all decoder layers, dropout, clipping and AdamW, in float32.
"""

import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linear_sum_assignment

from big_vision_like import train_step
from big_vision_like.benchmarks import measure, training
from big_vision_like.losses import matching, set_prediction
from big_vision_like.models import detr
from big_vision_like.tasks import detection

CLASSES, QUERIES, LAYERS = 91, 100, 6
# The most objects of an image of COCO's training set, and how many it has.
MOST, OBJECTS = 93, 7
MODES = ("eager", "channels last", "compiled")
OURS, SCIPY = "ours", "scipy"
FROZEN = ("backbone/(stem|stage0)_.*",)
_CLIP = 0.1


def run(
  *,
  batches: Sequence[int] = (1, 2),
  size: tuple[int, int] = detr.IMAGE_SIZE,
  sizes: Mapping[str, int] | None = None,
  repeats: int = 7,
  modes: Sequence[str] = MODES,
) -> str:
  """Both tables.

  Args:
    batches: images of a step, each two rows.
    size: of the images.
    sizes: of a smaller model, see models/detr.py.
    repeats: interleaved rounds.
    modes: how torch runs; the fastest counts.
  """
  return "\n\n".join(
    [
      matching_table(repeats=10 * repeats),
      steps_table(batches, size, dict(sizes or {}), repeats, modes),
    ]
  )


# -- matching -----------------------------------------------------------------


def matching_table(
  *, images: int = 16, queries: int = QUERIES, slots: int = 63, repeats: int
) -> str:
  """Milliseconds for one layer of a batch."""
  rows = []
  for name, (cost, valid) in problems(images, queries, slots).items():
    calls = {
      OURS: _compiled(matching.assign, cost, valid),
      SCIPY: _compiled(by_scipy, cost, valid),
    }
    times = measure.interleaved(calls, repeats=repeats)
    ours, theirs = (total(cost, call()) for call in calls.values())
    rows.append(
      {
        "costs": name,
        "targets": int(valid.sum()),
        "ours, ms": 1e3 * times.median(OURS),
        "scipy, ms": 1e3 * times.median(SCIPY),
        "ours / scipy": times.ratio(SCIPY, OURS),
        "excess": f"{ours - theirs:.0e}",
      }
    )
  note = (
    f"{images} images, {queries} queries, room for {slots} targets, on "
    f"{jax.device_count()} x {jax.devices()[0].device_kind}. scipy's solver is "
    "called from the compiled program, image by image, as training would have "
    "to. The ratio is of speeds; the excess is that of our total cost over "
    "scipy's. Aim: no excess beyond rounding, and at most 5 ms for DETR's "
    "costs."
  )
  return measure.table("Matching", rows, note)


def problems(
  images: int, queries: int, slots: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Costs [1,B,T,Q] and valid targets [B,T], by name."""
  rng = np.random.default_rng(0)
  few = np.clip(rng.geometric(1 / OBJECTS, (images, 1)), 1, slots)
  some, every = np.arange(slots) < few, np.ones((images, slots), bool)

  def costs(spread, distance, valid):
    data = random_set(rng, (1, images), queries, valid)
    logits, boxes, label, true_boxes = data
    boxes = 0.5 + distance * (boxes - 0.5)
    cost = set_prediction.matching_cost(
      spread * logits, boxes, label, true_boxes, set_prediction.Costs()
    )
    return np.asarray(cost), valid

  return {
    "DETR's": costs(3.0, 1.0, some),
    "all slots used": costs(3.0, 1.0, every),
    "before training": costs(0.1, 0.01, some),
    "before training, all slots used": costs(0.1, 0.01, every),
  }


def random_set(
  rng: np.random.Generator,
  shape: tuple[int, int],
  queries: int,
  valid: np.ndarray,
) -> tuple[jax.Array, ...]:
  """Logits and boxes of (layers, images), labels and boxes of targets."""

  def boxes(*shape):
    center = rng.uniform(0.1, 0.9, (*shape, 2))
    sides = rng.uniform(0.02, 0.5, (*shape, 2))
    return jnp.asarray(np.concatenate([center, sides], -1), jnp.float32)

  logits = rng.normal(size=(*shape, queries, CLASSES + 1))
  label = np.where(valid, rng.integers(0, CLASSES, valid.shape), -1)
  return (
    jnp.asarray(logits, jnp.float32),
    boxes(*shape, queries),
    jnp.asarray(label, jnp.int32),
    boxes(*valid.shape),
  )


def by_scipy(cost: jax.Array, valid: jax.Array) -> jax.Array:
  """`matching.assign` on the host."""

  def solve(cost, valid):
    out = np.full((*cost.shape[:2], cost.shape[-1]), -1, np.int32)
    for index in np.ndindex(cost.shape[:2]):
      there = np.flatnonzero(valid[index[1]])
      target, query = linear_sum_assignment(cost[index][there])
      out[index][query] = there[target]
    return out

  shape = (*cost.shape[:2], cost.shape[-1])
  out = jax.ShapeDtypeStruct(shape, jnp.int32)
  return jax.pure_callback(
    lambda *args: solve(*map(np.asarray, args)), out, cost, valid
  )


def total(cost: np.ndarray, target: jax.Array) -> float:
  """What a match costs, in float64."""
  at = np.maximum(np.asarray(target), 0)[:, :, None]
  paid = np.take_along_axis(cost.astype(np.float64), at, 2)[:, :, 0]
  return float(paid[np.asarray(target) >= 0].sum())


def _compiled(fn: Callable, *args: Any) -> Callable[[], Any]:
  args = jax.device_put(args)
  program = jax.jit(fn).lower(*args).compile()
  return lambda: jax.block_until_ready(program(*args))


# -- steps --------------------------------------------------------------------


def steps_table(
  batches: Sequence[int],
  size: tuple[int, int],
  sizes: dict[str, int],
  repeats: int,
  modes: Sequence[str],
) -> str:
  """Images a second of DETR-R50, and what matching takes of a step."""
  installed = all(map(importlib.util.find_spec, ("transformers", "timm")))
  rows = []
  for batch in batches:
    data = make_batch(batch, size)
    calls = {OURS: our_inference(data, sizes)}
    if installed:
      calls |= {m: their_inference(data, sizes, m) for m in modes}
    rows.append(_row("inference", batch, calls, repeats))
    calls = {OURS: our_training(data, sizes)}
    if installed:
      eager = [m for m in modes if m != "compiled"]
      calls |= {m: their_training(data, sizes, m) for m in eager}
    matchers = {n: matcher(batch, n, sizes) for n in (OBJECTS, MOST)}
    rows.append(_row("training", batch, calls, repeats, matchers))
  note = (
    f"R50 at {size[0]} x {size[1]}, float32, {OBJECTS} objects an image, on "
    f"{jax.device_count()} x {jax.devices()[0].device_kind}"
  )
  if installed:
    import torch

    note += (
      f" and {torch.get_num_threads()} threads of torch, whose fastest of "
      f"{', '.join(modes)} counts (training is not compiled)"
    )
  else:
    note += "; transformers and timm are not installed"
  note += (
    f". Matching is that of all layers, costs included, for {OBJECTS} and for "
    f"{MOST} objects, as a share of our training step. Aims: 1 x transformers, "
    "matching at most 3%."
  )
  return measure.table("DETR, images/s", rows, note)


def _row(what, batch, calls, repeats, matchers=None):
  named = {f"matching, {n} objects": x for n, x in (matchers or {}).items()}
  times = measure.interleaved(calls | named, repeats=repeats)
  row = {"what": what, "batch": batch, OURS: batch / times.median(OURS)}
  modes = [name for name in calls if name != OURS]
  if modes:
    best = min(modes, key=times.median)
    row |= {
      "transformers": batch / times.median(best),
      "its mode": best,
      "ours / transformers": times.ratio(best, OURS),
    }
  shares = {name: times.ratio(name, OURS) for name in named}
  return row | {name: f"{x:.2%}" for name, x in shares.items()}


def make_batch(
  batch: int, size: tuple[int, int], objects: int = OBJECTS
) -> dict[str, np.ndarray]:
  """Images that fill their canvas, with room for the most objects of COCO."""
  rng = np.random.default_rng(0)
  valid = np.broadcast_to(np.arange(MOST) < objects, (batch, MOST))
  *_, label, boxes = random_set(rng, (1, batch), 1, valid)
  return {
    "image": rng.integers(0, 256, (batch, *size, 3), np.uint8),
    "size": np.full((batch, 2), size, np.int32),
    "boxes": np.where(valid[..., None], boxes, 0),
    "box_label": np.asarray(label),
    "_mask": np.ones(batch, bool),
  }


def make_model(sizes: dict[str, int]) -> detr.DETR:
  return detr.Model(
    variant="R50",
    num_classes=CLASSES,
    num_queries=QUERIES,
    sizes=sizes,
    scan=False,
  )


TASK = detection.Task(num_classes=CLASSES)


def our_inference(
  data: dict[str, np.ndarray], sizes: dict[str, int]
) -> Callable[[], Any]:
  """The last layer's logits and boxes, from pixels."""
  model, data = make_model(sizes), jax.device_put(data)
  init = functools.partial(train_step.init_variables, model, TASK)
  params, constants = jax.jit(init)(jax.random.key(0), data)

  def predict(variables, data):
    inputs, targets = TASK.prepare(data, None)
    out = TASK.predict(model.apply(variables, train=False, **inputs), targets)
    return out["logits"], out["boxes"]

  return _compiled(predict, {"params": params, **constants}, data)


def our_training(
  data: dict[str, np.ndarray], sizes: dict[str, int]
) -> Callable[[], Any]:
  """Our step, from pixels to the new state."""
  data = jax.device_put(data)
  trained = training.Training(
    make_model(sizes), TASK, data, lr=1e-4, wd=1e-4, clip=_CLIP, frozen=FROZEN
  )
  return lambda: trained(data)


def matcher(
  batch: int, objects: int, sizes: dict[str, int]
) -> Callable[[], Any]:
  """Matches all layers of a step."""
  valid = np.broadcast_to(np.arange(MOST) < objects, (batch, MOST))
  shape = (sizes.get("decoder_depth", LAYERS), batch)
  data = random_set(np.random.default_rng(0), shape, QUERIES, valid)
  costs = set_prediction.Costs()
  return _compiled(lambda *x: set_prediction.match(*x, costs), *data)


def their_inference(
  data: dict[str, np.ndarray], sizes: dict[str, int], mode: str
) -> Callable[[], Any]:
  """transformers' model in evaluation."""
  import torch

  from big_vision_like.benchmarks import peers

  model, inputs, _ = _theirs(data, sizes, mode, auxiliary_loss=False)
  model.eval()
  if mode == "compiled":
    model = torch.compile(model)

  def run() -> None:
    with torch.inference_mode():
      model(**inputs)
    peers.wait()

  return run


def their_training(
  data: dict[str, np.ndarray], sizes: dict[str, int], mode: str
) -> Callable[[], Any]:
  """transformers' model and losses, torch's AdamW."""
  import torch

  from big_vision_like.benchmarks import peers

  model, inputs, labels = _theirs(data, sizes, mode, auxiliary_loss=True)
  trained = freeze(model.train())
  optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=1e-4)

  def run() -> None:
    optimizer.zero_grad(set_to_none=True)
    model(**inputs, labels=labels).loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, _CLIP)
    optimizer.step()
    peers.wait()

  return run


def freeze(model: Any) -> list[Any]:
  """Freezes the stem and the first stage; the other parameters."""
  for name, p in model.named_parameters():
    parts = ("conv1", "layer1")
    if any(f"backbone.model.{part}." in name for part in parts):
      p.requires_grad_(False)
  return [p for p in model.parameters() if p.requires_grad]


def _theirs(data, sizes, mode, *, auxiliary_loss):
  import torch

  from big_vision_like.benchmarks import peers, torchvision_ops

  torchvision_ops.declare()
  import transformers

  names = {"encoder_depth": "encoder_layers", "decoder_depth": "decoder_layers"}
  config = transformers.DetrConfig(
    backbone="resnet50",
    num_labels=CLASSES,
    num_queries=QUERIES,
    auxiliary_loss=auxiliary_loss,
    attention_dropout=0.1,
    activation_dropout=0.1,
    **{names[k]: n for k, n in sizes.items()},
  )
  model = transformers.DetrForObjectDetection(config).to(peers.device())
  put = lambda x: torch.from_numpy(np.array(x)).to(peers.device())
  inputs, _ = TASK.prepare(data, None)
  pixels = put(inputs["image"]).permute(0, 3, 1, 2)
  if mode == "channels last":
    model = model.to(memory_format=torch.channels_last)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
  mask = put(inputs["pixel_mask"])
  labels = [
    {
      "class_labels": put(label[label >= 0]).long(),
      "boxes": put(boxes[label >= 0]),
    }
    for label, boxes in zip(data["box_label"], data["boxes"])
  ]
  if mode != "channels last":
    pixels = pixels.contiguous()
  return model, {"pixel_values": pixels, "pixel_mask": mask}, labels
