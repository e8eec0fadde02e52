"""Boxes and what they have in common, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vision_like.losses import boxes


def test_corners_and_centers_are_inverse():
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.random((3, 5, 4)), jnp.float32)
  np.testing.assert_allclose(
    boxes.to_corners(jnp.array([0.5, 0.4, 0.2, 0.6])),
    [0.4, 0.1, 0.6, 0.7],
    atol=1e-7,
  )
  np.testing.assert_allclose(
    boxes.to_centers(boxes.to_corners(x)), x, atol=1e-6
  )


@pytest.mark.parametrize(
  ("a", "b", "iou", "giou"),
  [
    ((0, 0, 2, 3), (0, 0, 2, 3), 1, 1),
    ((0, 0, 2, 2), (1, 1, 3, 3), 1 / 7, -0.079365),
    ((0, 0, 1, 1), (2, 2, 3, 3), 0, -0.777778),
    ((0, 0, 4, 2), (1, 0, 2, 1), 1 / 8, 1 / 8),
  ],
)
def test_overlap_by_hand(a, b, iou, giou):
  a, b = (jnp.asarray(x, jnp.float32) for x in (a, b))
  for x, y in ((a, b), (b, a)):
    np.testing.assert_allclose(boxes.iou(x, y), iou, atol=1e-6)
    np.testing.assert_allclose(boxes.giou(x, y), giou, atol=1e-6)


def test_all_pairs_are_those_of_the_elements():
  rng = np.random.default_rng(1)
  a, b = (
    boxes.to_corners(jnp.asarray(rng.random((n, 4)), jnp.float32))
    for n in (3, 5)
  )
  for fn in (boxes.iou, boxes.giou):
    pairs = fn(a[:, None], b[None])
    assert pairs.shape == (3, 5)
    for i, j in np.ndindex(3, 5):
      np.testing.assert_allclose(pairs[i, j], fn(a[i], b[j]), rtol=1e-6)


@pytest.mark.parametrize("fn", [boxes.iou, boxes.giou])
def test_values_and_gradients_are_finite_without_area(fn):
  dot, line = [0.3, 0.3, 0.3, 0.3], [0.1, 0.2, 0.9, 0.2]
  inverted = [0.8, 0.8, 0.2, 0.2]
  x = jnp.array([dot, line, inverted, [0.0, 0, 0, 0], [0, 0, 1, 1]])
  pairs = lambda x: fn(x[:, None], x[None])
  assert np.isfinite(pairs(x)).all()
  assert np.isfinite(jax.grad(lambda x: pairs(x).sum())(x)).all()
  assert float(fn(x[0], x[0])) == 0
