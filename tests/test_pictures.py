"""What the pictures show, read from the figures before they become pixels."""

import json

import numpy as np
import pytest
from matplotlib import colors, image

from big_vision_like import pictures

P, L, M = 3, 41, 5
GRIDS = {0: [(4, 5), (1, 7), (2, 3)], 1: [(5, 1)], 2: []}


@pytest.fixture
def figures(monkeypatch):
  """The figures that were saved, still with their axes."""
  saved, save = [], pictures.save_figure

  def remember(figure, path):
    saved.append(figure)
    save(figure, path)

  monkeypatch.setattr(pictures, "save_figure", remember)
  return saved


def packed_batch(*, drop=()):
  """Three rows of images that count their pixels; `drop`ped tokens are gone.

  `drop` holds (row, slot, token of the image).
  """
  rows = len(GRIDS)
  batch = {
    "patches": np.zeros((rows, L, 3 * P * P), np.uint8),
    "segment_ids": np.zeros((rows, L), np.int32),
    "positions": np.zeros((rows, L, 2), np.int32),
    "grid_hw": np.zeros((rows, M, 2), np.int32),
    "example_mask": np.zeros((rows, M), bool),
    "label": np.full((rows, M), -1, np.int32),
  }
  images = {}
  rng = np.random.default_rng(0)
  for row, grids in GRIDS.items():
    at = 0
    for slot, (h, w) in enumerate(grids):
      pixels = rng.integers(0, 256, (h * P, w * P, 3)).astype(np.uint8)
      images[row, slot] = pixels
      batch["grid_hw"][row, slot] = h, w
      batch["example_mask"][row, slot] = True
      batch["label"][row, slot] = slot + 3
      for token in range(h * w):
        if (row, slot, token) in drop:
          continue
        i, j = divmod(token, w)
        patch = pixels[i * P : i * P + P, j * P : j * P + P]
        batch["patches"][row, at] = patch.ravel()
        batch["segment_ids"][row, at] = slot + 1
        batch["positions"][row, at] = i, j
        at += 1
  return batch, images


def is_picture(path):
  return image.imread(path)[..., :3].std() > 0.01


def test_an_unpacked_image_is_the_image():
  batch, images = packed_batch()
  zoom = 24 // P
  for (row, slot), pixels in images.items():
    expected = pixels.repeat(zoom, 0).repeat(zoom, 1)
    np.testing.assert_array_equal(pictures._unpack(batch, row, slot), expected)


def test_dropped_patches_are_hatched_and_the_others_stay_in_place():
  batch, images = packed_batch(drop={(0, 0, 0), (0, 0, 7), (0, 0, 19)})
  zoom = 24 // P
  drawn = pictures._unpack(batch, 0, 0)
  expected = images[0, 0].repeat(zoom, 0).repeat(zoom, 1)
  same = (drawn == expected).all(-1)
  patches = same.reshape(4, 24, 5, 24).transpose(0, 2, 1, 3)
  whole = patches.all((2, 3)).ravel()
  assert np.flatnonzero(~whole).tolist() == [0, 7, 19]
  hatched = drawn[24:48, 48:72]  # token 7 of a grid 5 wide
  assert set(np.unique(hatched)) == {150, 235}


def test_packed_rows_show_images_labels_frames_and_the_strip(figures, tmp_path):
  batch, _ = packed_batch(drop={(0, 1, 2), (0, 1, 5)})
  names = [f"class {i}" for i in range(9)]
  pictures.packed_rows(batch, tmp_path / "a" / "rows.png", names=names)
  assert is_picture(tmp_path / "a" / "rows.png")
  axes = figures[0].axes
  assert [a.get_title(loc="left") for a in axes[::2]] == [
    "row 0: 3 images in 31 of 41 tokens, 75.6% full",
    "row 1: 1 image in 5 of 41 tokens, 12.2% full",
    "row 2: 0 images in 0 of 41 tokens, 0.0% full",
  ]
  labels = [t.get_text() for t in axes[0].texts]
  assert labels == ["class 3", "class 4", "class 5"]
  assert len(axes[0].images) == 3
  frames = [line.get_color() for line in axes[0].lines]
  assert frames == list(pictures._COLOURS[:3])
  strip = axes[1].images[0].get_array()[0]
  expected = np.ones((L, 3))
  for i, (start, stop) in enumerate(((0, 20), (20, 25), (25, 31))):
    expected[start:stop] = colors.to_rgb(pictures._COLOURS[i])
  np.testing.assert_allclose(strip, expected)


def test_images_stand_over_their_tokens_and_never_overlap():
  batch, _ = packed_batch()
  tiles = pictures._tiles(batch, 0)
  placed, _ = pictures._shelve(tiles, width=400)
  # Tokens begin at 0, 20 and 27 of 41.
  lefts = [tile.left for tile in placed]
  np.testing.assert_allclose(lefts, [0, 400 * 20 / 41, 400 * 27 / 41])
  placed, height = pictures._shelve(tiles, width=25)
  for i, a in enumerate(placed):
    assert a.left + a.width <= 25
    assert a.top + a.height <= height
    for b in placed[:i]:
      assert b.left + b.width <= a.left or b.top + b.height <= a.top


def test_names_of_several_classes_are_cut():
  batch = {"multi_label": np.ones((1, 1, 7), np.uint8)}
  assert pictures._label_text(batch, (0, 0)) == "0, 1, 2, 3 +3"
  batch = {"label": np.array([-1])}
  assert pictures._label_text(batch, (0,), ["cat"]) == ""


def test_a_training_batch_of_stacked_images(figures, tmp_path):
  rng = np.random.default_rng(0)
  batch = {
    "image": rng.integers(0, 256, (7, 13, 17, 3)).astype(np.uint8),
    "label": np.arange(7),
  }
  pictures.training_batch(batch, tmp_path / "batch.png")
  shown = [a for a in figures[0].axes if a.get_visible()]
  assert [a.get_xlabel() for a in shown] == [str(i) for i in range(7)]
  np.testing.assert_array_equal(
    shown[5].images[0].get_array(), batch["image"][5]
  )


def test_a_training_batch_of_packed_rows(figures, tmp_path):
  pictures.training_batch(packed_batch()[0], tmp_path / "batch.png")
  assert figures[0].axes[0].get_title(loc="left").startswith("row 0")


def test_predictions_say_what_was_named_and_what_is_true(figures, tmp_path):
  images = [np.zeros((5 + i, 7, 3), np.uint8) for i in range(4)]
  truth = np.array([[1, 0, 0], [0, 1, 1], [0, 1, 0], [0, 0, 0]], bool)
  predicted = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0]], bool)
  pictures.predictions(
    images, predicted, truth, ("cat", "dog", "cow"), tmp_path / "p.png"
  )
  axes = figures[0].axes
  assert [a.get_xlabel() for a in axes] == [
    "cat",
    "dog\ntrue: dog, cow",
    "nothing\ntrue: dog",
    "nothing",
  ]
  frames = [a.spines["left"].get_edgecolor() for a in axes]
  right, wrong = (colors.to_rgba(c) for c in (pictures._RIGHT, pictures._WRONG))
  assert frames == [right, wrong, wrong, right]
  assert figures[0].get_suptitle() == (
    "2 of 4 true classes named; 2 of 4 held-out images fully right"
  )


def write_metrics(path, records):
  path.write_text("".join(json.dumps(r) + "\n" for r in records))


def test_learning_curves_share_a_panel_by_name(figures, tmp_path):
  records = [
    {"step": s, "time": 1.0, "train/loss": 1 / s, "lr": None if s < 3 else s}
    for s in range(1, 9)
  ]
  records[3] |= {"val/loss": 0.5, "val/examples": 100, "once": 1.0}
  records[7] |= {"val/loss": 0.25, "val/examples": 100}
  write_metrics(tmp_path / "m.jsonl", records)
  pictures.learning_curves(tmp_path / "m.jsonl", tmp_path / "c.png")
  assert is_picture(tmp_path / "c.png")
  shown = [a for a in figures[0].axes if a.get_visible()]
  assert [a.get_title(loc="left") for a in shown] == ["loss", "lr"]
  assert [a.get_legend() is None for a in shown] == [False, True]
  train, val = shown[0].lines
  assert (train.get_label(), val.get_label()) == ("train", "val")
  np.testing.assert_allclose(val.get_xydata(), [[4, 0.5], [8, 0.25]])
  np.testing.assert_allclose(train.get_ydata(), 1 / np.arange(1, 9))
  assert shown[1].lines[0].get_xdata().tolist() == list(range(3, 9))


def test_long_curves_carry_their_running_mean(figures, tmp_path):
  noisy = np.random.default_rng(0).normal(5, 1, 300)
  records = [{"step": s, "loss": x} for s, x in enumerate(noisy)]
  write_metrics(tmp_path / "m.jsonl", records)
  pictures.learning_curves(tmp_path / "m.jsonl", tmp_path / "c.png")
  raw, mean = figures[0].axes[0].lines
  np.testing.assert_allclose(raw.get_ydata(), noisy)
  np.testing.assert_allclose(mean.get_ydata()[17], noisy[17:27].mean())
  assert mean.get_xdata()[17] == 26


def test_a_run_without_metrics_still_has_a_picture(figures, tmp_path):
  (tmp_path / "m.jsonl").write_text("")
  pictures.learning_curves(tmp_path / "m.jsonl", tmp_path / "c.png")
  assert (tmp_path / "c.png").exists()
  assert figures[0].axes[0].get_title(loc="left") == "no metrics yet"


def test_budget_curve_has_settings_and_cascades(figures, tmp_path):
  rows = [
    {
      "tokens": name,
      "share": share,
      "tokens_per_image": cost,
      "images_per_s": 1000 / cost,
      "accuracy": 0.5 + cost / 200,
      "calibration_error": 1 / cost,
    }
    for name, share, cost in (
      ("16", "", 15.0),
      ("49", "", 47.0),
      ("16 > 49", 0.5, 38.5),
      ("16 > 49", 1.0, 62.0),
    )
  ]
  pictures.budget_curve(rows, tmp_path / "b.png")
  assert is_picture(tmp_path / "b.png")
  first, second, third = figures[0].axes
  cascade, single = first.lines
  np.testing.assert_allclose(single.get_xydata(), [[15, 0.575], [47, 0.735]])
  np.testing.assert_allclose(cascade.get_xdata(), [38.5, 62])
  assert cascade.get_label() == "cascade 16 > 49"
  assert [a.get_xlabel() for a in (first, second, third)] == [
    "tokens per image",
    "images/s",
    "tokens per image",
  ]
  assert len(third.lines) == 1
  assert [t.get_text() for t in third.texts] == ["16", "49"]
