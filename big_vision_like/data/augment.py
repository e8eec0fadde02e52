"""Augmentations that ops strings can name: colour, shear, noise.

The arithmetic is that of timm 1.0.31 and torchvision, on whose recipes the
papers train: the same Pillow operations on the same drawn parameters give the
same bytes. Operations here take an example with a decoded image.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated, Literal

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from big_vision_like.api import Example

Interpolation = Literal["bilinear", "bicubic"]
Magnitude = Annotated[float, "0 to 10"]
Bin = Annotated[int, "0 to 30"]
Rgb = tuple[float, float, float]

RESAMPLING = {
  "bilinear": Image.Resampling.BILINEAR,
  "bicubic": Image.Resampling.BICUBIC,
}
# Magnitudes run from 0 to here.
_TOP = 10.0
# torchvision's are the numbers of so many bins.
_BINS = 31
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_BLANK = np.zeros((), np.uint8)


def pixels(example: Example) -> np.ndarray:
  """The decoded image of an example.

  Raises:
    ValueError: if it is not decoded yet.
  """
  image = example["image"]
  if not isinstance(image, np.ndarray):
    raise ValueError(
      "An op that moves pixels got an undecoded image: put `decode` first."
    )
  return image


def blank(h: int, w: int) -> np.ndarray:
  """The stand-in of an image when only its size is asked for.

  It is one byte, whatever its size; ops hand it on and look at no pixel.
  """
  return np.broadcast_to(_BLANK, (h, w, 3))


def is_blank(image: np.ndarray) -> bool:
  """Whether it is a stand-in, or a part of one."""
  return np.may_share_memory(image, _BLANK)


@dataclasses.dataclass(frozen=True)
class Canvas:
  """What stands where the image has been moved away, and how it is moved."""

  fill: tuple[int, int, int]
  resample: Image.Resampling

  def affine(
    self, image: Image.Image, matrix: tuple[float, ...]
  ) -> Image.Image:
    return image.transform(
      image.size,
      Image.Transform.AFFINE,
      matrix,
      resample=self.resample,
      fillcolor=self.fill,
    )

  def rotate(self, image: Image.Image, degrees: float) -> Image.Image:
    return image.rotate(degrees, resample=self.resample, fillcolor=self.fill)


def _posterize(image: Image.Image, bits: int) -> Image.Image:
  """Keeps the upper bits; none make it black, which Pillow now refuses."""
  mask = 0xFF & ~(0xFF >> bits)
  return image.point([i & mask for i in range(256)] * 3)


def _solarize_add(image: Image.Image, add: int) -> Image.Image:
  """Adds to what is darker than 128."""
  table = [min(255, i + add) if i < 128 else i for i in range(256)]
  return image.point(table * 3)


# An operation of RandAugment: (image, argument, canvas) -> image.
_APPLY: dict[str, Callable[[Image.Image, float, Canvas], Image.Image]] = {
  "auto_contrast": lambda image, _, c: ImageOps.autocontrast(image),
  "equalize": lambda image, _, c: ImageOps.equalize(image),
  "invert": lambda image, _, c: ImageOps.invert(image),
  "rotate": lambda image, v, c: c.rotate(image, v),
  "posterize": lambda image, v, c: _posterize(image, v),
  "solarize": lambda image, v, c: ImageOps.solarize(image, v),
  "solarize_add": lambda image, v, c: _solarize_add(image, v),
  "color": lambda image, v, c: ImageEnhance.Color(image).enhance(v),
  "contrast": lambda image, v, c: ImageEnhance.Contrast(image).enhance(v),
  "brightness": lambda image, v, c: ImageEnhance.Brightness(image).enhance(v),
  "sharpness": lambda image, v, c: ImageEnhance.Sharpness(image).enhance(v),
  "shear_x": lambda image, v, c: c.affine(image, (1, v, 0, 0, 1, 0)),
  "shear_y": lambda image, v, c: c.affine(image, (1, 0, 0, v, 1, 0)),
  "translate_x": lambda image, v, c: c.affine(
    image, (1, 0, v * image.width, 0, 1, 0)
  ),
  "translate_y": lambda image, v, c: c.affine(
    image, (1, 0, 0, 0, 1, v * image.height)
  ),
}
OPERATIONS = tuple(_APPLY)

_ENHANCE = ("color", "contrast", "brightness", "sharpness")
# The argument at the top magnitude; either direction is as likely.
_SIGNED = {
  "rotate": 30.0,
  "shear_x": 0.3,
  "shear_y": 0.3,
  "translate_x": 0.45,
  "translate_y": 0.45,
}


def argument(
  name: str, magnitude: float, rng: np.random.Generator, *, increasing: bool
) -> float:
  """What a magnitude from 0 to 10 means to an operation of RandAugment.

  With `increasing`, a larger magnitude changes the image more, in all
  operations; without it, posterize, solarize and the enhancements follow the
  first published code, in which it may change it less.
  """

  def sign() -> float:
    return -1.0 if rng.random() > 0.5 else 1.0

  level = magnitude / _TOP
  if name in _SIGNED:
    return level * _SIGNED[name] * sign()
  if name in _ENHANCE:
    if not increasing:
      return level * 1.8 + 0.1
    return max(0.1, 1.0 + level * 0.9 * sign())
  if name == "posterize":
    bits = int(level * 4)
    return 4 - bits if increasing else bits
  if name == "solarize":
    threshold = min(256, int(level * 256))
    return 256 - threshold if increasing else threshold
  if name == "solarize_add":
    return min(128, int(level * 110))
  return 0.0


def rand_augment(
  example: Example,
  rng: np.random.Generator,
  num_ops: int = 2,
  magnitude: Magnitude = 9,
  mstd: Magnitude = 0.5,
  p: float = 0.5,
  increasing: bool = True,
  fill: Rgb = (124, 116, 104),
  interpolation: Interpolation = "bicubic",
) -> Example:
  """timm's "rand-m9-mstd0.5-inc1": operations drawn with replacement.

  Each of the `num_ops` happens with probability `p`, with a magnitude from
  N(magnitude, mstd²), cut to 0..10. `fill` is where the image was moved away;
  timm takes the mean of the normalisation. Colour jitter beside it is off in
  timm, whatever its setting says.

  Raises:
    ValueError: for an example with boxes or masks, which would stay behind.
  """
  picture = _whole_picture(example)
  canvas = Canvas(tuple(map(int, fill)), RESAMPLING[interpolation])
  for index in rng.integers(len(OPERATIONS), size=num_ops):
    name = OPERATIONS[index]
    if rng.random() > p:
      continue
    drawn = rng.normal(magnitude, mstd) if mstd else magnitude
    level = min(max(drawn, 0.0), _TOP)
    value = argument(name, level, rng, increasing=increasing)
    picture = _APPLY[name](picture, value, canvas)
  return {**example, "image": np.asarray(picture)}


def _whole_picture(example: Example) -> Image.Image:
  image = pixels(example)
  left = {"objects", "instance_mask", "semantic_mask"} & example.keys()
  if left:
    raise ValueError(
      "RandAugment moves pixels and would leave behind "
      f"{sorted(left)}; it is for whole images."
    )
  return Image.fromarray(image)


# torchvision's set: it moves by whole pixels, and may do nothing.
_APPLY_TORCHVISION = {
  "identity": lambda image, _, c: image,
  "shear_x": _APPLY["shear_x"],
  "shear_y": _APPLY["shear_y"],
  "translate_x": lambda image, v, c: c.affine(image, (1, 0, -v, 0, 1, 0)),
  "translate_y": lambda image, v, c: c.affine(image, (1, 0, 0, 0, 1, -v)),
  "rotate": _APPLY["rotate"],
  "brightness": _APPLY["brightness"],
  "color": _APPLY["color"],
  "contrast": _APPLY["contrast"],
  "sharpness": _APPLY["sharpness"],
  "posterize": _APPLY["posterize"],
  "solarize": _APPLY["solarize"],
  "auto_contrast": _APPLY["auto_contrast"],
  "equalize": _APPLY["equalize"],
}
OPERATIONS_TORCHVISION = tuple(_APPLY_TORCHVISION)


def argument_torchvision(
  name: str, magnitude: int, rng: np.random.Generator, *, h: int, w: int
) -> float:
  """What a magnitude from 0 to 30 means to an operation of torchvision's."""

  def signed(top: float) -> float:
    value = _bin(0.0, top, magnitude)
    return -value if rng.integers(2) else value

  if name in ("shear_x", "shear_y"):
    return signed(0.3)
  if name in ("translate_x", "translate_y"):
    side = w if name == "translate_x" else h
    return int(signed(150.0 / 331.0 * side))
  if name == "rotate":
    return signed(30.0)
  if name in _ENHANCE:
    return 1.0 + signed(0.9)
  if name == "posterize":
    return 8 - round(magnitude / ((_BINS - 1) / 4))
  if name == "solarize":
    return _bin(255.0, 0.0, magnitude)
  return 0.0


def _bin(start: float, end: float, index: int) -> float:
  """torch.linspace(start, end, _BINS)[index], to the bit.

  Its step is a float32; it counts from the nearer end and rounds the sum once.
  """
  start, end = np.float32(start), np.float32(end)
  step = float((end - start) / np.float32(_BINS - 1))
  if index < _BINS // 2:
    return float(np.float32(float(start) + step * index))
  return float(np.float32(float(end) - step * (_BINS - 1 - index)))


def rand_augment_torchvision(
  example: Example,
  rng: np.random.Generator,
  num_ops: int = 2,
  magnitude: Bin = 9,
  fill: Rgb = (0, 0, 0),
  interpolation: Interpolation = "bilinear",
) -> Example:
  """torchvision's RandAugment: other operations than timm's, always applied.

  They are drawn with replacement; its magnitudes are the numbers of 31 bins.
  Bilinear is what torchvision's recipes and Apple's ml-cvnets take.

  Raises:
    ValueError: for an example with boxes or masks, which would stay behind.
  """
  picture = _whole_picture(example)
  canvas = Canvas(tuple(map(int, fill)), RESAMPLING[interpolation])
  w, h = picture.size
  for _ in range(num_ops):
    name = OPERATIONS_TORCHVISION[rng.integers(len(OPERATIONS_TORCHVISION))]
    value = argument_torchvision(name, magnitude, rng, h=h, w=w)
    picture = _APPLY_TORCHVISION[name](picture, value, canvas)
  return {**example, "image": np.asarray(picture)}


def color_jitter(
  example: Example,
  rng: np.random.Generator,
  brightness: float = 0.4,
  contrast: float = 0.4,
  saturation: float = 0.4,
) -> Example:
  """torchvision's ColorJitter: factors from 1 - x to 1 + x, in random order.

  A scalar colour jitter of timm is this, with no change of hue.
  """
  changes = (
    (ImageEnhance.Brightness, brightness),
    (ImageEnhance.Contrast, contrast),
    (ImageEnhance.Color, saturation),
  )
  drawn = [
    (changes[i][0], rng.uniform(1.0 - changes[i][1], 1.0 + changes[i][1]))
    for i in rng.permutation(len(changes))
  ]
  if is_blank(pixels(example)):
    return example
  picture = Image.fromarray(example["image"])
  for enhance, factor in drawn:
    picture = enhance(picture).enhance(factor)
  return {**example, "image": np.asarray(picture)}


def random_erasing(
  example: Example,
  rng: np.random.Generator,
  p: float = 0.25,
  area: tuple[float, float] = (0.02, 1 / 3),
  aspect: tuple[float, float] = (0.3, 1 / 0.3),
  mean: Rgb = IMAGENET_MEAN,
  std: Rgb = IMAGENET_STD,
) -> Example:
  """Noise in a random rectangle, with probability p (timm's mode "pixel").

  timm writes N(0, 1) after the normalisation. Pixels are bytes here, so the
  noise is N(mean, std²) of the normalisation, cut to what a byte holds: it
  lies within 0.01 of timm's where that is an image's value, and of ImageNet's
  channels 3 % to 4 % of the numbers are cut.
  """
  image = pixels(example)
  if rng.random() > p:
    return example
  box = erased_box(rng, *image.shape[:2], area=area, aspect=aspect)
  if box is None:
    return example
  y, x, h, w = box
  noise = rng.normal(mean, std, size=(h, w, 3))
  image = image.copy()
  image[y : y + h, x : x + w] = np.clip(np.rint(noise * 255), 0, 255)
  return {**example, "image": image}


def erased_box(
  rng: np.random.Generator,
  height: int,
  width: int,
  *,
  area: tuple[float, float],
  aspect: tuple[float, float],
) -> tuple[int, int, int, int] | None:
  """(y, x, h, w) smaller than the image, or None after ten attempts."""
  for _ in range(10):
    target = rng.uniform(*area) * height * width
    ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
    h = round(math.sqrt(target * ratio))
    w = round(math.sqrt(target / ratio))
    if h < height and w < width:
      y = int(rng.integers(height - h + 1))
      x = int(rng.integers(width - w + 1))
      return y, x, h, w
  return None


OPS: dict[str, Callable[..., Example]] = {
  "rand_augment": rand_augment,
  "rand_augment_torchvision": rand_augment_torchvision,
  "color_jitter": color_jitter,
  "random_erasing": random_erasing,
}
