"""The classification loss against closed forms; masks leave no trace."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vision_like.tasks import classification


def packed(labels, mask):
  labels, mask = np.asarray(labels), np.asarray(mask)
  return {
    "patches": np.full((*mask.shape[:1], 7, 12), 51, np.uint8),
    "segment_ids": np.ones((mask.shape[0], 7), np.int32),
    "positions": np.zeros((mask.shape[0], 7, 2), np.int32),
    "grid_hw": np.ones((*mask.shape, 2), np.int32),
    "example_mask": mask,
    "label": labels,
    "_mask": np.ones(mask.shape[0], bool),
  }


def loss_of(task, batch, logits):
  inputs, targets = task.prepare(batch, None)
  loss, metrics = task.loss({"logits": logits}, targets)
  return float(loss), metrics, inputs


def test_sigmoid_loss_sums_classes_and_averages_images():
  logits = np.array([[[0.3, -1.2, 2.0], [0.1, 0.2, 0.3], [9.0, 9.0, 9.0]]])
  batch = packed([[2, 0, -1]], [[True, True, False]])
  task = classification.Task(num_classes=3)
  loss, metrics, inputs = loss_of(task, batch, logits)
  y = np.array([[0, 0, 1], [1, 0, 0]])
  p = 1 / (1 + np.exp(-logits[0, :2]))
  by_hand = -(y * np.log(p) + (1 - y) * np.log(1 - p)).sum(-1).mean()
  np.testing.assert_allclose(loss, by_hand, rtol=1e-6)
  assert float(metrics["loss"].count) == 2
  assert float(metrics["accuracy"].compute()) == 0.5
  np.testing.assert_allclose(inputs["patches"], 51 / 127.5 - 1, atol=1e-6)


def test_softmax_with_smoothing_matches_torch_definition():
  logits = np.array([[0.3, -1.2, 2.0, 0.0, 0.5]])
  batch = {
    "image": np.zeros((1, 2, 2, 3), np.uint8),
    "label": np.array([1]),
    "_mask": np.array([True]),
  }
  task = classification.Task(
    num_classes=5, loss_name="softmax", label_smoothing=0.1
  )
  loss, _, _ = loss_of(task, batch, logits)
  logp = logits[0] - np.log(np.exp(logits[0]).sum())
  y = np.full(5, 0.02)
  y[1] += 0.9
  np.testing.assert_allclose(loss, -(y * logp).sum(), rtol=1e-6)


def test_masked_slots_have_no_gradient_even_when_infinite():
  batch = packed([[0, -1]], [[True, False]])
  task = classification.Task(num_classes=2)
  _, targets = task.prepare(batch, None)

  def loss(logits):
    return task.loss({"logits": logits}, targets)[0]

  logits = jnp.array([[[0.5, -0.5], [jnp.inf, 0.0]]])
  grad = jax.grad(loss)(logits)
  assert np.isfinite(loss(logits))
  np.testing.assert_array_equal(grad[0, 1], 0.0)


def test_an_image_without_label_does_not_count():
  batch = packed([[1, -1]], [[True, True]])
  _, metrics, _ = loss_of(
    classification.Task(num_classes=2), batch, np.zeros((1, 2, 2))
  )
  assert float(metrics["loss"].count) == 1


def test_multi_label_accuracy_counts_any_true_class():
  batch = packed([[0]], [[True]])
  batch["multi_label"] = np.array([[[1, 0, 1]]], np.uint8)
  task = classification.Task(num_classes=3, labels="multi_label")
  for logits, expected in (([0, 0, 1], 1.0), ([0, 1, 0], 0.0)):
    _, metrics, _ = loss_of(task, batch, np.array([[logits]], np.float32))
    assert float(metrics["accuracy"].compute()) == expected


def test_normalisation_by_channel():
  pixels = np.arange(24, dtype=np.uint8).reshape(1, 2, 4, 3)
  mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
  batch = {"image": pixels, "label": np.array([0]), "_mask": np.array([True])}
  task = classification.Task(num_classes=1, mean=mean, std=std)
  inputs, _ = task.prepare(batch, None)
  expected = (pixels / 255.0 - np.array(mean)) / np.array(std)
  np.testing.assert_allclose(inputs["image"], expected, atol=1e-6)


@pytest.mark.parametrize(
  ("settings", "sentence"),
  [
    (dict(loss_name="hinge"), "config.task.loss_name = 'hinge'"),
    (dict(labels="boxes"), "config.task.labels = 'boxes'"),
    (dict(loss_name="softmax", labels="multi_label"), "one label an image"),
  ],
)
def test_wrong_settings_are_refused(settings, sentence):
  with pytest.raises(ValueError, match=sentence):
    classification.Task(num_classes=2, **settings)


def test_labels_that_the_source_lacks_are_refused():
  batch = packed([[0]], [[True]])
  task = classification.Task(num_classes=2, labels="multi_label")
  with pytest.raises(ValueError, match="gives only \\['label'\\]"):
    task.prepare(batch, None)
