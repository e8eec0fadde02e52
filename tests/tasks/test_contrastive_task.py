"""The contrastive task: who is a pair, what is counted, what is refused."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vision_like import train_step
from big_vision_like.tasks import contrastive


def packed():
  """Three slots in each of two rows: a pair, no text, no image."""
  ids = np.array([[1, 1, 2, 2, 2, 0, 0]] * 2, np.int32)
  return {
    "patches": np.full((2, 7, 12), 51, np.uint8),
    "segment_ids": ids,
    "positions": np.zeros((2, 7, 2), np.int32),
    "grid_hw": np.ones((2, 3, 2), np.int32),
    "example_mask": np.array([[True, True, False]] * 2),
    "text": np.array([[5, 6, 7, 0, 0]] * 2, np.int32),
    "text_segment_ids": np.array([[1, 1, 3, 0, 0], [2, 1, 1, 1, 1]], np.int32),
    "text_positions": np.array([[0, 1, 0, 0, 0]] * 2, np.int32),
    "_mask": np.ones(2, bool),
  }


def stacked(count=3):
  return {
    "image": np.full((count, 2, 2, 3), 51, np.uint8),
    "text": np.arange(count * 4, dtype=np.int32).reshape(count, 4),
    "label": np.arange(count, dtype=np.int32),
    "_mask": np.arange(count) < 2,
  }


def test_packed_pairs_need_an_image_and_a_text():
  batch = packed()
  inputs, targets = contrastive.Task().prepare(batch, jax.random.key(0))
  np.testing.assert_array_equal(
    targets["mask"], [[True, False, False], [True, True, False]]
  )
  np.testing.assert_allclose(inputs["patches"], 51 / 127.5 - 1, atol=1e-6)
  for key in set(batch) - {"patches", "_mask"}:
    np.testing.assert_array_equal(inputs[key], batch[key])
  assert set(inputs) == set(batch) - {"_mask"}


def test_stacked_pairs_are_the_rows_that_are_there():
  batch = stacked()
  task = contrastive.Task(mean=(0.2, 0.3, 0.4), std=(0.5, 0.1, 0.2))
  inputs, targets = task.prepare(batch, None)
  assert set(inputs) == {"image", "text"}
  np.testing.assert_allclose(inputs["image"][0, 0, 0], [0, -1, -1], atol=1e-6)
  np.testing.assert_array_equal(targets["mask"], batch["_mask"])
  np.testing.assert_array_equal(targets["label"], batch["label"])


@pytest.mark.parametrize("key", ["image", "text"])
def test_one_side_alone_can_be_embedded(key):
  batch = {k: x for k, x in stacked().items() if k in (key, "_mask")}
  task = contrastive.Task()
  inputs, targets = task.prepare(batch, None)
  assert set(inputs) == {key}
  side = {"image": "zimg", "text": "ztxt"}[key]
  z = jnp.ones((3, 5), jnp.bfloat16)
  predictions = task.predict({side: z, "t": 1.0, "b": 0.0}, targets)
  assert set(predictions) == {side, "mask"}
  assert predictions[side].dtype == jnp.float32


@pytest.mark.parametrize("loss_name", contrastive.LOSSES)
def test_loss_and_metrics_by_hand(loss_name):
  task = contrastive.Task(loss_name=loss_name, chunk=2)
  # Image 0 finds its text; image 1 is nearer to text 0; 2 is no pair.
  zimg = jnp.array([[1.0, 0.0], [0.8, 0.6], [9.0, 9.0]])
  ztxt = jnp.array([[1.0, 0.0], [0.0, 1.0], [9.0, 9.0]])
  outputs = {"zimg": zimg, "ztxt": ztxt, "t": jnp.float32(2), "b": -1.0}
  mask = jnp.array([True, True, False])
  loss, metrics = task.loss(outputs, {"mask": mask})
  logits = 2.0 * np.array([[1.0, 0.0], [0.8, 0.6]])
  if loss_name == "softmax":
    cross = lambda x: np.log(np.exp(x).sum(1)) - np.diag(x)
    want = (cross(logits) + cross(logits.T)).mean() / 2
  else:
    signs = 2 * np.eye(2) - 1
    want = np.log1p(np.exp(-signs * (logits - 1))).sum() / 2
  np.testing.assert_allclose(loss, want, rtol=1e-6)
  got = {k: float(m.compute()) for k, m in metrics.items()}
  bias = {"bias": -1.0} if loss_name == "sigmoid" else {}
  want = dict(loss=want, image_to_text=0.5, text_to_image=1.0, temperature=2.0)
  assert got == pytest.approx(want | bias, rel=1e-6)
  assert float(metrics["loss"].count) == 2


def test_a_step_without_a_pair_changes_nothing():
  task = contrastive.Task()
  z = jnp.ones((3, 5))
  outputs = {"zimg": z, "ztxt": z, "t": jnp.float32(2), "b": 0.0}
  loss, metrics = task.loss(outputs, {"mask": jnp.zeros(3, bool)})
  assert float(loss) == 0
  assert all(np.isfinite(m.compute()) for m in metrics.values())


def test_micro_batches_are_refused():
  with pytest.raises(ValueError, match="is not a mean over examples"):
    train_step.make_train_step(None, contrastive.Task(), None, accum_steps=2)


@pytest.mark.parametrize(
  ("settings", "sentence"),
  [
    (
      dict(loss_name="triplet"),
      "config.task.loss_name = 'triplet'; it is one of ('softmax', 'sigmoid').",
    ),
    (dict(exchange="all"), "config.task.exchange = 'all'; it is one of ("),
    (dict(chunk=0), "config.task.chunk = 0; it is a number of texts."),
  ],
)
def test_setting_refusals(settings, sentence):
  with pytest.raises(ValueError, match=re.escape(sentence)):
    contrastive.Task(**settings)


def test_batch_refusals():
  task = contrastive.Task()
  with pytest.raises(ValueError, match=r"gives only \['_mask', 'label'\]"):
    task.prepare({k: stacked()[k] for k in ("_mask", "label")}, None)
  batch = packed()
  del batch["text_segment_ids"], batch["text_positions"]
  sentence = (
    "The texts of packed rows lack ['text_positions', 'text_segment_ids']: "
    "pack them with their images, or set config.data.pack to None."
  )
  with pytest.raises(ValueError, match=re.escape(sentence)):
    task.prepare(batch, None)
