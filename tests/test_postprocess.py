"""Objects and segments from what a detector says, by hand-made predictions."""

import jax
import numpy as np
import pytest

from big_vision_like import postprocess

CLASSES = 4
IS_THING = (True, True, False)  # The head has one more class, which is stuff.


def logits(*classes, sure=9.0):
  """Queries that are sure of a class; CLASSES is no object."""
  return np.float32(sure * np.eye(CLASSES + 1)[list(classes)])


def segments(label, masks, *, size=None, image_hw=None, **kwargs):
  masks = np.asarray(masks, np.float32)
  size = size or masks.shape[1:]
  boxes = np.full((len(masks), 4), 0.5, np.float32)
  settings = dict(stride=1, is_thing=IS_THING, threshold=0.85) | kwargs
  return postprocess.segments(
    label, boxes, masks, size, image_hw or size, **settings
  )


def rows(*lines):
  """Masks of one row of pixels."""
  return np.array(lines)[:, None]


def test_objects_are_sorted_cut_and_clipped():
  label = logits(1, 4, 3, 0)
  label[2] *= 0.2  # 9 * 0.2: a probability of .6 among five classes
  label[3] *= 2
  boxes = np.float32([[0.5, 0.5, 0.5, 0.2], [0.5] * 4, [0.5] * 4, [0, 0, 1, 1]])
  found = postprocess.objects(label, boxes, (40, 60), threshold=0.7)
  assert found.label.tolist() == [0, 1]
  assert found.query.tolist() == [3, 0]
  np.testing.assert_allclose(found.box, [[0, 0, 30, 20], [15, 16, 45, 24]])
  assert found.id_map is None
  p = np.exp(18) / (np.exp(18) + 4)
  np.testing.assert_allclose(found.score[0], p, rtol=1e-12)
  found = postprocess.objects(label, boxes, (40, 60), threshold=0.5)
  assert found.label.tolist() == [0, 1, 3]


def test_pixels_go_to_the_largest_mask_of_the_sure():
  label = logits(0, 4, 0, 1)
  label[0] *= 2
  label[2] = 0  # Of all classes alike, but its mask is the largest.
  masks = rows([3] * 5 + [1] * 6, [9] * 11, [8] * 11, [2] * 11)
  found = segments(label, masks)
  assert found.id_map.tolist() == [[1] * 5 + [2] * 6]
  assert found.label.tolist() == [0, 1]
  assert found.query.tolist() == [0, 3]
  # The surest comes first.
  found = segments(label[[3, 1, 2, 0]], masks[[3, 1, 2, 0]])
  assert found.id_map.tolist() == [[1] * 5 + [2] * 6]
  assert found.query.tolist() == [3, 0]
  assert (np.diff(found.score) <= 0).all()


def test_small_segments_leave_their_pixels_to_others():
  # Without the first, the second is left with four pixels, and goes too.
  masks = rows(
    [9] * 4 + [0] * 12, [1, 0, 0, 0] + [5] * 3 + [0] * 9, [0, 2] + [1] * 14
  )
  found = segments(logits(0, 0, 1), masks)
  assert found.id_map.tolist() == [[1] * 16]
  assert found.query.tolist() == [2]
  found = segments(logits(0, 0, 1)[:2], masks[:2, :, :4])
  assert found.id_map.tolist() == [[0] * 4]
  assert len(found.query) == 0
  assert not segments(logits(4, 4, 4), masks).id_map.any()


def test_a_class_of_stuff_is_one_segment():
  masks = rows([5] * 6 + [1] * 6, [2] * 6 + [6] * 6)
  for c in (2, 3):  # stuff, and what the data does not have
    found = segments(logits(c, c), masks)
    assert found.id_map.tolist() == [[1] * 12]
    assert found.query.tolist() == [0]
  found = segments(logits(2, 3), masks)
  assert found.id_map.max() == 2
  assert segments(logits(0, 0), masks).id_map.max() == 2
  assert segments(logits(2, 2), masks, is_thing=None).id_map.max() == 2
  # As published: the second mask is left out once it is merged, and a thing
  # that is larger there than the first takes the pixels.
  masks = rows(
    [5] * 6 + [1] * 6 + [0] * 6, [2] * 6 + [6] * 6 + [0] * 6, [0] * 6 + [3] * 12
  )
  found = segments(logits(2, 2, 0), masks)
  assert found.query.tolist() == [0, 2]
  assert found.id_map.tolist() == [[1] * 6 + [2] * 12]


def test_an_image_is_cut_out_of_its_canvas():
  """Only its own pixels count, where they lie on the canvas."""
  rng = np.random.default_rng(0)
  size, hw, stride = (21, 37), (43, 61), 4
  coarse = rng.normal(size=(3, 6, 10)).astype(np.float32)
  canvas = np.full((3, 8, 16), 1e6, np.float32) * rng.normal(size=(3, 1, 1))
  canvas[:, :6, :10] = coarse
  found = segments(
    logits(0, 1, 1), canvas, size=size, image_hw=hw, stride=stride
  )
  fine = jax.image.resize(coarse, (3, 24, 40), "linear", antialias=False)
  winner = np.asarray(fine).argmax(0)[: size[0], : size[1]]
  for y in range(hw[0]):
    for x in range(hw[1]):
      own = winner[
        int((y + 0.5) * size[0] / hw[0]), int((x + 0.5) * size[1] / hw[1])
      ]
      assert found.query[found.id_map[y, x] - 1] == own


def test_numbers_are_checked():
  one = {"logits": logits(0), "boxes": np.ones((1, 4))}
  postprocess.check_finite(one, "it")
  with pytest.raises(ValueError, match="predicted for it is no number: boxes"):
    postprocess.check_finite(one | {"boxes": np.full(4, np.inf)}, "it")
