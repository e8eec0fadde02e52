"""The losses of a set: figures of the published code, and properties."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from big_vision_like import sharding
from big_vision_like.losses import boxes, masks, set_prediction

COSTS = set_prediction.Costs()
NONE = -1


def predictions():
  """Two images, six queries, four classes and no object; by a formula."""
  b, q, c = np.meshgrid(*map(np.arange, (2, 6, 5)), indexing="ij")
  logits = 2 * np.sin(1 + 3 * b + 2 * q + 0.7 * c * (q + 1))
  b, q = b[..., 0], q[..., 0]
  boxes = np.stack(
    [
      0.5 + 0.3 * np.sin(b + q),
      0.5 + 0.3 * np.cos(2 * b + q),
      0.2 + 0.1 * np.sin(3 * q + b),
      0.25 + 0.1 * np.cos(q - b),
    ],
    -1,
  )
  return jnp.float32(logits)[None], jnp.float32(boxes)[None]


LABEL = jnp.array([[0, 3, 1], [2, NONE, NONE]])
BOXES = jnp.array(
  [
    [[0.5, 0.5, 0.4, 0.4], [0.2, 0.7, 0.2, 0.3], [0.75, 0.3, 0.1, 0.2]],
    [[0.4, 0.6, 0.3, 0.2], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]],
  ]
)


@jax.jit
def losses(logits, box, label, true_boxes, mask):
  target = set_prediction.match(logits, box, label, true_boxes, COSTS)
  return set_prediction.losses(
    logits,
    box,
    label,
    true_boxes,
    target,
    mask,
    no_object=0.1,
    denominators="global",
  )


def test_match_of_the_published_code():
  logits, box = predictions()
  cost = set_prediction.matching_cost(logits, box, LABEL, BOXES, COSTS)[0]
  # atol: the published figures have four digits.
  for (image, query, target), want in {
    (0, 2, 2): 0.0966,
    (0, 5, 1): 0.5009,
    (0, 0, 0): 2.7171,
  }.items():
    np.testing.assert_allclose(cost[image, target, query], want, atol=6e-5)
  np.testing.assert_allclose(
    cost[1, 0], [4.4793, 6.6369, 3.6441, 0.9769, 3.0906, 1.4409], atol=6e-5
  )
  target = set_prediction.match(logits, box, LABEL, BOXES, COSTS)[0]
  assert target.tolist() == [[0, -1, 2, -1, -1, 1], [-1, -1, -1, 0, -1, -1]]
  query = set_prediction.query_of(target, 3)
  assert query.tolist() == [[0, 5, 2], [3, -1, -1]]
  wrong = set_prediction.class_error(logits[0], LABEL, target)
  assert (wrong[target >= 0] == 100).all()


@pytest.mark.parametrize(
  ("there", "ce", "l1", "giou", "cardinality"),
  [
    ((True, True), 2.105631, 0.311751, 0.867674, 2.0),
    ((True, False), 2.138318, 0.314092, 0.887953, 2.5),
    ((False, False), 2.290433, 0, 0, 4.0),
  ],
)
def test_losses_of_the_published_code(there, ce, l1, giou, cardinality):
  logits, box = predictions()
  label = jnp.where(jnp.array(there)[:, None], LABEL, NONE)
  got = losses(logits, box, label, BOXES, jnp.ones(2, bool))
  np.testing.assert_allclose(np.ravel(got), [ce, l1, giou], atol=1e-6)
  error = set_prediction.cardinality_error(logits[0], label)
  assert error.mean() == cardinality
  if all(there):
    total = got.ce + 5 * got.l1 + 2 * got.giou
    np.testing.assert_allclose(total, [5.399735], atol=2e-6)


def test_masks_of_the_published_code():
  h, w = np.meshgrid(np.arange(3), np.arange(4), indexing="ij")
  logits = jnp.float32(np.stack([np.sin(h + 2 * w), np.cos(2 * h - w)]))
  truth = jnp.array(np.stack([(h + w) % 2 == 0, h >= w]))
  of = logits, truth, jnp.ones((2, 3, 4), bool)
  # atol: the published figures have five digits.
  np.testing.assert_allclose(masks.dice(*of).sum() / 2, 0.47523, atol=6e-6)
  np.testing.assert_allclose(masks.focal(*of).sum() / 2, 0.15993, atol=6e-6)


def test_masks_count_inside_only():
  rng = np.random.default_rng(0)
  logits = jnp.float32(5 * rng.normal(size=(2, 5, 7)))
  truth = jnp.array(rng.random((2, 5, 7)) < 0.5)
  inside = jnp.zeros((2, 5, 7), bool).at[:, :3, :5].set(True)
  small = logits[:, :3, :5], truth[:, :3, :5], inside[:, :3, :5]
  for fn in (masks.focal, masks.dice):
    np.testing.assert_allclose(fn(logits, truth, inside), fn(*small), rtol=1e-6)
    assert np.isfinite(fn(logits, truth, ~inside & inside)).all()
  want = optax.sigmoid_focal_loss(small[0], small[1], alpha=0.25)
  np.testing.assert_allclose(masks.focal(*small), want.mean((1, 2)), rtol=1e-5)


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_masks_are_those_of_matched_queries_in_full_size(at_once, monkeypatch):
  monkeypatch.setattr(masks, "PIXELS", at_once * 12 * 16)
  rng = np.random.default_rng(0)
  logits = jnp.float32(rng.normal(size=(2, 5, 3, 4)))
  id_map = jnp.array(rng.integers(0, 4, (2, 12, 16)), jnp.uint8)
  query = jnp.array([[3, -1, 0], [-1, 4, -1]])
  inside = jnp.array(rng.random((2, 12, 16)) < 0.7)

  def by_object(logits):
    out = np.zeros((2, 2, 3)).tolist()
    for image, slot in np.argwhere(query >= 0):
      mask = logits[image, query[image, slot]]
      full = jax.image.resize(mask, (12, 16), "linear")
      of = full, id_map[image] == slot + 1, inside[image]
      for k, fn in enumerate((masks.focal, masks.dice)):
        out[k][image][slot] = fn(*of)
    return jnp.array(out)

  def ours(logits):
    return jnp.stack(masks.mask_losses(logits, id_map, query, inside))

  np.testing.assert_allclose(
    jax.jit(ours)(logits), by_object(logits), rtol=1e-5, atol=1e-7
  )
  weight = jnp.float32(rng.normal(size=(2, 2, 3)))
  grads = [
    jax.grad(lambda x, fn=fn: (weight * fn(x)).sum())(logits)
    for fn in (ours, by_object)
  ]
  np.testing.assert_allclose(*grads, rtol=1e-4, atol=1e-8)


def test_masks_of_one_object_at_a_time(monkeypatch):
  """The largest array is a mask in full size, not one for each object."""
  monkeypatch.setattr(masks, "PIXELS", 64 * 64)
  shape = jax.ShapeDtypeStruct
  args = (
    shape((1, 50, 16, 16), jnp.float32),
    shape((1, 64, 64), jnp.uint8),
    shape((1, 40), jnp.int32),
    shape((1, 64, 64), bool),
  )
  grad = jax.grad(lambda *x: sum(map(jnp.sum, masks.mask_losses(*x))))
  memory = jax.jit(grad).lower(*args).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 40 * 64 * 64 * 4 / 2


def random_set(rows, seed=0):
  rng = np.random.default_rng(seed)
  logits = jnp.float32(rng.normal(size=(3, rows, 7, 5)))
  box = jnp.float32(rng.uniform(0.1, 0.9, size=(3, rows, 7, 4)))
  count = rng.integers(0, 6, rows)
  count[:2] = 0, 5
  label = np.where(
    np.arange(5) < count[:, None], rng.integers(0, 4, (rows, 5)), NONE
  )
  true_boxes = jnp.float32(rng.uniform(0.1, 0.9, size=(rows, 5, 4)))
  return logits, box, label, true_boxes


def test_numbers_of_devices():
  """Global: they change nothing. Device: as so many processes would have it."""
  logits, box, label, true_boxes = random_set(16)
  label[4:] = NONE  # The last six of eight devices have nothing to match.
  label, mask = jnp.array(label), jnp.arange(16) < 11  # Two have no image.

  @functools.partial(jax.jit, static_argnames="denominators")
  def run(*data, denominators="global"):
    *data, mask = data
    target = set_prediction.match(*data, COSTS)
    return set_prediction.losses(
      *data, target, mask, no_object=0.1, denominators=denominators
    )

  data = logits, box, label, true_boxes, mask
  want = run(*data)
  with jax.set_mesh(sharding.make_mesh({"data": 4, "fsdp": 2})):
    got = {k: run(*data, denominators=k) for k in set_prediction.DENOMINATORS}
  for a, b in zip(got["global"], want):
    np.testing.assert_allclose(a, b, rtol=2e-6)
  alone = [
    run(logits[:, at], box[:, at], label[at], true_boxes[at], mask[at])
    for at in (slice(i, i + 2) for i in range(0, 12, 2))
  ]
  ce = np.mean([x.ce for x in alone], 0)
  assert np.abs(ce - want.ce).max() > 1e-3
  # Fewer targets than devices with images are counted as that many.
  n = int((label >= 0).sum())
  share = n / max(n, 6)
  want = set_prediction.Losses(ce, want.l1 * share, want.giou * share)
  for a, b in zip(got["device"], want):
    np.testing.assert_allclose(a, b, rtol=2e-6)


def test_device_counts_are_at_least_one_each():
  label = jnp.full((16, 3), NONE).at[0, 0].set(2)
  mask = jnp.arange(16) < 11
  with jax.set_mesh(sharding.make_mesh({"data": 8})):
    count = set_prediction.number_of_boxes(label, mask, "device")
  assert float(count) == 6
  assert float(set_prediction.number_of_boxes(label, mask, "global")) == 1
  empty = jnp.zeros(16, bool)
  assert float(set_prediction.number_of_boxes(label, empty, "device")) == 1


def test_distance_is_by_centre():
  """By corners, the first fixture would give 0.400271."""
  logits, box = predictions()
  target = set_prediction.match(logits, box, LABEL, BOXES, COSTS)
  own = jnp.take_along_axis(BOXES[None], jnp.maximum(target, 0)[..., None], 2)
  far = jnp.abs(boxes.to_corners(box) - boxes.to_corners(own)).sum(-1)
  wrong = jnp.where(target >= 0, far, 0).sum() / 4
  np.testing.assert_allclose(wrong, 0.400271, atol=1e-6)
