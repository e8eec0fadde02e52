"""Tar shards with WebDataset's names, read at random through an index.

A sample is the files of one shard that share their name up to the first dot:
`0001.jpg` (or another image), with `0001.cls` (the class as a number) or
`0001.json` ({"label": 3}), and `0001.txt` (a caption). The class names are the
lines of `label_names.txt` beside the shards, or else "0", "1", ...

The index of a shard is made by one scan and kept beside it, as
`<shard>.index.npz`, or in memory where we may not write. It is made again
when the shard's size or modification time has changed.
"""

import dataclasses
import functools
import glob
import json
import operator
import os
import re
import tarfile
import uuid
import zipfile
from pathlib import Path

import numpy as np

from big_vision_like.api import Example
from big_vision_like.data import ops

SPLITS = {"train": ("train",), "validation": ("validation", "val", "test")}
IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
INDEX_FORMAT = 1
OPEN_SHARDS = 128  # file descriptors kept, well below the usual 1,024

# image and caption are (offset, size) in the shard, (-1, -1) for none; label
# is -1 for none; name_end is where the image's name ends in `Shard.names`.
SAMPLE = np.dtype(
  [
    ("image", np.int64, 2),
    ("caption", np.int64, 2),
    ("label", np.int64),
    ("name_end", np.int64),
  ]
)


@dataclasses.dataclass(frozen=True)
class Shard:
  """A tar file and its index: a SAMPLE array [n] and the images' names."""

  path: str
  samples: np.ndarray
  names: bytes

  def name(self, i: int) -> str:
    start = self.samples["name_end"][i - 1] if i else 0
    name = self.names[start : self.samples["name_end"][i]]
    return f"{self.path}/{os.fsdecode(name)}"

  def read(self, i: int, field: str) -> bytes:
    offset, size = self.samples[field][i].tolist()
    try:
      file = _open(self.path)
      data = os.pread(file.descriptor, size, offset)
    except OSError as e:
      raise ops.BrokenImage(str(e)) from e
    if len(data) != size:
      raise ops.BrokenImage(f"{self.path} ends inside {self.name(i)}.")
    return data


class Source:
  """The samples of tar shards as a `Source` (see api.py).

  Examples have `label` and `caption` where the sample has them. Threads, and
  forked or spawned processes, may share a source.

  Args:
    split: "train" or "validation".
    path: a folder with train-*.tar and validation-*.tar (or val-, test-), or
      a pattern in which {split} stands for these names. A pattern without
      {split} is of training data.

  Raises:
    ValueError: if there are no shards, or one is truncated, holds a sample
      without an image or a label that is not a class.
  """

  def __init__(self, split: str, path: str | os.PathLike[str]):
    if split not in SPLITS:
      raise ValueError(
        f"Unknown split {split!r} of tar shards. There are: "
        f"{', '.join(SPLITS)}."
      )
    path = os.path.abspath(os.path.expanduser(path))
    files = _find(path, split)
    if not files:
      raise ValueError(
        f"No tar shards of the split {split!r} at {path}: expected a folder "
        f"with {split}-*.tar, or a pattern like /data/photos-{{split}}-*.tar."
      )
    self.shards = [_indexed(file) for file in files]
    self._ends = np.cumsum([len(shard.samples) for shard in self.shards])
    if not len(self):
      raise ValueError(f"There is no sample in {', '.join(files)}.")
    self.label_names = _label_names(path, self.shards)

  def __len__(self) -> int:
    return int(self._ends[-1])

  def __getitem__(self, index: int) -> Example:
    shard, i = self._locate(index)
    sample = shard.samples[i]
    example = {"id": operator.index(index), "image": shard.read(i, "image")}
    if sample["label"] >= 0:
      example["label"] = int(sample["label"])
    if sample["caption"][0] >= 0:
      example["caption"] = shard.read(i, "caption").decode(errors="replace")
    return example

  def hw(self, index: int) -> tuple[int, int]:
    shard, i = self._locate(index)
    return ops.image_hw(shard.read(i, "image"))

  def name(self, index: int) -> str:
    shard, i = self._locate(index)
    return shard.name(i)

  def _locate(self, index: int) -> tuple[Shard, int]:
    """The shard of a sample and its place there."""
    index = operator.index(index)
    if not 0 <= index < len(self):
      raise IndexError(f"Sample {index} of the {len(self)} in the tar shards.")
    which = int(np.searchsorted(self._ends, index, side="right"))
    shard = self.shards[which]
    return shard, index - int(self._ends[which]) + len(shard.samples)


class _Descriptor:
  """A file descriptor that is closed when nobody holds it any more."""

  def __init__(self, path: str):
    self.descriptor = os.open(path, os.O_RDONLY)

  def __del__(self):
    if hasattr(self, "descriptor"):
      os.close(self.descriptor)


@functools.lru_cache(OPEN_SHARDS)
def _open(path: str) -> _Descriptor:
  """Kept per process and read by position, so that a fork may share it."""
  return _Descriptor(path)


def _find(path: str, split: str) -> list[str]:
  """The files of a split's shards, in order."""
  if os.path.isdir(path):
    path = os.path.join(glob.escape(path), "{split}-*.tar")
  if "{split}" not in path:
    if split == "train":
      return sorted(glob.glob(path))
    raise ValueError(
      f"The pattern {path} does not say where its {split} data are: put "
      "{split} where the file names have `train`."
    )
  found = (glob.glob(path.replace("{split}", n)) for n in SPLITS[split])
  return sorted(next(filter(None, found), []))


def _label_names(path: str, shards: list[Shard]) -> tuple[str, ...]:
  """From the file, or numbers up to the largest label of all splits."""
  file = Path(shards[0].path).with_name("label_names.txt")
  if not file.exists():
    if os.path.isdir(path) or "{split}" in path:
      # Each split must count the same classes.
      shards = [_indexed(f) for split in SPLITS for f in _find(path, split)]
    largest = max(s.samples["label"].max(initial=-1) for s in shards)
    return tuple(map(str, range(largest + 1)))
  names = tuple(file.read_text(encoding="utf-8").split("\n"))
  names = tuple(name.strip() for name in names if name.strip())
  for shard in shards:
    wrong = np.flatnonzero(shard.samples["label"] >= len(names))
    if wrong.size:
      raise ValueError(
        f"{shard.name(wrong[0])} has the label "
        f"{shard.samples['label'][wrong[0]]}, but {file} names only the "
        f"classes 0 to {len(names) - 1}."
      )
  return names


def _indexed(path: str) -> Shard:
  """The shard with its index, from the file beside it where that is valid."""
  status = os.stat(path)
  stamp = np.array([INDEX_FORMAT, status.st_size, status.st_mtime_ns])
  index = f"{path}.index.npz"
  if shard := _load(path, index, stamp):
    return shard
  shard = _scan(path)
  _save(shard, index, stamp)
  return shard


def _load(path: str, index: str, stamp: np.ndarray) -> Shard | None:
  """None unless the file is a whole index of just this shard."""
  try:
    with np.load(index, allow_pickle=False) as file:
      if not np.array_equal(file["stamp"], stamp):
        return None
      return Shard(path, file["samples"], file["names"].tobytes())
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
    return None


def _save(shard: Shard, index: str, stamp: np.ndarray) -> None:
  """Writes all or nothing; many processes may do it at once."""
  part = f"{index}.{uuid.uuid4().hex}"
  try:
    with open(part, "xb") as file:
      names = np.frombuffer(shard.names, np.uint8)
      np.savez(file, stamp=stamp, samples=shard.samples, names=names)
    os.replace(part, index)
  except OSError:
    # A folder that we may not write to, or a full disk: memory has to do.
    Path(part).unlink(missing_ok=True)


def _scan(path: str) -> Shard:
  """Reads the headers of the whole shard, and its labels."""
  samples: dict[str, np.ndarray] = {}
  names: dict[str, bytes] = {}
  try:
    with tarfile.open(path, "r:") as tar:
      for member in tar:
        _add(tar, member, samples, names)
      end = os.pread(tar.fileobj.fileno(), tarfile.BLOCKSIZE, tar.offset)
  except tarfile.ReadError as e:
    raise ValueError(
      f"{path} is truncated or not an uncompressed tar file: {e}."
    ) from e
  # tarfile takes any unreadable header for the end of the archive.
  if end != bytes(tarfile.BLOCKSIZE):
    raise ValueError(
      f"{path} is truncated: its end-of-archive mark is missing."
    )
  for key in samples:
    if key not in names:
      raise ValueError(
        f"The sample {key!r} of {path} has no image: we know "
        f"{', '.join('.' + e for e in IMAGES)}."
      )
    samples[key]["name_end"] = len(names[key])
  array = np.array([samples[key] for key in samples], SAMPLE)
  array["name_end"] = np.cumsum(array["name_end"])
  return Shard(path, array, b"".join(names[key] for key in samples))


def _add(
  tar: tarfile.TarFile,
  member: tarfile.TarInfo,
  samples: dict[str, np.ndarray],
  names: dict[str, bytes],
) -> None:
  """Enters one file of the archive into its sample."""
  parts = re.fullmatch(r"((?:.*/)?[^/.]+)\.([^/]+)", member.name)
  if not member.isreg() or not parts:
    return
  key, extension = parts[1], parts[2].lower()
  if extension not in (*IMAGES, "cls", "json", "txt"):
    return
  if key not in samples:
    samples[key] = np.array(((-1, -1), (-1, -1), -1, 0), SAMPLE)
  sample = samples[key]
  if extension in ("cls", "json"):
    text = tar.extractfile(member).read()
    sample["label"] = _label(text, extension, f"{tar.name}/{member.name}")
  elif extension == "txt":
    sample["caption"] = member.offset_data, member.size
  elif key in names:
    raise ValueError(f"The sample {key!r} of {tar.name} has two images.")
  else:
    sample["image"] = member.offset_data, member.size
    names[key] = os.fsencode(member.name)


def _label(text: bytes, extension: str, name: str) -> int:
  """The label in a .cls or .json file; -1 if a .json has none."""
  try:
    if extension == "cls":
      content = int(text)
    else:
      content = json.loads(text).get("label", -1)
  except (ValueError, AttributeError) as e:
    raise ValueError(f"Cannot read the label {name}: {e}.") from e
  if type(content) is not int or content < -1:
    raise ValueError(f"{name} holds {content!r}, not the number of a class.")
  return content
