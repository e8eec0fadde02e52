"""Boxes: what is wrong with them, the places of a batch, what is said."""

import dataclasses
import logging

import numpy as np
import pytest

from big_vision_like.data import objects, ops
from big_vision_like.data.objects import ObjectSpec

NAN, INF = float("nan"), float("inf")
HW = (30, 50)


@pytest.mark.parametrize(
  ("box", "flag", "clipped"),
  [
    ([3, 4, 20, 30], 0, [3, 4, 20, 30]),
    ([-1, 4, 51, 30.5], 0, [0, 4, 50, 30]),
    ([-1.5, 4, 20, 30], objects.CLIPPED, [0, 4, 20, 30]),
    ([-9, -9, 99, 99], objects.CLIPPED, [0, 0, 50, 30]),
    ([3, NAN, 20, 30], objects.NOT_FINITE, None),
    ([3, 4, INF, 30], objects.NOT_FINITE, None),
    ([20, 4, 3, 30], objects.INVERTED, None),
    ([3, 30, 20, 4], objects.INVERTED, None),
    ([3, 4, 3, 30], objects.EMPTY, None),
    ([45, 4, 45 + 1e-9, 30], objects.EMPTY, None),
    ([3, 4, 1e300, 30], objects.NOT_FINITE, None),
    ([60, 4, 70, 30], objects.OUTSIDE, None),
    ([3, -9, 20, 0], objects.OUTSIDE, None),
    ([0.2, 0.3, 0.9, 1.0], objects.FIRST_PIXEL, None),
    ([0.2, 0.3, 0.9, 1.1], 0, [0.2, 0.3, 0.9, 1.1]),
  ],
)
def test_boxes_are_clipped_or_dropped_by_rule(box, flag, clipped):
  boxes = np.array([[1, 2, 5, 9], box], np.float64)
  for hw in (HW, np.array([(99, 99), HW])):
    found, flags = objects.check_boxes(boxes, hw)
    assert flags.tolist() == [0, flag]
    assert objects.is_sound(flags).tolist() == [True, clipped is not None]
    np.testing.assert_array_equal(found[0], boxes[0])
    if clipped is not None:
      np.testing.assert_array_equal(found[1], np.float32(clipped))
    assert np.isfinite(found).all()


def test_no_boxes_at_all():
  found, flags = objects.check_boxes(np.zeros((0, 4), np.float32), HW)
  assert found.shape == (0, 4)
  assert flags.shape == (0,)


SPEC = ObjectSpec(canvases=((32, 64), (64, 64)), max_objects=3, masks=True)


def example(boxes, labels=None, **more):
  n = len(boxes)
  found = {"boxes": np.array(boxes, np.float32).reshape(-1, 4)}
  found["label"] = np.array(labels or range(n), np.int32)
  mask = np.zeros(HW, np.uint8)
  for i, (x0, y0, x1, y1) in enumerate(boxes):
    if x1 > x0:  # NaN is not
      mask[int(y0) : int(y1), int(x0) : int(x1)] = i + 1
  image = np.zeros((*HW, 3), np.uint8)
  return {
    "id": 7,
    "image": image,
    "image_hw": HW,
    "objects": found | more,
    "instance_mask": mask,
  }


def write(spec, one):
  batch = spec.blank(2) | spec.blank_masks(2, (32, 64), HW)
  one = spec.prepare(one, lambda: "it")
  spec.check(one, 11, lambda: "it")
  spec.write(batch, 1, one)
  return batch


def test_a_written_row():
  boxes = [[0, 0, 10, 30], [25, 3, 50, 15]]
  batch = write(SPEC, example(boxes, [4, 2]))
  assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
    "size": ((2, 2), "int32"),
    "boxes": ((2, 3, 4), "float32"),
    "box_label": ((2, 3), "int32"),
    "object_counts": ((2, 8), "int32"),
    "box_id_map": ((2, 32, 64), "uint8"),
  }
  assert batch["size"].tolist() == [[0, 0], [30, 50]]
  assert batch["box_label"].tolist() == [[-1] * 3, [4, 2, -1]]
  wanted = [[0.1, 0.5, 0.2, 1.0], [0.75, 0.3, 0.5, 0.4], [0, 0, 0, 0]]
  np.testing.assert_allclose(batch["boxes"][1], wanted, atol=1e-7)
  assert not batch["boxes"][0].any()
  assert batch["object_counts"].tolist() == [[0] * 8, [2] + [0] * 7]
  ids = batch["box_id_map"][1]
  assert (ids[:30, :10] == 1).all()
  assert (ids[3:15, 25:50] == 2).all()
  assert (ids > 0).sum() == 300 + 300


def test_more_objects_than_places_leave_the_largest():
  boxes = [[0, 0, 9, 9], [10, 0, 12, 2], [20, 0, 30, 9], [40, 0, 48, 9]]
  batch = write(SPEC, example(boxes))
  assert batch["box_label"][1].tolist() == [0, 2, 3]
  assert batch["object_counts"][1].tolist() == [4, 0, 0, 0, 0, 0, 0, 1]
  assert set(np.unique(batch["box_id_map"][1])) == {0, 1, 2, 3}
  assert (batch["box_id_map"][1, :9, 20:30] == 2).all()
  assert not batch["box_id_map"][1, :2, 10:12].any()


def test_bad_boxes_leave_their_place_to_others():
  boxes = [[NAN, 0, 9, 9], [10, 0, 12, 2], [20, 9, 20, 9], [40, 0, 48, 9]]
  batch = write(SPEC, example(boxes))
  assert batch["box_label"][1].tolist() == [1, 3, -1]
  assert batch["object_counts"][1].tolist() == [4, 1, 0, 1, 0, 0, 0, 0]
  assert np.isfinite(batch["boxes"]).all()
  assert (batch["box_id_map"][1, :9, 40:48] == 2).all()


def test_crowds_are_for_evaluation():
  boxes = [[0, 0, 9, 9], [10, 0, 12, 2]]
  crowd = dict(is_crowd=np.array([True, False]))
  batch = write(SPEC, example(boxes, [5, 6], **crowd))
  assert batch["box_label"][1].tolist() == [6, -1, -1]
  assert set(np.unique(batch["box_id_map"])) == {0, 1}
  spec = dataclasses.replace(SPEC, evaluation=True)
  batch = write(spec, example(boxes, [5, 6], **crowd))
  assert batch["box_label"][1].tolist() == [5, 6, -1]
  assert batch["box_crowd"][1].tolist() == [True, False, False]
  assert batch["box_area"][1].tolist() == [81, 4, 0]
  assert batch["box_pixels"][1].tolist() == [*boxes, [0] * 4]
  area = np.array([7, 3], np.float32)
  batch = write(spec, example(boxes, [5, 6], area=area))
  assert batch["box_area"][1].tolist() == [7, 3, 0]
  assert not batch["box_crowd"].any()


def test_an_evaluation_keeps_the_masks_of_the_original_image():
  spec = dataclasses.replace(SPEC, evaluation=True)
  one = example([[NAN, 0, 9, 9], [10, 0, 12, 2], [0, 9, 4, 12], [9, 9, 50, 30]])
  one = spec.prepare(one, lambda: "it")
  cropped = ops.parse("center_crop(30)")(one, np.random.default_rng(0))
  batch = spec.blank(2) | spec.blank_masks(2, (32, 64), (31, 50))
  spec.write(batch, 1, cropped)
  left = (batch["box_label"][1] >= 0).sum()
  assert left == 2  # The crop loses one, whose pixels are nobody's then.
  assert batch["original_id_map"].shape == (2, 31, 50)
  for k, (x0, y0, x1, y1) in enumerate(batch["box_pixels"][1, :left], 1):
    inside = batch["original_id_map"][1] == k
    assert inside[int(y0) : int(y1), int(x0) : int(x1)].all()
    assert inside.sum() == (x1 - x0) * (y1 - y0)
  assert batch["original_id_map"].max() == left
  assert spec.blank_masks(1, (32, 32), HW)["original_id_map"].shape == (1, *HW)


def test_maps_of_many_objects_take_two_bytes():
  spec = dataclasses.replace(SPEC, max_objects=256)
  assert spec.blank_masks(1, (2, 3), HW)["box_id_map"].dtype == np.uint16
  assert not dataclasses.replace(SPEC, masks=False).blank_masks(1, (2, 3), HW)


def test_the_smallest_canvas_that_holds():
  spec = ObjectSpec(canvases=((64, 64), (96, 32), (32, 96), (96, 96)))
  assert spec.smallest((1, 1)) == (32, 96)
  assert spec.smallest((33, 1)) == (96, 32)
  assert spec.smallest((64, 64)) == (64, 64)
  assert spec.smallest((65, 33)) == (96, 96)
  assert spec.smallest((1, 97)) is None


@pytest.mark.parametrize(
  ("settings", "sentence"),
  [
    (dict(canvases=()), "is a list of different pairs"),
    (dict(canvases=((64, 65),)), "in multiples of 32 pixels"),
    (dict(canvases=((64, 64, 8),)), "is a list of different pairs"),
    (dict(canvases=(64, 64)), "is a list of different pairs"),
    (dict(canvases=((64, 64), (64, 64))), "is a list of different pairs"),
    (dict(canvases=((64, 32), (32, 64))), r"of all shapes: add \(64, 64\)"),
    (dict(max_objects=0), "a whole number from 1 to 65535, not 0"),
  ],
)
def test_settings_that_are_refused(settings, sentence):
  with pytest.raises(ValueError, match=sentence):
    ObjectSpec(**dict(canvases=((64, 64),)) | settings)


def test_examples_that_are_refused():
  one = example([[0, 0, 9, 9]])
  for change, sentence in (
    (dict(objects=None), "needs examples with objects, and it has id, image"),
    (dict(instance_mask=None), "needs examples with instance_mask"),
  ):
    left = {k: v for k, v in one.items() if k not in change}
    with pytest.raises(ValueError, match=sentence):
      SPEC.prepare(left, lambda: "it")
  with pytest.raises(
    ValueError, match="of it need boxes and label, and have b"
  ):
    SPEC.prepare(one | {"objects": {"boxes": None}}, lambda: "it")
  for label in (11, -1):
    with pytest.raises(
      ValueError, match=f"class {label} of an object of it is"
    ):
      SPEC.check(example([[0, 0, 9, 9]], [label]), 11, lambda: "it")
  many = example([[i, 0, i + 1, 9] for i in range(4)])
  spec = dataclasses.replace(SPEC, evaluation=True)
  with pytest.raises(ValueError, match=r"it has 4 objects, .*\.max_objects=3"):
    spec.check(many, 11, lambda: "it")
  SPEC.check(many, 11, lambda: "it")


def host(rows, first=0):
  ids = np.arange(first, first + len(rows))
  return {"example_id": ids, "object_counts": np.array(rows, np.int32)}


def test_faults_are_counted_and_said_now_and_then(caplog):
  faults = objects.ObjectFaults("image {}".format, required=True)
  good, bad = [5] + [0] * 7, [5, 1, 0, 0, 0, 0, 0, 2]
  filler = host([bad])
  filler["example_id"][:] = -1
  with caplog.at_level(logging.WARNING, logger="absl"):
    for step in range(13):
      faults.update(host([good, bad], first=2 * step))
      faults.update(filler)
  assert (faults.images, faults.boxes) == (26, 130)
  assert faults.counts[objects.NOT_FINITE] == 13
  assert faults.counts[0] == 26
  messages = [r.getMessage() for r in caplog.records]
  assert messages == [
    "1 of 10 boxes hold what is no finite number: dropped. Such a one is in "
    "image 1.",
    "2 of 10 boxes are more than config.data.objects.max_objects in an image, "
    "of which the largest are kept: dropped. Such a one is in image 1.",
    "10 of 50 boxes are more than config.data.objects.max_objects in an image, "
    "of which the largest are kept: dropped. Such a one is in image 9.",
    "10 of 100 boxes hold what is no finite number: dropped. Such a one is in "
    "image 19.",
  ]


def test_most_boxes_dropped_end_a_run():
  faults = objects.ObjectFaults(str, required=False, patience=40)
  row = [10, 0, 0, 0, 2, 4, 3, 0]  # clipped ones are none of those
  faults.update(host([row] * 3))
  with pytest.raises(
    ValueError, match=r"Of 40 boxes .*, 8 lie outside of .*; 1"
  ):
    faults.update(host([row]))


def test_no_box_in_many_images_ends_training():
  empty = host([[0] * 8] * 8)
  for required in (True, False):
    faults = objects.ObjectFaults(str, required=required, empty=16)
    faults.update(empty)
    if required:
      with pytest.raises(ValueError, match="None of the first 16 images has a"):
        faults.update(empty)
    else:
      faults.update(empty)
