"""Data sets that TensorFlow Datasets has prepared, read without TensorFlow.

They have to be prepared as array_record, TFDS's format with random access
(its parquet writer loses records). Reading takes what stands on the disk: no
builder's code, no network.
"""

import operator
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from big_vision_like.api import Example
from big_vision_like.data import ops

FORMAT = "array_record"


class Source:
  """A prepared data set as a `Source` (see api.py).

  Examples have `label` where the data set has class labels, `objects` where
  it has those, with boxes float32 [O,4] as (x0, y0, x1, y1) in pixels, and
  `caption` where it has a text `caption`, or a list of those in `captions`.

  Args:
    split: "train", "validation" (the test split of a data set that has only
      this) or what else TFDS understands, such as "train[:90%]".
    dataset: name[/config][:version], or the directory of a version.
    data_dir: where data sets are kept; by default where TFDS keeps them,
      TFDS_DATA_DIR or ~/tensorflow_datasets.

  Raises:
    ValueError: if the data set is not prepared as array_record (says how to),
      has no such split, or leaves open which features to take.
  """

  def __init__(
    self,
    split: str,
    dataset: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
  ):
    builder = tfds.builder_from_directory(_find(dataset, data_dir))
    formats = sorted(f.value for f in builder.info.available_file_formats())
    if FORMAT not in formats:
      raise ValueError(
        f"{dataset} is prepared as {', '.join(formats)}, and we read {FORMAT} "
        f"alone. {_advice(dataset)}"
      )
    features = builder.info.features
    self.dataset = dataset
    self.split = _existing_split(split, list(builder.info.splits), dataset)
    self._image = _choose(features, tfds.features.Image, "image", dataset)
    if not self._image:
      raise ValueError(f"{dataset} has no image among {sorted(features)}.")
    self._label = _choose(features, tfds.features.ClassLabel, "label", dataset)
    objects = _object_features(features)
    self._has_objects = "bbox" in objects
    self._captions = [k for k in ("caption", "captions") if k in features]
    labels = features[self._label] if self._label else objects.get("label")
    self.label_names = tuple(labels.names) if labels else ()
    # TFDS would decode alpha and palettes to arrays that do not fit.
    undecoded = {
      key: tfds.decode.SkipDecoding()
      for key, feature in features.items()
      if isinstance(feature, tfds.features.Image)
    }
    if not builder.info.splits[self.split].num_examples:
      raise ValueError(f"The split {self.split!r} of {dataset} is empty.")
    self._records = builder.as_data_source(
      self.split, decoders=undecoded, file_format=FORMAT
    )

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> Example:
    index, record = self._record(index)
    example = {"id": index, "image": record[self._image]}
    if self._label:
      example["label"] = int(record[self._label])
    if self._has_objects:
      hw = ops.image_hw(example["image"])
      try:
        example["objects"] = _objects(record["objects"], hw)
      except ValueError as e:
        raise ValueError(f"{self.name(index)} {e}") from e
    for key in self._captions:
      example["caption"] = _caption(record[key])
    return example

  def hw(self, index: int) -> tuple[int, int]:
    return ops.image_hw(self._record(index)[1][self._image])

  def name(self, index: int) -> str:
    return f"{self.dataset}/{self.split}/{operator.index(index)}"

  def _record(self, index: int) -> tuple[int, dict[str, Any]]:
    index = operator.index(index)
    if not 0 <= index < len(self):
      raise IndexError(f"{self.name(index)} of {len(self)} examples.")
    return index, self._records[index]


def _find(dataset: str, data_dir: str | os.PathLike[str] | None) -> str:
  """The directory of a prepared version, the latest if none is named."""
  if _is_prepared(path := Path(dataset).expanduser()):
    return str(path)
  default = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
  root = Path(data_dir or default).expanduser()
  name, _, version = dataset.partition(":")
  versions = _versions(root / name)
  if version in versions or (versions and not version):
    return str(root / name / (version or versions[-1]))
  have = [f"{name}:{v}" for v in versions]
  if not versions and (root / name).is_dir():
    configs = sorted(d.name for d in (root / name).iterdir() if _versions(d))
    have = [f"{name}/{config}" for config in configs]
  there = f"There are: {', '.join(have)}. " if have else ""
  raise ValueError(
    f"{dataset} is not prepared in {root}. {there}{_advice(dataset)}"
  )


def _versions(root: Path) -> list[str]:
  """The prepared versions in a directory, oldest first."""
  if not root.is_dir():
    return []
  names = [
    d.name
    for d in root.iterdir()
    if re.fullmatch(r"\d+\.\d+\.\d+", d.name) and _is_prepared(d)
  ]
  return sorted(names, key=lambda name: [int(n) for n in name.split(".")])


def _is_prepared(version: Path) -> bool:
  return (version / "dataset_info.json").exists()


def _advice(dataset: str) -> str:
  return (
    f"Prepare it with `tfds build {dataset} --file_format={FORMAT}`, or with "
    f"tfds.builder({dataset!r}, file_format={FORMAT!r})"
    ".download_and_prepare(); many data sets need TensorFlow for this, once."
  )


def _existing_split(split: str, existing: list[str], dataset: str) -> str:
  """The split under its name in the data set; slices pass as they are."""
  if split == "validation" and split not in existing and "test" in existing:
    return "test"
  for name in re.findall(r"(?:^|\+)\s*(\w+)", split):
    if name not in existing:
      raise ValueError(
        f"{dataset} has no split {name!r}. There are: {', '.join(existing)}. "
        "A part of one is named like train[:90%]."
      )
  return split


def _choose(
  features: tfds.features.FeaturesDict, kind: type, name: str, dataset: str
) -> str | None:
  """The one feature of a kind, or of several the one with the usual name."""
  found = [
    key
    for key, feature in features.items()
    if isinstance(feature, kind)
    and not isinstance(feature, tfds.features.LabeledImage)
  ]
  if len(found) > 1 and name not in found:
    raise ValueError(
      f"Cannot tell which feature of {dataset} is its {name}: there are "
      f"{', '.join(sorted(found))}."
    )
  return name if name in found else next(iter(found), None)


def _object_features(
  features: tfds.features.FeaturesDict,
) -> dict[str, tfds.features.FeatureConnector]:
  """What is known of each object, if the data set has objects."""
  inner = getattr(dict(features.items()).get("objects"), "feature", None)
  return dict(inner.items()) if hasattr(inner, "items") else {}


def _caption(value: Any) -> str | list[str]:
  """A text, or several: a list, or as COCO has them, with "text" in a dict."""
  if isinstance(value, dict):
    value = value["text"]
  if isinstance(value, bytes):
    return value.decode(errors="replace")
  return [_caption(text) for text in value]


def _objects(
  objects: dict[str, Any], hw: tuple[int, int]
) -> dict[str, np.ndarray]:
  """TFDS has lists, and boxes as (y0, x0, y1, x1) in shares of the sides."""
  boxes = np.array(objects["bbox"], np.float32).reshape(-1, 4)
  if (boxes > 2).any():
    raise ValueError(
      f"has a box (y0, x0, y1, x1) = {boxes[(boxes > 2).any(axis=1)][0]}: in "
      "TFDS, boxes are fractions of the image, and this one is in pixels."
    )
  h, w = hw
  scale = np.array([w, h, w, h], np.float32)
  out = {"boxes": boxes[:, [1, 0, 3, 2]] * scale}
  for key, dtype in (
    ("label", np.int32),
    ("is_crowd", np.bool_),
    ("area", np.float32),
  ):
    if key in objects:
      out[key] = np.array(objects[key], dtype)
  return out
