"""COCO's JSON files: where they and their images lie, and what they hold."""

import collections
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SPLITS = {
  "train": ("train",),
  "validation": ("val", "validation", "valid", "test"),
}
_ANNOTATIONS = (
  "annotations/{kind}_{name}2017.json",
  "annotations/{kind}_{name}.json",
  "annotations/{name}.json",
  "{name}.json",
  "{name}/_annotations.coco.json",
)
_IMAGES = ("{name}2017", "{name}", "images/{name}", "images", ".")


def annotation_files(
  root: Path, kind: str, named: dict[str, str | None]
) -> dict[str, Path]:
  """The JSON of each split; there is always a "train"."""
  if root.is_file():
    if any(named.values()):
      raise ValueError(
        f"Give the folder of the files {named}, not the file {root}."
      )
    return {"train": root}
  if not root.is_dir():
    raise ValueError(f"{root}, where COCO's annotations should be, is missing.")
  files = {}
  for split, names in SPLITS.items():
    candidates = [
      root / pattern.format(kind=kind, name=name)
      for name in names
      for pattern in _ANNOTATIONS
    ]
    if named[split]:
      candidates = [root / named[split]]
    if found := next((c for c in candidates if c.is_file()), None):
      files[split] = found
    elif named[split] or split == "train":
      tried = ", ".join(str(c.relative_to(root)) for c in candidates)
      raise ValueError(f"{root} has no {split} annotations: no {tried}.")
  return files


def read(file: Path, panoptic: bool) -> dict[str, Any]:
  """What a file holds, its images by id.

  Raises:
    ValueError: if it is no such file, or uses an id twice.
  """
  try:
    content = json.loads(file.read_bytes())
  except ValueError as e:
    raise ValueError(f"{file} is not JSON: {e}.") from e
  keys = ("images", "annotations", "categories")
  if not isinstance(content, dict) or not set(keys) <= set(content):
    found = sorted(content) if isinstance(content, dict) else type(content)
    raise ValueError(f"{file} is not COCO's: it needs {keys}, not {found}.")
  _check_fields(file, content["images"], "id", "file_name")
  _check_fields(file, content["categories"], "id")
  if any(
    ("segments_info" in a) != panoptic for a in content["annotations"][:1]
  ):
    raise ValueError(
      f"{file} has {'instances' if panoptic else 'segments'}: set "
      f"config.data.source.panoptic={not panoptic}."
    )
  for what in ("images", "categories", "annotations"):
    ids = [entry["id"] for entry in content[what] if "id" in entry]
    twice = [i for i, n in collections.Counter(ids).items() if n > 1]
    if twice:
      raise ValueError(f"{file} has several {what} with the id {twice[0]}.")
    content[what].sort(key=lambda entry: entry.get("id", 0))
  return content


def _check_fields(file: Path, entries: Sequence[Any], *keys: str) -> None:
  for entry in entries:
    if not isinstance(entry, dict) or not set(keys) <= set(entry):
      raise ValueError(
        f"{file} is not COCO's: {entry} has no {' or no '.join(keys)}."
      )


def image_folders(
  root: Path, file: Path, split: str, images: str | None
) -> list[Path]:
  """Where the images of a split may lie."""
  places = [
    root / (images or ".") / pattern.format(name=name)
    for name in SPLITS[split]
    for pattern in _IMAGES
  ]
  return list(dict.fromkeys([*places, *([] if images else [file.parent])]))


def choose(folders: Sequence[Path], files: Sequence[str], what: str) -> Path:
  """The first folder that has any of the files."""
  for place in folders:
    if any((place / file).is_file() for file in files):
      return place
  raise ValueError(
    f"Cannot find {what}: {', '.join(files[:1])} is not in "
    f"{', '.join(map(str, folders))}."
  )


def segments(annotations: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """The segments of panoptic annotations as one list, like instances."""
  return [
    {**segment, "image_id": a["image_id"]}
    for a in annotations
    for segment in a["segments_info"]
  ]
