"""Batches on canvases: one choice for all hosts, images whole and in place."""

import dataclasses
import pickle
from typing import ClassVar

import jax
import numpy as np
import pytest

from big_vision_like import api, build, sharding
from big_vision_like.data import ops, pipeline
from big_vision_like.data.objects import ObjectSpec
from big_vision_like.data.packing import PackSpec
from big_vision_like.data.sources import digit_scenes
from configs import vit_i1k

CANVASES = ((32, 64), (64, 32), (64, 64), (96, 96), (64, 96))
SPEC = ObjectSpec(CANVASES, max_objects=4, masks=True)
OPS = "decode|flip_lr|detr_crop((35, 43), 31, 60)|detr_resize((29, 41), 83)"


@dataclasses.dataclass(frozen=True)
class Boxes:
  """Noise whose objects are its left and right half; the fifth is broken."""

  size: int = 53
  hw_is_wrong: bool = False
  labels: tuple[int, int] = (2, 5)
  label_names: ClassVar[tuple[str, ...]] = tuple("abcdefg")

  def __len__(self):
    return self.size

  def hw(self, index):
    if index == 5:
      raise ops.BrokenImage("no header")
    rng = np.random.default_rng(index)
    h, w = rng.integers(25, 90, 2).tolist()
    return h, w + self.hw_is_wrong

  def __getitem__(self, index):
    if index == 7:  # of which only the pixels are broken
      return {"id": index, "image": b"no image", "objects": {}}
    h, w = dataclasses.replace(self, hw_is_wrong=False).hw(index)
    rng = np.random.default_rng([index, 1])
    mask = np.ones((h, w), np.uint8)
    mask[:, w // 2 :] = 2
    return {
      "id": index,
      "label": 99,  # Nobody looks at it.
      "image": rng.integers(1, 256, (h, w, 3)).astype(np.uint8),
      "objects": {
        "boxes": np.array(
          [[0, 0, w // 2, h], [w // 2, 0, w, h]][: index % 3], np.float32
        ).reshape(-1, 4),
        "label": np.array(self.labels, np.int32)[: index % 3],
      },
      "instance_mask": np.where(mask > index % 3, 0, mask).astype(np.uint8),
    }

  def name(self, index):
    return f"boxes/{index}"


def train(source=Boxes(), **kwargs):
  settings = dict(
    ops=OPS,
    objects=SPEC,
    batch_size=4,
    total_steps=30,
    seed=3,
    num_classes=7,
  )
  return pipeline.train_data(source, **settings | kwargs)


def evaluation(source=Boxes(), **kwargs):
  settings = dict(
    ops="decode|detr_resize(37, 90)", objects=SPEC, batch_size=4, num_classes=7
  )
  return pipeline.eval_data(source, **settings | kwargs)


def assert_same(left, right):
  assert left.keys() == right.keys()
  for key in left:
    assert left[key].dtype == right[key].dtype, key
    np.testing.assert_array_equal(left[key], right[key], err_msg=key)


def test_images_lie_top_left_on_the_smallest_canvas_that_holds_them():
  dataset = train()
  seen = set()
  for step in range(30):
    batch = dataset[step]
    there = batch["_mask"]
    h, w = batch["image"].shape[1:3]
    seen.add((h, w))
    sizes = batch["size"]
    assert not sizes[~there].any()
    assert (sizes[there] > 0).all()
    planned = [size for _, size in dataset.placed(step) if size]
    needed = np.max(planned, axis=0)
    holding = [c for c in CANVASES if c[0] >= needed[0] and c[1] >= needed[1]]
    assert h * w == min(a * b for a, b in holding)
    for row, (height, width) in enumerate(sizes):
      assert not batch["image"][row, height:].any()
      assert not batch["image"][row, :, width:].any()
      assert not batch["box_id_map"][row, height:].any()
      # Noise is 1 or more.
      assert (batch["image"][row, :height, :width].max(axis=-1) > 0).all()
  assert len(seen) >= 3
  assert seen <= set(CANVASES)


@pytest.mark.parametrize("open_data", [train, evaluation])
def test_a_window_has_the_same_images_on_smaller_canvases(open_data):
  plain, spec = open_data(), dataclasses.replace(SPEC, window=5)
  sorted_ = open_data(objects=spec)
  assert len(sorted_) == len(plain)
  pixels = lambda batches: sum(x["image"][0, ..., 0].size for x in batches)
  smaller = 0
  for first in range(0, len(plain), 5):
    window = range(first, min(first + 5, len(plain)))
    before, after = ([d[s] for s in window] for d in (plain, sorted_))
    found = [
      sorted(
        (i, *x["size"][row])
        for x in batches
        for row, i in enumerate(x["example_id"])
        if i >= 0
      )
      for batches in (before, after)
    ]
    assert found[0] == found[1]
    assert pixels(after) <= pixels(before)
    smaller += pixels(after) < pixels(before)
  assert smaller
  # Not always from small to large, and the same in any order and process.
  again = pickle.loads(pickle.dumps(sorted_))
  for step in reversed(range(len(sorted_))):
    assert_same(again[step], sorted_[step])
  areas = [x["image"][0].size for x in map(sorted_.__getitem__, range(5))]
  assert areas != sorted(areas)


def test_boxes_and_map_agree_with_each_other():
  checked = 0
  for step in range(12):
    batch = train()[step]
    for row, (h, w) in enumerate(batch["size"]):
      for k, label in enumerate(batch["box_label"][row]):
        cx, cy, bw, bh = batch["boxes"][row, k]
        inside = batch["box_id_map"][row] == k + 1
        if label < 0:
          assert not inside.any()
          assert (cx, cy, bw, bh) == (0, 0, 0, 0)
          continue
        assert label in (2, 5)
        if not inside.any():
          continue  # a sliver of less than half a pixel
        checked += 1
        rows, columns = np.nonzero(inside)
        found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        box = np.array([cx - bw / 2, cy - bh / 2, cx + bw / 2, cy + bh / 2])
        # Each of two resizes rounds an edge, and the second enlarges the first.
        box *= np.array([w, h] * 2)
        np.testing.assert_allclose(box, found, atol=1.2)
  assert checked > 20


def test_batches_have_the_layout_of_the_contract():
  batch = train()[0]
  h, w = batch["image"].shape[1:3]
  assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
    "image": ((4, h, w, 3), "uint8"),
    "size": ((4, 2), "int32"),
    "boxes": ((4, 4, 4), "float32"),
    "box_label": ((4, 4), "int32"),
    "box_id_map": ((4, h, w), "uint8"),
    "_mask": ((4,), "bool"),
    "example_id": ((4,), "int64"),
    "image_hw": ((4, 2), "int32"),
    "broken_id": ((4,), "int64"),
    "object_counts": ((4, 8), "int32"),
  }
  scored = evaluation()[0]
  scores = {"box_crowd", "box_area", "box_pixels", "original_id_map"}
  assert set(scored) - set(batch) == scores
  device = set(pipeline.spec(evaluation()))
  assert device == set(batch) - set(api.HOST_KEYS)
  plain = dataclasses.replace(SPEC, masks=False)
  assert "box_id_map" not in train(objects=plain)[0]


def test_specs_are_the_closed_set():
  dataset = train(parts=(1,), part_count=2)
  shapes = [s["image"].shape for s in pipeline.specs(dataset)]
  assert shapes == [(4, h, w, 3) for h, w in CANVASES]
  # What the run is initialised with is the most that a step can need.
  assert pipeline.spec(dataset)["image"].shape == (4, 96, 96, 3)
  assert pipeline.spec(dataset) == pipeline.spec(train())
  # For the mean cost of a step.
  taken = [dataset[s]["image"].shape[1:3] for s in range(30)]
  shares = [taken.count(canvas) / 30 for canvas in CANVASES]
  np.testing.assert_allclose(pipeline.shares(dataset), shares)


def test_hosts_share_each_batch_and_agree_on_its_canvas():
  whole = train()
  halves = [train(parts=(i,), part_count=2) for i in range(2)]
  for step in range(0, 30, 5):
    parts = [half[step] for half in halves]
    joined = {k: np.concatenate([p[k] for p in parts]) for k in whole[step]}
    assert_same(joined, whole[step])
  whole = evaluation()
  halves = [evaluation(parts=(i,), part_count=2) for i in range(2)]
  assert len(whole) == len(halves[0]) == 14
  for step in (0, 1, 13):
    parts = [half[step] for half in halves]
    joined = {k: np.concatenate([p[k] for p in parts]) for k in whole[step]}
    assert_same(joined, whole[step])


@pytest.mark.parametrize(
  ("workers", "start"), [(0, 6), pytest.param(2, 25, marks=pytest.mark.slow)]
)
def test_any_number_of_workers_and_any_start_agree(workers, start):
  dataset = pickle.loads(pickle.dumps(train()))
  iterator = pipeline.open_iterator(dataset, start=start, workers=workers)
  for step, batch in enumerate(iterator, start):
    assert_same(batch, train()[step])
    assert iterator.get_state() == step + 1
  assert step == 29
  iterator.close()


def test_an_evaluation_is_in_order_and_filled_up():
  dataset = evaluation()
  batches = [dataset[s] for s in range(14)]
  ids = np.concatenate([b["example_id"] for b in batches])
  broken = np.concatenate([b["broken_id"] for b in batches])
  assert ids[ids >= 0].tolist() == [i for i in range(53) if i not in (5, 7)]
  assert broken[broken >= 0].tolist() == [5, 7]
  last = batches[-1]
  assert last["_mask"].tolist() == [True, False, False, False]
  assert not last["size"][1:].any()
  for batch, i in ((batches[0], 2), (batches[3], 2)):
    source = Boxes()[int(batch["example_id"][i])]
    assert batch["image_hw"][i].tolist() == list(source["image"].shape[:2])
    boxes = source["objects"]["boxes"]
    n = len(boxes)
    np.testing.assert_array_equal(batch["box_pixels"][i, :n], boxes)
    assert not batch["box_pixels"][i, n:].any()
    area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    np.testing.assert_array_equal(batch["box_area"][i, :n], area)
    h, w = source["image"].shape[:2]
    whole = batch["original_id_map"][i]
    np.testing.assert_array_equal(whole[:h, :w], source["instance_mask"])
    assert not whole[h:].any()
    assert not whole[:, w:].any()


def test_an_evaluation_has_room_for_all_that_its_source_has():
  """A source that knows its most objects is asked; another is refused."""

  class Knows(Boxes):
    max_objects = 9

  spec = dataclasses.replace(SPEC, max_objects=1)
  assert evaluation(Knows(), objects=spec)[0]["boxes"].shape == (4, 9, 4)
  with pytest.raises(ValueError, match=r"boxes/\d+ has 2 objects, of which an"):
    list(pipeline.open_iterator(evaluation(objects=spec), threads=0))
  # Training keeps the largest, and counts.
  batch = train(objects=spec)[0]
  assert batch["object_counts"][:, -1].sum() > 0


@pytest.mark.parametrize(
  ("make", "settings", "sentence"),
  [
    (
      train,
      dict(ops="decode|detr_resize(97)"),
      r"boxes/\d+ is \d+ x \d+ after the ops, and the largest of config\.data\."
      r"objects\.canvases is 96 x 96",
    ),
    (train, dict(source=Boxes(hw_is_wrong=True)), r"hw\(\) of its source must"),
    (
      train,
      dict(source=Boxes(labels=(2, 7))),
      r"class 7 of an object of boxes/\d+ is outside .* are 7 classes",
    ),
    (train, dict(pack=PackSpec(61, 5, 13)), r"needs data\.pack = None"),
    (train, dict(scales=((32, 32, 4),)), r"needs data\.scales = None"),
    (evaluation, dict(pack=PackSpec(61, 5, 13)), r"needs data\.pack = None"),
    (evaluation, dict(tokens=9), "token budget needs packed rows"),
    (train, dict(part_count=3), "4 is not divisible by the 3 parts"),
  ],
)
def test_refusals(make, settings, sentence):
  with pytest.raises(ValueError, match=sentence):
    list(pipeline.open_iterator(make(**settings), threads=0))


def test_a_config_makes_them():
  c = vit_i1k.get_config()
  with c.unlocked():
    c.batch_size = 8
    c.data.source = dict(
      name="digit_scenes", level="photo_boxes", target="panoptic"
    )
    c.data.ops = "decode|flip_lr|detr_resize((48, 64), 128)"
    c.data.eval_ops = "decode|detr_resize(64, 128)"
    c.data.objects = dict(
      canvases=[[64, 96], [96, 64], [128, 128]], max_objects=5, masks=True
    )
  parts = build.build(c)
  assert parts.task.num_classes == len(digit_scenes.TARGETS["panoptic"])
  batch, host = next(build.EvalBatches(parts, {"limit": 8})())
  assert set(host) >= {"box_crowd", "box_area", "object_counts", "image_hw"}
  assert batch["box_label"].shape == (8, 5)
  ids = jax.device_get(batch["box_id_map"])
  for row, (h, w) in enumerate(batch["size"]):
    # Panoptic: every pixel belongs to a segment.
    assert (ids[row, :h, :w] > 0).all()
  batches = build.EvalBatches(parts, {})
  assert batches.is_thing == (True,) * 10 + (False,) * 14
  other = dataclasses.replace(parts, source=Boxes())
  with pytest.raises(ValueError, match=r"differ in .*, zero: both files"):
    next(build.EvalBatches(other, {"limit": 8})())
  placed = sharding.batch_sharding(parts.mesh)
  device, _ = pipeline.to_device(parts.train_data[0], placed)
  shapes = [s["image"].shape for s in pipeline.specs(parts.train_data)]
  assert device["image"].shape in shapes
