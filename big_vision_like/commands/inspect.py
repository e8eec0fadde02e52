"""Looks at a data set: sizes, labels, boxes, unreadable files, packed rows.

Decodes every image (or --limit of them, spread evenly over the set) and plans
rows for the sizes it found, with the code that plans them for training.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import itertools
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import tqdm

from big_vision_like import resolve
from big_vision_like.data import (
  budgets,
  objects,
  ops,
  packing,
  planning,
  sources,
)

# Classes that a table shows in full; of more, the two ends.
SHOWN = 20
# Rows that an expected fill is averaged over.
ROWS = 8 * planning.BLOCK
BAR = 40
CHUNK = 4096
# Sides of the square of the same area that COCO tells boxes apart by.
SMALL, LARGE = 32, 96
# Bad boxes of a kind that are named.
NAMED = 3
ASPECTS = (0.0, 1 / 3, 1 / 2, 2 / 3, 0.9, 1.1, 3 / 2, 2.0, 3.0, math.inf)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """The data, and the rows to plan for it."""
  add = parser.add_argument
  add("--data", required=True, metavar="SPEC", help="as in configs: folder:/p")
  add("--split", default="train", help="train or validation")
  add("--limit", type=int, metavar="N", help="decode only N images")
  add("--threads", type=int, default=os.cpu_count(), help="that decode")
  rows = parser.add_argument_group("packed rows")
  add = rows.add_argument
  add("--length", type=int, default=256, help="tokens in a row")
  add("--patch", type=int, default=16, help="side of a patch in pixels")
  add("--max-images", type=int, default=16, help="images in a row, at most")
  add("--kind", default="side", help="side, area or native")
  add("--dist", default="uniform", help="uniform or normal")
  add("--low", type=float, default=64, help="smallest training resolution")
  add("--high", type=float, default=256, help="largest training resolution")
  add("--drop-mean", type=float, default=0.5, help="mean share of tokens lost")
  add(
    "--drop-max", type=float, default=0.9, help="largest share of tokens lost"
  )
  add("--tokens", type=int, metavar="N", help="tokens an image in evaluation")


def main(args: argparse.Namespace) -> None:
  """Prints the report."""
  laws = Laws.of(args)
  source = resolve.make(
    "data/sources",
    "Source",
    "--data",
    sources.settings(args.data),
    split=args.split,
  )
  indices = _choose(len(source), args.limit)
  images, broken = scan(source, indices, threads=args.threads)
  print(f"{args.data}, split {args.split}: {len(source):,} images", end="")
  print(f", {len(indices):,} of them decoded" if args.limit else "")
  _print_section("Unreadable", unreadable(source, broken))
  if not images:
    raise ValueError(f"No image of {args.data} can be read.")
  if notes := getattr(source, "notes", ()):
    _print_section("Annotations", [*notes, *getattr(source, "faults", ())])
  _print_section("Sizes", sizes(images))
  _print_section("Labels", labels(images, source.label_names))
  if any(image.boxes is not None for image in images):
    _print_section("Objects", boxes(images, source))
  _print_section(f"Rows of {args.length} tokens", fill(images, laws))


@dataclasses.dataclass(frozen=True)
class Image:
  """What the report needs of a decoded image."""

  index: int
  hw: tuple[int, int]
  classes: tuple[int, ...]
  boxes: np.ndarray | None = None  # [O,4], all but crowds
  flags: np.ndarray | None = None  # [O], see data/objects.py


def _choose(count: int, limit: int | None) -> list[int]:
  """All indices, or `limit` of them spread evenly: files are often sorted."""
  if limit is None or limit >= count:
    return list(range(count))
  if limit < 1:
    raise ValueError(f"--limit {limit}: at least one image has to be decoded.")
  return np.linspace(0, count - 1, limit).round().astype(int).tolist()


def scan(
  source: Any, indices: Sequence[int], *, threads: int
) -> tuple[list[Image], dict[int, str]]:
  """Decodes the images; those that cannot be read are given with the reason."""
  images, broken = [], {}
  bar = tqdm.tqdm(total=len(indices), unit="image", disable=None)
  with bar, concurrent.futures.ThreadPoolExecutor(threads) as pool:
    # In chunks: a pool keeps all of its results until they are asked for.
    for start in range(0, len(indices), CHUNK):
      chunk = indices[start : start + CHUNK]
      for index, result in zip(
        chunk, pool.map(lambda i: _read(source, i), chunk)
      ):
        if isinstance(result, Image):
          images.append(result)
        else:
          broken[index] = result
        bar.update()
  return images, broken


def _read(source: Any, index: int) -> Image | str:
  try:
    example = source[index]
    height, width = ops.decode(example["image"]).shape[:2]
  except (ops.BrokenImage, OSError) as e:
    return str(e)
  if "multi_label" in example:
    classes = np.flatnonzero(example["multi_label"]).tolist()
  elif "label" not in example and "objects" in example:
    classes = np.unique(example["objects"]["label"]).tolist()
  else:
    classes = [c for c in [int(example.get("label", -1))] if c >= 0]
  image = Image(index, (height, width), tuple(classes))
  return (
    _with_boxes(image, example["objects"]) if "objects" in example else image
  )


def _with_boxes(image: Image, found: dict[str, np.ndarray]) -> Image:
  crowd = found.get("is_crowd", np.zeros(len(found["boxes"]), bool))
  boxes, flags = objects.check_boxes(found["boxes"][~crowd], image.hw)
  return dataclasses.replace(image, boxes=boxes, flags=flags)


def unreadable(source: Any, broken: dict[int, str]) -> list[str]:
  """A line per image that cannot be read."""
  if not broken:
    return ["none"]
  return [f"{source.name(i)}: {reason}" for i, reason in broken.items()]


def sizes(images: Sequence[Image]) -> list[str]:
  """Ranges, and histograms of the side of the square and of the aspect."""
  hw = np.array([image.hw for image in images])
  height, width = hw.T
  side = np.sqrt(height * width)
  # Steps of the square root of two: each doubles the area.
  steps = np.arange(math.floor(2 * math.log2(side.min())), 100) / 2
  edges = 2.0 ** steps[: np.searchsorted(2.0**steps, side.max(), "right") + 1]
  return [
    f"height {_range(height)}, width {_range(width)} pixels",
    "",
    "side of the square of the same area, in pixels",
    *histogram(side, edges, "{:.0f}"),
    "",
    "width / height",
    *histogram(width / height, ASPECTS, "{:.2f}"),
  ]


def _range(values: np.ndarray) -> str:
  low, median, high = np.percentile(values, (0, 50, 100))
  return f"{low:.0f} to {high:.0f} (median {median:.0f})"


def histogram(
  values: np.ndarray, edges: Sequence[float], form: str
) -> list[str]:
  """A line per bin that is not empty: [low, high), count and a bar."""
  names = [
    f"{form.format(a)} - {form.format(b)}" for a, b in itertools.pairwise(edges)
  ]
  bins = np.searchsorted(edges, values, "right") - 1
  counts = np.bincount(bins, minlength=len(names))
  width = max(map(len, names))
  return [
    f"{name:>{width}} {n:>9,} {'#' * math.ceil(BAR * n / counts.max())}"
    for name, n in zip(names, counts)
    if n
  ]


def labels(images: Sequence[Image], names: Sequence[str]) -> list[str]:
  """Images per class, most common first; of many classes both ends."""
  counts = collections.Counter({c: 0 for c in range(len(names))})
  counts.update(c for image in images for c in image.classes)
  unknown = sorted(c for c in counts if c >= len(names))
  rows = [
    (names[c] if c < len(names) else f"(no class {c})", n)
    for c, n in counts.most_common()
  ]
  unlabelled = sum(not image.classes for image in images)
  width = max((len(name) for name, _ in rows), default=0)
  lines = [f"{name:{width}} {n:>9,}" for name, n in rows]
  if len(lines) > SHOWN:
    hidden = len(lines) - SHOWN
    lines[SHOWN // 2 : -SHOWN // 2] = [f"... {hidden:,} more classes ..."]
  lines.insert(0, f"{len(names):,} classes; images by class")
  if unlabelled:
    lines.append(f"{unlabelled:,} images without a label")
  if unknown:
    lines.append(f"labels outside the {len(names)} classes: {unknown}")
  return lines


def boxes(images: Sequence[Image], source: Any) -> list[str]:
  """Boxes an image and their sizes, crowds left out; bad ones by name."""
  images = [image for image in images if image.boxes is not None]
  sound = [objects.is_sound(image.flags) for image in images]
  counts = np.array([kept.sum() for kept in sound])
  most = int(counts.max())
  # The paper has 100 for COCO, of which an image holds up to 93.
  queries = max(10, math.ceil(most / 10) * 10)
  quantiles = np.percentile(counts, (90, 99), method="higher")
  lines = [
    f"{counts.sum():,} boxes; in an image {_range(counts)}, up to "
    "{} in 90 % and {} in 99 % of them".format(*quantiles),
    f"{int((counts == 0).sum()):,} images without a box",
    f"proposed: config.model.num_queries={queries}, config.data.objects."
    f"max_objects={queries}",
  ]
  if most:
    lines += ["", *_box_sizes(images, sound)]
  for flag, what in objects.FLAGS.items():
    bad = [(i.index, int((i.flags & flag > 0).sum())) for i in images]
    if count := sum(n for _, n in bad):
      first = [source.name(index) for index, n in bad if n][:NAMED]
      lines.append(f"{count:,} boxes {what}, such as in {', '.join(first)}")
  return lines


def _box_sizes(
  images: Sequence[Image], sound: Sequence[np.ndarray]
) -> list[str]:
  """Shares of COCO's three sizes, and a histogram of the share of an image."""
  sides = [
    np.sqrt((i.boxes[kept, 2:] - i.boxes[kept, :2]).prod(axis=1))
    for i, kept in zip(images, sound)
  ]
  side = np.concatenate(sides)
  small, large = (side < SMALL).mean(), (side >= LARGE).mean()
  share = [s / math.sqrt(math.prod(i.hw)) for i, s in zip(images, sides)]
  return [
    f"side of the square of the same area {_range(side)} pixels: "
    f"{small:.0%} small (below {SMALL}), {1 - small - large:.0%} medium, "
    f"{large:.0%} large (from {LARGE})",
    "",
    "that side as a share of the image's",
    *histogram(
      np.concatenate(share), [*np.arange(11) / 10, math.inf], "{:.1f}"
    ),
  ]


@dataclasses.dataclass(frozen=True)
class Laws:
  """What rows are planned for: see `data/budgets.py`."""

  spec: packing.PackSpec
  sizes: budgets.Sizes
  drops: dict[str, budgets.Drop]
  tokens: int | None

  @classmethod
  def of(cls, args: argparse.Namespace) -> "Laws":
    """Refuses wrong settings before anything is decoded."""
    drops = {"none dropped": budgets.Drop()}
    if args.drop_mean:
      drops[f"{args.drop_mean:.0%} dropped"] = budgets.Drop(
        law="beta", mean=args.drop_mean, max=args.drop_max
      )
    return cls(
      spec=packing.PackSpec(args.length, args.patch, args.max_images),
      sizes=budgets.Sizes(args.kind, args.dist, args.low, args.high),
      drops=drops,
      tokens=args.tokens,
    )


def fill(images: Sequence[Image], laws: Laws) -> list[str]:
  """A table of what rows would hold, by way of packing."""
  spec, sizes, tokens = laws.spec, laws.sizes, laws.tokens
  trained = "native sizes"
  if sizes.kind != "native":
    trained = f"{sizes.dist} {sizes.kind} {sizes.low:g}-{sizes.high:g}"
  table = [
    (f"training, {trained}, {name}", *planned(images, laws, drop))
    for name, drop in laws.drops.items()
  ]
  exact = "native sizes" if tokens is None else f"{tokens} tokens an image"
  table.append((f"evaluation, {exact}", *packed(images, spec, tokens)))
  width = max(len(row[0]) for row in table)
  return [
    f"patches of {spec.patch} pixels, at most {spec.max_images} images",
    f"{'':{width}}  images/row  tokens/image    fill",
    *(
      f"{name:{width}}  {count / rows:>10.2f}  {total / count:>12.1f}  "
      f"{total / (rows * spec.length):>6.1%}"
      for name, rows, count, total in table
    ),
  ]


def planned(
  images: Sequence[Image], laws: Laws, drop: budgets.Drop
) -> tuple[int, int, int]:
  """(rows, images, tokens) of the first rows of a training run."""
  rng = np.random.default_rng(0)
  order = rng.integers(len(images), size=1 << 16)
  plan = planning.PlannedRows(
    laws.spec,
    sizes=laws.sizes,
    drop=drop,
    seed=0,
    rows=ROWS,
    order=lambda position: int(order[position % len(order)]),
    hw=lambda i: images[i].hw,
  )
  return _count([plan(row) for row in range(ROWS)], images, laws.spec)


def packed(
  images: Sequence[Image], spec: packing.PackSpec, tokens: int | None
) -> tuple[int, int, int]:
  """(rows, images, tokens) of the images as an evaluation set."""
  plan = planning.ExactRows(
    spec,
    indices=range(len(images)),
    hw=lambda i: images[i].hw,
    tokens=tokens,
  )
  return _count([plan(row) for row in range(len(plan))], images, spec)


def _count(
  rows: Sequence[Sequence[packing.Slot]],
  images: Sequence[Image],
  spec: packing.PackSpec,
) -> tuple[int, int, int]:
  slots = [slot for row in rows for slot in row]
  tokens = sum(
    slot.kept
    if slot.drop
    else math.prod(slot.grid(*images[slot.index].hw, spec=spec))
    for slot in slots
  )
  return len(rows), len(slots), tokens


def _print_section(title: str, lines: Sequence[str]) -> None:
  print(f"\n{title}")
  print("\n".join(f"  {line}".rstrip() for line in lines))
