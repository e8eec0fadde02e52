"""Pictures of a run: what was packed, how it learned, what it sees.

Numpy in, PNG out. matplotlib is imported where a picture is drawn, and used
without its global state, so that neither a display nor a notebook matters.
"""

import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from einops import rearrange

from big_vision_like import observe

_Path = str | os.PathLike[str]
# Of segments, and of lines: told apart by people who do not see red and green
# alike (after Okabe and Ito).
_COLOURS = (
  "#0072b2",
  "#e69f00",
  "#009e73",
  "#cc79a7",
  "#56b4e9",
  "#d55e00",
  "#7a5195",
  "#b5a300",
)
_RIGHT, _WRONG = "#00805a", "#c8321e"
_FAINT = "#d9d9d9"


def training_batch(batch: Mapping[str, np.ndarray], path: _Path) -> None:
  """Draws a training batch: packed rows, or images of one size."""
  if "patches" in batch:
    packed_rows(batch, path)
  else:
    images = np.asarray(batch["image"])[:24]
    titles = [_label_text(batch, (i,)) for i in range(len(images))]
    _image_grid(images, titles, [_FAINT] * len(images), path)


def packed_rows(
  batch: Mapping[str, np.ndarray],
  path: _Path,
  *,
  names: Sequence[str] | None = None,
  rows: int = 4,
) -> None:
  """Draws the first rows of a packed batch.

  Each row shows its images on their own grids, dropped patches hatched, framed
  in the colour of the segment; below, the row itself, token by token.

  Args:
    batch: patches [B,L,3P²], segment_ids [B,L], positions [B,L,2], grid_hw
      [B,M,2], example_mask [B,M], and labels, if any.
    path: of the PNG.
    names: of the classes.
    rows: how many rows to draw at most.
  """
  batch = {key: np.asarray(value)[:rows] for key, value in batch.items()}
  tiles = [_tiles(batch, row) for row in range(len(batch["patches"]))]
  width = _common_width(tiles)
  placed = [_shelve(row, width) for row in tiles]
  heights = [10 * height / width for _, height in placed]
  figure = new_figure(10.4, sum(heights) + 0.8 * len(placed) + 0.3)
  axes = figure.subplots(
    2 * len(placed),
    height_ratios=[x for h in heights for x in (h, 0.16)],
    squeeze=False,
  )[:, 0]
  for row, (boxes, height) in enumerate(placed):
    mosaic, strip = axes[2 * row : 2 * row + 2]
    _draw_mosaic(mosaic, boxes, (width, height), batch, row, names)
    _draw_strip(strip, batch["segment_ids"][row])
  figure.supxlabel(
    "frame and strip: one colour per image; hatched: dropped tokens; "
    "white: padding",
    fontsize=8,
    color="#555555",
  )
  save_figure(figure, path)


class _Tile(NamedTuple):
  """An image of a row, its place and size in its own pixels."""

  slot: int
  start: float  # of its tokens, as a share of the row
  pixels: np.ndarray  # magnified
  height: int
  width: int
  left: float = 0.0
  top: float = 0.0


def _tiles(batch, row) -> list[_Tile]:
  side = math.isqrt(batch["patches"].shape[-1] // 3)
  tiles = []
  for slot in np.flatnonzero(batch["example_mask"][row]):
    start = np.argmax(batch["segment_ids"][row] == slot + 1)
    start = start / batch["segment_ids"].shape[1]
    size = batch["grid_hw"][row, slot] * side
    tiles.append(_Tile(slot, start, _unpack(batch, row, slot), *size))
  return tiles


def _gap(tiles: Sequence[_Tile]) -> float:
  """Room between images, enough for a label."""
  return 0.2 * float(np.mean([max(t.height, t.width) for t in tiles] or [1]))


def _common_width(rows: Sequence[Sequence[_Tile]]) -> float:
  """A width in pixels, one for all rows, so that sizes can be compared."""
  gap = _gap([t for row in rows for t in row])
  widths = [7 * max((t.height for row in rows for t in row), default=1)]
  for row in rows:
    one_shelf = sum(t.width + gap for t in row)
    area = sum((t.height + gap) * (t.width + gap) for t in row)
    widths.append(min(one_shelf, math.sqrt(7 * area)))
    widths += [t.width for t in row]
  return max(widths)


def _shelve(tiles: Sequence[_Tile], width: float) -> tuple[list[_Tile], float]:
  """The tiles with places, and the height that they take.

  Each stands over its own tokens if there is room, else they follow each other
  on shelves.
  """
  gap = _gap(tiles)
  for aligned in (True, False):
    placed, left, top, shelf = [], 0.0, gap, 0.0
    for tile in tiles:
      left = max(left, tile.start * width) if aligned else left
      if left and left + tile.width > width:
        left, top, shelf = 0.0, top + shelf + gap, 0.0
      placed.append(tile._replace(left=left, top=top))
      left += tile.width + gap
      shelf = max(shelf, tile.height)
    if top == gap:
      break
  return placed, top + shelf + 0.1 * gap


def _unpack(batch, row, slot) -> np.ndarray:
  """The image in a slot, magnified; dropped patches are hatched."""
  patches = batch["patches"][row]
  side = math.isqrt(patches.shape[-1] // 3)
  zoom = math.ceil(24 / side)
  rows, columns = batch["grid_hw"][row, slot]
  y, x = np.mgrid[: rows * side * zoom, : columns * side * zoom]
  canvas = np.where((x + y) % 8 < 2, 150, 235).astype(np.uint8)
  canvas = np.repeat(canvas[..., None], 3, axis=-1)
  mine = batch["segment_ids"][row] == slot + 1
  drawn = rearrange(patches[mine], "n (p q c) -> n p q c", p=side, q=side)
  drawn = drawn.repeat(zoom, axis=1).repeat(zoom, axis=2)
  grid = rearrange(canvas, "(h p) (w q) c -> h w p q c", h=rows, w=columns)
  grid[tuple(batch["positions"][row][mine].T)] = drawn
  return rearrange(grid, "h w p q c -> (h p) (w q) c")


def _draw_mosaic(axes, tiles, size, batch, row, names) -> None:
  segments = batch["segment_ids"][row]
  full = np.count_nonzero(segments)
  axes.set_title(
    f"row {row}: {len(tiles)} image{'s' * (len(tiles) != 1)} in {full} of "
    f"{len(segments)} tokens, {full / len(segments):.1%} full",
    loc="left",
    fontsize=9,
  )
  for tile in tiles:
    right, bottom = tile.left + tile.width, tile.top + tile.height
    box, colour = (tile.left, right, bottom, tile.top), colour_of(tile.slot)
    axes.imshow(tile.pixels, extent=box)
    across = [tile.left, right, right, tile.left, tile.left]
    down = [tile.top, tile.top, bottom, bottom, tile.top]
    axes.plot(across, down, color=colour, lw=2.5, solid_joinstyle="miter")
    text = _label_text(batch, (row, tile.slot), names)
    room = int(170 * tile.width / size[0])  # letters of 7 points over 10 inches
    axes.annotate(
      text if len(text) <= room else f"{text[:room]}…",
      (tile.left, tile.top),
      (0, 3),
      textcoords="offset points",
      fontsize=7,
      color=colour,
    )
  axes.set_xlim(-0.004 * size[0], size[0])
  axes.set_ylim(size[1], 0)
  axes.set_aspect("equal", anchor="W")
  axes.axis("off")


def _draw_strip(axes, segments: np.ndarray) -> None:
  from matplotlib import colors

  rgb = np.array(
    [(1, 1, 1) if s == 0 else colors.to_rgb(colour_of(s - 1)) for s in segments]
  )
  axes.imshow(
    rgb[None], aspect="auto", extent=(0, len(segments), 0, 1), zorder=0
  )
  starts = np.flatnonzero(np.diff(segments)) + 1
  axes.vlines(starts, 0, 1, color="white", lw=1.5)
  axes.set_yticks([])
  axes.set_xticks([0, len(segments)], ["0", f"{len(segments)} tokens"])
  axes.tick_params(labelsize=7, length=0, colors="#555555")
  for spine in axes.spines.values():
    spine.set_color("#999999")


def colour_of(slot: int) -> str:
  """One of a few colours, in turn."""
  return _COLOURS[slot % len(_COLOURS)]


def _label_text(batch, index, names=None) -> str:
  """The classes of an example as text; "" if it has none."""
  classes = []
  if "multi_label" in batch:
    classes = np.flatnonzero(batch["multi_label"][index])
  elif "label" in batch and batch["label"][index] >= 0:
    classes = [batch["label"][index]]
  texts = [names[c] if names else str(c) for c in classes]
  more = f" +{len(texts) - 4}" if len(texts) > 4 else ""
  return ", ".join(texts[:4]) + more


def predictions(
  images: Sequence[np.ndarray],
  predicted: Sequence[np.ndarray],
  truth: Sequence[np.ndarray],
  names: Sequence[str],
  path: _Path,
) -> None:
  """Draws images with the classes that the model names.

  The frame is green where they are exactly the true ones. Below an image stand
  the classes named, and, if they are not all, those missed.

  Args:
    images: uint8 [H,W,3], of any sizes.
    predicted: bool [C] for each image, the classes that the model names.
    truth: bool [C] for each image.
    names: of the classes.
    path: of the PNG.
  """
  titles, colours = [], []
  found = total = 0
  for said, true in zip(predicted, truth):
    said, true = np.asarray(said, bool), np.asarray(true, bool)
    found, total = found + (said & true).sum(), total + true.sum()
    text = ", ".join(names[c] for c in np.flatnonzero(said)) or "nothing"
    if (said == true).all():
      colours.append(_RIGHT)
    else:
      colours.append(_WRONG)
      real = ", ".join(names[c] for c in np.flatnonzero(true)) or "nothing"
      text = f"{text}\ntrue: {real}"
    titles.append(text)
  right = sum(colour == _RIGHT for colour in colours)
  heading = (
    f"{found} of {total} true classes named; "
    f"{right} of {len(images)} held-out images fully right"
  )
  _image_grid(images, titles, colours, path, heading=heading)


def _image_grid(images, titles, colours, path, *, heading="") -> None:
  columns = min(6, max(1, len(images)))
  rows = math.ceil(len(images) / columns)
  figure = new_figure(1.6 * columns + 0.2, 1.95 * rows + 0.4)
  axes = figure.subplots(rows, columns, squeeze=False).ravel()
  for one in axes:
    one.set_xticks([])
    one.set_yticks([])
    one.set_visible(False)
  for one, image, title, colour in zip(axes, images, titles, colours):
    one.set_visible(True)
    one.imshow(image, interpolation="nearest")
    shown = colour if colour != _FAINT else "#333333"
    one.set_xlabel(title, fontsize=8, color=shown)
    for spine in one.spines.values():
      spine.set(color=colour, linewidth=2.5)
  if heading:
    figure.suptitle(heading, fontsize=10)
  save_figure(figure, path)


def learning_curves(metrics_path: _Path, path: _Path) -> None:
  """Draws the metrics of a run against its steps.

  Metrics whose names end alike ("train/loss" and "val/loss") share a panel;
  curves of many points are drawn faint, with their running mean.

  Args:
    metrics_path: the `metrics.jsonl` of the run.
    path: of the PNG.
  """
  panels: dict[str, dict[str, np.ndarray]] = {}
  for name, points in _curves(observe.read_metrics(metrics_path)).items():
    panels.setdefault(name.rpartition("/")[2], {})[name] = points
  order = sorted(panels, key=_panel_rank)[:12] or ["no metrics yet"]
  columns = min(3, len(order))
  rows = math.ceil(len(order) / columns)
  figure = new_figure(4.2 * columns, 2.7 * rows + 0.2)
  axes = figure.subplots(rows, columns, squeeze=False).ravel()
  for one in axes[len(order) :]:
    one.set_visible(False)
  for one, panel in zip(axes, order):
    _draw_panel(one, panel, panels.get(panel, {}))
  save_figure(figure, path)


def _curves(records: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
  """[n,2] of (step, value) by metric; null is no point, one is no curve."""
  curves: dict[str, list[tuple[int, float]]] = {}
  for record in records:
    for name, value in record.items():
      count = name in ("step", "time") or name.endswith("/examples")
      if not count and value is not None:
        curves.setdefault(name, []).append((record["step"], value))
  return {k: np.array(v, float) for k, v in curves.items() if len(v) > 1}


def _panel_rank(panel: str) -> tuple[int, str]:
  """What people look at first."""
  first = ("loss", "mAP", "accuracy", "10shot", "lr", "grad_norm")
  first += ("images_per_s", "tokens_per_s", "fill", "calibration_error")
  return (first.index(panel) if panel in first else len(first), panel)


def _draw_panel(axes, panel: str, curves: Mapping[str, np.ndarray]) -> None:
  for i, (name, points) in enumerate(sorted(curves.items())):
    x, y = points.T
    style = dict(color=colour_of(i), label=name.rpartition("/")[0] or name)
    if len(x) < 40:
      axes.plot(x, y, marker=".", ms=5, lw=1.5, **style)
      continue
    axes.plot(x, y, color=colour_of(i), alpha=0.25, lw=0.8)
    width = max(2, len(x) // 30)
    mean = np.convolve(y, np.ones(width) / width, "valid")
    axes.plot(x[width - 1 :], mean, lw=1.6, **style)
  if any("/" in name for name in curves):
    axes.legend(fontsize=7, frameon=False)
  _finish(axes, panel, "step")
  axes.ticklabel_format(axis="y", scilimits=(-3, 5))


def budget_curve(rows: Sequence[Mapping[str, Any]], path: _Path) -> None:
  """Draws a score against the tokens and the time that an image takes.

  Args:
    rows: of the evaluator `budget_curve`; an empty `share` marks a single
      setting, the others are points of cascades.
    path: of the PNG.
  """
  score = "mAP" if "mAP" in rows[0] else "accuracy"
  single = [row for row in rows if row["share"] == ""]
  names = dict.fromkeys(row["tokens"] for row in rows if row["share"] != "")
  figure = new_figure(12.6, 3.9)
  panels = (
    ("tokens_per_image", score, names),
    ("images_per_s", score, names),
    ("tokens_per_image", "calibration_error", ()),
  )
  all_axes = figure.subplots(1, 3)
  for axes, (x, y, cascades) in zip(all_axes, panels):
    for i, name in enumerate(cascades):
      points = [row for row in rows if row["tokens"] == name]
      style = dict(
        color=colour_of(i + 1), lw=1, ls="--", label=f"cascade {name}"
      )
      _plot_rows(axes, points, x, y, **style)
    style = dict(color=colour_of(0), lw=2.2, marker="o", label="one setting")
    _plot_rows(axes, single, x, y, **style)
    for row in single:
      axes.annotate(
        row["tokens"],
        (row[x], row[y]),
        (0, -12),
        textcoords="offset points",
        ha="center",
        fontsize=7,
      )
    axes.margins(0.06, 0.1)
    _finish(axes, y, x)
  all_axes[0].legend(fontsize=7, frameon=False, loc="lower right")
  save_figure(figure, path)


def _plot_rows(axes, rows, x, y, **style) -> None:
  axes.plot([row[x] for row in rows], [row[y] for row in rows], **style)


def panels(
  parts: Mapping[str, np.ndarray | Mapping[str, np.ndarray]],
  path: _Path,
  *,
  note: str = "",
) -> None:
  """Draws matrices over pairs of layers, and curves over layers.

  Args:
    parts: by title a matrix [p,p] or curves [p] by name, NaN where there is
      nothing. "chance" and what ends in " before" is dashed, the latter in the
      colour of the curve without it.
    path: of the PNG.
    note: below, what to know before reading them.
  """
  figure = new_figure(4.0 * len(parts), 3.7)
  for axes, (title, part) in zip(
    figure.subplots(1, len(parts), squeeze=False)[0], parts.items()
  ):
    if isinstance(part, Mapping):
      _draw_layers(axes, part)
    else:
      _draw_matrix(figure, axes, part)
    _finish(axes, title, "layer")
    if not isinstance(part, Mapping):
      axes.grid(visible=False)
  if note:
    text = textwrap.fill(note, 58 * len(parts))
    figure.supxlabel(text, fontsize=8, color="#555555")
  save_figure(figure, path)


def _draw_matrix(figure, axes, matrix: np.ndarray) -> None:
  count = len(matrix)
  low = min(0.0, np.nanmin(matrix)) if np.isfinite(matrix).any() else 0.0
  box = (0.5, count + 0.5, count + 0.5, 0.5)
  image = axes.imshow(matrix, vmin=low, vmax=1, cmap="viridis", extent=box)
  figure.colorbar(image, ax=axes, shrink=0.8)


def _draw_layers(axes, curves: Mapping[str, np.ndarray]) -> None:
  colours: dict[str, str] = {}
  for name, y in curves.items():
    plain = name.removesuffix(" before")
    colour = colours.setdefault(plain, colour_of(len(colours)))
    dashed = name == "chance" or name != plain
    style = dict(ls="--", lw=1.2) if dashed else dict(lw=1.8, marker=".")
    label = None if name != plain else name
    axes.plot(np.arange(1, len(y) + 1), y, color=colour, label=label, **style)
  drawn = np.concatenate([y[np.isfinite(y)] for y in curves.values()])
  if drawn.size and 0 < 100 * drawn.min() < drawn.max():
    axes.set_yscale("log")
  axes.legend(fontsize=7, frameon=False)
  axes.xaxis.get_major_locator().set_params(integer=True)


def methods(
  rows: Sequence[Mapping[str, Any]],
  drops: Sequence[Mapping[str, Any]],
  tasks: Sequence[str],
  path: _Path,
) -> None:
  """Draws what benchmarks/memory.py finds: methods, and joined tasks.

  Args:
    rows: `method` and the accuracy of each task.
    drops: `task` and accuracies "alone, X" and "joined, X".
    tasks: the tasks of `rows`.
    path: of the PNG.
  """
  figure = new_figure(11.0, 3.8)
  left, right = figure.subplots(1, 2)
  curves = {row["method"]: [row[task] for task in tasks] for row in rows}
  _bars(left, tasks, curves)
  _finish(left, "accuracy of a new task, by what is trained", "")
  kinds = [k for k in drops[0] if k.startswith(("alone", "joined"))]
  curves = {kind: [row[kind] for row in drops] for kind in kinds}
  _bars(right, [row["task"] for row in drops], curves)
  _finish(right, "accuracy alone, and with all tasks in one model", "")
  save_figure(figure, path)


def _bars(axes, groups: Sequence[str], series: Mapping[str, Sequence[float]]):
  """Bars side by side in each group."""
  width = 0.8 / len(series)
  for i, (name, values) in enumerate(series.items()):
    at = np.arange(len(groups)) + (i + 0.5) * width - 0.4
    axes.bar(at, values, width, color=colour_of(i), label=name)
  axes.set_xticks(range(len(groups)), groups)
  axes.set_ylim(0, 1)
  # Below the axes, where no bar is.
  place = dict(loc="upper center", bbox_to_anchor=(0.5, -0.08))
  axes.legend(fontsize=7, frameon=False, ncols=3, **place)


def _finish(axes, title: str, x_label: str) -> None:
  title, x_label = (
    text.replace("_per_s", "/s").replace("_", " ") for text in (title, x_label)
  )
  axes.set_title(title, loc="left", fontsize=9)
  axes.set_xlabel(x_label, fontsize=8)
  axes.spines[["top", "right"]].set_visible(False)
  axes.grid(color="#e6e6e6", lw=0.7)
  axes.set_axisbelow(True)
  axes.tick_params(labelsize=8)


def new_figure(width: float, height: float):
  """An empty figure of a size in inches."""
  from matplotlib.figure import Figure

  return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure, path: _Path) -> None:
  """Writes a PNG, and its folder if there is none."""
  Path(path).parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=150)
