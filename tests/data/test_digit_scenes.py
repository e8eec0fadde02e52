"""The embedded scenes: targets that agree with pixels, splits that do not."""

import concurrent.futures
import dataclasses
import hashlib
import pickle
import subprocess
import sys

import numpy as np
import pytest
import skimage.data
import sklearn.datasets

from big_vision_like.data.sources import digit_scenes
from big_vision_like.data.sources.digit_scenes import Source

LEVELS = tuple(digit_scenes.LEVELS)
SPLITS = ("train", "validation")


def assert_same(a, b):
  assert a.keys() == b.keys()
  for key in a:
    if isinstance(a[key], dict):
      assert_same(a[key], b[key])
    else:
      np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.parametrize("level", LEVELS)
def test_shapes_and_types(level):
  source = Source("train", level=level)
  lowest, highest = digit_scenes.LEVELS[level].digits
  counts = set()
  for i in range(60):
    example = source[i]
    h, w = source.hw(i)
    count = len(example["objects"]["label"])
    counts.add(count)
    assert example["id"] == i
    for key, shape, dtype in (
      ("image", (h, w, 3), np.uint8),
      ("multi_label", (10,), np.uint8),
      ("instance_mask", (h, w), np.uint8),
      ("semantic_mask", (h, w), np.uint8),
    ):
      assert example[key].shape == shape
      assert example[key].dtype == dtype
    for key, shape, dtype in (
      ("boxes", (count, 4), np.float32),
      ("label", (count,), np.int32),
      ("color", (count,), np.int32),
    ):
      assert example["objects"][key].shape == shape
      assert example["objects"][key].dtype == dtype
    assert type(example["label"]) is int
  assert counts == set(range(lowest, highest + 1))


@pytest.mark.parametrize("level", LEVELS)
def test_targets_agree_with_each_other(level):
  source = Source("validation", level=level)
  for i in range(60):
    example = source[i]
    objects, mask = example["objects"], example["instance_mask"]
    for k, box in enumerate(objects["boxes"], start=1):
      rows = np.flatnonzero((mask == k).any(axis=1))
      cols = np.flatnonzero((mask == k).any(axis=0))
      np.testing.assert_array_equal(
        box, [cols[0], rows[0], cols[-1] + 1, rows[-1] + 1]
      )
    assert mask.max() == len(objects["boxes"]) > 0
    classes = np.concatenate([[0], objects["label"] + 1])
    np.testing.assert_array_equal(example["semantic_mask"], classes[mask])
    assert set(np.flatnonzero(example["multi_label"])) == set(objects["label"])
    x0, y0, x1, y1 = objects["boxes"].T
    largest = np.argmax((x1 - x0) * (y1 - y0))
    assert example["label"] == objects["label"][largest]
    first = example["caption"].split(" and ")[0].split()
    assert first[0] == "a"
    assert first[1] in ("large", "small")
    assert first[2] == list(digit_scenes.COLORS)[objects["color"][largest]]
    assert first[3] == source.label_names[example["label"]]


@pytest.mark.parametrize("target", ["digit", "color", "background"])
def test_a_target_changes_the_labels_alone(target):
  plain = Source("validation", level="photo_multi")
  source = Source("validation", level="photo_multi", target=target)
  words = [p[2] for p in digit_scenes.PHOTOS]
  for i in range(20):
    want, got = plain[i], source[i]
    boxes = want["objects"]["boxes"]
    truth = {
      "digit": want["objects"]["label"],
      "color": want["objects"]["color"],
      "background": [words.index(want["caption"].partition(" on ")[2])]
      * len(boxes),
    }[target]
    x0, y0, x1, y1 = boxes.T
    assert got["label"] == truth[np.argmax((x1 - x0) * (y1 - y0))]
    assert got["multi_label"].shape == (len(source.label_names),)
    assert set(np.flatnonzero(got["multi_label"])) == set(truth)
    for key in ("label", "multi_label"):
      del want[key], got[key]
    assert_same(want, got)


def test_panoptic_scenes_have_their_photograph_as_the_last_object():
  plain = Source("validation", level="photo_boxes")
  source = Source("validation", level="photo_boxes", target="panoptic")
  names = source.label_names
  words = [p[2] for p in digit_scenes.PHOTOS]
  assert source.is_thing == (True,) * 10 + (False,) * len(words)
  assert plain.is_thing is None
  assert (plain.max_objects, source.max_objects) == (3, 4)
  for i in range(30):
    want, got = plain[i], source[i]
    count, found = len(want["objects"]["label"]), got["objects"]
    for key in ("image", "label", "caption"):
      np.testing.assert_array_equal(want[key], got[key])
    for key in ("boxes", "label", "color"):
      np.testing.assert_array_equal(found[key][:-1], want["objects"][key])
    photo = want["caption"].partition(" on ")[2]
    assert found["label"].dtype == np.int32
    assert found["label"][-1] == 10 + words.index(photo)
    assert names[found["label"][-1]] in photo
    mask = want["instance_mask"]
    rest = np.where(mask == 0, count + 1, mask)
    np.testing.assert_array_equal(got["instance_mask"], rest)
    rows, columns = np.nonzero(mask == 0)
    box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    np.testing.assert_array_equal(found["boxes"][-1], box)
    classes = np.concatenate([[0], found["label"] + 1])
    np.testing.assert_array_equal(got["semantic_mask"], classes[rest])
    assert set(np.flatnonzero(got["multi_label"])) == set(found["label"])


def test_labels_have_names():
  names = {
    t: Source("train", "photo", t).label_names for t in ("digit", "color")
  }
  assert names["digit"][3] == "three"
  assert names["color"] == tuple(digit_scenes.COLORS)
  backgrounds = Source("train", level="photo", target="background").label_names
  assert len(set(backgrounds)) == len(digit_scenes.PHOTOS)
  assert backgrounds[:5] == (
    "astronaut",
    "cat",
    "cup of coffee",
    "rocket",
    "galaxies",
  )


def test_digits_have_the_colour_that_is_said():
  colors = np.array(list(digit_scenes.COLORS.values()))
  source = Source("train", level="photo_multi")
  for i in range(20):
    example = source[i]
    for k, color in enumerate(example["objects"]["color"], start=1):
      inside = example["image"][example["instance_mask"] == k]
      # Strokes are opaque in their middle, so that most colour comes near.
      distance = np.abs(inside - colors[color]).max(axis=1)
      assert distance.min() <= 40, (i, k)


def test_digits_are_those_of_their_class():
  # The digits themselves tell: the rendered strokes match the class's bitmap
  # mean better than most others'.
  digits = sklearn.datasets.load_digits()
  means = np.stack(
    [digits.images[digits.target == c].mean(axis=0) for c in range(10)]
  ).reshape(10, -1)
  source = Source("validation", level="plain")
  hits = 0
  for i in range(200):
    example = source[i]
    x0, y0, x1, y1 = example["objects"]["boxes"][0].astype(int)
    crop = example["image"].astype(np.float32).max(axis=-1)
    crop = crop - crop[0, 0]
    rows = np.linspace(y0, y1 - 1, 8).round().astype(int)
    cols = np.linspace(x0, x1 - 1, 8).round().astype(int)
    values = crop[np.ix_(rows, cols)].ravel()
    scores = [np.corrcoef(values, m)[0, 1] for m in means]
    hits += int(np.argmax(scores)) == example["label"]
  assert hits > 100  # chance is 20


def test_glyphs_and_photos_are_those_of_the_packages():
  digits = sklearn.datasets.load_digits()
  glyphs, classes = digit_scenes._glyphs()
  np.testing.assert_array_equal(classes, digits.target)
  # The average over a bitmap's pixel, with the margin of half a pixel off.
  small = glyphs[:, 4:-4, 4:-4].reshape(-1, 8, 8, 8, 8).mean(axis=(2, 4))
  for a, b in zip(small[:50], digits.images[:50], strict=True):
    assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.95
  photos = dict(
    zip(
      (p[1] for p in digit_scenes.PHOTOS), digit_scenes._photos(), strict=True
    )
  )
  np.testing.assert_array_equal(
    photos["data/astronaut.png"], skimage.data.astronaut()
  )
  np.testing.assert_array_equal(
    photos["data/rocket.jpg"], skimage.data.rocket()
  )
  np.testing.assert_array_equal(
    photos["data/camera.png"][..., 1], skimage.data.camera()
  )
  np.testing.assert_array_equal(
    photos["datasets/images/china.jpg"],
    sklearn.datasets.load_sample_image("china.jpg"),
  )


@pytest.mark.parametrize("level", LEVELS)
def test_hw_and_its_ranges(level):
  source = Source("train", level=level)
  row = digit_scenes.LEVELS[level]
  h, w = np.array([source.hw(i) for i in range(400)]).T
  side, aspect = np.sqrt(h * w), w / h
  # Sides are rounded to whole pixels.
  assert row.side[0] - 1 < side.min() < side.max() < row.side[1] + 1
  assert side.min() < row.side[0] * 1.1
  assert side.max() > row.side[1] * 0.9
  assert aspect.max() < row.aspect * 1.05
  assert aspect.max() > row.aspect * 0.9
  assert aspect.min() < 1.1 / row.aspect
  assert abs(np.log(aspect).mean()) < 0.1


def test_plain_scenes_are_what_a_small_model_learns_on():
  source = Source("train", level="plain")
  for i in range(100):
    example = source[i]
    h, w = example["image"].shape[:2]
    assert 24 <= min(h, w)
    assert max(h, w) <= 48
    box = example["objects"]["boxes"][0]
    assert box[3] - box[1] > 0.5 * min(h, w)
    background = example["image"][example["instance_mask"] == 0]
    digit = example["image"][example["instance_mask"] == 1]
    # Half-transparent edges count to either side.
    assert np.median(digit, axis=0).max() > np.median(background) + 100


def test_every_class_is_equally_likely():
  source = Source("train", level="plain")
  counts = np.bincount([source[i]["label"] for i in range(1000)])
  assert len(counts) == 10
  assert counts.min() > 65  # four standard deviations below 100
  assert counts.max() < 140


@pytest.mark.parametrize("split", SPLITS)
def test_digits_and_photo_regions_are_held_out(split, monkeypatch):
  # Digits of training are zeros and those held out ones; photographs are dark
  # on the left, where training looks, and light on the right.
  glyphs, _ = digit_scenes._glyphs()
  classes = (np.arange(1797) >= 1300).astype(np.int32)
  photo = np.full((400, 600, 3), 50, np.uint8)
  photo[:, 450:] = 210
  photos = (photo,) * len(digit_scenes.PHOTOS)
  monkeypatch.setattr(digit_scenes, "_glyphs", lambda: (glyphs, classes))
  monkeypatch.setattr(digit_scenes, "_photos", lambda: photos)
  source = Source(split, level="photo_multi")
  held_out = split == "validation"
  for i in range(60):
    example = source[i]
    assert set(example["objects"]["label"]) == {int(held_out)}
    # Brightness varies: 50 becomes at most 85, and 210 at least 106.
    assert (np.median(example["image"][:3], axis=(0, 1)) > 95).all() == held_out


def test_examples_depend_on_seed_split_and_index_alone():
  source = Source("train", level="photo_multi", seed=3)
  first = [source[i] for i in (5, 2, 11)]
  for i, example in zip((5, 2, 11), first, strict=True):
    assert_same(
      Source("train", level="photo_multi", seed=3, size=50)[i], example
    )
  others = [
    Source("train", level="photo_multi", seed=4),
    Source("validation", level="photo_multi", seed=3),
  ]
  for other in others:
    assert other.hw(5) != source.hw(5)
  assert len({source.hw(i) for i in range(50)}) > 40


def test_another_process_renders_the_same():
  source = Source("validation", level="photo_multi", seed=7)
  script = (
    "import hashlib, pickle, sys\n"
    "source = pickle.loads(sys.stdin.buffer.read())\n"
    "image = source[12]['image']\n"
    "print(hashlib.sha256(image.tobytes()).hexdigest())\n"
    "print('sklearn' in sys.modules, 'skimage' in sys.modules)\n"
  )
  out = subprocess.run(
    [sys.executable, "-c", script],
    input=pickle.dumps(source),
    capture_output=True,
    check=True,
  ).stdout.decode()
  expected = hashlib.sha256(source[12]["image"].tobytes()).hexdigest()
  # The packages are read, not imported: workers stay small and start fast.
  assert out.split() == [expected, "False", "False"]


def test_threads_render_the_same():
  source = Source("train", level="photo_multi")
  digit_scenes._glyphs.cache_clear()
  digit_scenes._photos.cache_clear()
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    threaded = list(pool.map(source.__getitem__, range(24)))
  for i, example in enumerate(threaded):
    assert_same(example, source[i])


def test_pickles_small():
  Source("train")[0]
  assert len(pickle.dumps(Source("train", level="photo_multi"))) < 300


def test_examples_may_be_written_to():
  source = Source("train", level="photo")
  example = source[0]
  example["image"][:] = 0
  example["instance_mask"][:] = 0
  assert source[0]["image"].any()
  assert source[0]["instance_mask"].any()


def test_a_scene_without_room_still_has_a_digit(monkeypatch):
  # Six digits as large as the image: only the first finds a place.
  level = dataclasses.replace(
    digit_scenes.LEVELS["plain"], digits=(6, 6), digit=(1, 1), side=(7, 13)
  )
  monkeypatch.setitem(digit_scenes.LEVELS, "plain", level)
  source = Source("train", level="plain")
  counts = [len(source[i]["objects"]["label"]) for i in range(50)]
  assert min(counts) >= 1
  assert max(counts) < 6


def test_len_and_names():
  assert len(Source("train")) == 100_000
  assert len(Source("validation")) == 2_000
  source = Source("train", size=17)
  assert len(source) == 17
  assert source.name(16) == "digit_scenes/train/16"
  assert source.label_names[3] == "three"
  for index in (-1, 17):
    with pytest.raises(IndexError, match=f"digit_scenes/train/{index} of 17"):
      source[index]
  assert source[np.int64(3)]["id"] == 3


@pytest.mark.parametrize(
  ("settings", "sentence"),
  [
    ({"split": "test"}, "Unknown split 'test'.*: train, validation"),
    (
      {"level": "hard"},
      "Unknown level 'hard'.*: plain, plain_multi, photo, photo_boxes, photo_m",
    ),
    (
      {"target": "shape"},
      "Unknown target 'shape'.*: digit, color, background",
    ),
    (
      {"target": "background"},
      "The level 'plain' of digit_scenes has plain backgrounds",
    ),
    ({"size": 0}, "size of at least 1.*got size=0"),
    ({"seed": -1}, "seed of at least 0; got size=None, seed=-1"),
  ],
)
def test_refusals(settings, sentence):
  with pytest.raises(ValueError, match=sentence):
    Source(**settings)


def test_a_package_without_its_pictures_is_named():
  with pytest.raises(
    ValueError, match=r"digits\.csv\.gz from .*'no_such_package'"
  ):
    digit_scenes._wheel_file("no_such_package", "datasets/data/digits.csv.gz")
  with pytest.raises(ValueError, match=r"data/moved\.png from .*'skimage'"):
    digit_scenes._wheel_file("skimage", "data/moved.png")
