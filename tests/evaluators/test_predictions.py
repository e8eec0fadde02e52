"""The pictures of predictions: the right image with the right labels."""

from pathlib import Path

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vision_like import pictures, sharding
from big_vision_like.data import packing
from big_vision_like.evaluators import predictions

SPEC = packing.PackSpec(length=23, patch=5, max_images=3)
FOLDER = Path("nowhere")
GRIDS = [[(2, 3), (1, 7)], [(4, 5)], [], [(1, 1), (3, 1), (2, 2)]]


class Batches:
  """Batches as the loop lends them; remembers what was asked."""

  label_names = ("zero", "one", "two")

  def __init__(self, *batches):
    self.batches = batches
    self.asked = {}

  def __call__(self, **overrides):
    self.asked = overrides
    return iter([(batch, {}) for batch in self.batches])


def noise(grid, seed):
  shape = (grid[0] * SPEC.patch, grid[1] * SPEC.patch, 3)
  return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def packed_batch():
  batch, images = packing.blank(SPEC, len(GRIDS)), {}
  for row, grids in enumerate(GRIDS):
    start = 0
    for slot, grid in enumerate(grids):
      image = images[row, slot] = noise(grid, 10 * row + slot)
      start += packing.put(
        batch, row, slot, start, image=image, keep=None, spec=SPEC
      )
  return batch, images


def drawn(monkeypatch, predict, *batches, **settings):
  """What an evaluator hands to the picture, and what it asked for."""
  calls = []
  monkeypatch.setattr(pictures, "predictions", lambda *a: calls.append(a))
  lent = Batches(*batches)
  evaluator = predictions.Evaluator(**settings)
  scores = evaluator.run(predict=predict, batches=lent, folder=FOLDER)
  assert scores == {}
  (call,) = calls
  return call, lent.asked


@pytest.mark.parametrize("devices", [1, 4])
def test_packed_images_come_back_with_their_labels(monkeypatch, devices):
  batch, images = packed_batch()
  mesh = sharding.make_mesh({"data": devices}, jax.devices()[:devices])
  batch = jax.device_put(batch, sharding.batch_sharding(mesh))
  rng = np.random.default_rng(0)
  multi_label = rng.integers(0, 2, (4, 3, 3), np.uint8)
  logits = rng.normal(size=(4, 3, 3)).astype(np.float32)
  out = {
    "logits": logits,
    "multi_label": multi_label,
    "mask": np.asarray(batch["example_mask"]),
  }
  call, asked = drawn(monkeypatch, lambda _: out, batch, images=19)
  assert asked == {"limit": 19}
  shown, predicted, truth, names, path = call
  assert names == Batches.label_names
  assert path == FOLDER / "predictions.png"
  assert len(shown) == len(images) == 6
  for (place, image), one, said, true in zip(
    images.items(), shown, predicted, truth
  ):
    np.testing.assert_array_equal(one, image)
    np.testing.assert_array_equal(true, multi_label[place] == 1)
    probability = 1 / (1 + np.exp(-logits[place]))
    best = np.arange(3) == logits[place].argmax()
    np.testing.assert_array_equal(said, (probability >= 0.5) | best)


def test_stacked_images_show_the_single_best_class(monkeypatch):
  image = np.stack([noise((2, 3), seed) for seed in range(5)])
  batch = {"image": jnp.asarray(image), "_mask": jnp.ones(5, bool)}
  # Row 1 is a filler; sigmoids above one half name no second class.
  out = {
    "logits": np.float32(
      [[5, 9, 3], [0, 0, 0], [1, 0, 0], [3, 4, 5], [2, 1, 0]]
    ),
    "label": np.int32([1, -1, 2, 2, 0]),
    "mask": np.array([True, False, True, True, True]),
  }
  (shown, predicted, truth, _, _), _ = drawn(monkeypatch, lambda _: out, batch)
  np.testing.assert_array_equal(np.stack(shown), image[[0, 2, 3, 4]])
  assert [list(np.flatnonzero(x)) for x in predicted] == [[1], [0], [2], [0]]
  assert [list(np.flatnonzero(x)) for x in truth] == [[1], [2], [2], [0]]


def test_every_batch_is_predicted_on_every_host(monkeypatch):
  # A host that predicts fewer batches than the others stops them all.
  batch, _ = packed_batch()
  batch = jax.tree.map(jnp.asarray, batch)
  seen = []

  def predict(batch):
    seen.append(batch)
    shape = batch["example_mask"].shape
    return {
      "logits": np.zeros((*shape, 3), np.float32),
      "label": np.zeros(shape, np.int32),
      "mask": np.zeros(shape, bool),
    }

  monkeypatch.setattr(jax, "process_index", lambda: 1)
  lent = Batches(batch, batch, batch)
  evaluator = predictions.Evaluator()
  assert not evaluator.run(predict=predict, batches=lent, folder=FOLDER)
  assert len(seen) == 3
  assert not FOLDER.exists()


def test_dropped_tokens_are_black():
  batch = packing.blank(SPEC, 1)
  image = noise((2, 3), 0)
  keep = np.array([0, 2, 4])
  packing.put(batch, 0, 0, 0, image=image, keep=keep, spec=SPEC)
  one = {k: batch[k][0] for k in ("patches", "segment_ids", "positions")}
  got = predictions.unpack(**one, grid_hw=batch["grid_hw"][0], slot=0)
  expected = np.zeros_like(image)
  for token in keep:
    r, c = (5 * x for x in divmod(token, 3))
    expected[r : r + 5, c : c + 5] = image[r : r + 5, c : c + 5]
  np.testing.assert_array_equal(got, expected)


def test_the_picture_is_drawn(tmp_path):
  batch, _ = packed_batch()
  shape = batch["example_mask"].shape
  out = {
    "logits": np.random.default_rng(0).normal(size=(*shape, 3)),
    "label": np.ones(shape, np.int32),
    "mask": batch["example_mask"],
  }
  lent = Batches(jax.tree.map(jnp.asarray, batch))
  predictions.Evaluator().run(
    predict=lambda _: out, batches=lent, folder=tmp_path
  )
  picture = cv2.imread(str(tmp_path / "predictions.png"))
  assert picture.std() > 10
