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


def stacked(n=6, h=11, w=13, classes=7, seed=0):
  rng = np.random.default_rng(seed)
  return {
    "image": rng.integers(0, 256, (n, h, w, 3)).astype(np.uint8),
    "label": rng.integers(0, classes, n).astype(np.int32),
    "_mask": np.ones(n, bool),
  }


def mixing(**kwargs):
  settings = dict(num_classes=7, loss_name="softmax", label_smoothing=0.1)
  return classification.Task(**settings | kwargs)


KEYS = [jax.random.key(seed) for seed in range(8)]


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixing_is_timms_batch_mode(kind, monkeypatch):
  import torch
  from timm.data import mixup

  batch, task = stacked(), mixing(**{kind: 0.8})
  plain, _ = task.prepare(batch, None)
  theirs = mixup.Mixup(**{f"{kind}_alpha": 0.8}, num_classes=7)
  if kind == "mixup":
    theirs.cutmix_alpha = 0.0
  else:
    theirs.mixup_alpha = 0.0
  drawn, box = {}, classification.cutmix_box

  def spy(share, y, x, **kwargs):
    drawn.update(share=float(share), y=int(y), x=int(x))
    return box(share, y, x, **kwargs)

  monkeypatch.setattr(classification, "cutmix_box", spy)
  shares = set()
  for key in KEYS:
    inputs, targets = task.prepare(batch, key)
    centers = iter([drawn["y"], drawn["x"]])
    with monkeypatch.context() as patched:
      patched.setattr(np.random, "beta", lambda a, b: drawn["share"])
      patched.setattr(np.random, "randint", lambda *_, c=centers, **__: next(c))
      image = torch.tensor(np.array(plain["image"]).transpose(0, 3, 1, 2))
      expected, y = theirs(image, torch.tensor(batch["label"]))
    expected = expected.numpy().transpose(0, 2, 3, 1)
    # Float32, of numbers of size 1: mixup rounds a product and a sum.
    atol = 3e-7 if kind == "mixup" else 0
    np.testing.assert_allclose(inputs["image"], expected, rtol=0, atol=atol)
    np.testing.assert_allclose(targets["y"], y.numpy(), rtol=0, atol=2e-7)
    shares.add(drawn["share"])
  assert len(shares) == len(KEYS)


@pytest.mark.parity
def test_cutmix_boxes_are_timms(monkeypatch):
  from timm.data import mixup

  rng, drawn = np.random.default_rng(0), []
  draw = lambda low, high, size=None: (
    drawn.append(rng.integers(low, high)) or (drawn[-1])
  )
  monkeypatch.setattr(np.random, "randint", draw)
  for h, w in ((11, 13), (32, 32), (7, 50)):
    for share in np.float32(rng.random(20)):
      drawn.clear()
      yl, yh, xl, xh = mixup.rand_bbox((3, h, w), share)
      ours = classification.cutmix_box(share, *drawn, h=h, w=w)
      expected = np.zeros((h, w), bool)
      expected[yl:yh, xl:xh] = True
      np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("settings", [dict(mixup=0.8), dict(cutmix=1.0)])
def test_mixed_labels_are_the_shares_of_the_pixels(settings):
  """An image of ones among zeros shows its share, which its label has too."""
  batch = stacked(n=2)
  batch["image"][0], batch["image"][1] = 255, 0
  batch["label"][:] = 0, 1
  task = mixing(**settings, label_smoothing=0.0, mean=0.0, std=1.0)
  shares = []
  for key in KEYS:
    inputs, targets = task.prepare(batch, key)
    share = np.asarray(inputs["image"]).mean((1, 2, 3))
    np.testing.assert_allclose(targets["y"][:, 0], share, atol=1e-6)
    np.testing.assert_allclose(targets["y"].sum(-1), 1.0, atol=1e-6)
    shares.append(share[0])
  assert np.ptp(shares) > 0.3


def test_one_of_mixup_and_cutmix_is_chosen_for_each_batch():
  task = mixing(mixup=0.8, cutmix=1.0, mean=0.0, std=1.0)
  batch = stacked(n=2)
  batch["image"][0], batch["image"][1] = 255, 0
  prepare = jax.jit(task.prepare)
  cut = 0
  for seed in range(64):
    image = np.asarray(prepare(batch, jax.random.key(seed))[0]["image"])
    whole = np.isin(image, (0.0, 1.0)).all()
    cut += whole
    assert whole or np.ptp(image[0]) == 0
  # Four standard deviations of 64 fair coins.
  assert abs(cut - 32) <= 16


def test_the_law_of_the_shares():
  from scipy import stats

  for settings, alpha in ((dict(mixup=0.2), 0.2), (dict(mixup=0.8), 0.8)):
    task = mixing(**settings)
    draw = jax.vmap(lambda key, t=task: t._draw(key, 3, 5)[1])
    shares = draw(jax.random.split(jax.random.key(1), 2000))
    law = stats.beta(alpha, alpha)
    assert stats.kstest(np.asarray(shares), law.cdf).pvalue > 1e-3


def test_what_is_not_there_is_mixed_into_nothing():
  batch = stacked(n=6)
  batch["_mask"][1] = False
  batch["label"][2] = -1
  task = mixing(mixup=0.8, cutmix=1.0)
  plain, soft = task.prepare(batch, None)
  for key in KEYS[:4]:
    inputs, targets = task.prepare(batch, key)
    # 4 and 3 are the partners of 1 and 2; 0 and 5 belong together.
    for row in range(1, 5):
      np.testing.assert_array_equal(inputs["image"][row], plain["image"][row])
      np.testing.assert_array_equal(targets["y"][row], soft["y"][row])
    assert not np.array_equal(inputs["image"][0], plain["image"][0])
    assert not np.array_equal(inputs["image"][5], plain["image"][5])
    np.testing.assert_array_equal(
      targets["mask"], [True, False, False, True, True, True]
    )


def test_only_training_is_mixed_and_the_key_alone_decides():
  batch, task = stacked(), mixing(mixup=0.8, cutmix=1.0)
  plain = mixing().prepare(batch, None)
  for other in (task.prepare(batch, None), mixing().prepare(batch, KEYS[0])):
    jax.tree.map(np.testing.assert_array_equal, plain, other)
  first, again = (task.prepare(batch, KEYS[1]) for _ in range(2))
  jax.tree.map(np.testing.assert_array_equal, first, again)
  assert not np.array_equal(first[0]["image"], plain[0]["image"])


def test_the_mixed_loss_is_the_mixture_of_the_losses():
  batch, task = stacked(), mixing(mixup=0.8)
  _, targets = task.prepare(batch, KEYS[2])
  logits = jax.random.normal(KEYS[3], (6, 7))
  share = task._draw(KEYS[2], 11, 13)[1]
  _, plain = task.prepare(batch, None)
  flipped = plain | {"y": plain["y"][::-1]}
  loss = lambda t: task.loss({"logits": logits}, t)[0]
  expected = share * loss(plain) + (1 - share) * loss(flipped)
  np.testing.assert_allclose(loss(targets), expected, rtol=1e-6)


def test_packed_rows_are_not_mixed():
  task = classification.Task(num_classes=2, cutmix=1.0)
  for rng in (None, KEYS[0]):
    with pytest.raises(ValueError, match="packed rows hold images of many"):
      task.prepare(packed([[0]], [[True]]), rng)


def test_negative_alphas_are_refused():
  with pytest.raises(ValueError, match=r"mixup = -0\.1 and cutmix = 0"):
    classification.Task(num_classes=2, mixup=-0.1)
