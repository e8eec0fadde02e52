"""A folder of photographs, one directory per class.

Two layouts are understood:

  path/train/<class>/*  and  path/validation/<class>/* (or val, or test)
  path/<class>/*        (or path/train/<class>/* alone)

In the second, a share `holdout` of the images is the validation split, chosen
by a hash of each file's name, so that a folder that grows keeps its split.
Images may lie deeper below a class directory; links are followed; names that
begin with a dot are ignored. `cat.txt` beside `cat.jpg` is its caption.
"""

import hashlib
import operator
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from big_vision_like.api import Example
from big_vision_like.data import ops

EXTENSIONS = (
  ".jpg",
  ".jpeg",
  ".png",
  ".webp",
  ".bmp",
  ".gif",
  ".tif",
  ".tiff",
)
CAPTION = ".txt"
SPLITS = {"train": ("train",), "validation": ("validation", "val", "test")}


class Source:
  """The images of a folder as a `Source` (see api.py).

  Examples have `label`, and `caption` where there is one.

  Args:
    split: "train" or "validation".
    path: the folder.
    holdout: share of the images held out where the folder has no validation
      directory.

  Raises:
    ValueError: if the folder cannot be read, holds no image of the split or
      has another layout, and if its splits have different classes.
  """

  def __init__(
    self, split: str, path: str | os.PathLike[str], *, holdout: float = 0.1
  ):
    if split not in SPLITS:
      raise ValueError(
        f"Unknown split {split!r} of a folder. There are: {', '.join(SPLITS)}."
      )
    if not 0 <= holdout < 1:
      raise ValueError(f"holdout is a share from 0 to below 1; got {holdout}.")
    root = Path(path).expanduser().absolute()
    splits = _split_directories(root)
    self.split = split
    self.label_names = _class_names(root, splits)
    self.root = splits.get(split) or splits["train"]
    files = [
      (f"{name}/{file}", label)
      for label, name in enumerate(self.label_names)
      for file in _images(self.root / name)
    ]
    if "validation" not in splits:
      files = held_out(files, split, holdout)
    if not files:
      raise ValueError(
        f"{root} has no image for the split {split!r} (holdout={holdout})."
      )
    # One buffer and its offsets: a million names pickle fast and stay small.
    names = [os.fsencode(file) for file, _ in files]
    self._names = b"".join(names)
    self._ends = np.cumsum([len(n) for n in names])
    self._labels = np.array([label for _, label in files], np.int32)
    captions = {
      f"{name}/{file}"
      for name in self.label_names
      for file in _files(self.root / name, (CAPTION,))
    }
    self._has_caption = np.array([_caption(f) in captions for f, _ in files])

  def __len__(self) -> int:
    return len(self._labels)

  def __getitem__(self, index: int) -> Example:
    index = self._check(index)
    name = self.name(index)
    example = {"id": index, "label": int(self._labels[index])}
    try:
      example["image"] = Path(name).read_bytes()
      if self._has_caption[index]:
        text = Path(_caption(name)).read_bytes()
        example["caption"] = text.decode(errors="replace")
    except OSError as e:
      raise ops.BrokenImage(str(e)) from e
    return example

  def hw(self, index: int) -> tuple[int, int]:
    return ops.image_hw(self.name(index))

  def name(self, index: int) -> str:
    index = self._check(index)
    start = self._ends[index - 1] if index else 0
    return str(self.root / os.fsdecode(self._names[start : self._ends[index]]))

  def _check(self, index: int) -> int:
    index = operator.index(index)
    if not 0 <= index < len(self):
      raise IndexError(f"Image {index} of the {len(self)} in {self.root}.")
    return index


def _split_directories(root: Path) -> dict[str, Path]:
  """Where each split's class directories are; there is always a "train"."""
  if not root.is_dir():
    what = "is not a directory" if root.exists() else "does not exist"
    raise ValueError(f"The image folder {root} {what}.")
  splits = {}
  for split, names in SPLITS.items():
    # A directory of images alone is a class that happens to have this name.
    found = (root / n for n in names if _subdirectories(root / n))
    if directory := next(found, None):
      splits[split] = directory
  if "train" in splits:
    return splits
  if splits and not set(_subdirectories(root)) - set(SPLITS["validation"]):
    raise ValueError(
      f"{root} has {splits['validation'].name}/<class>/ but no train/<class>/."
    )
  return {"train": root}


def _class_names(root: Path, splits: dict[str, Path]) -> tuple[str, ...]:
  """The directories with an image in any split; all splits must have them."""
  present = {s: set(_subdirectories(d)) for s, d in splits.items()}
  names = {
    name
    for split, directory in splits.items()
    for name in present[split]
    if next(_images(directory / name), None)
  }
  for split, directory in splits.items():
    if missing := sorted(names - present[split]):
      raise ValueError(
        f"The splits of {root} differ in their classes: {directory} has no "
        f"directory {', '.join(missing)}."
      )
  if not names:
    loose = next(_images(root), None)
    found = f"an image without a class, {loose}" if loose else "no image"
    raise ValueError(
      f"{root} should hold one directory per class, as in {root}/cat/1.jpg, "
      f"or {root}/train/cat/1.jpg beside {root}/validation/cat/2.jpg. We found "
      f"{found}. Images end in {' '.join(EXTENSIONS)}."
    )
  return tuple(sorted(names))


def _entries(directory: str) -> list[os.DirEntry[str]]:
  try:
    with os.scandir(directory) as entries:
      visible = [e for e in entries if not e.name.startswith(".")]
  except OSError as e:
    raise ValueError(f"Cannot read the image folder: {e}.") from e
  return sorted(visible, key=lambda e: e.name)


def _subdirectories(directory: Path) -> list[str]:
  if not directory.is_dir():
    return []
  return [e.name for e in _entries(str(directory)) if _is_directory(e)]


def _is_directory(entry: os.DirEntry[str]) -> bool:
  # A link to itself makes `entry.is_dir()` raise, `isdir` only deny.
  return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _caption(file: str) -> str:
  """The name of an image's caption."""
  return os.path.splitext(file)[0] + CAPTION


def _images(directory: Path) -> Iterator[str]:
  return _files(directory, EXTENSIONS)


def _files(directory: Path, extensions: tuple[str, ...]) -> Iterator[str]:
  """Names of the files below a directory, relative to it, in order."""
  seen = set()

  def walk(path: str, prefix: str) -> Iterator[str]:
    status = os.stat(path)
    # Each real directory counts once, or circular links would never end.
    if (key := (status.st_dev, status.st_ino)) in seen:
      return
    seen.add(key)
    for entry in _entries(path):
      if _is_directory(entry):
        yield from walk(entry.path, f"{prefix}{entry.name}/")
      elif entry.name.lower().endswith(extensions):
        yield prefix + entry.name

  return walk(str(directory), "")


def held_out(
  files: list[tuple[str, int]], split: str, holdout: float
) -> list[tuple[str, int]]:
  """The files of a split; with any share at all, one is held out at least."""

  def draw(file: str) -> float:
    digest = hashlib.blake2b(os.fsencode(file), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64

  draws = [draw(file) for file, _ in files]
  threshold = max(holdout, np.nextafter(min(draws), 1)) if holdout else 0
  validation = split == "validation"
  return [f for f, d in zip(files, draws) if (d < threshold) == validation]
