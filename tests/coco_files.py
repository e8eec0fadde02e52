"""Hand-made COCO files: odd ids, an empty image, a crowd and broken boxes."""

import json
import pathlib

import cv2
import numpy as np

CATEGORIES = (
  {"id": 90, "name": "cat"},
  {"id": 3, "name": "ant"},
  {"id": 17, "name": "bee"},
)
COLORS = {3: (230, 40, 40), 17: (40, 220, 60), 90: (50, 80, 240)}
STUFF = (
  {"id": 101, "name": "sky", "isthing": 0},
  {"id": 107, "name": "sea", "isthing": 0},
)
# Of the images by number.
EMPTY, CROWD, BROKEN = 2, 3, 4
# (x, y, width, height) of what is wrong in image BROKEN.
INVERTED = [30, 20, -10, 8]
OVERHANGING = [-5, 2, 25, 13]


def instances(
  root: pathlib.Path, split: str = "train", count: int = 8, seed: int = 0
) -> dict:
  """Writes annotations/instances_<split>2017.json and <split>2017/<split>*.png.

  Rectangles in the colour of their class, on dark noise; their ids fall while
  their numbers rise. Returns what stands in the file.
  """
  rng = np.random.default_rng([seed, len(split)])
  content = {"images": [], "annotations": [], "categories": list(CATEGORIES)}
  for number in range(count):
    h, w = (int(n) for n in rng.integers(60, 101, 2))
    pixels = rng.integers(0, 60, (h, w, 3)).astype(np.uint8)
    name = f"{split}{number:04}.png"
    image = {"id": 1000 - 7 * number, "file_name": name}
    content["images"].append({**image, "height": h, "width": w})
    boxes = [] if number == EMPTY else _draw_boxes(rng, h, w)
    for x, y, width, height in boxes:
      category = int(rng.choice([3, 17, 90]))
      pixels[y : y + height, x : x + width] = COLORS[category]
      _annotate(content, image, [x, y, width, height], category)
    if number == CROWD:
      _annotate(content, image, [10, 5, 40, 30], 17)
      counts = [5 * w, 0, h * w - 5 * w]
      rle = {"size": [h, w], "counts": counts}
      content["annotations"][-1] |= {"iscrowd": 1, "segmentation": rle}
    if number == BROKEN:
      _annotate(content, image, INVERTED, 3)
      _annotate(content, image, OVERHANGING, 17)
    _write(root / f"{split}2017" / name, pixels)
  _write(root / "annotations" / f"instances_{split}2017.json", content)
  return content


def panoptic(
  root: pathlib.Path, split: str = "train", count: int = 5, seed: int = 0
) -> dict:
  """Adds segments to what `instances` wrote: its boxes, before sky and sea.

  Writes annotations/panoptic_<split>2017.json and a folder of PNGs.
  """
  file = root / "annotations" / f"instances_{split}2017.json"
  given = json.loads(file.read_text())
  things = [{**c, "isthing": 1} for c in given["categories"]]
  content = {"images": given["images"][:count], "annotations": []}
  content["categories"] = [*things, *STUFF]
  rng = np.random.default_rng(seed)
  folder = root / "annotations" / f"panoptic_{split}2017"
  for image in content["images"]:
    h, w = image["height"], image["width"]
    ids = np.full((h, w), 300)
    ids[h // 2 :] = 70_001
    categories = {300: 101, 70_001: 107}
    for a in given["annotations"]:
      x, y, width, height = a["bbox"]
      if a["image_id"] == image["id"] and "iscrowd" not in a and width > 0:
        segment = int(rng.integers(2, 2**24))
        ids[max(y, 0) : y + height, max(x, 0) : x + width] = segment
        categories[segment] = a["category_id"]
    segments = [_segment(ids == i, i, c) for i, c in categories.items()]
    name = image["file_name"]
    entry = {"image_id": image["id"], "file_name": name}
    entry["segments_info"] = [s for s in segments if s]
    content["annotations"].append(entry)
    colours = np.stack([ids >> 8 * k & 255 for k in range(3)], axis=-1)
    _write(folder / name, colours.astype(np.uint8))
  _write(folder.with_suffix(".json"), content)
  return content


def _draw_boxes(rng, h, w):
  """One to three boxes (x, y, width, height) that do not touch."""
  thirds = rng.permutation(3)[: rng.integers(1, 4)]
  boxes = []
  for third in thirds:
    width = int(rng.integers(9, w // 3))
    height = int(rng.integers(9, h))
    x = int(third * (w // 3) + rng.integers(w // 3 - width))
    boxes.append((x, int(rng.integers(h - height)), width, height))
  return boxes


def _annotate(content, image, box, category):
  x, y, w, h = box
  content["annotations"].append(
    {
      "id": 10 * len(content["annotations"]) + 3,
      "image_id": image["id"],
      "category_id": category,
      "bbox": box,
      "area": abs(w * h) - 0.5,
      "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
    }
  )


def _segment(mask, id, category):
  if not mask.any():
    return None
  x, y, w, h = cv2.boundingRect(mask.astype(np.uint8))
  return {
    "id": id,
    "category_id": category,
    "bbox": [x, y, w, h],
    "area": int(mask.sum()),
    "iscrowd": 0,
  }


def _write(path, content):
  path.parent.mkdir(parents=True, exist_ok=True)
  if isinstance(content, dict):
    path.write_text(json.dumps(content))
  else:
    assert cv2.imwrite(str(path), content[..., ::-1])
