"""COCO files, of which every number is known."""

import json
import pickle
import shutil

import coco_files
import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from big_vision_like.data import (
  coco_json,
  objects,
  ops,
  pipeline,
  segmentations,
)
from big_vision_like.data.sources import coco


@pytest.fixture
def root(tmp_path):
  for split in ("train", "val"):
    coco_files.instances(tmp_path, split)
  return tmp_path


def content_of(root, name="instances_train2017"):
  return json.loads((root / "annotations" / f"{name}.json").read_text())


def rewrite(root, change, name="instances_train2017"):
  """Changes a file that was written."""
  content = content_of(root, name)
  change(content)
  path = root / "annotations" / f"{name}.json"
  path.write_text(json.dumps(content))


def annotation(content, number):
  """The first annotation of an image."""
  id = content["images"][number]["id"]
  return next(a for a in content["annotations"] if a["image_id"] == id)


def place(number, count=8):
  """The index of an image: ids fall while numbers rise."""
  return count - 1 - number


def test_examples_are_what_pycocotools_reads(root):
  source = coco.Source("train", root)
  api = COCO(root / "annotations" / "instances_train2017.json")
  assert len(source) == 8
  assert source.label_names == ("ant", "bee", "cat")
  assert source.category_ids == (3, 17, 90)
  assert source.is_thing is None
  broken = place(coco_files.BROKEN)
  for i, id in enumerate(sorted(api.getImgIds())):
    image = api.loadImgs(id)[0]
    assert source.image_ids[i] == id
    assert source.name(i) == str(root / "train2017" / image["file_name"])
    assert source.hw(i) == (image["height"], image["width"])
    example = source[i]
    assert ops.decode(example["image"]).shape[:2] == source.hw(i)
    assert "label" not in example
    wanted = api.loadAnns(api.getAnnIds(id))
    if i == broken:
      wanted.pop(-2)
    found = example["objects"]
    assert len(found["boxes"]) == len(wanted)
    for k, a in enumerate(wanted):
      x, y, w, h = a["bbox"]
      box = np.maximum([x, y, x + w, y + h], 0)  # one overhangs
      np.testing.assert_array_equal(found["boxes"][k], box)
      assert source.category_ids[found["label"][k]] == a["category_id"]
      assert found["area"][k] == np.float32(a["area"])
      assert found["is_crowd"][k] == a.get("iscrowd", 0)
  assert len(source[place(coco_files.EMPTY)]["objects"]["boxes"]) == 0
  assert source[place(coco_files.CROWD)]["objects"]["is_crowd"].sum() == 1


def test_raw_ids_fit_published_heads(root):
  source = coco.Source("train", root, raw_ids=True)
  plain = coco.Source("train", root)
  assert len(source.label_names) == 91
  assert [source.label_names[i] for i in (3, 4, 90)] == ["ant", "(id 4)", "cat"]
  for i in range(8):
    ids = np.array(plain.category_ids)[plain[i]["objects"]["label"]]
    np.testing.assert_array_equal(source[i]["objects"]["label"], ids)


def test_broken_boxes_are_named_and_dropped_or_clipped(root, caplog):
  coco._warn_once.cache_clear()
  with caplog.at_level("WARNING", logger="absl"):
    for _ in range(2):
      coco.Source("train", root)
  (message,) = [r.getMessage() for r in caplog.records]
  ids = [a["id"] for a in content_of(root)["annotations"]]
  assert "1 are inverted, with a negative width or height: dropped" in message
  assert "1 reach more than a pixel beyond their image: clipped" in message
  numbers = [int(n.split()[0]) for n in message.split("(annotation ")[1:]]
  assert set(numbers) <= set(ids)
  assert message.count("0004.png") == 2
  assert coco.Source("train", root).faults == (message,)


@pytest.mark.parametrize(
  ("box", "what"),
  [
    ([float("nan"), 2, 9, 9], "hold what is no finite number"),
    ([1, 2, float("inf"), 9], "hold what is no finite number"),
    ([1, 2, 9], "hold what is no finite number"),
    (None, "hold what is no finite number"),
    (["1", 2, 9, 9], "hold what is no finite number"),
    ([9, 9, -3, 4], "are inverted"),
    ([9, 9, 0, 4], "are empty"),
    ([1000, 9, 5, 5], "lie outside of their image"),
    ([0.1, 0.2, 0.5, 0.7], "lie within the first pixel"),
  ],
)
def test_what_is_no_box_is_dropped(root, box, what, caplog):
  def change(content):
    annotation(content, 0)["bbox"] = box

  whole = coco.Source("train", root)
  rewrite(root, change)
  with caplog.at_level("WARNING", logger="absl"):
    source = coco.Source("train", root)
  assert f"1 {what}" in caplog.text
  assert "0000.png" in caplog.text
  last = place(0)
  before, after = whole[last]["objects"], source[last]["objects"]
  np.testing.assert_array_equal(before["boxes"][1:], after["boxes"])


def test_boxes_overhang_by_a_pixel_without_a_word(root, caplog):
  def change(content):
    content["annotations"] = [annotation(content, 0)]
    content["annotations"][0]["bbox"] = [-0.6, 3, 9, 9]

  rewrite(root, change)
  with caplog.at_level("WARNING", logger="absl"):
    source = coco.Source("train", root)
  assert not caplog.records
  boxes = source[place(0)]["objects"]["boxes"]
  np.testing.assert_array_equal(boxes, np.float32([[0, 3, 8.4, 12]]))


def test_masks_are_those_of_pycocotools(root):
  source = coco.Source("train", root, masks=True)
  api = COCO(root / "annotations" / "instances_train2017.json")
  for i, id in enumerate(source.image_ids):
    example = source[i]
    wanted = np.zeros(source.hw(i), int)
    kept = [
      a for a in api.loadAnns(api.getAnnIds(id)) if min(a["bbox"][2:]) > 0
    ]
    # The smallest is on top.
    for k in np.argsort([-a["area"] for a in kept], kind="stable"):
      wanted[api.annToMask(kept[k]) > 0] = k + 1
    np.testing.assert_array_equal(example["instance_mask"], wanted)
  assert "instance_mask" not in coco.Source("train", root)[0]


def test_masks_of_every_form(root):
  h, w = 60, 70
  inside = np.zeros((h, w), np.uint8)
  inside[10:20, 30:50] = 1
  rle = coco_mask.encode(np.asfortranarray(inside))
  compressed = {"size": [h, w], "counts": rle["counts"].decode()}
  flat = np.flatnonzero(np.diff(np.pad(inside.T.ravel(), 1)))
  counts = np.diff([0, *flat, h * w]).tolist()
  polygon = [[30, 10, 50, 10, 50, 20, 30, 20], [0, 0, 1, 1]]

  for form in (compressed, {"size": [h, w], "counts": counts}, polygon):
    encoded = segmentations.encode(form, (h, w))
    np.testing.assert_array_equal(segmentations.decode(encoded, h, w), inside)
  for nothing in (
    None,
    [],
    [[1, 2, 3, 4]],
    [[1, 2, 3, 4, 5, float("nan")]],
    {"size": [w, h], "counts": counts},
    {"size": [h, w], "counts": counts[:-1]},
    {"size": [h, w], "counts": [-1, *counts, 1]},
    {"size": [h, w]},
    {"size": [h, w], "counts": "~~~"},
    {"size": [h, w], "counts": ""},
    "x",
  ):
    assert segmentations.encode(nothing, (h, w)) == b""


def test_compressed_runs_are_those_of_pycocotools():
  rng = np.random.default_rng(0)
  for _ in range(50):
    h, w = rng.integers(1, 90, 2).tolist()
    mask = (rng.random((h, w)) < rng.choice([0, 0.01, 0.5, 1])).astype(np.uint8)
    rle = coco_mask.encode(np.asfortranarray(mask))
    text = rle["counts"].decode()
    form = {"size": [h, w], "counts": text}
    encoded = segmentations.encode(form, (h, w))
    np.testing.assert_array_equal(segmentations.decode(encoded, h, w), mask)
    # What is cut would be memory as it was.
    if len(text) > 1:
      form["counts"] = text[:-1]
      assert segmentations.encode(form, (h, w)) == b""


def test_an_object_without_a_mask_is_dropped_where_masks_are_read(root, caplog):
  def change(content):
    annotation(content, 0).pop("segmentation")

  rewrite(root, change)
  with caplog.at_level("WARNING", logger="absl"):
    source = coco.Source("train", root, masks=True)
  assert "1 have no segmentation that fits their image: dropped" in caplog.text
  plain = coco.Source("train", root)
  counts = [len(s[place(0)]["objects"]["boxes"]) for s in (plain, source)]
  assert counts[0] == counts[1] + 1


def test_panoptic_segments(root):
  content = coco_files.panoptic(root)
  source = coco.Source("train", root, panoptic=True, masks=True, holdout=0)
  names = ("ant", "bee", "cat", "sky", "sea")
  assert source.label_names == names
  assert source.is_thing == (True, True, True, False, False)
  assert len(source) == 5
  for a in content["annotations"]:
    i = int(np.flatnonzero(source.image_ids == a["image_id"])[0])
    example = source[i]
    mask, found = example["instance_mask"], example["objects"]
    assert len(found["label"]) == len(a["segments_info"])
    assert mask.min() > 0
    for k, segment in enumerate(a["segments_info"]):
      assert source.category_ids[found["label"][k]] == segment["category_id"]
      rows, columns = np.nonzero(mask == k + 1)
      box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
      np.testing.assert_array_equal(found["boxes"][k], box)
      assert len(rows) == segment["area"]
  boxes = coco.Source("train", root, panoptic=True, holdout=0)
  shutil.rmtree(root / "annotations" / "panoptic_train2017")
  assert "instance_mask" not in boxes[0]
  with pytest.raises(ValueError, match="Cannot find the segments' PNGs"):
    coco.Source("train", root, panoptic=True, masks=True)


LAYOUTS = {
  "coco": ("annotations/instances_train2017.json", "train2017"),
  "annotations": ("annotations/train.json", "images/train"),
  "flat": ("train.json", "images"),
  "roboflow": ("train/_annotations.coco.json", "train"),
  "beside": ("train.json", "."),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_of_ones_own_are_found(root, tmp_path, layout):
  file, images = LAYOUTS[layout]
  new = tmp_path / "own"
  for split, name in (("train", "train"), ("val", "valid")):
    to = new / file.replace("train", name)
    if layout == "coco":
      to = new / file.replace("train", split)
    folder = new / images.replace("train", split if layout == "coco" else name)
    shutil.copytree(root / f"{split}2017", folder, dirs_exist_ok=True)
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(root / "annotations" / f"instances_{split}2017.json", to)
  for split in coco_json.SPLITS:
    source = coco.Source(split, new)
    assert len(source) == 8
    assert source[0]["image"]
    assert ("train" in source.file.name + source.file.parent.name) == (
      split == "train"
    )


def test_files_may_have_any_name(root):
  (root / "annotations" / "instances_val2017.json").rename(root / "b.json")
  source = coco.Source(
    "validation", root, validation="b.json", images="val2017"
  )
  assert source.file == root / "b.json"
  assert source.root == root / "val2017"


def test_one_file_is_held_out_of(root):
  file = root / "train2017" / "own.json"
  shutil.copy(root / "annotations" / "instances_train2017.json", file)
  whole = {coco.Source("train", file, holdout=0).name(i) for i in range(8)}
  parts = [coco.Source(s, file, holdout=0.4) for s in coco_json.SPLITS]
  names = [{p.name(i) for i in range(len(p))} for p in parts]
  assert names[0] | names[1] == whole
  assert not names[0] & names[1]
  assert names[1]
  with pytest.raises(ValueError, match="no image for the split 'validation'"):
    coco.Source("validation", file, holdout=0)


def test_the_table_of_classes_is_told(root):
  notes = coco.Source("train", root).notes
  assert "8 images, 1 of them without a box" in " ".join(notes)
  assert "1 of them crowds, at most" in " ".join(notes)
  assert notes[-1] == "3 classes: 0 ant (id 3), 1 bee (id 17), 2 cat (id 90)"


def _category(content):
  annotation(content, 1)["category_id"] = 5


def _twice(key):
  def change(content):
    content[key].append(content[key][0])

  return change


def _fractions(content):
  for a in content["annotations"]:
    a["bbox"] = [0.1, 0.25, 0.5, 0.5]


def _corners(content):
  """(x0, y0, x1, y1), where width and height should be."""
  first = content["annotations"][0]
  first["bbox"] = [40, 40, 60, 60]
  content["annotations"] = [{**first, "id": i} for i in range(101)]


@pytest.mark.parametrize(
  ("change", "sentence"),
  [
    (
      _category,
      r"annotation \d+ of train0001.png has the category 5, which .* 3, 1",
    ),
    (_twice("images"), "has several images with the id 1000"),
    (_twice("categories"), "has several categories with the id 90"),
    (_twice("annotations"), "has several annotations with the id 3"),
    (
      _fractions,
      r"fractions where pixels .* boxes are \(x, y, width, height\)",
    ),
    (_corners, r"beyond their image: clipped .* boxes are \(x, y, width, heig"),
    (lambda c: c.pop("categories"), r"not COCO's: it needs .*'categories'"),
    (lambda c: c.update(categories=[]), "has no categories"),
    (lambda c: c["images"][0].pop("id"), "has no id or no file_name"),
    (lambda c: c["images"][0].pop("width"), "the height .* and the width None"),
    (lambda c: c.update(images=[]), "no image for the split 'train'"),
    (
      lambda c: c["annotations"][0].update(segments_info=[]),
      r"has segments: set config\.data\.source\.panoptic=True",
    ),
  ],
)
def test_what_can_only_be_a_mistake_is_refused(root, change, sentence):
  rewrite(root, change)
  with pytest.raises(ValueError, match=sentence):
    coco.Source("train", root)


def test_refusals(root, tmp_path):
  for arguments, sentence in (
    (dict(split="test"), "Unknown split 'test' of COCO.*: train, validation"),
    (dict(holdout=1), "holdout is a share"),
    (
      dict(path=tmp_path / "no"),
      "no, where COCO's annotations should be, is mi",
    ),
    (
      dict(path=root / "train2017"),
      "has no train annotations: no annotations/i",
    ),
    (dict(validation="x.json"), "has no validation annotations: no x.json"),
    (dict(images="annotations"), "Cannot find the images: train00"),
    (
      dict(panoptic=True),
      "has no train annotations: no annotations/panoptic_t",
    ),
  ):
    with pytest.raises(ValueError, match=sentence):
      coco.Source(**dict(split="train", path=root) | arguments)
  file = root / "annotations" / "instances_train2017.json"
  with pytest.raises(ValueError, match="Give the folder of the files"):
    coco.Source("train", file, train="x.json")
  rewrite(root, lambda c: c["categories"].append({"id": -1, "name": "elk"}))
  with pytest.raises(ValueError, match=r"needs whole numbers .* -1, 3, 17, 90"):
    coco.Source("train", root, raw_ids=True)
  (root / "x.json").write_text("{")
  with pytest.raises(ValueError, match=r"x\.json is not JSON"):
    coco.Source("train", root / "x.json")


def test_annotations_of_other_images_are_counted(root, caplog):
  def change(content):
    annotation(content, 1)["image_id"] = 4711

  rewrite(root, change)
  with caplog.at_level("WARNING", logger="absl"):
    coco.Source("train", root)
  assert "1 belong to images that are not listed: dropped" in caplog.text
  assert "of image 4711" in caplog.text


def test_files_that_are_missing_or_of_another_size_are_broken_images(root):
  (root / "train2017" / "train0007.png").unlink()
  turned = root / "train2017" / "train0006.png"
  h, w = cv2.imread(str(turned)).shape[:2]
  cv2.imwrite(str(turned), np.zeros((h + 1, w, 3), np.uint8))
  source = coco.Source("train", root)
  with pytest.raises(ops.BrokenImage, match="No such file"):
    source[0]
  with pytest.raises(
    ops.BrokenImage, match=rf"is {h + 1} x {w}, .* says {h} x"
  ):
    source[1]
  with pytest.raises(IndexError, match="Image 8 of the 8 of"):
    source[8]


def test_pickles_to_columns(root):
  def change(content):
    first = content["annotations"][0]
    more = [{**first, "id": -i} for i in range(1, 3001)]
    content["annotations"] += more

  small = len(pickle.dumps(coco.Source("train", root)))
  rewrite(root, change)
  source = coco.Source("train", root)
  assert len(pickle.dumps(source)) - small < 3000 * 30
  copy = pickle.loads(pickle.dumps(source))
  np.testing.assert_array_equal(
    copy[3]["objects"]["boxes"], source[3]["objects"]["boxes"]
  )


SPEC = objects.ObjectSpec(canvases=((64, 96), (128, 128)), max_objects=7)


def test_a_file_of_everything_trains_and_evaluates(root):
  """Batches, up to the ones of a broken image."""
  whole = (root / "train2017" / "train0001.png").read_bytes()
  (root / "train2017" / "train0001.png").write_bytes(whole[:-200])
  source = coco.Source("train", root)
  settings = dict(objects=SPEC, batch_size=8, num_classes=3)
  batch = pipeline.train_data(
    source, ops="decode|flip_lr", total_steps=1, seed=0, **settings
  )[0]
  rows = {int(i): row for row, i in enumerate(batch["example_id"]) if i >= 0}
  assert len(rows) == 7
  assert batch["broken_id"].max() == place(1)
  assert (batch["box_label"][rows[place(coco_files.EMPTY)]] == -1).all()
  for i, row in rows.items():
    found = source[i]["objects"]
    wanted = found["label"][~found["is_crowd"]]
    there = batch["box_label"][row] >= 0
    np.testing.assert_array_equal(batch["box_label"][row][there], wanted)
  scored = pipeline.eval_data(source, ops="decode", **settings)[0]
  crowd = place(coco_files.CROWD)
  assert scored["box_crowd"].sum() == scored["box_crowd"][crowd].sum() == 1
  n = len(source[crowd]["objects"]["area"])
  np.testing.assert_array_equal(
    scored["box_area"][crowd, :n], source[crowd]["objects"]["area"]
  )
  # Another file is another data set.
  other = coco.Source("validation", root)
  assert pipeline.fingerprint(source) != pipeline.fingerprint(other)


def test_fingerprints_see_boxes(root):
  def change(content):
    annotation(content, 0)["bbox"][2] -= 1

  before = pipeline.fingerprint(coco.Source("train", root))
  rewrite(root, change)
  assert pipeline.fingerprint(coco.Source("train", root)) != before
