"""Labels images with a trained model, or finds and draws the objects in them.

Takes files and folders (searched through for images). The model, the way its
images are prepared and the names of its labels come from the run folder. With
tasks of a learnable memory, from the run or from --adapters, all are answered
in one pass, and a table says what each adds to its time.

Of a detector, prints each object with its label, score and box in pixels of the
file, and draws them, with a mask head as segments:

  predict --run runs/detr photos/ --threshold 0.9 --json found.json --attention
"""

import argparse
import ast
import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jaxtyping import Float
from ml_collections import ConfigDict

from big_vision_like import (
  api,
  attach,
  build,
  checkpoint,
  compilation,
  detect,
  postprocess,
  record,
  sharding,
  train_step,
)
from big_vision_like.benchmarks import tasks as task_costs
from big_vision_like.data import objects, ops, packing, pipeline
from big_vision_like.data.sources import folder
from big_vision_like.models import memory
from big_vision_like.weights import adapter

BATCH_SIZE = 16
# Tasks, with the arguments that make sense of them alone.
_OPTIONS = {
  "classification": ("adapters", "tasks", "top", "tokens", "features"),
  "detection": ("threshold", "pictures", "json", "attention"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """The run, the images, and what to write."""
  add = parser.add_argument
  add("--run", required=True, metavar="DIR", help="run folder of a training")
  add("images", nargs="+", metavar="IMAGE", help="image files or folders")
  add("--adapters", nargs="+", default=(), metavar="FILE", help="more tasks")
  add("--tasks", nargs="+", metavar="NAME", help="to answer; without: all")
  add("--step", type=step, default="latest", help="a step, best or latest")
  add("--top", type=int, metavar="N", help="labels to print for an image (5)")
  add("--tokens", type=int, metavar="N", help="most tokens of a packed image")
  add("--features", metavar="OUT.npz", help="file for features and scores")
  add(
    "--batch-size",
    type=int,
    metavar="N",
    help="images, or packed rows (16; of a detector 1)",
  )
  add = parser.add_argument_group("of a detector").add_argument
  add(
    "--threshold",
    type=float,
    metavar="P",
    help=f"least score of an object ({postprocess.BOX_THRESHOLD}; of a segment "
    f"{postprocess.SEGMENT_THRESHOLD})",
  )
  add("--pictures", metavar="DIR", help="for them (RUN/predictions)")
  add("--json", metavar="OUT.json", help="file for the objects, and masks")
  add(
    "--attention",
    action="store_true",
    help="draw where the decoder looks for each object",
  )


def step(text: str) -> int | str:
  """Reads --step."""
  if text not in ("best", "latest") and not text.isdecimal():
    raise argparse.ArgumentTypeError(
      f"{text!r} is neither a step, nor best, nor latest"
    )
  return text if text in ("best", "latest") else int(text)


def main(args: argparse.Namespace) -> int:
  """Prints a table; 1 if some image cannot be read."""
  files, broken = find_images(args.images)
  for name, reason in broken.items():
    print(f"skipped {name}: {reason}", file=sys.stderr)
  if not files:
    raise ValueError(f"No image of {' '.join(args.images)} can be read.")
  task = record.read_run(args.run)["config"]["task"]["name"]
  if task not in _OPTIONS:
    raise ValueError(
      "predict prints the scores of a classification, or the objects of a "
      f"detection, but the task of {args.run} is {task!r}."
    )
  others = {k for name, keys in _OPTIONS.items() if name != task for k in keys}
  given = [k for k in sorted(others) if getattr(args, k)]
  if given:
    raise ValueError(
      f"The task of {args.run} is {task}, which has no --{', --'.join(given)}."
    )
  compilation.enable_compilation_cache()
  run = load_run(args.run, step=args.step)
  show = _print_objects if task == "detection" else _print_scores
  seen = show(args, run, files)
  skipped = sorted(set(range(len(files))) - seen)
  for i in skipped:
    print(f"skipped {files[i][0]}: cannot be decoded", file=sys.stderr)
  return 1 if broken or skipped else 0


def _print_scores(args, run, files) -> set[int]:
  """Of a classification; returns which files could be read."""
  batch_size = args.batch_size or BATCH_SIZE
  if args.adapters:
    run = attach.join(run, args.adapters)
  run = attach.folded(attach.chosen(run, args.tasks))
  result = predict(run, files, batch_size=batch_size, tokens=args.tokens)
  names = [str(files[i][0]) for i in result.indices]
  for task, labels in run.labels.items():
    scores = result.scores[task]
    lines = table(names, scores, labels.names, top=args.top or 5)
    print("\n".join([f"{task}:", *lines] if task else lines))
  if isinstance(run.model, memory.MemoryViT):
    print("\n".join(costs(run, files, batch_size, args.tokens)))
  if args.features:
    arrays = {"names": np.array(names), "features": result.features}
    for task, labels in run.labels.items():
      suffix = f"/{task}" if task else ""
      arrays[f"scores{suffix}"] = result.scores[task]
      arrays[f"label_names{suffix}"] = np.array(labels.names)
    np.savez(args.features, **arrays)
  return set(result.indices)


def _print_objects(args, run, files) -> set[int]:
  """Of a detection; returns which files could be read."""
  mesh = sharding.make_mesh({"data": -1})
  data = _eval_data(
    run, files, mesh, batch_size=args.batch_size or 1, tokens=None
  )
  seen = detect.report(
    run,
    detect.find(
      run, data, mesh, threshold=args.threshold, attention=args.attention
    ),
    [file for file, _ in files],
    folder=Path(args.pictures or Path(args.run) / "predictions"),
    json_file=args.json,
  )
  if not seen:
    raise ValueError(_none_decoded(files))
  return seen


@dataclasses.dataclass(frozen=True)
class Run:
  """A trained model, ready to be applied.

  `labels` are those of each task that it answers, of which "" is the only one
  of a model without a memory. `is_thing` is known of each class of panoptic
  data.
  """

  config: ConfigDict
  label_names: tuple[str, ...]
  model: nn.Module
  task: api.Task
  variables: dict[str, api.PyTree]
  labels: Mapping[str, adapter.Labels]
  is_thing: tuple[bool, ...] | None = None

  def state(self) -> api.TrainState:
    """The state that evaluation needs: what it applies, and no optimizer."""
    return api.TrainState(
      step=jnp.zeros((), jnp.int32),
      params=self.variables["params"],
      model_state={k: v for k, v in self.variables.items() if k != "params"},
      opt_state=(),
      rng=jax.random.key(0),
    )


@dataclasses.dataclass(frozen=True)
class Result:
  """Of the images that could be decoded, in the order they were given.

  `scores` by task are probabilities: they sum to 1 over the classes where the
  loss is a softmax, and are one yes or no per class where it is a sigmoid.
  """

  indices: list[int]
  scores: Mapping[str, Float[np.ndarray, "n c"]]
  features: Float[np.ndarray, "n d"]


@dataclasses.dataclass(frozen=True)
class Files:
  """Image files as a `Source` without labels (see api.py)."""

  files: Sequence[tuple[Path, tuple[int, int]]]
  label_names: tuple[str, ...]

  def __len__(self) -> int:
    return len(self.files)

  def __getitem__(self, index: int) -> api.Example:
    return {
      "id": index,
      "image": self.files[index][0].read_bytes(),
      "label": -1,
      # The tasks of several labels ask for it.
      "multi_label": np.zeros(len(self.label_names), np.uint8),
      "objects": {
        "boxes": np.zeros((0, 4), np.float32),
        "label": np.zeros(0, np.int32),
      },
    }

  def hw(self, index: int) -> tuple[int, int]:
    return self.files[index][1]

  def name(self, index: int) -> str:
    return str(self.files[index][0])


def find_images(
  paths: Sequence[str],
) -> tuple[list[tuple[Path, tuple[int, int]]], dict[str, str]]:
  """Files with their (height, width), and why others cannot be read.

  Raises:
    ValueError: if a folder holds no image.
  """
  files, broken = [], {}
  for path in map(Path, paths):
    for file in list(_below(path)) if path.is_dir() else [path]:
      try:
        files.append((file, ops.image_hw(file)))
      except ops.BrokenImage as e:
        broken[str(file)] = str(e)
  return files, broken


def _below(path: Path) -> Iterator[Path]:
  found = sorted(
    p for p in path.rglob("*") if p.suffix.lower() in folder.EXTENSIONS
  )
  if not found:
    raise ValueError(
      f"The folder {path} holds no image ({' '.join(folder.EXTENSIONS)})."
    )
  return iter(found)


def load_run(path: str, *, step: int | str = "latest") -> Run:
  """The model of a run folder with the parameters of a step.

  Raises:
    ValueError: if the folder is not that of a run, or its tokenizer is another
      one than the model was trained with.
  """
  stored = record.read_run(path)
  config = ConfigDict(stored["config"])
  names = tuple(stored["label_names"])
  task = build.make_task(config, len(names))
  # The run's attention may be a kernel of other devices than these.
  portable = {"attention": "auto"} if "attention" in config.model else {}
  text = build.make_text(config) if "text" in config.data else None
  if text is not None:
    checkpoint.check_same_tokenizer(path, text.tokenizer.fingerprint)
  model = build.make_model(config, task.num_classes, text, **portable)
  variables = checkpoint.load_variables(path, step=step)
  labels = {}
  if hasattr(task, "loss_name"):
    tasks = stored.get("tasks", {})
    labels = attach.labels(model, names, task.loss_name, tasks)
  return Run(
    config, names, model, task, variables, labels, stored.get("is_thing")
  )


def settings(pairs: Sequence[str]) -> dict[str, Any]:
  """KEY=VALUE, where the value is a Python literal or a word."""
  found = {}
  for pair in pairs:
    key, equals, value = pair.partition("=")
    if not equals:
      raise ValueError(f"--set {pair}: write KEY=VALUE.")
    try:
      found[key] = ast.literal_eval(value)
    except (ValueError, SyntaxError):
      found[key] = value
  return found


def predict(
  run: Run,
  files: Sequence[tuple[Path, tuple[int, int]]],
  *,
  batch_size: int,
  tokens: int | None = None,
) -> Result:
  """Applies the model to files, prepared as the run prepares evaluation."""
  mesh = sharding.make_mesh({"data": -1})
  everywhere = sharding.replicated(mesh)
  keys = {k: f"logits/{k}" if k else "logits" for k in run.labels}
  state = jax.device_put(run.state(), everywhere)
  apply = jax.jit(
    train_step.make_predict(run.model, run.task), out_shardings=everywhere
  )
  data = _eval_data(run, files, mesh, batch_size=batch_size, tokens=tokens)
  rows: dict[int, dict[str, np.ndarray]] = {}
  with jax.set_mesh(mesh), tqdm.tqdm(total=len(files), disable=None) as bar:
    for batch, host in data:
      out = jax.device_get(apply(state, batch))
      ids = host["example_id"]
      for at in np.argwhere(ids >= 0):
        at = tuple(at)
        wanted = ("features", *keys.values())
        rows[int(ids[at])] = {k: out[k][at] for k in wanted}
      bar.update(len(rows) - bar.n)
  if not rows:
    raise ValueError(_none_decoded(files))
  stacked = lambda key: np.array([rows[i][key] for i in sorted(rows)])
  scores = {
    task: probabilities(stacked(key), run.labels[task].loss_name)
    for task, key in keys.items()
  }
  return Result(sorted(rows), scores, stacked("features"))


def _none_decoded(files):
  return (
    f"None of the {len(files)} images can be decoded, the first of them "
    f"{files[0][0]}."
  )


def _eval_data(
  run: Run,
  files: Sequence[tuple[Path, tuple[int, int]]],
  mesh: jax.sharding.Mesh,
  *,
  batch_size: int,
  tokens: int | None,
) -> Iterator[tuple[api.Batch, dict[str, Any]]]:
  config = run.config.data
  # No more rows than images, and as many on each device.
  rows = min(batch_size, len(files))
  rows = -(-rows // mesh.size) * mesh.size
  dataset = pipeline.eval_data(
    Files(files, run.label_names),
    ops=config.eval_ops,
    pack=config.pack and packing.PackSpec(**config.pack),
    objects=_canvases(run),
    num_classes=run.task.num_classes,
    batch_size=rows,
    tokens=tokens,
  )
  placed = sharding.batch_sharding(mesh)
  for batch in pipeline.open_iterator(dataset, workers=0, threads=2):
    yield pipeline.to_device(batch, placed)


def _canvases(run: Run) -> objects.ObjectSpec | None:
  """Those of a detector; there are no masks to lay on them."""
  settings = build.plain(run.config.data.get("objects"))
  if not settings:
    return None
  return objects.ObjectSpec(**settings | {"masks": False})


def probabilities(
  logits: Float[np.ndarray, "n c"], loss_name: str
) -> Float[np.ndarray, "n c"]:
  """Scores from 0 to 1, as the loss of the task reads the logits."""
  squash = jax.nn.softmax if loss_name == "softmax" else jax.nn.sigmoid
  return np.asarray(squash(logits))


def table(
  names: Sequence[str],
  scores: Float[np.ndarray, "n c"],
  label_names: Sequence[str],
  *,
  top: int,
) -> list[str]:
  """A line per image: its name, then its best labels with their scores."""
  best = np.argsort(-scores, axis=1, kind="stable")[:, :top]
  cells = [
    [f"{label_names[c]} {scores[row, c]:.3f}" for c in classes]
    for row, classes in enumerate(best)
  ]
  left = max(map(len, names))
  widths = [max(map(len, column)) for column in zip(*cells)]
  return [
    "  ".join(
      [f"{name:{left}}", *(f"{c:{w}}" for c, w in zip(row, widths))]
    ).rstrip()
    for name, row in zip(names, cells)
  ]


def costs(
  run: Run,
  files: Sequence[tuple[Path, tuple[int, int]]],
  batch_size: int,
  tokens: int | None,
) -> list[str]:
  """What each task of a memory adds to the time of the first batch."""
  mesh = sharding.make_mesh({"data": -1})
  data = _eval_data(run, files, mesh, batch_size=batch_size, tokens=tokens)
  batch, host = next(data)
  inputs, _ = run.task.prepare(batch, None)
  params = jax.device_put(run.variables["params"], sharding.replicated(mesh))
  with jax.set_mesh(mesh):
    return task_costs.lines(
      run.model, params, inputs, images=int((host["example_id"] >= 0).sum())
    )
