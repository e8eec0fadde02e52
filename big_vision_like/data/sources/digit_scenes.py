"""Real handwritten digits on plain colours or on crops of real photographs.

The embedded data set of every config: nothing is downloaded, each example is
rendered on demand as a pure function of (seed, split, level, index), up to
OpenCV's version. Held out for validation are the last 497 of the 1,797 digits
and the right quarter of every photograph.

The pictures are read from the installed wheels. scikit-learn: the digits
(test set of the UCI "Optical Recognition of Handwritten Digits"), china.jpg
(by danielbuechele) and flower.jpg (by vultilion), both from Flickr under CC
BY 2.0. scikit-image, all CC0, in the public domain or without known copyright
restrictions, as its documentation says: astronaut and hubble_deep_field
(NASA), rocket (SpaceX), chelsea (Stefan van der Walt), coffee (Rachel
Michetti, courtesy of Pikolo Espresso Bar), camera (Lav Varshney), retina
(Mikael Häggström), ihc (CMMI), coins (Brooklyn Museum), brick and gravel
(CC0Textures), grass (linolafett on DeviantArt).
"""

import dataclasses
import functools
import importlib.util
import math
import operator
import os
import re
from typing import Any

import cv2
import numpy as np

from big_vision_like.api import Example

# OpenCV's own threads would fight those of the loader's workers.
cv2.setNumThreads(0)

SIZES = {"train": 100_000, "validation": 2_000}  # the default sizes
COLORS = {
  "red": (220, 40, 40),
  "green": (40, 190, 60),
  "blue": (50, 90, 230),
  "yellow": (240, 220, 40),
  "white": (245, 245, 245),
  "black": (15, 15, 15),
  "orange": (245, 140, 30),
  "purple": (150, 60, 200),
}
BRIGHT = ("white", "yellow", "orange", "green")
# Package, file and words for captions of each photograph.
PHOTOS = (
  ("skimage", "data/astronaut.png", "an astronaut"),
  ("skimage", "data/chelsea.png", "a cat"),
  ("skimage", "data/coffee.png", "a cup of coffee"),
  ("skimage", "data/rocket.jpg", "a rocket"),
  ("skimage", "data/hubble_deep_field.jpg", "galaxies"),
  ("skimage", "data/ihc.png", "stained tissue"),
  ("skimage", "data/retina.jpg", "a retina"),
  ("skimage", "data/brick.png", "a brick wall"),
  ("skimage", "data/grass.png", "grass"),
  ("skimage", "data/gravel.png", "gravel"),
  ("skimage", "data/camera.png", "a cameraman"),
  ("skimage", "data/coins.png", "coins"),
  ("sklearn", "datasets/images/china.jpg", "a temple"),
  ("sklearn", "datasets/images/flower.jpg", "a flower"),
)
DIGITS = (
  "zero",
  "one",
  "two",
  "three",
  "four",
  "five",
  "six",
  "seven",
  "eight",
  "nine",
)
_BACKGROUNDS = tuple(re.sub("^an? ", "", p[2]) for p in PHOTOS)
# What an image can be classified by.
TARGETS = {
  "digit": DIGITS,
  "color": tuple(COLORS),
  "background": _BACKGROUNDS,
  "panoptic": DIGITS + _BACKGROUNDS,
}
TRAIN_DIGITS = 1_300
TRAIN_WIDTH = 0.75  # the share of a photograph's width seen in training
GLYPH = 72  # side of an upsampled digit with its margin
MIN_DIGIT = 12  # pixels; below, 8 x 8 digits cannot be told apart
MIN_ALPHA = 96  # from here on a pixel belongs to the digit in the masks


@dataclasses.dataclass(frozen=True)
class Level:
  """How hard the scenes are.

  `side` is the range of sqrt(height * width), `aspect` the largest width /
  height or its inverse, `digit` the range of a digit's height as a share of
  the shorter side, `rotation` a standard deviation in degrees. `plain` is the
  range of the channels of a plain background; without it there is a photograph.
  """

  side: tuple[int, int]
  aspect: float
  digits: tuple[int, int]
  digit: tuple[float, float]
  rotation: float
  colors: tuple[str, ...] = tuple(COLORS)
  plain: tuple[int, int] | None = None


LEVELS = {
  "plain": Level((30, 39), 1.5, (1, 1), (0.8, 1.0), 5.0, BRIGHT, (0, 60)),
  "plain_multi": Level((38, 54), 1.4, (1, 3), (0.4, 0.75), 7.0, plain=(0, 255)),
  "photo": Level((48, 128), 1.8, (1, 1), (0.5, 0.9), 10.0),
  "photo_boxes": Level((64, 96), 1.5, (1, 3), (0.3, 0.8), 10.0),
  "photo_multi": Level((96, 320), 2.0, (1, 6), (0.12, 0.7), 10.0),
}


@functools.cache
def _glyphs() -> tuple[np.ndarray, np.ndarray]:
  """Opacity uint8 [1797, GLYPH, GLYPH] and class int32 [1797] of the digits."""
  path = _wheel_file("sklearn", "datasets/data/digits.csv.gz")
  table = np.loadtxt(path, delimiter=",", dtype=np.uint8)
  small = (table[:, :64].astype(np.float32) * (255 / 16)).reshape(-1, 8, 8)
  # Half a pixel of the bitmap stays as a margin, so that strokes fade out.
  framed = np.pad(small, ((0, 0), (1, 1), (1, 1)))
  large = [
    cv2.resize(g, (80, 80), interpolation=cv2.INTER_CUBIC) for g in framed
  ]
  glyphs = np.clip(np.stack(large)[:, 4:-4, 4:-4], 0, 255).astype(np.uint8)
  return glyphs, table[:, 64].astype(np.int32)


@functools.cache
def _photos() -> tuple[np.ndarray, ...]:
  """The photographs, uint8 [H,W,3]."""
  photos = []
  for package, file, _ in PHOTOS:
    photo = cv2.imread(_wheel_file(package, file), cv2.IMREAD_COLOR_RGB)
    if "retina" in file:  # large, round, and black around
      photo = photo[150:1250, 150:1250]
      photo = cv2.resize(photo, (700, 700), interpolation=cv2.INTER_AREA)
    photos.append(photo)
  return tuple(photos)


def _wheel_file(package: str, file: str) -> str:
  """The path of a file of an installed package, which is not imported.

  Importing scikit-learn costs every worker seconds and 100 MB.
  """
  spec = importlib.util.find_spec(package)
  for root in (spec and spec.submodule_search_locations) or ():
    if os.path.exists(path := os.path.join(root, file)):
      return path
  raise ValueError(
    f"digit_scenes reads {file} from the installed package {package!r}, which "
    "does not have it: install scikit-learn and scikit-image again."
  )


@dataclasses.dataclass(frozen=True)
class Source:
  """Digit scenes as a `Source`: see api.py.

  An example has
    image          uint8 [H,W,3]
    id             the index
    label          class of the largest digit (0 to 9), or by `target` its
                   colour, or the photograph behind it
    multi_label    uint8, the classes that occur
    objects        boxes float32 [O,4] (x0, y0, x1, y1) in pixels, the
                   right and lower edges exclusive; label int32 [O]; color
                   int32 [O], a position in COLORS, -1 for a photograph
    instance_mask  uint8 [H,W], 0 background, else 1 + position in objects
    semantic_mask  uint8 [H,W], 0 background, else 1 + class
    caption        "a large white four and a small red two on a cat"
  There is at least one digit. Digits do not cover each other. `target` is one
  of TARGETS; it changes the labels alone, but for "panoptic": its last object
  is the photograph, all that is no digit, in the masks too. `is_thing` tells
  the two kinds of classes apart.
  """

  split: str = "train"
  level: str = "plain"
  target: str = "digit"
  size: int | None = None
  seed: int = 0

  def __post_init__(self):
    for field, choices in (
      ("split", SIZES),
      ("level", LEVELS),
      ("target", TARGETS),
    ):
      if (value := getattr(self, field)) not in choices:
        raise ValueError(
          f"Unknown {field} {value!r} of digit_scenes. There are: "
          f"{', '.join(choices)}."
        )
    if (self.size is not None and self.size < 1) or self.seed < 0:
      raise ValueError(
        "digit_scenes takes a size of at least 1 and a seed of at least 0; "
        f"got size={self.size}, seed={self.seed}."
      )

    photographs = ("background", "panoptic")
    if self.target in photographs and LEVELS[self.level].plain:
      raise ValueError(
        f"The level {self.level!r} of digit_scenes has plain backgrounds; "
        f"target={self.target!r} is for the levels with photographs."
      )

  @property
  def label_names(self) -> tuple[str, ...]:
    return TARGETS[self.target]

  @property
  def is_thing(self) -> tuple[bool, ...] | None:
    if self.target != "panoptic":
      return None
    return tuple(name in DIGITS for name in self.label_names)

  @property
  def max_objects(self) -> int:
    return LEVELS[self.level].digits[1] + (self.target == "panoptic")

  def __len__(self) -> int:
    return SIZES[self.split] if self.size is None else self.size

  def name(self, index: int) -> str:
    return f"digit_scenes/{self.split}/{index}"

  def hw(self, index: int) -> tuple[int, int]:
    return _draw_hw(self._rng(index), LEVELS[self.level])

  def __getitem__(self, index: int) -> Example:
    level = LEVELS[self.level]
    rng = self._rng(index)
    h, w = _draw_hw(rng, level)
    image, photo = _background(rng, level, h, w, self.split == "train")
    scene = _Scene(image, photo)
    for _ in range(rng.integers(level.digits[0], level.digits[1] + 1)):
      scene.draw_digit(rng, level, self.split == "train")
    return {"id": operator.index(index), **scene.example(self.target)}

  def _rng(self, index: int) -> np.random.Generator:
    index = operator.index(index)
    if not 0 <= index < len(self):
      raise IndexError(f"{self.name(index)} of {len(self)} examples.")
    key = [self.seed, list(SIZES).index(self.split)]
    # The last word of the counter: a stream of 2^192 blocks for each index.
    return np.random.Generator(
      np.random.Philox(key=key, counter=[0, 0, 0, index])
    )


def _draw_hw(rng: np.random.Generator, level: Level) -> tuple[int, int]:
  """Area and aspect ratio are log-uniform."""
  side = _log_uniform(rng, *level.side)
  stretch = math.sqrt(_log_uniform(rng, 1 / level.aspect, level.aspect))
  return round(side / stretch), round(side * stretch)


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
  return math.exp(rng.uniform(math.log(low), math.log(high)))


def _background(
  rng: np.random.Generator, level: Level, h: int, w: int, train: bool
) -> tuple[np.ndarray, int | None]:
  """An image without digits, and which of PHOTOS it is of."""
  if level.plain:
    image = np.empty((h, w, 3), np.uint8)
    image[:] = rng.integers(*level.plain, 3, endpoint=True)
    return image, None
  which = int(rng.integers(len(PHOTOS)))
  photo = _photos()[which]
  edge = int(photo.shape[1] * TRAIN_WIDTH)
  region = photo[:, :edge] if train else photo[:, edge:]
  height, width = region.shape[:2]
  scale = rng.uniform(0.35, 1) * min(height / h, width / w)
  crop_h, crop_w = max(1, int(h * scale)), max(1, int(w * scale))
  y = int(rng.integers(height - crop_h + 1))
  x = int(rng.integers(width - crop_w + 1))
  image = cv2.resize(
    region[y : y + crop_h, x : x + crop_w],
    (w, h),
    interpolation=cv2.INTER_AREA if scale > 1 else cv2.INTER_LINEAR,
  )
  if rng.random() < 0.5:
    image = cv2.flip(image, 1)
  levels = np.arange(256) * rng.uniform(0.6, 1.1) + rng.uniform(-20, 30)
  image = cv2.LUT(image, np.clip(levels, 0, 255).astype(np.uint8))
  return image, which


class _Scene:
  """An image while digits are drawn onto it."""

  def __init__(self, image: np.ndarray, photo: int | None):
    self.image, self.photo = image, photo
    self.instance_mask = np.zeros(image.shape[:2], np.uint8)
    self.boxes: list[tuple[int, int, int, int]] = []
    self.labels: list[int] = []
    self.colors: list[int] = []

  def draw_digit(
    self, rng: np.random.Generator, level: Level, train: bool
  ) -> None:
    """Draws a digit, unless it hits others in six places: the first never."""
    h, w = self.instance_mask.shape
    glyphs, classes = _glyphs()
    first, end = (0, TRAIN_DIGITS) if train else (TRAIN_DIGITS, len(classes))
    which = int(rng.integers(first, end))
    glyph_h = int(min(h, w) * _log_uniform(rng, *level.digit))
    glyph_w = int(glyph_h * math.exp(rng.normal(-0.05, 0.12)))
    glyph_h = min(max(MIN_DIGIT, glyph_h), h)
    glyph_w = min(max(MIN_DIGIT, glyph_w), w)
    angle = rng.normal(0, level.rotation)
    alpha = _warp(glyphs[which], glyph_h, glyph_w, angle)
    visible = cv2.compare(alpha, MIN_ALPHA, cv2.CMP_GE)
    colors = [level.colors[i] for i in rng.integers(len(level.colors), size=3)]
    for _ in range(6):
      y = int(rng.integers(h - glyph_h + 1))
      x = int(rng.integers(w - glyph_w + 1))
      window = np.s_[y : y + glyph_h, x : x + glyph_w]
      if not cv2.bitwise_and(self.instance_mask[window], visible).any():
        break
    else:
      return
    color = self._blend(window, alpha, colors)
    self.instance_mask[window] |= visible & np.uint8(len(self.labels) + 1)
    left, top, width, height = cv2.boundingRect(visible)
    self.boxes.append((x + left, y + top, x + left + width, y + top + height))
    self.labels.append(int(classes[which]))
    self.colors.append(color)

  def _blend(
    self, window: tuple[slice, slice], alpha: np.ndarray, names: list[str]
  ) -> int:
    """Paints in the colour farthest from what is there; returns which."""
    patch = self.image[window]
    mean = cv2.mean(patch)[:3]
    name = max(names, key=lambda n: math.dist(COLORS[n], mean))
    # OpenCV's 8-bit products are six times faster than numpy's wider ones.
    weight = cv2.merge((alpha, alpha, alpha))
    paint = np.full_like(patch, COLORS[name])
    paint = cv2.multiply(paint, weight, scale=1 / 255)
    patch[:] = cv2.add(paint, cv2.multiply(patch, 255 - weight, scale=1 / 255))
    return tuple(COLORS).index(name)

  def example(self, target: str) -> dict[str, Any]:
    """The scene and all that is known of it, classified by a target."""
    boxes = np.array(self.boxes, np.float32)
    labels = np.array(self.labels, np.int32)
    colors = np.array(self.colors, np.int32)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    by_size = np.argsort(-area, kind="stable")
    found = {
      "digit": labels,
      "color": colors,
      "background": np.full(len(labels), self.photo),
      "panoptic": labels,
    }[target]
    multi_label = np.zeros(len(TARGETS[target]), np.uint8)
    multi_label[found] = 1
    caption = self._caption(boxes, by_size[:3])
    if target == "panoptic" and not self.instance_mask.all():
      stuff = len(DIGITS) + self.photo
      multi_label[stuff] = 1
      boxes = np.concatenate([boxes, self._cover_rest()])
      labels = np.append(labels, np.int32(stuff))
      colors = np.append(colors, np.int32(-1))
    classes = np.zeros(256, np.uint8)
    classes[1 : 1 + len(labels)] = labels + 1
    return {
      "image": self.image,
      "label": int(found[by_size[0]]),
      "multi_label": multi_label,
      "objects": {
        "boxes": boxes,
        "label": labels,
        "color": colors,
      },
      "instance_mask": self.instance_mask,
      "semantic_mask": cv2.LUT(self.instance_mask, classes),
      "caption": caption,
    }

  def _cover_rest(self) -> np.ndarray:
    """Makes one more object of the pixels without one; its box [1,4]."""
    rest = cv2.compare(self.instance_mask, 0, cv2.CMP_EQ)
    self.instance_mask |= rest & np.uint8(len(self.labels) + 1)
    left, top, width, height = cv2.boundingRect(rest)
    return np.array([[left, top, left + width, top + height]], np.float32)

  def _caption(self, boxes: np.ndarray, order: np.ndarray) -> str:
    photo = "a plain background"
    if self.photo is not None:
      photo = PHOTOS[self.photo][2]
    large = 0.4 * min(self.instance_mask.shape)
    digits = [
      f"a {'large' if boxes[i, 3] - boxes[i, 1] > large else 'small'} "
      f"{tuple(COLORS)[self.colors[i]]} {DIGITS[self.labels[i]]}"
      for i in order
    ]
    return f"{' and '.join(digits)} on {photo}"


def _warp(glyph: np.ndarray, h: int, w: int, angle: float) -> np.ndarray:
  """The glyph's opacity, rotated by degrees and scaled to h x w."""
  matrix = cv2.getRotationMatrix2D((GLYPH / 2, GLYPH / 2), angle, 1)
  matrix *= np.array([[w / GLYPH], [h / GLYPH]])
  return cv2.warpAffine(glyph, matrix, (w, h), flags=cv2.INTER_LINEAR)
