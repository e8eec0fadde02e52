"""`inspect`: what it says of folders whose content is known."""

import coco_files
import cv2
import numpy as np
import pytest

from big_vision_like import __main__ as command_line
from big_vision_like.commands import inspect
from big_vision_like.data import objects, packing


def write(path, h, w):
  path.parent.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(0)
  assert cv2.imwrite(str(path), rng.integers(0, 256, (h, w, 3), np.uint8))


@pytest.fixture
def folder(tmp_path):
  for i in range(7):
    write(tmp_path / "cat" / f"{i}.png", 30, 62)
  for i in range(3):
    write(tmp_path / "dog" / f"{i}.png", 62, 30)
  whole = (tmp_path / "dog" / "0.png").read_bytes()
  (tmp_path / "dog" / "cut.png").write_bytes(whole[: len(whole) // 2])
  (tmp_path / "dog" / "text.jpg").write_text("not an image")
  for split in ("train", "validation"):
    (tmp_path / split).mkdir()
    for name in ("cat", "dog"):
      if split == "train":
        (tmp_path / name).rename(tmp_path / split / name)
      else:
        write(tmp_path / split / name / "0.png", 17, 19)
  return tmp_path


def report(capsys, folder, *argv):
  code = command_line.main(["inspect", "--data", f"folder:{folder}", *argv])
  assert code == 0
  return capsys.readouterr().out


def test_report_of_a_folder(folder, capsys):
  out = report(
    capsys, folder, "--length", "19", "--max-images", "19", "--low", "16",
    "--high", "32", "--tokens", "7",
  )  # fmt: skip
  assert "split train: 12 images" in out
  assert f"{folder}/train/dog/cut.png: " in out
  assert f"{folder}/train/dog/text.jpg: " in out
  assert "height 30 to 62 (median 30), width 30 to 62 (median 62)" in out
  # sqrt(30 * 62) = 43.1
  assert "32 - 45        10 ####" in out
  assert "0.33 - 0.50         3 ####" in out
  assert "2.00 - 3.00         7 ####" in out
  lines = [line.split() for line in out.splitlines()]
  assert ["cat", "7"] in lines
  assert ["dog", "3"] in lines


def test_exact_fill_is_what_can_be_counted_by_hand(folder, capsys):
  # 30 x 62 pixels are 2 x 4 patches: two images, 16 of the 19 tokens, a row.
  out = report(capsys, folder, "--length", "19", "--high", "64")
  (line,) = [x for x in out.splitlines() if "evaluation, native" in x]
  assert line.split()[-3:] == ["2.00", "8.0", "84.2%"]
  out = report(capsys, folder, "--length", "23", "--high", "64")
  # Two images still: 16 of 23 tokens.
  assert "69.6%" in out


def test_planned_rows_are_full_only_with_dropping(folder, capsys):
  out = report(capsys, folder)
  lines = out.splitlines()
  (with_drop,) = [x.split() for x in lines if "50% dropped" in x]
  (without,) = [x.split() for x in lines if "none dropped" in x]
  assert float(with_drop[-1].rstrip("%")) >= 99
  assert 90 < float(without[-1].rstrip("%")) < 100
  assert float(with_drop[-3]) > float(without[-3])


def test_limit_is_spread_over_the_set(folder, capsys):
  out = report(capsys, folder, "--limit", "2", "--split", "validation")
  assert "2 images" in out
  out = report(capsys, folder, "--limit", "4")
  # Files 0, 4, 7 and 11 of 12, the last of which is text.
  assert "4 of them decoded" in out
  lines = [line.split() for line in out.splitlines()]
  assert ["cat", "2"] in lines
  assert ["dog", "1"] in lines


def test_many_classes_are_shown_at_both_ends():
  names = [f"class{i}" for i in range(31)]
  images = [inspect.Image(0, (1, 1), (i,)) for i in range(31) for _ in range(i)]
  lines = inspect.labels([*images, inspect.Image(0, (1, 1), ())], names)
  assert lines[0].startswith("31 classes")
  assert lines[1].split() == ["class30", "30"]
  assert lines[11] == "... 11 more classes ..."
  assert lines[-2].split() == ["class0", "0"]
  assert lines[-1] == "1 images without a label"
  assert len(lines) == 1 + 20 + 1 + 1


def test_labels_outside_the_classes_are_named():
  lines = inspect.labels([inspect.Image(0, (1, 1), (5,))], ("a", "b"))
  assert lines[-1] == "labels outside the 2 classes: [5]"


def test_histogram_counts_every_value_once():
  rng = np.random.default_rng(0)
  hw = rng.integers(1, 3000, (997, 2))
  images = [inspect.Image(i, tuple(map(int, x)), ()) for i, x in enumerate(hw)]
  lines = inspect.sizes(images)
  split = lines.index("width / height")
  for part in (lines[3:split], lines[split + 1 :]):
    counts = [int(x.split()[3]) for x in part if x]
    assert sum(counts) == 997


def test_slots_of_dropped_images_count_what_is_kept():
  slot = packing.Slot(0, 0, kept=5, full=17.0, drop=True)
  spec = packing.PackSpec(length=23, patch=16, max_images=3)
  images = [inspect.Image(0, (80, 64), ())]
  assert inspect._count([[slot], []], images, spec) == (2, 1, 5)


def test_nothing_readable_is_an_error(tmp_path, capsys):
  (tmp_path / "cat").mkdir()
  (tmp_path / "cat" / "a.jpg").write_text("not an image")
  argv = ["inspect", "--data", f"folder:{tmp_path}", "--split", "validation"]
  assert command_line.main(argv) == 2
  assert "No image of folder:" in capsys.readouterr().err


def test_refusals(folder, capsys):
  for argv, sentence in (
    (["--limit", "0"], "at least one image has to be decoded"),
    (["--data", "folder:/nowhere"], "/nowhere does not exist"),
    (["--data", "fold:x"], "Did you mean 'folder'?"),
    (["--length", "4", "--low", "16", "--high", "16"], "max_images"),
    (["--tokens", "257"], "do not fit rows of 256"),
    (["--kind", "sides"], "data.sizes.kind is 'sides'"),
    (["--drop-mean", "0.95"], "needs 0 < mean < max"),
  ):
    code = command_line.main(["inspect", "--data", f"folder:{folder}", *argv])
    assert code == 2
    assert sentence in capsys.readouterr().err


def test_report_of_coco_files(tmp_path, capsys):
  coco_files.instances(tmp_path)
  coco_files.instances(tmp_path, "val")
  code = command_line.main(["inspect", "--data", f"coco:{tmp_path}"])
  assert code == 0
  out = capsys.readouterr().out
  assert "3 classes: 0 ant (id 3), 1 bee (id 17), 2 cat (id 90)" in out
  assert "1 are inverted, with a negative width or height: dropped" in out
  assert "1 images without a box" in out
  assert (
    "config.model.num_queries=10, config.data.objects.max_objects=10" in out
  )


def boxed(index, *boxes, hw=(100, 100)):
  found = np.array(boxes, np.float32).reshape(-1, 4)
  crowd = np.zeros(len(found), bool)
  image = inspect.Image(index, hw, ())
  return inspect._with_boxes(image, {"boxes": found, "is_crowd": crowd})


def test_boxes_are_counted_and_measured():
  class Source:
    name = "image {}".format

  many = [[i, 0, i + 20, 20] for i in range(61)]
  images = [
    boxed(0),
    boxed(1, [0, 0, 32, 32], [0, 0, 96, 96], [5, 5, 5, 9]),
    boxed(2, *many),
    inspect.Image(3, (9, 9), (1,)),
  ]
  lines = inspect.boxes(images, Source)
  assert lines[0].startswith("63 boxes; in an image 0 to 61 (median 2)")
  assert "1 images without a box" in lines
  # As COCO's 93 in an image have 100.
  assert "num_queries=70" in lines[2]
  text = "\n".join(lines)
  assert "97% small (below 32), 2% medium, 2% large (from 96)" in text
  rows = [line.split()[:4] for line in lines]
  assert ["0.2", "-", "0.3", "61"] in rows
  assert ["0.9", "-", "1.0", "1"] in rows
  assert f"1 boxes {objects.FLAGS[objects.EMPTY]}, such as in image 1" in text


def test_crowds_are_no_boxes_to_count():
  image = inspect.Image(0, (9, 9), ())
  found = {"boxes": np.ones((2, 4)), "is_crowd": np.array([True, True])}
  lines = inspect.boxes([inspect._with_boxes(image, found)], None)
  assert lines[0].startswith("0 boxes")
  assert "num_queries=10" in lines[2]
