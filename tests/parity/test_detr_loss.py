"""Losses and gradients of DETR against transformers' code in float64."""

import functools

import jax
import numpy as np
import pytest

from big_vision_like.tasks import detection

pytestmark = pytest.mark.parity

torch = pytest.importorskip("torch")
theirs = pytest.importorskip("transformers.loss.loss_for_object_detection")

CLASSES, LAYERS = 11, 3
WEIGHTS = dict(loss_ce=1, loss_bbox=5, loss_giou=2, loss_mask=1, loss_dice=1)


def make(seed, *, rows=4, slots=9, queries=13, canvas=(20, 28)):
  """Outputs and targets; image 0 is full, and image 1 empty."""
  rng = np.random.default_rng(seed)
  count = rng.integers(0, slots + 1, rows)
  count[:2] = slots, 0
  there = np.arange(slots) < count[:, None]
  sides = tuple(-(-n // 4) for n in canvas)
  # Crowds: half of the boxes lie close together.
  center = rng.uniform(0.2, 0.8, (rows, slots, 2))
  center[:, ::2] = 0.4 + 0.02 * center[:, ::2]
  boxes = np.concatenate([center, rng.uniform(0.05, 0.4, center.shape)], -1)
  id_map = rng.integers(0, slots + 1, (rows, *canvas))
  id_map = np.where(id_map > count[:, None, None], 0, id_map)
  outputs = {
    "logits": 2 * rng.normal(size=(LAYERS, rows, queries, CLASSES + 1)),
    "boxes": 1 / (1 + np.exp(-rng.normal(size=(LAYERS, rows, queries, 4)))),
    "masks": rng.normal(size=(rows, queries, *sides)),
  }
  targets = {
    "boxes": boxes * there[..., None],
    "box_label": np.where(there, rng.integers(0, CLASSES, there.shape), -1),
    "box_id_map": id_map.astype(np.uint8),
    "size": np.broadcast_to(canvas, (rows, 2)),
    "mask": np.ones(rows, bool),
  }
  return outputs, targets


def their_loss(outputs, targets):
  """Total, losses by name and gradients of transformers' criterion."""
  x = {k: torch.tensor(v, requires_grad=True) for k, v in outputs.items()}
  labels = []
  for boxes, label, id_map in zip(
    targets["boxes"], targets["box_label"], targets["box_id_map"]
  ):
    there = np.flatnonzero(label >= 0)
    masks = id_map == 1 + there[:, None, None]
    labels.append(
      {
        "class_labels": torch.tensor(label[there]),
        "boxes": torch.tensor(boxes[there]),
        "masks": torch.tensor(masks.astype(np.float64)),
      }
    )
  matcher = theirs.HungarianMatcher(class_cost=1, bbox_cost=5, giou_cost=2)
  names = ["labels", "boxes", "cardinality", "masks"]
  criterion = theirs.ImageLoss(matcher, CLASSES, 0.1, names).double()
  last = {"logits": x["logits"][-1], "pred_boxes": x["boxes"][-1]}
  last["pred_masks"] = x["masks"]
  last["auxiliary_outputs"] = [
    {"logits": a, "pred_boxes": b}
    for a, b in zip(x["logits"][:-1], x["boxes"][:-1])
  ]
  losses = criterion(last, labels)
  weights = {
    k: w
    for name, w in WEIGHTS.items()
    for k in losses
    if k == name or k.startswith(f"{name}_")
  }
  total = sum(w * losses[k] for k, w in weights.items())
  total.backward()
  grads = {k: v.grad.numpy() for k, v in x.items()}
  values = {k: v.item() for k, v in losses.items()}
  return total.item(), values, grads


@functools.cache
def ours(**settings):
  task = detection.Task(num_classes=CLASSES, mask_area="canvas", **settings)

  def run(outputs, targets):
    (loss, metrics), grads = jax.value_and_grad(task.loss, has_aux=True)(
      outputs, targets
    )
    return loss, {k: m.compute() for k, m in metrics.items()}, grads

  return jax.jit(run)


def check(outputs, targets):
  want, values, grads = their_loss(outputs, targets)
  as32 = lambda x: x.astype(np.float32) if x.dtype == np.float64 else x
  got = ours()(*jax.tree.map(as32, (outputs, targets)))
  loss, metrics, got_grads = jax.device_get(got)
  # float32 against float64: sums of some hundred terms.
  np.testing.assert_allclose(loss, want, rtol=1e-5)
  for name in (*WEIGHTS, "cardinality_error"):
    np.testing.assert_allclose(
      metrics[name], values[name], rtol=1e-5, err_msg=name
    )
  for key, grad in grads.items():
    scale = np.abs(grad).max()
    np.testing.assert_allclose(
      got_grads[key], grad, rtol=1e-4, atol=1e-5 * scale, err_msg=key
    )


@pytest.mark.parametrize("seed", range(20))
def test_losses_and_gradients(seed):
  check(*make(seed))


def test_without_any_target():
  outputs, targets = make(0)
  targets["box_label"] = np.full_like(targets["box_label"], -1)
  # torch cannot stack no masks at all, so that they are left to our own tests.
  x = {k: torch.tensor(v) for k, v in outputs.items()}
  ce = -torch.log_softmax(x["logits"], -1)[..., -1].mean((1, 2)).sum()
  loss, _, grads = ours()(
    {k: np.float32(v) for k, v in outputs.items()},
    targets | {"boxes": np.float32(targets["boxes"])},
  )
  np.testing.assert_allclose(loss, ce.item(), rtol=1e-5)
  assert not np.asarray(grads["boxes"]).any()
  assert not np.asarray(grads["masks"]).any()
