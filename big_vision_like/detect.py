"""What a detector finds in images of its user: as text, as data, as pictures.

See commands/predict.py. Objects are those of postprocess.py, segments where the
model has masks.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array, Float
from pycocotools import mask as coco_mask

from big_vision_like import (
  api,
  capture,
  object_pictures,
  postprocess,
  sharding,
)
from big_vision_like.data import ops

_CROSS = "cross_attn"


@dataclasses.dataclass(frozen=True)
class Detection:
  """What is found in one image.

  Attributes:
    example_id: of the image.
    image_hw: (height, width) of the image as it was read.
    found: the objects, in its pixels.
    maps: float [n,H,W], where the decoder's last layer looks for each; or None.
  """

  example_id: int
  image_hw: tuple[int, int]
  found: postprocess.Found
  maps: np.ndarray | None = None


def measure(
  model: nn.Module, task: api.Task, *, attention: bool
) -> Callable[[api.TrainState, api.Batch], dict[str, Array]]:
  """The task's predictions and, if asked for, `attention` [B,Q,S].

  That is the mean over heads of the weights of the decoder's last cross
  attention, as in the paper's figure 6.
  """

  def run(state, batch):
    inputs, targets = task.prepare(batch, None)
    if not attention:
      outputs = model.apply(state.variables(), train=False, **inputs)
      return task.predict(outputs, targets)
    outputs, lent = model.apply(
      state.variables(), train=False, mutable=[api.INTERMEDIATES], **inputs
    )
    layers = capture.maps(lent.get(api.INTERMEDIATES, {}), batch)
    layers = [x for x in layers if x.name.endswith(_CROSS)]
    if not layers:
      raise ValueError(
        "There is no attention to draw: the model lends no maps of a "
        f"{_CROSS}, as the decoder of detr does."
      )
    weights = layers[-1].values[:, 0].mean(1)
    return task.predict(outputs, targets) | {"attention": weights}

  return run


def find(
  run: Any,
  data: Iterable[tuple[api.Batch, dict[str, np.ndarray]]],
  mesh: jax.sharding.Mesh,
  *,
  threshold: float | None = None,
  attention: bool = False,
) -> Iterator[Detection]:
  """What a detector finds in each image.

  Args:
    run: `predict.Run` of a detection.
    data: batches of images on canvases.
    mesh: of the devices that they are on.
    threshold: of the score; None: that of boxes or of segments.
    attention: whether to have `maps`.

  Raises:
    ValueError: if a prediction is no number.
  """
  everywhere = sharding.replicated(mesh)
  state = jax.device_put(run.state(), everywhere)
  apply = jax.jit(
    measure(run.model, run.task, attention=attention), out_shardings=everywhere
  )
  for batch, host in data:
    with jax.set_mesh(mesh):
      out = jax.device_get(apply(state, batch))
    canvas = batch["image"].shape[1:3]
    yield from _read(out, host, canvas, run.is_thing, threshold)


def _read(out, host, canvas, is_thing, threshold) -> Iterator[Detection]:
  for row in np.flatnonzero(host["example_id"] >= 0):
    one = {k: np.asarray(x[row]) for k, x in out.items()}
    example_id = int(host["example_id"][row])
    postprocess.check_finite(one, f"image {example_id + 1} of those given")
    hw = tuple(host["image_hw"][row].tolist())
    found = postprocess.find(
      one, canvas, hw, is_thing=is_thing, threshold=threshold
    )
    maps = None
    if "attention" in one:
      weights, stride = grid_maps(one["attention"][found.query], canvas)
      maps = postprocess.at_pixels(weights, one["size"], hw, stride)
    yield Detection(example_id, hw, found, maps)


def grid_maps(
  weights: Float[np.ndarray, "n s"], canvas: tuple[int, int]
) -> tuple[Float[np.ndarray, "n h w"], int]:
  """Weights of tokens as maps, and a token's pixels: some power of 2."""
  for stride in (2**k for k in range(max(canvas).bit_length() + 1)):
    h, w = (-(-n // stride) for n in canvas)
    if h * w == weights.shape[1]:
      return weights.reshape(-1, h, w), stride
  raise ValueError(
    f"{weights.shape[1]} tokens are no grid of a canvas of {canvas[0]} x "
    f"{canvas[1]} pixels."
  )


def lines(
  name: str, found: postprocess.Found, names: Sequence[str]
) -> list[str]:
  """The image, and a line for each object: label, score, box in pixels."""
  count = len(found.label)
  text = [f"{name}: {count} object{'s' * (count != 1)}"]
  width = max((len(names[c]) for c in found.label), default=0)
  for c, score, box in zip(found.label, found.score, found.box):
    x0, y0, x1, y1 = np.round(box).astype(int)
    label = f"{names[c]:{width}}"
    text.append(f"  {label}  {score:.3f}  x {x0} to {x1}, y {y0} to {y1}")
  return text


def as_json(
  name: str,
  one: Detection,
  names: Sequence[str],
  is_thing: Sequence[bool] | None,
) -> dict[str, Any]:
  """An image as a JSON file holds it; masks as COCO's compressed RLE."""
  found, (h, w) = one.found, one.image_hw
  rows = [
    {"label": names[c], "class": c, "score": score, "box": box}
    for c, score, box in zip(
      found.label.tolist(), found.score.tolist(), found.box.tolist()
    )
  ]
  if found.id_map is not None:
    things = postprocess.are_things(found.label, is_thing).tolist()
    for k, (row, thing) in enumerate(zip(rows, things), 1):
      mask = np.asfortranarray(found.id_map == k, np.uint8)
      rle = coco_mask.encode(mask)
      rle["counts"] = rle["counts"].decode("ascii")
      row |= {"is_thing": thing, "area": int(mask.sum()), "segmentation": rle}
  return {"file": name, "height": h, "width": w, "objects": rows}


def report(
  run: Any,
  detections: Iterable[Detection],
  files: Sequence[Path],
  *,
  folder: Path,
  json_file: str | None = None,
) -> set[int]:
  """Prints and draws what is found; returns in which files.

  Args:
    run: `predict.Run` of a detection.
    detections: from `find`; example_id is a position in `files`.
    files: of the images.
    folder: for the pictures; those of attention go into attention/ inside it.
    json_file: for all of it; None: none.
  """
  names = postprocess.all_names(run.label_names, run.task.num_classes)
  pictures, rows = picture_names(files), {}
  for one in detections:
    at, file = one.example_id, files[one.example_id]
    print("\n".join(lines(str(file), one.found, names)), flush=True)
    image = ops.decode(file.read_bytes())
    drawn = object_pictures.found_objects(one.found, names, by_class=False)
    object_pictures.detections(image, drawn, folder / pictures[at])
    if one.maps is not None:
      path = folder / "attention" / pictures[at]
      object_pictures.attention(image, drawn, one.maps, path)
    rows[at] = as_json(str(file), one, names, run.is_thing)
  print(f"Pictures of {len(rows)} images are in {folder}.")
  if json_file:
    text = json.dumps({"images": list(rows.values())})
    Path(json_file).write_text(text + "\n")
  return set(rows)


def picture_names(files: Sequence[Path]) -> list[str]:
  """Of the picture of each file, none of them used twice."""
  names: dict[str, None] = {}
  for file in files:
    name, number = file.stem, 1
    while name in names:
      number += 1
      name = f"{file.stem}_{number}"
    names[name] = None
  return [f"{name}.png" for name in names]
