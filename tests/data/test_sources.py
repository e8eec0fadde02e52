"""Folders, tar shards and prepared TFDS data sets behind one contract."""

import concurrent.futures
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds

from big_vision_like.data import ops
from big_vision_like.data.sources import folder, tar
from big_vision_like.data.sources import tfds as tfds_source


def png(h, w, value=0):
  image = np.full((h, w, 3), value, np.uint8)
  return cv2.imencode(".png", image)[1].tobytes()


def put(path, data=None):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(png(5, 7) if data is None else data)


def assert_contract(source, n, names):
  """What api.py asks of every source."""
  assert len(source) == n
  assert source.label_names == names
  copy = pickle.loads(pickle.dumps(source))
  for i in range(n):
    example = source[i]
    assert example == copy[np.int64(i)]
    assert example["id"] == i
    assert isinstance(example["image"], bytes)
    assert 0 <= example["label"] < len(names)
    assert ops.decode(example["image"]).shape[:2] == source.hw(i)
  assert len({source.name(i) for i in range(n)}) == n
  for index in (-1, n):
    for read in (source.__getitem__, source.hw):
      with pytest.raises(IndexError, match=str(index)):
        read(index)


# Folders.


@pytest.fixture
def photos(tmp_path):
  """40 photographs of three classes, one directory each."""
  for label, name in enumerate(("ant", "bee", "cat")):
    for i in range((11, 12, 17)[label]):
      put(tmp_path / name / f"{i}.png", png(3 + i, 5 + label, label))
  return tmp_path


def names_of(source):
  return {source.name(i) for i in range(len(source))}


def test_folder_with_a_directory_per_class(photos):
  train = folder.Source("train", photos, holdout=0)
  assert_contract(train, 40, ("ant", "bee", "cat"))
  for i in range(40):
    pixels = ops.decode(train[i]["image"])
    assert (pixels == train[i]["label"]).all()
    assert pixels.shape[1] == 5 + train[i]["label"]


def test_folder_holds_out_a_share_that_stays(photos):
  splits = [folder.Source(s, photos, holdout=0.3) for s in folder.SPLITS]
  train, validation = map(names_of, splits)
  assert not train & validation
  assert len(train | validation) == 40
  # A share of 0.3 gives 12; four standard deviations of a binomial.
  assert 2 <= len(validation) <= 23
  for i in range(100, 140):
    put(photos / "ant" / f"{i}.png")
  assert validation <= names_of(
    folder.Source("validation", photos, holdout=0.3)
  )
  assert train <= names_of(folder.Source("train", photos, holdout=0.3))


def test_folder_holds_out_one_image_of_few(tmp_path):
  for name in ("ant/1.png", "ant/2.png", "bee/1.png"):
    put(tmp_path / name)
  assert len(folder.Source("validation", tmp_path, holdout=0.01)) == 1
  assert len(folder.Source("train", tmp_path, holdout=0.01)) == 2


@pytest.mark.parametrize("name", ["validation", "val", "test"])
def test_folder_with_directories_for_the_splits(tmp_path, name):
  for c in ("bee", "ant"):
    put(tmp_path / "train" / c / "1.png")
    put(tmp_path / "train" / c / "2.png")
    put(tmp_path / name / c / "3.png")
  assert_contract(folder.Source("train", tmp_path), 4, ("ant", "bee"))
  validation = folder.Source("validation", tmp_path)
  assert_contract(validation, 2, ("ant", "bee"))
  assert validation.name(1) == str(tmp_path / name / "bee" / "3.png")


def test_folder_prefers_validation_to_test(tmp_path):
  for split in ("train", "test", "validation"):
    put(tmp_path / split / "ant" / f"{split}.png")
  source = folder.Source("validation", tmp_path)
  assert source.name(0).endswith("validation/ant/validation.png")


def test_folder_with_train_alone_holds_out_of_it(tmp_path):
  for i in range(20):
    put(tmp_path / "train" / "ant" / f"{i}.png")
  put(tmp_path / "test" / "of_unknown_class.png")
  train = folder.Source("train", tmp_path, holdout=0.5)
  validation = folder.Source("validation", tmp_path, holdout=0.5)
  assert len(train) + len(validation) == 20
  assert train.label_names == validation.label_names == ("ant",)


def test_a_class_may_be_called_train(tmp_path):
  put(tmp_path / "bus" / "1.png")
  put(tmp_path / "train" / "1.png")
  source = folder.Source("train", tmp_path, holdout=0)
  assert source.label_names == ("bus", "train")


def test_folder_finds_any_image_in_order(tmp_path):
  files = [
    "ant/a.JPG",
    "ant/deep/er/b.jpeg",
    "ant/z.PnG",
    "bee/bild größe.webp",
    "bee/c.bmp",
    "bee/d.gif",
    "bee/e.tif",
    "bee/f.TIFF",
  ]
  others = ["ant/notes.txt", "ant/.hidden.png", ".git/x.png", "papers/a.pdf"]
  for name in files + others:
    put(tmp_path / name)
  source = folder.Source("train", tmp_path, holdout=0)
  found = [
    os.path.relpath(source.name(i), tmp_path) for i in range(len(source))
  ]
  assert found == files
  assert source.label_names == ("ant", "bee")


def test_folder_survives_circular_links(tmp_path):
  put(tmp_path / "ant" / "1.png")
  put(tmp_path / "bee" / "2.png")
  os.symlink(tmp_path, tmp_path / "ant" / "up")
  os.symlink(tmp_path / "ant", tmp_path / "bee" / "ant")
  os.symlink("self", tmp_path / "ant" / "self")
  os.symlink("self", tmp_path / "self")
  source = folder.Source("train", tmp_path, holdout=0)
  # Links are followed, but each real directory counts once in a class.
  assert source.label_names == ("ant", "bee")
  assert len(source) < 10


def test_folder_follows_links_to_images_and_classes(tmp_path):
  put(tmp_path / "store" / "x.png", png(11, 13))
  root = tmp_path / "root"
  root.mkdir()
  os.symlink(tmp_path / "store", root / "ant")
  (root / "bee").mkdir()
  os.symlink(tmp_path / "store" / "x.png", root / "bee" / "y.png")
  source = folder.Source("train", root, holdout=0)
  assert_contract(source, 2, ("ant", "bee"))


def test_folder_lists_broken_files_to_be_found_later(tmp_path):
  put(tmp_path / "ant" / "empty.png", b"")
  put(tmp_path / "ant" / "text.jpg", b"hello")
  os.symlink("nowhere", tmp_path / "ant" / "zz.png")
  source = folder.Source("train", tmp_path, holdout=0)
  assert len(source) == 3
  assert source[0]["image"] == b""
  for i in range(3):
    with pytest.raises(ops.BrokenImage):
      source.hw(i)
  with pytest.raises(ops.BrokenImage, match="No such file"):
    source[2]


def test_folder_reads_sizes_without_the_exif_rotation(tmp_path):
  from PIL import Image

  exif = Image.Exif()
  exif[0x0112] = 6
  file = io.BytesIO()
  Image.new("RGB", (43, 31)).save(file, "JPEG", exif=exif)
  put(tmp_path / "ant" / "1.jpg", file.getvalue())
  assert folder.Source("train", tmp_path, holdout=0).hw(0) == (31, 43)


def test_folder_captions_lie_beside_their_images(tmp_path):
  for name, caption in (
    ("cat/1", b"a cat\n"),
    ("cat/deep/2", None),
    ("dog/3", b"caf\xe9"),
    ("dog/4.5", b""),
  ):
    put(tmp_path / f"{name}.png")
    if caption is not None:
      put(tmp_path / f"{name}.txt", caption)
  put(tmp_path / "cat/deep/4.txt", b"of no image")
  source = folder.Source("train", tmp_path, holdout=0.0)
  found = [source[i].get("caption") for i in range(len(source))]
  assert found == ["a cat\n", None, "caf\ufffd", ""]


def test_folder_pickles_to_its_names(tmp_path):
  for i in range(300):
    put(tmp_path / "ant" / f"{i:06}.png", b"")
  source = folder.Source("train", tmp_path, holdout=0)
  # 14 bytes of name, 8 of offset and 4 of label each.
  assert len(pickle.dumps(source)) < 300 * 26 + 1000


def test_folder_refusals(tmp_path, monkeypatch):
  def refused(sentence, split="train", path=tmp_path, **settings):
    with pytest.raises(ValueError, match=sentence):
      folder.Source(split, path, **settings)

  refused("Unknown split 'dev'.*: train, validation", split="dev")
  refused("holdout is a share .* got 1", holdout=1)
  refused("/none does not exist", path=tmp_path / "none")
  put(tmp_path / "file")
  refused("/file is not a directory", path=tmp_path / "file")
  refused(r"one directory per class.*found no image\. Images end in \.jpg")
  put(tmp_path / "1.png")
  refused(r"cat/1\.jpg.*found an image without a class, 1\.png")
  put(tmp_path / "ant" / "1.png")
  refused(r"no image for the split 'train' \(holdout=0\.5\)", holdout=0.5)
  refused("no image for the split 'validation'", split="validation", holdout=0)

  def denied(path):
    raise PermissionError(13, "Permission denied", path)

  monkeypatch.setattr(os, "scandir", denied)
  refused("Cannot read the image folder: .*Permission denied")


def test_folder_splits_must_have_the_same_classes(tmp_path):
  for name in ("train/ant", "train/bee", "val/ant", "val/bee", "val/cow"):
    put(tmp_path / name / "1.png")
  for split in folder.SPLITS:
    with pytest.raises(ValueError, match=r"differ.*/train has no dir.* cow"):
      folder.Source(split, tmp_path)
  (tmp_path / "val" / "cow" / "1.png").unlink()
  assert folder.Source("train", tmp_path).label_names == ("ant", "bee")
  shutil.rmtree(tmp_path / "val" / "bee")
  with pytest.raises(ValueError, match=r"differ.*/val has no dir.* bee"):
    folder.Source("train", tmp_path)


def test_folder_with_validation_alone_is_refused(tmp_path):
  put(tmp_path / "val" / "ant" / "1.png")
  with pytest.raises(ValueError, match=r"val/<class>/ but no train/<class>/"):
    folder.Source("train", tmp_path)


# Tar shards.


def write_tar(path, files):
  with tarfile.open(path, "w") as archive:
    for name, data in files.items():
      info = tarfile.TarInfo(name)
      info.size = len(data)
      archive.addfile(info, io.BytesIO(data))


def sample(key, label, h):
  return {f"{key}.png": png(h, 7, label), f"{key}.cls": b"%d\n" % label}


@pytest.fixture
def shards(tmp_path):
  """Two training shards of five and three samples, one for validation."""
  first = {}
  for i in range(5):
    first |= sample(f"./a/{i:03}", i % 3, 3 + i)
  write_tar(tmp_path / "train-000.tar", first)
  second = sample("x.y/one", 2, 11)
  second["two.txt"] = "Größe".encode()
  second["two.json"] = json.dumps({"label": 1, "url": "?"}).encode()
  second["two.JPEG"] = png(13, 7, 1)
  second["three.seg.png"] = b"not the image"
  second |= sample("three", 0, 17)
  second["__notes__"] = b""
  second["._three.png"] = b"left by a Mac"
  write_tar(tmp_path / "train-001.tar", second)
  write_tar(tmp_path / "validation-000.tar", sample("v", 1, 19))
  return tmp_path


def test_tar_reads_every_sample(shards):
  source = tar.Source("train", shards)
  assert_contract(source, 8, ("0", "1", "2"))
  for i in range(8):
    assert (ops.decode(source[i]["image"]) == source[i]["label"]).all()
  assert [source.hw(i)[0] for i in range(8)] == [3, 4, 5, 6, 7, 11, 13, 17]
  assert source.name(6) == str(shards / "train-001.tar" / "two.JPEG")
  assert source[6]["caption"] == "Größe"
  assert "caption" not in source[5]
  assert len(tar.Source("validation", shards)) == 1


def test_tar_splits_count_the_same_classes(shards):
  assert tar.Source("validation", shards).label_names == ("0", "1", "2")
  (shards / "label_names.txt").write_text("ant\nbee\n cat\n\n")
  for split in tar.SPLITS:
    source = tar.Source(split, shards)
    assert source.label_names == ("ant", "bee", "cat")
  (shards / "label_names.txt").write_text("ant\nbee\n")
  with pytest.raises(ValueError, match=r"002\.png has the label 2.* 0 to 1"):
    tar.Source("train", shards)


def test_tar_patterns(shards):
  pattern = shards / "{split}-*.tar"
  assert len(tar.Source("train", pattern)) == 8
  assert len(tar.Source("validation", pattern)) == 1
  assert len(tar.Source("train", shards / "train-*1.tar")) == 3
  with pytest.raises(ValueError, match=r"put {split} where .* have `train`"):
    tar.Source("validation", shards / "train-*.tar")
  (shards / "validation-000.tar").rename(shards / "val-000.tar")
  assert len(tar.Source("validation", pattern)) == 1


def test_tar_without_labels_has_images(tmp_path):
  write_tar(tmp_path / "train-0.tar", {"a.png": png(3, 5), "a.json": b"{}"})
  source = tar.Source("train", tmp_path)
  assert source[0] == {"id": 0, "image": png(3, 5)}
  assert source.label_names == ()


def test_tar_scans_once(shards, monkeypatch):
  first = tar.Source("train", shards)

  def scanned(path):
    raise AssertionError(path)

  monkeypatch.setattr(tar, "_scan", scanned)
  again = tar.Source("train", shards)
  assert [again[i] for i in range(8)] == [first[i] for i in range(8)]
  assert not list(shards.glob("*.npz.*"))


@pytest.mark.parametrize("damage", [b"", b"junk", "cut", "pickle"])
def test_tar_makes_a_bad_index_again(shards, damage):
  tar.Source("train", shards)
  index = shards / "train-000.tar.index.npz"
  if damage == "cut":
    index.write_bytes(index.read_bytes()[:-100])
  elif damage == "pickle":
    np.savez(index, stamp=np.array([{}], dtype=object))
  else:
    index.write_bytes(damage)
  assert_contract(tar.Source("train", shards), 8, ("0", "1", "2"))
  assert index.stat().st_size > 500


def test_tar_makes_a_stale_index_again(shards):
  tar.Source("train", shards)
  write_tar(shards / "train-000.tar", sample("new", 2, 23))
  tar._open.cache_clear()
  source = tar.Source("train", shards)
  assert len(source) == 4
  assert source.hw(0) == (23, 7)


def test_tar_keeps_the_index_in_memory_where_it_may_not_write(
  shards, monkeypatch
):
  def denied(part, index):
    raise PermissionError(13, "Permission denied", index)

  monkeypatch.setattr(os, "replace", denied)
  assert_contract(tar.Source("train", shards), 8, ("0", "1", "2"))
  assert not list(shards.glob("*.npz*"))


def test_tar_is_read_by_threads_forks_and_fresh_processes(shards):
  source = tar.Source("train", shards)
  expected = [source[i]["image"] for i in range(8)]
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    order = list(range(8)) * 50
    images = pool.map(lambda i: source[i]["image"], order)
    assert list(images) == [expected[i] for i in order]
  script = (
    "import os, pickle, sys\n"
    "source, expected = pickle.loads(sys.stdin.buffer.read())\n"
    "source[0]\n"  # the child shares the parent's open file
    "child = os.fork()\n"
    "for _ in range(200):\n"
    "  for i, image in enumerate(expected):\n"
    "    assert source[i]['image'] == image\n"
    "if child:\n"
    "  assert os.waitpid(child, 0)[1] == 0\n"
    "  print('equal')\n"
  )
  done = subprocess.run(
    [sys.executable, "-c", script],
    input=pickle.dumps((source, expected)),
    capture_output=True,
    check=True,
  )
  assert done.stdout == b"equal\n"


def test_tar_keeps_few_files_open(tmp_path):
  count = tar.OPEN_SHARDS + 20
  for i in range(count):
    write_tar(tmp_path / f"train-{i:03}.tar", sample("a", i % 7, 3))
  source = tar.Source("train", tmp_path)
  before = len(os.listdir("/proc/self/fd"))
  assert [source[i]["label"] for i in range(count)] == [
    i % 7 for i in range(count)
  ]
  assert len(os.listdir("/proc/self/fd")) - before <= tar.OPEN_SHARDS


def test_tar_that_shrinks_later_is_a_broken_image(shards):
  source = tar.Source("train", shards)
  os.truncate(shards / "train-000.tar", 600)
  with pytest.raises(ops.BrokenImage, match=r"ends inside .*a/004\.png"):
    source[4]
  (shards / "train-000.tar").unlink()
  tar._open.cache_clear()
  with pytest.raises(ops.BrokenImage, match="No such file"):
    source[4]


@pytest.mark.parametrize("cut", ["data", "header", "end", "gzip", "empty"])
def test_tar_truncated_shards_are_named(shards, cut):
  path = shards / "train-001.tar"
  with tarfile.open(path) as archive:
    last = archive.getmembers()[-1]
  data = path.read_bytes()
  kept = {
    "data": last.offset_data + 3,
    "header": last.offset + 100,
    "end": last.offset,
    "gzip": None,
    "empty": 0,
  }[cut]
  path.write_bytes(data[:kept] if cut != "gzip" else b"\x1f\x8b" + data)
  with pytest.raises(ValueError, match=r"train-001\.tar is truncated"):
    tar.Source("train", shards)


@pytest.mark.parametrize(
  ("files", "sentence"),
  [
    ({"a.cls": b"1"}, r"'a' of .*train-0\.tar has no image.*\.jpg"),
    ({"a.png": b"", "a.jpg": b""}, r"'a' of .*train-0\.tar has two images"),
    ({"a.png": b"", "a.cls": b"cat"}, r"Cannot read the label .*a\.cls"),
    ({"a.png": b"", "a.json": b"{"}, r"Cannot read the label .*a\.json"),
    ({"a.png": b"", "a.json": b"[1]"}, r"Cannot read the label .*a\.json"),
    ({"a.json": b'{"label": "x"}'}, r"a\.json holds 'x', not the number"),
    ({"a.cls": b"-7"}, r"a\.cls holds -7, not the number of a class"),
    ({"README": b""}, r"no sample in .*train-0\.tar"),
  ],
)
def test_tar_refuses_samples(tmp_path, files, sentence):
  write_tar(tmp_path / "train-0.tar", files)
  with pytest.raises(ValueError, match=sentence):
    tar.Source("train", tmp_path)


def test_tar_refuses_missing_shards(tmp_path):
  with pytest.raises(ValueError, match=r"No tar shards of .*'train' at .*-\*"):
    tar.Source("train", tmp_path)
  with pytest.raises(ValueError, match=r"No tar shards of .*'validation'"):
    tar.Source("validation", tmp_path / "{split}.tar")
  with pytest.raises(ValueError, match=r"Unknown split 'dev'.*: train, va"):
    tar.Source("dev", tmp_path)


# Prepared TFDS data sets.

IMAGE = tfds.features.Image(shape=(None, None, 3))
CLASSES = tfds.features.ClassLabel(names=["ant", "bee", "cat"])


def prepare(root, features, splits, version="1.2.0", format="array_record"):
  """Writes a data set called "toy" as TFDS would."""
  path = root / "toy" / version
  path.mkdir(parents=True)
  identity = tfds.core.dataset_info.DatasetIdentity(
    name="toy",
    version=tfds.core.Version(version),
    data_dir=str(path),
    module_name="toy",
  )
  info = tfds.core.DatasetInfo(
    builder=identity, features=tfds.features.FeaturesDict(features)
  )
  writer = tfds.core.SequentialWriter(info, 4, file_format=format)
  writer.initialize_splits(list(splits))
  writer.add_examples(splits)
  writer.close_all()
  return path


def labelled(n):
  return [{"image": png(3 + i, 7, i), "label": i % 3} for i in range(n)]


@pytest.fixture
def toy(tmp_path):
  features = {"image": IMAGE, "label": CLASSES}
  prepare(tmp_path, features, {"train": labelled(11), "test": labelled(2)})
  return tmp_path


def test_tfds_reads_every_record(toy):
  source = tfds_source.Source("train", "toy", data_dir=toy)
  assert_contract(source, 11, ("ant", "bee", "cat"))
  for i in range(11):
    example = source[i]
    assert example == {"id": i, "image": png(3 + i, 7, i), "label": i % 3}
  assert source.name(3) == "toy/train/3"
  assert len(pickle.dumps(source)) < 20_000


def test_tfds_does_without_tensorflow(toy):
  script = (
    "import sys\n"
    "from big_vision_like.data.sources.tfds import Source\n"
    f"assert len(Source('train', 'toy', data_dir={str(toy)!r})[0]) == 3\n"
    "print('tensorflow' in sys.modules)\n"
  )
  done = subprocess.run(
    [sys.executable, "-c", script], capture_output=True, check=True
  )
  assert done.stdout == b"False\n"


def test_tfds_splits(toy):
  def images(split):
    source = tfds_source.Source(split, "toy", data_dir=toy)
    return [source[i]["image"] for i in range(len(source))]

  everything = [e["image"] for e in labelled(11)]
  assert images("validation") == images("test") == everything[:2]
  assert images("train[3:5]") == everything[3:5]
  assert images("train[9:]+test") == everything[9:] + everything[:2]


def test_tfds_names(toy, monkeypatch):
  features = {"image": IMAGE, "label": CLASSES}
  for version, n in (("1.10.0", 5), ("1.9.0", 3)):
    prepare(toy, features, {"train": labelled(n)}, version=version)

  def size(dataset, **settings):
    return len(tfds_source.Source("train", dataset, **settings))

  assert size("toy", data_dir=toy) == 5
  assert size("toy:1.9.0", data_dir=toy) == 3
  assert size(str(toy / "toy" / "1.2.0")) == 11
  monkeypatch.setenv("TFDS_DATA_DIR", str(toy))
  assert size("toy:1.2.0") == 11
  (toy / "toy").rename(toy / "small")
  (toy / "toy").mkdir()
  (toy / "small").rename(toy / "toy" / "small")
  assert size("toy/small:1.9.0") == 3
  with pytest.raises(ValueError, match=r"There are: toy/small\. Prepare it"):
    size("toy")


def test_tfds_boxes_in_pixels_are_refused():
  objects = {"bbox": [[0.1, 0.2, 0.5, 0.7], [1, 2, 30, 40]], "area": [7, 9]}
  with pytest.raises(
    ValueError, match=r"\[ 1.  2. 30. 40.\]: in TFDS, boxes ar"
  ):
    tfds_source._objects(objects, (50, 60))
  objects["bbox"] = [[0.1, 0.2, 0.5, 1.01]]
  found = tfds_source._objects(objects, (50, 60))
  np.testing.assert_allclose(found["boxes"], [[12, 5, 60.6, 25]], rtol=1e-6)
  assert found["area"].dtype == np.float32


def test_tfds_objects_become_boxes_in_pixels(tmp_path):
  box = tfds.features.BBox(ymin=0.1, xmin=0.25, ymax=0.5, xmax=1.0)
  objects = {
    "bbox": tfds.features.BBoxFeature(),
    "label": tfds.features.ClassLabel(names=["ant", "bee"]),
    "is_crowd": np.bool_,
  }
  examples = [
    {"image": png(20, 8), "objects": objects}
    for objects in (
      [{"bbox": box, "label": 1, "is_crowd": True}],
      [],
    )
  ]
  features = {"image": IMAGE, "objects": tfds.features.Sequence(objects)}
  prepare(tmp_path, features, {"train": examples})
  source = tfds_source.Source("train", "toy", data_dir=tmp_path)
  assert source.label_names == ("ant", "bee")
  assert "label" not in source[0]
  full, empty = source[0]["objects"], source[1]["objects"]
  np.testing.assert_allclose(full["boxes"], [[2, 2, 8, 10]], rtol=1e-6)
  assert full["label"].tolist() == [1]
  assert full["is_crowd"].tolist() == [True]
  assert empty["boxes"].shape == (0, 4)
  assert empty["label"].dtype == np.int32


def test_tfds_captions(tmp_path):
  text = tfds.features.Text()
  for version, key, feature, value, expected in (
    ("1.0.0", "caption", text, "Größe", "Größe"),
    ("2.0.0", "captions", tfds.features.Sequence(text), ["a", "b"], ["a", "b"]),
    (
      "3.0.0",
      "captions",
      tfds.features.Sequence({"text": text, "id": np.int64}),
      [{"text": "a", "id": 7}],
      ["a"],
    ),
  ):
    features = {"image": IMAGE, key: feature, "file_name": text}
    example = {"image": png(3, 5), key: value, "file_name": "1.png"}
    prepare(tmp_path, features, {"train": [example]}, version=version)
    source = tfds_source.Source("train", f"toy:{version}", data_dir=tmp_path)
    assert source[0]["caption"] == expected


def test_tfds_chooses_features(tmp_path):
  names = {"fine": CLASSES, "label": CLASSES, "thumb": IMAGE, "image": IMAGE}
  one = {"fine": 1, "label": 2, "thumb": png(3, 5), "image": png(7, 11)}
  for version, kept in (
    ("1.0.0", ("fine", "label", "thumb", "image")),
    ("2.0.0", ("fine", "thumb")),
    ("3.0.0", ("thumb",)),
  ):
    prepare(
      tmp_path,
      {k: names[k] for k in kept},
      {"train": [{k: one[k] for k in kept}]},
      version=version,
    )

  def example(version):
    return tfds_source.Source("train", f"toy:{version}", data_dir=tmp_path)[0]

  assert example("1.0.0") == {"id": 0, "image": png(7, 11), "label": 2}
  assert example("2.0.0") == {"id": 0, "image": png(3, 5), "label": 1}
  assert example("3.0.0") == {"id": 0, "image": png(3, 5)}


@pytest.mark.parametrize(
  ("features", "sentence"),
  [
    (
      {"left": IMAGE, "right": IMAGE},
      "which feature of toy is its image: there are left, right",
    ),
    (
      {"image": IMAGE, "fine": CLASSES, "coarse": CLASSES},
      "which feature of toy is its label: there are coarse, fine",
    ),
    ({"label": CLASSES}, r"toy has no image among \['label'\]"),
  ],
)
def test_tfds_refuses_unclear_features(tmp_path, features, sentence):
  example = {k: png(3, 5) if v is IMAGE else 1 for k, v in features.items()}
  prepare(tmp_path, features, {"train": [example]})
  with pytest.raises(ValueError, match=sentence):
    tfds_source.Source("train", "toy", data_dir=tmp_path)


def test_tfds_refusals(toy):
  def refused(sentence, split="train", dataset="toy", data_dir=toy):
    with pytest.raises(ValueError, match=sentence):
      tfds_source.Source(split, dataset, data_dir=data_dir)

  prepared = "Prepare it with `tfds build .* --file_format=array_record`"
  refused(f"nothing is not prepared in .*{prepared}", dataset="nothing")
  refused(r"toy:9\.9\.9 is not .* are: toy:1\.2\.0\.", dataset="toy:9.9.9")
  refused("no split 'dev'. There are: train, test", split="dev")
  refused("no split 'dev'", split="train+dev[:10%]")
  refused("Unrecognized split format", split="train[:x]")
  refused(r"The split 'train\[:0\]' of toy is empty", split="train[:0]")
  info = toy / "toy" / "1.2.0" / "dataset_info.json"
  for other in ("tfrecord", "parquet"):
    info.write_text(info.read_text().replace("array_record", other))
    refused(f"toy is prepared as {other}.*array_record alone. {prepared}")
    info.write_text(info.read_text().replace(other, "array_record"))
