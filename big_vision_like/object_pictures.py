"""Pictures of objects: their boxes and segments, and where a query looks."""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from big_vision_like import pictures, postprocess

_Path = str | os.PathLike[str]
_INCHES = 2.4  # of an image among others
_ALONE = 8.0
_SIDE = 400  # pixels, at least, of an image with segments
_GREY = 0.45  # what is left of an image below where queries look


@dataclasses.dataclass(frozen=True)
class Drawn:
  """What is drawn over an image.

  Attributes:
    boxes: float [n,4], (x0, y0, x1, y1) in its pixels.
    texts: of the boxes.
    colours: their numbers; equal ones look alike.
    id_map: int [H,W], 0 or 1 + the position of a segment, if there are any.
  """

  boxes: np.ndarray
  texts: Sequence[str]
  colours: Sequence[int]
  id_map: np.ndarray | None = None


def true_objects(one: Mapping[str, np.ndarray], names: Sequence[str]) -> Drawn:
  """The objects of a row of a batch, coloured by class.

  Args:
    one: `size`, `box_label`, `true_boxes` and maybe `box_id_map`.
    names: of the classes.
  """
  h, w = one["size"]
  there = one["box_label"] >= 0
  center, side = np.split(one["true_boxes"][there], 2, axis=1)
  corners = np.concatenate([center - side / 2, center + side / 2], axis=1)
  labels = one["box_label"][there].tolist()
  id_map = one["box_id_map"][:h, :w] if "box_id_map" in one else None
  texts = [names[c] for c in labels]
  return Drawn(corners * np.array([w, h, w, h]), texts, labels, id_map)


def found_objects(
  found: postprocess.Found, names: Sequence[str], *, by_class: bool = True
) -> Drawn:
  """What is found, coloured by class, or each object in a colour of its own."""
  labels = found.label.tolist()
  colours = labels if by_class else range(len(labels))
  texts = [f"{names[c]} {p:.2f}" for c, p in zip(labels, found.score)]
  return Drawn(found.box, texts, colours, found.id_map)


def training_batch(
  batch: Mapping[str, np.ndarray], path: _Path, *, images: int = 24
) -> None:
  """Draws images of a training batch with their objects.

  Args:
    batch: image, size, boxes, box_label and maybe box_id_map.
    path: of the PNG.
    images: how many to draw at most.
  """
  most = max(int(batch["box_label"].max()) + 1, 0)
  names = [str(c) for c in range(most)]
  rows = np.flatnonzero(batch["_mask"])[:images]
  figure, axes = _grid(len(rows), min(6, max(1, len(rows))))
  for one, row in zip(axes, rows):
    values = {k: np.asarray(x[row]) for k, x in batch.items()}
    values["true_boxes"] = values["boxes"]
    h, w = values["size"]
    draw(one, values["image"][:h, :w], true_objects(values, names))
  pictures.save_figure(figure, path)


def compared(
  pairs: Sequence[tuple[UInt8[np.ndarray, "h w 3"], Drawn, Drawn]],
  path: _Path,
) -> None:
  """Draws images twice, with what is true and beside it with what is found."""
  figure, axes = _grid(2 * len(pairs), 2 * min(3, len(pairs)))
  for i, (image, *both) in enumerate(pairs):
    for one, drawn, title in zip(axes[2 * i :], both, ("true", "found")):
      draw(one, image, drawn)
      one.set_title(title, loc="left", fontsize=7, color="#555555", pad=3)
  pictures.save_figure(figure, path)


def detections(
  image: UInt8[np.ndarray, "h w 3"], drawn: Drawn, path: _Path
) -> None:
  """Draws one image with what is found in it."""
  h, w = image.shape[:2]
  figure = pictures.new_figure(*_inches(h, w))
  draw(figure.subplots(), image, drawn, fontsize=9)
  pictures.save_figure(figure, path)


def attention(
  image: UInt8[np.ndarray, "h w 3"],
  drawn: Drawn,
  maps: Float[np.ndarray, "n h w"],
  path: _Path,
) -> None:
  """Draws where the query of each object looks, as DETR's figure 6.

  Each object has the colour of its box; its map is brightest where the weight
  of attention is largest, whatever that is.

  Args:
    image: uint8 [H,W,3].
    drawn: the objects.
    maps: float [n,H,W], weights of attention.
    path: of the PNG.
  """
  h, w = image.shape[:2]
  width, height = _inches(h, w)
  figure = pictures.new_figure(2 * width, height)
  left, right = figure.subplots(1, 2)
  draw(left, image, drawn, fontsize=9)
  canvas = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None] * _GREY
  for weights, colour in zip(maps, drawn.colours):
    alpha = (weights / max(weights.max(), 1e-30))[..., None]
    canvas = canvas * (1 - alpha) + 255 * _rgb(colour) * alpha
  boxes = dataclasses.replace(drawn, texts=[""] * len(maps), id_map=None)
  draw(right, np.round(canvas).astype(np.uint8), boxes)
  pictures.save_figure(figure, path)


def draw(axes, image: np.ndarray, drawn: Drawn, *, fontsize: float = 6) -> None:
  """Draws an image, its segments, and boxes with their texts."""
  h, w = image.shape[:2]
  # Around pixels, and not through their centres.
  axes.imshow(_shaded(image, drawn), extent=(0, w, h, 0))
  axes.set_xlim(0, w)
  axes.set_ylim(h, 0)
  axes.set_xticks([])
  axes.set_yticks([])
  axes.set_visible(True)
  for (x0, y0, x1, y1), text, number in zip(
    drawn.boxes, drawn.texts, drawn.colours
  ):
    colour = pictures.colour_of(number)
    across, down = [x0, x1, x1, x0, x0], [y0, y0, y1, y1, y0]
    axes.plot(across, down, color=colour, lw=1.3, solid_joinstyle="miter")
    if text:
      axes.text(
        max(x0, 0),
        max(y0, 0),
        text,
        fontsize=fontsize,
        color="white",
        va="top",
        clip_on=True,
        bbox=dict(facecolor=colour, edgecolor="none", pad=0.8, alpha=0.85),
      )


def _shaded(image: np.ndarray, drawn: Drawn) -> np.ndarray:
  """The image with segments in their colours, and white borders."""
  if drawn.id_map is None:
    return image
  # So that borders are thin on small images too.
  zoom = math.ceil(_SIDE / max(image.shape[:2]))
  image, ids = (
    x.repeat(zoom, 0).repeat(zoom, 1)
    for x in (image, np.asarray(drawn.id_map, np.int64))
  )
  table = np.array([(0, 0, 0), *map(_rgb, drawn.colours)]) * 255
  out = np.where(ids[..., None] > 0, 0.5 * image + 0.5 * table[ids], image)
  edge = np.zeros(ids.shape, bool)
  edge[1:] |= ids[1:] != ids[:-1]
  edge[:, 1:] |= ids[:, 1:] != ids[:, :-1]
  out[edge] = 255
  return out.astype(np.uint8)


def _rgb(number: int) -> np.ndarray:
  from matplotlib import colors

  return np.array(colors.to_rgb(pictures.colour_of(number)))


def _inches(h: int, w: int) -> tuple[float, float]:
  scale = _ALONE / max(h, w)
  return max(w * scale, 1.0), max(h * scale, 1.0)


def _grid(count: int, columns: int):
  """A figure, and axes, which are hidden until drawn in."""
  rows = max(1, math.ceil(count / columns))
  figure = pictures.new_figure(_INCHES * columns, _INCHES * rows)
  axes = figure.subplots(rows, columns, squeeze=False).ravel()
  for one in axes:
    one.set_visible(False)
  return figure, axes
