"""Image operations on the host, named in one string.

`parse("decode|random_resized_crop(224)|flip_lr")` makes a callable
`op(example, rng) -> example`. Arguments are Python literals. Every operation
that moves pixels moves the example's `objects` (boxes and what stands beside
them) and masks along with the image; objects that leave the picture are
dropped. Labels and captions of the whole image stay as they are.

We decode with OpenCV and resize with Pillow, the fastest pair that agrees
with `jax.image.resize`; bicubic is Pillow's alone. Nothing here rotates an
image by its EXIF tag, so that boxes and masks stay aligned. What changes
colours, and RandAugment, is in `augment.py`.
"""

import ast
import dataclasses
import difflib
import inspect
import io
import math
import os
from collections.abc import Callable, Iterator
from typing import Annotated, Any, get_args

import cv2
import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from big_vision_like.api import Example
from big_vision_like.data import augment
from big_vision_like.data.augment import (
  RESAMPLING,
  Bin,
  Interpolation,
  Magnitude,
  Rgb,
)

# OpenCV's own threads would fight those of the loader's workers.
cv2.setNumThreads(0)

# Pillow's own limit: more is a decompression bomb, not a photograph.
MAX_PIXELS = 178_956_970
# Pillow knows formats that run other programs (EPS); images are these.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
MASKS = ("instance_mask", "semantic_mask")
# Maps of 1 + the position of an object; the second stays as it was decoded.
ID_MAPS = ("instance_mask", "original_id_map")

Pixels = UInt8[np.ndarray, "height width 3"]
Range = tuple[float, float]
Size = int | tuple[int, int]
Sides = int | tuple[int, ...]
Share = Annotated[float, "above 0, at most 1"]
Box = tuple[int, int, int, int]


class BrokenImage(Exception):
  """An image that cannot be read: its example is to be skipped and counted."""


def image_hw(image: bytes | str | os.PathLike[str]) -> tuple[int, int]:
  """(height, width) as `decode` will give, from the header alone.

  Args:
    image: the encoded image, or the name of its file.

  Raises:
    BrokenImage: if the header cannot be read, or promises absurd sizes.
  """
  with _open(image) as header:
    return header.height, header.width


def decode(image: bytes | np.ndarray) -> Pixels:
  """The image as RGB; an array passes through after a check.

  Alpha is ignored, of animations we take the first frame, and of 16-bit
  channels the upper 8 bits.

  Raises:
    BrokenImage: if the bytes are not a whole image of a known format.
    ValueError: if an array is not uint8 [H,W,3], which is a source's error.
  """
  if isinstance(image, np.ndarray):
    if image.dtype != np.uint8 or image.shape[2:] != (3,) or 0 in image.shape:
      raise ValueError(
        "An image that is an array must be uint8 [H,W,3]; the source gave "
        f"{image.dtype} {list(image.shape)}."
      )
    return image
  with _open(image) as header:
    pixels = _decode_opencv(image) if _is_plain(header) else None
    return _decode_pillow(header) if pixels is None else pixels


def resize(
  image: Pixels,
  h: int,
  w: int,
  *,
  box: Box | None = None,
  interpolation: Interpolation = "bilinear",
) -> UInt8[np.ndarray, "{h} {w} 3"]:
  """Antialiased resize to h x w, of a crop if a box is given.

  Bilinear is within 1.5 grey levels of `jax.image.resize(..., "bilinear")`,
  bicubic is Pillow's. The box is (x0, y0, x1, y1) in whole pixels. The result
  may be a view of `image`, or read-only. A blank stays blank.
  """
  if box is not None:
    x0, y0, x1, y1 = box
    image = image[y0:y1, x0:x1]
  height, width = image.shape[:2]
  if (height, width) == (h, w):
    return image
  if augment.is_blank(image):
    return augment.blank(h, w)
  if interpolation == "bilinear" and h >= height and w >= width:
    image = np.ascontiguousarray(image)
    return cv2.resize(image, (w, h), interpolation=cv2.INTER_LINEAR)
  resample = RESAMPLING[interpolation]
  return np.asarray(Image.fromarray(image).resize((w, h), resample))


def _open(image: bytes | str | os.PathLike[str]) -> Image.Image:
  """The header of an image, by Pillow."""
  file = io.BytesIO(image) if isinstance(image, bytes) else image
  if image == b"":
    raise BrokenImage("The file is empty.")
  # A broken file makes Pillow's parsers raise nearly anything.
  try:
    return Image.open(file, formats=FORMATS)
  except Image.UnidentifiedImageError as e:
    raise BrokenImage(f"Not an image of the formats {FORMATS}.") from e
  except Exception as e:
    raise BrokenImage(f"Cannot read the header: {_describe(e)}.") from e


def _describe(e: Exception) -> str:
  return f"{type(e).__name__}: {e}"


def _check_size(h: int, w: int) -> None:
  """Refuses what a sliver of an image would become when it is enlarged."""
  if h * w > MAX_PIXELS:
    raise BrokenImage(f"Would be resized to {h} x {w}: more than {MAX_PIXELS}.")


def _is_plain(header: Image.Image) -> bool:
  """Whether OpenCV reads it as Pillow would: 8 bits, colour or grey, still."""
  if header.format in ("JPEG", "MPO"):
    return header.mode in ("RGB", "L")
  return (
    header.format == "PNG"
    and header.mode in ("RGB", "L")
    and not getattr(header, "is_animated", False)
  )


def _decode_opencv(image: bytes) -> Pixels | None:
  """None where OpenCV gives up: Pillow then reads it, or says why not."""
  flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
  try:
    return cv2.imdecode(np.frombuffer(image, np.uint8), flags)
  except cv2.error:
    return None


def _decode_pillow(image: Image.Image) -> Pixels:
  # A broken file makes Pillow's parsers raise nearly anything.
  try:
    image.load()
  except Exception as e:
    raise BrokenImage(f"Cannot decode the pixels: {_describe(e)}.") from e
  if image.mode == "F":
    raise BrokenImage("Floating-point pixels have no range to map to 8 bits.")
  if image.mode.startswith("I"):
    grey = np.clip(np.asarray(image, np.int32), 0, 65535) >> 8
    return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=-1)
  return np.asarray(image.convert("RGB"))


def _crop_resize(
  example: Example,
  box: Box,
  h: int,
  w: int,
  interpolation: Interpolation = "bilinear",
) -> Example:
  """The part of the example inside the box, resized to h x w."""
  x0, y0, x1, y1 = box
  out = dict(example)
  out["image"] = resize(
    example["image"], h, w, box=box, interpolation=interpolation
  )
  for key in MASKS:
    if key in example:
      # OpenCV's plain "nearest" takes the corner of a pixel, not its centre.
      out[key] = cv2.resize(
        np.ascontiguousarray(example[key][y0:y1, x0:x1]),
        (w, h),
        interpolation=cv2.INTER_NEAREST_EXACT,
      )
  if "objects" in example:
    origin = np.array([x0, y0, x0, y0], np.float32)
    scale = np.array([w / (x1 - x0), h / (y1 - y0)] * 2, np.float32)
    boxes = (example["objects"]["boxes"] - origin) * scale
    boxes = np.clip(boxes, 0, np.array([w, h, w, h], np.float32))
    out["objects"] = {**example["objects"], "boxes": boxes}
    # Of some objects, nothing is left.
    return keep_objects(out, (boxes[:, 2:] > boxes[:, :2]).all(axis=1))
  return out


def keep_objects(example: Example, kept: Bool[np.ndarray, " o"]) -> Example:
  """The example with some of its objects; masks number them anew."""
  if kept.all():
    return example
  objects = {k: v[kept] for k, v in example["objects"].items()}
  out = {**example, "objects": objects}
  for key in ID_MAPS:
    if key in example:
      new_ids = np.zeros(len(kept) + 1, example[key].dtype)
      new_ids[1:][kept] = np.arange(1, kept.sum() + 1)
      out[key] = new_ids[example[key]]
  return out


def _hw(example: Example) -> tuple[int, int]:
  return augment.pixels(example).shape[:2]


def _decode(example: Example, rng: np.random.Generator) -> Example:
  del rng
  return {**example, "image": decode(example["image"])}


def _resize(
  example: Example, rng: np.random.Generator, h: int, w: int | None = None
) -> Example:
  del rng
  height, width = _hw(example)
  return _crop_resize(example, (0, 0, width, height), h, w or h)


def _resize_small(
  example: Example,
  rng: np.random.Generator,
  n: int,
  interpolation: Interpolation = "bilinear",
) -> Example:
  """Resizes the shorter side to n and keeps the aspect ratio."""
  del rng
  h, w = _hw(example)
  h_new, w_new = round(h * n / min(h, w)), round(w * n / min(h, w))
  _check_size(h_new, w_new)
  return _crop_resize(example, (0, 0, w, h), h_new, w_new, interpolation)


def _resize_center_crop(
  example: Example,
  rng: np.random.Generator,
  size: int,
  crop_pct: Share = 0.875,
  interpolation: Interpolation = "bicubic",
) -> Example:
  """timm's evaluation: `crop_pct` of the shorter side is what is seen.

  The shorter side becomes floor(size / crop_pct), the longer one is rounded
  down, and half a pixel of the crop's offset is rounded to even.
  """
  del rng
  h, w = _hw(example)
  small = math.floor(size / crop_pct)
  h_new, w_new = small * h // min(h, w), small * w // min(h, w)
  _check_size(h_new, w_new)
  whole = _crop_resize(example, (0, 0, w, h), h_new, w_new, interpolation)
  y, x = round((h_new - size) / 2), round((w_new - size) / 2)
  return _crop_resize(whole, (x, y, x + size, y + size), size, size)


def _center_crop(
  example: Example, rng: np.random.Generator, h: int, w: int | None = None
) -> Example:
  del rng
  return _crop(example, h, w or h, lambda margin: margin // 2)


def _random_crop(
  example: Example, rng: np.random.Generator, h: int, w: int | None = None
) -> Example:
  return _crop(example, h, w or h, lambda n: int(rng.integers(n + 1)))


def _crop(
  example: Example, h: int, w: int, pick: Callable[[int], int]
) -> Example:
  """An image smaller than its crop is first enlarged until the crop fits."""
  height, width = _hw(example)
  ratio = max(h / height, w / width)
  if ratio > 1:
    whole = (0, 0, width, height)
    height, width = max(h, round(height * ratio)), max(w, round(width * ratio))
    _check_size(height, width)
    example = _crop_resize(example, whole, height, width)
  y, x = pick(height - h), pick(width - w)
  return _crop_resize(example, (x, y, x + w, y + h), h, w)


def _random_resized_crop(
  example: Example,
  rng: np.random.Generator,
  size: Size,
  scale: Range = (0.08, 1.0),
  ratio: Range = (3 / 4, 4 / 3),
  interpolation: Interpolation = "bilinear",
) -> Example:
  """The crop of Inception: `scale` of the area, width / height in `ratio`.

  `size` is a side, or (height, width).
  """
  box = _random_box(rng, *_hw(example), scale, ratio)
  h, w = (size, size) if isinstance(size, int) else size
  return _crop_resize(example, box, h, w, interpolation)


def _random_box(
  rng: np.random.Generator, h: int, w: int, scale: Range, ratio: Range
) -> Box:
  """Ten attempts, then the largest central crop of a permitted ratio."""
  for _ in range(10):
    area = h * w * rng.uniform(*scale)
    aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    crop_w = round(math.sqrt(area * aspect))
    crop_h = round(math.sqrt(area / aspect))
    if 0 < crop_h <= h and 0 < crop_w <= w:
      y = int(rng.integers(h - crop_h + 1))
      x = int(rng.integers(w - crop_w + 1))
      return x, y, x + crop_w, y + crop_h
  aspect = min(max(w / h, ratio[0]), ratio[1])
  crop_h = max(1, min(h, round(w / aspect)))
  crop_w = max(1, min(w, round(h * aspect)))
  y, x = (h - crop_h) // 2, (w - crop_w) // 2
  return x, y, x + crop_w, y + crop_h


def _detr_resize(
  example: Example,
  rng: np.random.Generator,
  sides: Sides,
  longest: int | None = None,
) -> Example:
  """DETR's resize to a shorter side of `sides`, and a longer up to `longest`.

  The longer side is rounded down. Where `longest` limits it, the shorter side
  is rounded first, and may be any.
  """
  h, w = _hw(example)
  choices = (sides,) if isinstance(sides, int) else sides
  n = choices[int(rng.integers(len(choices)))]
  if longest is not None and max(h, w) / min(h, w) * n > longest:
    # A sliver keeps one pixel.
    n = max(1, round(longest * min(h, w) / max(h, w)))
  h_new, w_new = n * h // min(h, w), n * w // min(h, w)
  _check_size(h_new, w_new)
  return _crop_resize(example, (0, 0, w, h), h_new, w_new)


def _detr_crop(
  example: Example,
  rng: np.random.Generator,
  sides: Sides,
  low: int,
  high: int,
  p: float = 0.5,
) -> Example:
  """With probability p, DETR's resize to one of `sides`, and a crop of it.

  Width and height of the crop are each uniform from `low` to `high`, or to the
  side of the image where that is less.
  """
  shortest = min((sides,) if isinstance(sides, int) else sides)
  if not low <= min(shortest, high):
    raise ValueError(
      f"detr_crop cuts {low} to {high} pixels out of images whose shorter side "
      f"is {sides}: low is at most high and at most each of the sides."
    )
  if rng.random() >= p:
    return example
  example = _detr_resize(example, rng, sides)
  h, w = _hw(example)
  crop_w = int(rng.integers(low, min(w, high) + 1))
  crop_h = int(rng.integers(low, min(h, high) + 1))
  y = int(rng.integers(h - crop_h + 1))
  x = int(rng.integers(w - crop_w + 1))
  return _crop_resize(example, (x, y, x + crop_w, y + crop_h), crop_h, crop_w)


def _flip_lr(
  example: Example, rng: np.random.Generator, p: float = 0.5
) -> Example:
  """Mirrors the image, its masks and its boxes with probability p."""
  w = _hw(example)[1]
  if rng.random() >= p or augment.is_blank(example["image"]):
    return example
  out = dict(example)
  for key in ("image", *MASKS):
    if key in example:
      out[key] = np.ascontiguousarray(example[key][:, ::-1])
  if "objects" in example:
    x0, y0, x1, y1 = example["objects"]["boxes"].T
    boxes = np.stack([w - x1, y0, w - x0, y1], axis=1)
    out["objects"] = {**example["objects"], "boxes": boxes}
  return out


def _keep(example: Example, rng: np.random.Generator, *keys: str) -> Example:
  """The example with these keys only, and `id`."""
  del rng
  missing = [key for key in keys if key not in example]
  if missing:
    raise ValueError(
      f"The op 'keep' asks for {missing}, but the examples have "
      f"{sorted(example)}."
    )
  return {k: v for k, v in example.items() if k == "id" or k in keys}


OPS: dict[str, Callable[..., Example]] = {
  "decode": _decode,
  "resize": _resize,
  "resize_small": _resize_small,
  "resize_center_crop": _resize_center_crop,
  "center_crop": _center_crop,
  "random_crop": _random_crop,
  "random_resized_crop": _random_resized_crop,
  "detr_resize": _detr_resize,
  "detr_crop": _detr_crop,
  "flip_lr": _flip_lr,
  "keep": _keep,
  **augment.OPS,
}


def _is_tuple(value: Any, length: int, *types: type) -> bool:
  return (
    isinstance(value, tuple)
    and len(value) == length
    and all(type(v) in types for v in value)
  )


def _is_range(value: Any) -> bool:
  return _is_tuple(value, 2, int, float) and 0 < value[0] <= value[1]


def _are_sides(value: Any) -> bool:
  sides = value if isinstance(value, tuple) else (value,)
  return bool(sides) and all(type(v) is int and v > 0 for v in sides)


def _is_size(value: Any) -> bool:
  sides = value if _is_tuple(value, 2, int) else (value,)
  return all(type(v) is int and v > 0 for v in sides)


# What an argument may be, by the annotation of its parameter.
_KINDS: dict[Any, tuple[Callable[[Any], bool], str]] = {
  int: (lambda v: type(v) is int and v > 0, "a positive whole number"),
  int | None: (
    lambda v: v is None or (type(v) is int and v > 0),
    "a positive whole number or None",
  ),
  float: (
    lambda v: type(v) in (int, float) and 0 <= v <= 1,
    "a number from 0 to 1",
  ),
  bool: (lambda v: type(v) is bool, "True or False"),
  Share: (
    lambda v: type(v) in (int, float) and 0 < v <= 1,
    "a number above 0 and at most 1",
  ),
  Magnitude: (
    lambda v: type(v) in (int, float) and 0 <= v <= 10,
    "a number from 0 to 10",
  ),
  Bin: (
    lambda v: type(v) is int and 0 <= v <= 30,
    "a whole number from 0 to 30",
  ),
  Range: (_is_range, "two numbers (low, high) with 0 < low <= high"),
  Size: (_is_size, "a positive whole number, or two of them (height, width)"),
  Sides: (_are_sides, "a positive whole number, or several: (480, 512)"),
  Rgb: (
    lambda v: _is_tuple(v, 3, int, float) and min(v) >= 0,
    "three numbers (red, green, blue)",
  ),
  Interpolation: (
    lambda v: v in get_args(Interpolation),
    f"one of {', '.join(get_args(Interpolation))}",
  ),
  str: (lambda v: isinstance(v, str), "a string"),
}


@dataclasses.dataclass(frozen=True)
class Ops:
  """What `parse` returns: operations with their arguments, in order."""

  spec: str
  steps: tuple[
    tuple[Callable[..., Example], tuple[Any, ...], dict[str, Any]], ...
  ]

  def __call__(self, example: Example, rng: np.random.Generator) -> Example:
    for op, args, kwargs in self.steps:
      example = op(example, rng, *args, **kwargs)
    return example

  def output_hw(
    self, hw: tuple[int, int], rng: np.random.Generator
  ) -> tuple[int, int]:
    """The size that an image of size `hw` gets, found without any pixels.

    It is what a call with the same random numbers makes: no op draws more or
    less because of pixels or objects.
    """
    for op, args, kwargs in self.steps:
      if op is not _keep:
        example = op({"image": augment.blank(*hw)}, rng, *args, **kwargs)
        hw = _hw(example)
    return hw


def parse(spec: str) -> Ops:
  """The operations of a string such as "decode|resize_small(256)|flip_lr".

  The result can be pickled; the empty string does nothing.

  Raises:
    ValueError: if the string cannot be read, an operation is unknown (lists
      them) or its arguments are wrong (shows its signature).
  """
  if not spec.strip():
    return Ops(spec, ())
  try:
    tree = ast.parse(spec.strip(), mode="eval").body
    calls = [_call(node) for node in _chain(tree)]
  except (SyntaxError, ValueError, TypeError) as e:
    raise ValueError(
      f"Cannot read the ops {spec!r}: expected names joined by '|', with "
      "literal arguments, as in 'decode|random_resized_crop(224)|flip_lr'."
    ) from e
  for name, args, kwargs in calls:
    _check(spec, name, args, kwargs)
  return Ops(spec, tuple((OPS[n], args, kwargs) for n, args, kwargs in calls))


def _chain(node: ast.expr) -> Iterator[ast.expr]:
  """The operands of a | b | c, in order."""
  if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
    yield from _chain(node.left)
    node = node.right
  yield node


def _call(node: ast.expr) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
  """(name, arguments, keywords) of a name or of a call with literals."""
  call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
  if not isinstance(call.func, ast.Name):
    raise ValueError(f"{ast.unparse(node)} is not the name of an op.")
  args = tuple(ast.literal_eval(a) for a in call.args)
  kwargs = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
  return call.func.id, args, kwargs


def _check(
  spec: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
  """Refuses unknown operations and arguments that these do not take."""
  if name not in OPS:
    near = difflib.get_close_matches(name, OPS, 1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(
      f"Unknown op {name!r} in {spec!r}.{hint} There are: {', '.join(OPS)}."
    )
  parameters = list(inspect.signature(OPS[name]).parameters.values())[2:]
  bare = [p.replace(annotation=p.empty) for p in parameters]
  wrong = f"Wrong arguments in {spec!r}: {name}{inspect.Signature(bare)}"
  try:
    bound = inspect.Signature(parameters).bind(*args, **kwargs).arguments
  except TypeError as e:
    raise ValueError(f"{wrong}: {e}.") from e
  for p in parameters:
    valid, expected = _KINDS[p.annotation]
    given = [bound[p.name]] if p.name in bound else []
    for value in given[0] if given and p.kind is p.VAR_POSITIONAL else given:
      if not valid(value):
        raise ValueError(f"{wrong}: {p.name} is {expected}; got {value!r}.")
