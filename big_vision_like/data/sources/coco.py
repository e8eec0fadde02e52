"""Images with boxes in COCO's JSON, of the data set itself or of one's own.

`path` is COCO's root, with annotations/instances_train2017.json, train2017/ and
so on, or a folder that has train.json (or annotations/train.json, or
train/_annotations.coco.json) and in the same way val.json, validation.json,
valid.json or test.json, or a single JSON file. Without a file for validation, a
share `holdout` of the images is held out, by a hash of each file's name.
Images lie in a folder of the split's name, in images/, or beside the JSON.

Class c is the c-th category by id; with `raw_ids` it is the id itself, as for
published heads of 91 classes. Boxes are checked once, while the file is read,
by the rules of data/objects.py; annotations of images that the file does not
list are left out, and with masks those without a segmentation.
"""

import functools
import operator
import os
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Float

from big_vision_like.api import Example
from big_vision_like.data import coco_json, objects, ops, segmentations
from big_vision_like.data.sources import folder

# Behind the flags of boxes, what else is wrong with an annotation.
_STRANGE, _NO_MASK = 64, 128
_FAULTS = objects.FLAGS | {
  _STRANGE: "belong to images that are not listed: dropped",
  _NO_MASK: "have no segmentation that fits their image: dropped",
}
# Annotations that a warning names.
_NAMED = 3
_WIDTH = 78
# With fewer boxes, most may be wrong by chance.
_MANY = 100


class Source:
  """The images of a COCO file as a `Source` (see api.py), by their ids.

  Examples have `objects` with boxes, label, is_crowd and area (the
  annotation's, in pixels), and with `masks` an `instance_mask`: 1 + the
  position of an object; of instances that overlap, the smaller one is on top.

  Panoptic files have things and stuff, told apart by `is_thing`. Their boxes
  are those of the JSON, the right and lower edges exclusive; the reference
  takes the last row and column of the mask, and is a pixel smaller.

  Attributes:
    label_names: of the classes; with raw ids, "(id 12)" where there is none.
    category_ids: the file's id of each class.
    image_ids: the file's id of each image.
    is_thing: of each class, in panoptic files; else None.
    max_objects: the most objects of an image.
    notes: what the file has, and its table of classes, as lines.
    faults: what is wrong with its annotations, as lines.

  Args:
    split: "train" or "validation".
    path: the root, or a JSON file.
    train: the file of a split, relative to `path`, where its name is none of
    validation: those above.
    images: the folder of the images, or of their folders, relative to `path`.
    panoptic: reads annotations/panoptic_train2017.json and the like; the PNGs
      of the segments lie in a folder of that name beside it.
    masks: whether to make `instance_mask`.
    raw_ids: whether a class is the id of its category.
    holdout: share of the images held out where there is one file alone.

  Raises:
    ValueError: if files or folders are missing, the JSON is not COCO's, ids
      are used twice, an annotation is of a category that there is not, or most
      of the boxes are no boxes.
  """

  def __init__(
    self,
    split: str,
    path: str | os.PathLike[str],
    *,
    train: str | None = None,
    validation: str | None = None,
    images: str | None = None,
    panoptic: bool = False,
    masks: bool = False,
    raw_ids: bool = False,
    holdout: float = 0.1,
  ):
    if split not in coco_json.SPLITS:
      raise ValueError(
        f"Unknown split {split!r} of COCO. There are: "
        f"{', '.join(coco_json.SPLITS)}."
      )
    if not 0 <= holdout < 1:
      raise ValueError(f"holdout is a share from 0 to below 1; got {holdout}.")
    root = Path(path).expanduser().absolute()
    kind = "panoptic" if panoptic else "instances"
    named = {"train": train, "validation": validation}
    files = coco_json.annotation_files(root, kind, named)
    self.file = files.get(split) or files["train"]
    content = coco_json.read(self.file, panoptic)
    self._read_categories(content["categories"], panoptic, raw_ids)
    listed = content["images"]
    if "validation" not in files:
      named = [(image["file_name"], i) for i, image in enumerate(listed)]
      kept = folder.held_out(named, split, holdout) if named else []
      listed = [listed[i] for _, i in kept]
    if not listed:
      raise ValueError(f"{self.file} has no image for the split {split!r}.")
    self._read_images(listed)
    root = root if root.is_dir() else root.parent
    folders = coco_json.image_folders(root, self.file, split, images)
    few = [image["file_name"] for image in listed[:10]]
    self.root = coco_json.choose(folders, few, "the images")
    self._masks = masks
    annotations = content["annotations"]
    self._segments_root = None
    if panoptic:
      pngs = {a["image_id"]: a["file_name"] for a in annotations}
      self._pngs = _Strings(
        os.fsencode(pngs.get(i, "")) for i in self.image_ids.tolist()
      )
      if masks:
        few = [a["file_name"] for a in annotations[:10]]
        places = [self.file.with_suffix(""), root / self.file.stem]
        self._segments_root = coco_json.choose(
          places, few, "the segments' PNGs"
        )
      annotations = coco_json.segments(annotations)
    others = {image["id"] for image in content["images"]}
    others -= set(self.image_ids.tolist())
    self._read_annotations(
      [a for a in annotations if a.get("image_id") not in others]
    )

  def _read_categories(
    self, categories: Sequence[dict[str, Any]], panoptic: bool, raw_ids: bool
  ) -> None:
    by_id = {c["id"]: c for c in categories}
    if not by_id:
      raise ValueError(f"{self.file} has no categories.")
    if raw_ids and not all(type(i) is int and i >= 0 for i in by_id):
      raise ValueError(
        f"raw_ids=True needs whole numbers for the categories of {self.file}, "
        f"which has {', '.join(map(str, by_id))}."
      )
    ids = range(max(by_id) + 1) if raw_ids else by_id
    self.category_ids = tuple(ids)
    found = {i: by_id.get(i, {}) for i in ids}
    self.label_names = tuple(
      str(c.get("name", f"(id {i})")) for i, c in found.items()
    )
    self.is_thing = None
    if panoptic:
      self.is_thing = tuple(bool(c.get("isthing", 0)) for c in found.values())
    self._used = tuple(by_id)

  def _read_images(self, images: Sequence[dict[str, Any]]) -> None:
    self.image_ids = np.array([image["id"] for image in images])
    self._files = _Strings(os.fsencode(i["file_name"]) for i in images)
    sizes = [(i.get("height"), i.get("width")) for i in images]
    for (h, w), image in zip(sizes, images):
      if type(h) is not int or type(w) is not int or h < 1 or w < 1:
        raise ValueError(
          f"{self.file} gives {image['file_name']} the height {h} and the "
          f"width {w}, where whole numbers above 0 are needed."
        )
    self._hw = np.array(sizes, np.int32)

  def _read_annotations(self, annotations: list[dict[str, Any]]) -> None:
    """Fills the columns with what is sound; says what is not."""
    index = {id: i for i, id in enumerate(self.image_ids.tolist())}
    image = np.array(
      [index.get(a.get("image_id"), -1) for a in annotations], int
    )
    classes = {id: c for c, id in enumerate(self.category_ids)}
    classes = {id: classes[id] for id in self._used}
    for a, i in zip(annotations, image):
      if a.get("category_id") not in classes:
        raise ValueError(
          f"{self._place(a, i)} has the category {a.get('category_id')}, which "
          f"is not among those of {self.file}: "
          f"{', '.join(map(str, self._used))}."
        )
    boxes = _boxes(annotations)
    boxes, flags = objects.check_boxes(boxes, self._hw[image])
    flags[image < 0] = _STRANGE
    segments = None
    if self._masks and self._segments_root is None:
      segments = [
        segmentations.encode(a.get("segmentation"), tuple(self._hw[i].tolist()))
        for a, i in zip(annotations, image)
      ]
      flags[np.array([not s for s in segments], bool) & (flags == 0)] = _NO_MASK
    self.faults = self._report(annotations, image, flags)
    kept = np.flatnonzero(objects.is_sound(flags))
    kept = kept[np.argsort(image[kept], kind="stable")]
    self._starts = np.searchsorted(image[kept], np.arange(len(self) + 1))
    self._boxes = boxes[kept]
    chosen = [annotations[i] for i in kept]
    labels = [classes[a["category_id"]] for a in chosen]
    self._labels = np.array(labels, np.int32)
    self._crowd = np.array([a.get("iscrowd", 0) for a in chosen], bool)
    if self._segments_root is not None:
      self._ids = np.array([a["id"] for a in chosen], np.int64)
    area = (self._boxes[:, 2:] - self._boxes[:, :2]).prod(axis=1)
    given = segmentations.numbers([a.get("area") for a in chosen])
    self._area = np.where(np.isfinite(given), given, area).astype(np.float32)
    if segments is not None:
      self._segments = _Strings(segments[i] for i in kept)
    self.max_objects = int(np.diff(self._starts).max())

  def _place(self, annotation: dict[str, Any], image: int) -> str:
    """What a message calls an annotation."""
    file = f"image {annotation.get('image_id')}"
    if image >= 0:
      file = os.fsdecode(self._files(image))
    return f"annotation {annotation.get('id')} of {file}"

  def _report(self, annotations, image, flags) -> tuple[str, ...]:
    """Warns once of what is wrong, and refuses what can only be a mistake."""
    lines = []
    for flag, what in _FAULTS.items():
      found = np.flatnonzero(flags & flag)
      if not len(found):
        continue
      first = [self._place(annotations[i], image[i]) for i in found[:_NAMED]]
      more = ", ..." if len(found) > _NAMED else ""
      lines.append(f"{len(found):,} {what} ({', '.join(first)}{more})")
    if not lines:
      return ()
    what = "; ".join(lines)
    text = f"Of the {len(flags):,} annotations of {self.file}, {what}"
    fractions = (flags & objects.FIRST_PIXEL > 0).mean() > 0.5
    if fractions or (len(flags) >= _MANY and (flags != 0).mean() > 0.5):
      raise ValueError(
        f"{text}. COCO's boxes are (x, y, width, height) in pixels."
      )
    _warn_once(f"{text}.")
    return (f"{text}.",)

  @property
  def notes(self) -> tuple[str, ...]:
    counts = np.diff(self._starts)
    found = (
      f"{self.file}: {len(self):,} images, {(counts == 0).sum():,} of them "
      f"without a box, {len(self._boxes):,} boxes, {self._crowd.sum():,} of "
      f"them crowds, at most {self.max_objects} in an image"
    )
    table = ", ".join(
      f"{c} {name}" + (f" (id {id})" if c != id else "")
      for c, (name, id) in enumerate(zip(self.label_names, self.category_ids))
      if id in self._used
    )
    classes = f"{len(self._used)} classes: {table}"
    return (found, *textwrap.wrap(classes, _WIDTH))

  def __len__(self) -> int:
    return len(self._hw)

  def __getitem__(self, index: int) -> Example:
    index = self._check(index)
    try:
      image = Path(self.name(index)).read_bytes()
    except OSError as e:
      raise ops.BrokenImage(str(e)) from e
    if (hw := ops.image_hw(image)) != self.hw(index):
      raise ops.BrokenImage(
        f"The file is {hw[0]} x {hw[1]}, and {self.file} says "
        f"{self._hw[index, 0]} x {self._hw[index, 1]}."
      )
    span = slice(*self._starts[index : index + 2])
    example = {
      "id": index,
      "image": image,
      "objects": {
        "boxes": self._boxes[span],
        "label": self._labels[span],
        "is_crowd": self._crowd[span],
        "area": self._area[span],
      },
    }
    if self._masks:
      example["instance_mask"] = self._instance_mask(index, span)
    return example

  def hw(self, index: int) -> tuple[int, int]:
    h, w = self._hw[self._check(index)].tolist()
    return h, w

  def name(self, index: int) -> str:
    return str(self.root / os.fsdecode(self._files(self._check(index))))

  def _check(self, index: int) -> int:
    index = operator.index(index)
    if not 0 <= index < len(self):
      raise IndexError(f"Image {index} of the {len(self)} of {self.file}.")
    return index

  def _instance_mask(self, index: int, span: slice) -> np.ndarray:
    hw = self.hw(index)
    if self._segments_root is None:
      encoded = [self._segments(i) for i in range(span.start, span.stop)]
      return segmentations.instance_mask(encoded, self._area[span], hw)
    if not self._pngs(index):
      return np.zeros(hw, segmentations.id_dtype(0))
    file = self._segments_root / os.fsdecode(self._pngs(index))
    try:
      png = ops.decode(file.read_bytes())
    except OSError as e:
      raise ops.BrokenImage(str(e)) from e
    if png.shape[:2] != hw:
      raise ops.BrokenImage(f"{file} is of another size than its image.")
    return segmentations.panoptic_mask(png, self._ids[span])


class _Strings:
  """Many strings in one buffer: small, and fast to hand to workers."""

  def __init__(self, strings: Iterable[bytes]):
    strings = list(strings)
    self._buffer = b"".join(strings)
    self._ends = np.cumsum([0, *map(len, strings)])

  def __call__(self, index: int) -> bytes:
    start, end = self._ends[index : index + 2]
    return self._buffer[start:end]


@functools.lru_cache
def _warn_once(text: str) -> None:
  """Each evaluation reads its file again."""
  logging.warning("%s", text)


def _boxes(annotations: Sequence[dict[str, Any]]) -> Float[np.ndarray, "n 4"]:
  """(x0, y0, x1, y1), NaN where there is no box of four numbers."""
  nothing = (None,) * 4
  rows = [a.get("bbox") for a in annotations]
  rows = [r if isinstance(r, list) and len(r) == 4 else nothing for r in rows]
  boxes = segmentations.numbers([x for row in rows for x in row]).reshape(-1, 4)
  return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
