"""The detection task: who counts, what surfaces, what is refused; a step."""

import functools
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from big_vision_like import hlo, sharding, train_step
from big_vision_like.tasks import detection

CLASSES, QUERIES, LAYERS = 3, 7, 2
TASK = detection.Task(num_classes=CLASSES)


def make_batch(rows=5, slots=4, canvas=(16, 24), seed=0):
  """The last row holds no image, the one before no object."""
  rng = np.random.default_rng(seed)
  count = rng.integers(1, slots + 1, rows)
  count[0], count[-2:] = slots, 0
  there = np.arange(slots) < count[:, None]
  size = rng.integers(8, np.array(canvas) + 1, (rows, 2)).astype(np.int32)
  size[-1] = 0
  id_map = rng.integers(0, slots + 1, (rows, *canvas))
  return {
    "image": rng.integers(1, 256, (rows, *canvas, 3)).astype(np.uint8),
    "size": size,
    "boxes": rng.uniform(0.1, 0.9, (rows, slots, 4)).astype(np.float32)
    * there[..., None],
    "box_label": np.where(
      there, rng.integers(0, CLASSES, there.shape), -1
    ).astype(np.int32),
    "box_id_map": np.where(id_map > count[:, None, None], 0, id_map).astype(
      np.uint8
    ),
    "_mask": np.arange(rows) < rows - 1,
  }


def make_outputs(rows=5, canvas=(16, 24), seed=1):
  rng = np.random.default_rng(seed)
  sides = tuple(n // 4 for n in canvas)
  normal = lambda *shape: jnp.float32(rng.normal(size=shape))
  return {
    "logits": normal(LAYERS, rows, QUERIES, CLASSES + 1),
    "boxes": jax.nn.sigmoid(normal(LAYERS, rows, QUERIES, 4)),
    "masks": normal(rows, QUERIES, *sides),
  }


@functools.partial(jax.jit, static_argnames="task")
def grade(outputs, batch, task=TASK):
  """loss, metrics, gradients."""
  _, targets = task.prepare(batch, None)
  (loss, metrics), grads = jax.value_and_grad(task.loss, has_aux=True)(
    outputs, targets
  )
  return loss, {k: x.compute() for k, x in metrics.items()}, grads


def test_canvas_is_zero_beside_the_image():
  batch = make_batch()
  inputs, targets = TASK.prepare(batch, None)
  assert set(inputs) == {"image", "pixel_mask"}
  for image, seen, pixels, (h, w) in zip(
    inputs["image"], inputs["pixel_mask"], batch["image"], batch["size"]
  ):
    want = np.zeros(image.shape)
    want[:h, :w] = (pixels[:h, :w] / 255 - TASK.mean) / TASK.std
    np.testing.assert_allclose(image, want, atol=1e-5)
    assert seen.sum() == seen[:h, :w].sum() == h * w
  assert set(targets) == {
    "boxes",
    "box_label",
    "box_id_map",
    "size",
    "mask",
  }


def test_order_of_the_objects_changes_nothing():
  outputs, batch = make_outputs(), make_batch()
  want = grade(outputs, batch)
  order = np.array([2, 0, 3, 1])
  moved = {k: batch[k][:, order] for k in ("boxes", "box_label")}
  # Slot order[i] has become slot i.
  ids = np.concatenate([[0], 1 + np.argsort(order)]).astype(np.uint8)
  moved["box_id_map"] = ids[batch["box_id_map"]]
  chex.assert_trees_all_close(
    grade(outputs, batch | moved), want, rtol=1e-5, atol=1e-7
  )


def test_padding_and_rows_without_an_image_count_nowhere():
  outputs, batch = make_outputs(), make_batch()
  want = grade(outputs, batch)
  pad = lambda x, value: np.pad(
    x,
    ((0, 2), (0, 3)) + ((0, 0),) * (x.ndim - 2),
    constant_values=value,
  )
  more = {
    "boxes": pad(batch["boxes"], 0),
    "box_label": pad(batch["box_label"], -1),
    **{
      k: np.concatenate([batch[k], np.zeros_like(batch[k][:2])])
      for k in ("image", "size", "box_id_map", "_mask")
    },
  }
  # What is there instead of an image is no number, and claims to have objects.
  more["box_label"][4:] = 1
  worse = {}
  for key, x in outputs.items():
    x = x.at[4].set(jnp.nan) if key == "masks" else x.at[:, 4].set(jnp.nan)
    axis = 0 if key == "masks" else 1
    empty = jnp.take(x, jnp.array([4, 4]), axis)
    worse[key] = jnp.concatenate([x, empty], axis)
  loss, metrics, grads = grade(worse, more)
  chex.assert_trees_all_close((loss, metrics), want[:2], rtol=1e-5)
  for key, grad in grads.items():
    axis = 0 if key == "masks" else 1
    np.testing.assert_allclose(
      jnp.take(grad, jnp.arange(5), axis), want[2][key], rtol=1e-5, atol=1e-8
    )
    assert not jnp.take(grad, jnp.array([4, 5, 6]), axis).any()


def test_canvas_changes_nothing():
  outputs, batch = make_outputs(), make_batch()
  wide = dict(batch)
  for key in ("image", "box_id_map"):
    value = np.zeros((5, 24, 40, *batch[key].shape[3:]), np.uint8)
    value[:, :16, :24] = batch[key]
    wide[key] = value
  # The model repeats the border of its masks.
  edge = ((0, 0), (0, 0), (0, 2), (0, 4))
  more = outputs | {"masks": jnp.pad(outputs["masks"], edge, "edge")}
  want = grade(outputs, batch)[1]
  same = grade(more, wide)[1]
  chex.assert_trees_all_close(same, want, rtol=1e-5)
  published = detection.Task(num_classes=CLASSES, mask_area="canvas")
  other = grade(more, wide, task=published)[1]
  assert abs(other["loss_dice"] - want["loss_dice"]) > 1e-3
  assert abs(other["loss_mask"] - want["loss_mask"]) > 1e-4


def test_layers_add_up():
  outputs, batch = make_outputs(), make_batch()
  loss, metrics, _ = grade(outputs, batch)
  weights = dict(ce=1, bbox=5, giou=2, mask=1, dice=1)
  total = sum(w * metrics[f"loss_{k}"] for k, w in weights.items())
  np.testing.assert_allclose(total + metrics["loss_aux"], loss, rtol=1e-6)
  np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)


def test_last_layer_alone_with_other_weights():
  outputs, batch = make_outputs(), make_batch()
  _, metrics, _ = grade(outputs, batch)
  weights = dict(ce=1.5, l1=0.5, giou=3, mask=4, dice=0.0)
  task = detection.Task(
    num_classes=CLASSES,
    auxiliary=False,
    **{f"{k}_weight": w for k, w in weights.items()},
  )
  loss, its, grads = grade(outputs, batch, task=task)
  names = {"l1": "bbox"}
  want = sum(w * metrics[f"loss_{names.get(k, k)}"] for k, w in weights.items())
  np.testing.assert_allclose(loss, want, rtol=1e-6)
  assert its["loss_aux"] == 0
  assert not grads["logits"][0].any()
  assert grads["logits"][1].all(-1)[:4].all()


def test_nothing_to_match():
  outputs, batch = make_outputs(), make_batch()
  none = batch | {"box_label": np.full((5, 4), -1, np.int32)}
  loss, metrics, grads = grade(outputs, none)
  logits = outputs["logits"][:, :4]
  ce = -jax.nn.log_softmax(logits)[..., -1].mean((1, 2))
  np.testing.assert_allclose(loss, ce.sum(), rtol=1e-6)
  assert metrics["loss_bbox"] == metrics["loss_mask"] == 0
  chex.assert_tree_all_finite(grads)
  assert not grads["boxes"].any()
  nobody = none | {"_mask": np.zeros(5, bool)}
  loss, _, grads = grade(outputs, nobody)
  assert loss == 0
  assert not any(g.any() for g in jax.tree.leaves(grads))


def test_what_is_no_number_surfaces():
  outputs, batch = make_outputs(), make_batch()
  good = grade(outputs, batch)
  chex.assert_tree_all_finite(good)
  # A query of image 0 that no object has.
  query = int(np.flatnonzero(~good[2]["boxes"][-1, 0].any(-1))[0])

  def put(key, *at, value=jnp.nan):
    if key in outputs:
      return outputs | {key: outputs[key].at[at].set(value)}, batch
    x = batch[key].copy()
    x[at] = value
    return outputs, batch | {key: x}

  cases = {
    "a logit": put("logits", 0, 1, 2, 3),
    "an infinite logit": put("logits", 1, 1, 2, 3, value=jnp.inf),
    "a box": put("boxes", 1, 0, query, 0),
    "all boxes": put("boxes", slice(None)),
    "an infinite box": put("boxes", 1, 0, query, 0, value=jnp.inf),
    "a mask": put("masks", 0, query, 1, 1),
    "a true box": (outputs, batch | {"boxes": batch["boxes"] * np.nan}),
    "a label": put("box_label", 0, 0, value=CLASSES),
  }
  for name, (out, data) in cases.items():
    assert not np.isfinite(grade(out, data)[0]), name


@pytest.mark.slow
def test_devices_change_nothing_and_exchange_sums():
  outputs, batch = make_outputs(rows=16), make_batch(rows=16)
  want = grade(outputs, batch)
  mesh = sharding.make_mesh({"data": 4, "fsdp": 2})
  rows = sharding.batch_sharding(mesh)
  layered = jax.NamedSharding(mesh, jax.P(None, *rows.spec))
  places = {"logits": layered, "boxes": layered, "masks": rows}
  with jax.set_mesh(mesh):
    args = jax.device_put(outputs, places), jax.device_put(batch, rows)
    program = grade.lower(*args).compile()
    got = program(*args)
  chex.assert_trees_all_close(jax.device_get(got), want, rtol=1e-5, atol=1e-7)
  found = hlo.Program(program.as_text()).collectives(8)
  assert {x.op for x in found} <= {"all-reduce"}
  assert sum(x.bytes * x.runs for x in found) < 500


def test_predictions_are_those_of_the_last_layer():
  outputs, batch = make_outputs(), make_batch()
  _, targets = TASK.prepare(batch, None)
  low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), outputs)
  out = TASK.predict(low, targets)
  for key in ("logits", "boxes"):
    assert out[key].dtype == jnp.float32
    np.testing.assert_array_equal(out[key], low[key][-1])
  assert out["masks"].shape == (5, QUERIES, 4, 6)
  np.testing.assert_array_equal(out["true_boxes"], batch["boxes"])
  assert {len(x) for x in out.values()} == {5}
  assert set(out) == {
    "logits",
    "boxes",
    "masks",
    "true_boxes",
    "box_label",
    "box_id_map",
    "size",
    "mask",
  }


class Tiny(nn.Module):
  """Boxes and labels from the mean colour of the image and of each query."""

  @nn.compact
  def __call__(self, image, pixel_mask, *, train):
    mean = image.sum((1, 2)) / jnp.maximum(pixel_mask.sum((1, 2)), 1)[:, None]
    queries = self.param("queries", nn.initializers.normal(1), (QUERIES, 8))
    x = nn.relu(nn.Dense(8)(mean)[:, None] + queries)
    logits = nn.Dense(CLASSES + 1, name="label")(x)
    boxes = nn.sigmoid(nn.Dense(4, name="box")(x))
    return {"logits": logits[None], "boxes": boxes[None]}


def test_a_step_learns():
  batch = {k: x for k, x in make_batch().items() if k != "box_id_map"}
  tx = optax.adam(0.03)
  state = train_step.init_state(Tiny(), TASK, tx, jax.random.key(0), batch)
  step = jax.jit(train_step.make_train_step(Tiny(), TASK, tx))
  losses = []
  for _ in range(60):
    state, metrics = step(state, batch)
    losses.append(float(metrics["loss"].compute()))
  assert losses[-1] < 0.6 * losses[0]
  assert set(metrics) >= {"loss_ce", "loss_bbox", "loss_giou", "class_error"}


def test_micro_batches_are_refused():
  with pytest.raises(ValueError, match="is not a mean over examples"):
    train_step.make_train_step(Tiny(), TASK, optax.sgd(1), accum_steps=2)


@pytest.mark.parametrize(
  ("settings", "sentence"),
  [
    (
      dict(denominators="process"),
      "config.task.denominators = 'process'; it is one of ('global', 'devi",
    ),
    (
      dict(mask_area="box"),
      "config.task.mask_area = 'box'; it is one of ('image', 'canvas').",
    ),
    (
      dict(l1_weight=-1, no_object=float("nan")),
      "config.task: l1_weight = -1, no_object = nan. Weights and costs are",
    ),
    (
      dict(label_cost=0, l1_cost=0, giou_cost=0),
      "config.task: label_cost, l1_cost and giou_cost are all 0",
    ),
  ],
)
def test_refused_settings(settings, sentence):
  with pytest.raises(ValueError, match=re.escape(sentence)):
    detection.Task(num_classes=CLASSES, **settings)


def test_refused_data():
  outputs, batch = make_outputs(), make_batch()
  _, targets = TASK.prepare(batch, None)

  def refused(sentence, call):
    with pytest.raises(ValueError, match=re.escape(sentence)):
      call()

  trace = lambda task, *args: jax.eval_shape(task.loss, *args)
  less = lambda x, *keys: {k: v for k, v in x.items() if k not in keys}
  refused(
    "detection needs images on canvases, `image` and `size`, but the data "
    "gives only ['_mask', 'box_id_map', 'box_label', 'boxes', 'image'].",
    lambda: TASK.prepare(less(batch, "size"), None),
  )
  refused(
    "detection learns from `boxes` and `box_label`, but the data gives only "
    "['box_id_map', 'box_label', 'mask', 'size'].",
    lambda: trace(TASK, outputs, less(targets, "boxes")),
  )
  refused(
    "config.model predicts masks, but the data has none",
    lambda: trace(TASK, outputs, less(targets, "box_id_map")),
  )
  refused(
    "config.task.num_classes = 5, but the model's logits are of 3 classes",
    lambda: trace(detection.Task(num_classes=5), outputs, targets),
  )
  few = {k: outputs[k][:, :, :3] for k in ("logits", "boxes")}
  refused(
    "A batch with room for 4 objects an image, and a model with 3 queries",
    lambda: trace(TASK, few, targets),
  )
