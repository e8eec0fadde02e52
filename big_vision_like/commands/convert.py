"""Converts published weights into a run folder, and back into their layouts.

  convert vit_b16.safetensors runs/vit_b16 --model vit --variant B/16
  convert hf://google/siglip-base-patch16-224 runs/siglip --model two_towers \\
    --variant google/siglip-base-patch16-224 --tokenizer spiece.model
  convert runs/vit_b16 vit_b16.npz --layout google

What it writes can be used as any run: by predict, and as config.init_from. The
layout of a file is recognised from its names.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from ml_collections import ConfigDict

from big_vision_like import (
  api,
  checkpoint,
  record,
  resolve,
  trees,
  warm_start,
)
from big_vision_like.commands import predict
from big_vision_like.models import detr, two_towers
from big_vision_like.weights import engine

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """From where, to where, and which model it is."""
  add = parser.add_argument
  add("source", help="file of weights, hf://org/name, or a run folder")
  add("target", help="run folder to make, or a file of weights to write")
  add("--model", metavar="NAME", help="of the weights: a file in models/")
  add("--variant", metavar="V", help="such as B/16, or a published name")
  add("--layout", help="whose names; needed to write, recognised to read")
  add("--set", nargs="+", default=(), metavar="KEY=VALUE", help="of the model")
  add("--resize", nargs="+", default=(), help="what to fit to the model")
  add("--tokenizer", metavar="FILE", help="sentencepiece model, for texts")
  add("--labels", metavar="FILE", help="names: a line each, or JSON")
  add("--dtype", choices=list(DTYPES), default="float32", help="to write")


def main(args: argparse.Namespace) -> int:
  """Converts, and says what was written."""
  is_file = Path(args.source).suffix in engine.SUFFIXES
  if is_file or args.source.startswith(warm_start.HUB):
    return _import(args)
  return _export(args)


def _import(args: argparse.Namespace) -> int:
  if not args.model or not args.variant:
    raise ValueError(
      "To read published weights, say whose they are: --model NAME --variant V "
      f"with one of the models {', '.join(resolve.available('models'))}."
    )
  if Path(args.target).exists() and any(Path(args.target).iterdir()):
    raise ValueError(f"{args.target} exists already; nothing was written.")
  path = Path(args.source)
  if args.source.startswith(warm_start.HUB):
    path = warm_start.download(args.source)
  published = engine.table(args.model, "PUBLISHED")
  settings = published.get(args.variant, {"variant": args.variant})
  config, variables, layout = read_published(
    engine.read(path),
    name=args.model,
    settings={**settings, **predict.settings(args.set)},
    layout=args.layout,
    resize=args.resize,
    prepared=engine.table(args.model, "PREPARED").get(args.variant),
    tokenizer=args.tokenizer,
  )
  names = label_names(args.labels, path, config.task.num_classes)
  is_thing = engine.table(args.model, "IS_THING").get(len(names))
  extra = {} if is_thing is None else {"is_thing": list(is_thing)}
  write_run(
    Path(args.target), config, variables, names, source=args.source, **extra
  )
  print(
    f"{trees.count(variables['params']):,} parameters from {args.source}, read "
    f"as {layout}, are in {args.target}."
  )
  return 0


def _export(args: argparse.Namespace) -> int:
  if args.layout is None:
    raise ValueError("To write published weights, say how: --layout NAME.")
  if Path(args.target).exists():
    raise ValueError(f"{args.target} exists already; nothing was written.")
  run = predict.load_run(args.source)
  name = run.config.model.name
  tensors = engine.export_weights(
    run.variables, name=name, model=run.model, layout=args.layout
  )
  dtype = DTYPES[args.dtype]
  tensors = {
    k: x.astype(dtype) if x.dtype == np.float32 else x
    for k, x in tensors.items()
  }
  engine.write(args.target, tensors)
  print(
    f"{len(tensors)} arrays of {name} from {args.source}, in the "
    f"{args.layout} layout, are in {args.target}."
  )
  return 0


def read_published(
  tensors: engine.Tensors,
  *,
  name: str,
  settings: Mapping[str, Any],
  layout: str | None = None,
  resize: Sequence[str] = (),
  prepared: Mapping[str, Any] | None = None,
  tokenizer: str | None = None,
) -> tuple[ConfigDict, api.PyTree, str]:
  """A model that computes what the published one does.

  Args:
    tensors: arrays by their names.
    name: of the model's file.
    settings: of the model, its variant among them; they go before those that
      the layout asks for (its GELU, the constant of its LayerNorms, ...).
    layout: whose names they are; None: recognised.
    resize: see `engine.resize_ours`.
    prepared: how images, and texts, are prepared; None: as the layout says.
    tokenizer: file of a sentencepiece model, for models of texts.

  Returns:
    The sections `model`, `task` and `data` of a config, the variables, and the
    layout.

  Raises:
    ValueError: if the arrays are not those of the model, see
      `engine.import_weights`.
  """
  has_head = resolve.takes("models", name, "Model", "num_classes")

  def make(classes, **more):
    head = {"num_classes": classes} if has_head else {}
    more = {"name": name, **settings, **more, **head}
    return resolve.make("models", "Model", "--set", more)

  layout = layout or engine.recognise(tensors, name, make(1))
  wanted = {**_of_layout(name, layout, "SETTINGS", make(None)), **settings}
  classes = engine.count_classes(tensors, name, make(1), layout)
  model = make(classes, **wanted)
  prepared = prepared or _of_layout(name, layout, "PREPROCESS", model)
  shapes = jax.eval_shape(
    lambda: model.init(
      jax.random.key(0), train=False, **example_inputs(model, prepared)
    )
  )
  variables, layout = engine.import_weights(
    tensors,
    name=name,
    model=model,
    shapes=shapes,
    layout=layout,
    resize=resize,
  )
  task = dict(name="classification", loss_name="softmax")
  if isinstance(model, two_towers.TwoTowers):
    task = dict(name="contrastive", loss_name="sigmoid")
  if isinstance(model, detr.DETR):
    task = dict(name="detection")
  task.update(
    num_classes=classes or 0,
    mean=tuple(prepared["mean"]),
    std=tuple(prepared["std"]),
  )
  data = _data(model, prepared)
  if tokenizer is not None:
    file = dict(name="sentencepiece", path=str(Path(tokenizer).absolute()))
    data["text"] = {**file, **prepared.get("text", {})}
  config = ConfigDict(
    dict(model={"name": name, **wanted}, task=task, data=data)
  )
  return config, variables, layout


def _of_layout(
  name: str, layout: str, table: str, model: nn.Module
) -> dict[str, Any]:
  """An entry of SETTINGS or PREPROCESS of weights/<name>.py."""
  entry = engine.table(name, table).get(layout, {})
  return dict(entry(model) if callable(entry) else entry)


def example_inputs(
  model: nn.Module, prepared: Mapping[str, Any]
) -> dict[str, Any]:
  """Zeros of the shapes that a published model takes."""
  if isinstance(model, two_towers.TwoTowers):
    inputs = example_inputs(_image_model(model), prepared)
    tokens = jnp.ones((1, 1), jnp.int32)
    packed = dict(text_segment_ids=tokens, text_positions=0 * tokens)
    return inputs | {"text": tokens} | (packed if is_packed(model) else {})
  if is_packed(model):
    side = _patch(model)
    ids = jnp.ones((1, 1), jnp.int32)
    return dict(
      patches=jnp.zeros((1, 1, 3 * side**2)),
      segment_ids=ids,
      positions=jnp.zeros((1, 1, 2), jnp.int32),
      grid_hw=jnp.ones((1, 1, 2), jnp.int32),
      example_mask=ids > 0,
    )
  return dict(image=jnp.zeros((1, prepared["size"], prepared["size"], 3)))


def is_packed(model: nn.Module) -> bool:
  """Whether a model reads packed rows."""
  return "patches" in type(_image_model(model)).__call__.__annotations__


def _image_model(model: nn.Module) -> nn.Module:
  """The model, or of two towers that of the images."""
  if isinstance(model, two_towers.TwoTowers):
    return model.make("image", parent=None)
  return model


def _patch(model: nn.Module) -> int:
  return int(_image_model(model).variant.partition("/")[2] or 16)


def _data(model: nn.Module, prepared: Mapping[str, Any]) -> dict[str, Any]:
  """How the published model's images are prepared, as our ops."""
  if is_packed(model):
    tokens = (prepared["size"] // _patch(model)) ** 2
    pack = dict(
      length=4 * tokens,
      patch=_patch(model),
      max_images=16,
      interpolation=prepared["interpolation"],
      eval_tokens=tokens,
    )
    return dict(eval_ops="decode", pack=pack)
  if isinstance(model, detr.DETR):
    size, longest = prepared["size"], prepared["longest"]
    spec = dict(canvases=_canvases(size, longest), masks=model.has_masks)
    ops = f"decode|detr_resize({size}, {longest})"
    return dict(eval_ops=ops, pack=None, objects=spec)
  size, crop_pct = prepared["size"], prepared["crop_pct"]
  if crop_pct is None:
    return dict(eval_ops=f"decode|resize({size})", pack=None)
  method = prepared["interpolation"]
  ops = f"resize_center_crop({size}, crop_pct={crop_pct}, "
  return dict(eval_ops=f"decode|{ops}interpolation='{method}')", pack=None)


def _canvases(size: int, longest: int) -> tuple[tuple[int, int], ...]:
  """For images lying, standing, and of both kinds; of COCO's most are 4 : 3."""
  short, usual, long = (
    -(-n // 32) * 32 for n in (size, size * 4 // 3, longest)
  )
  sides = [(short, usual), (short, long)]
  return (*sides, *((w, h) for h, w in sides), (long, long))


def label_names(
  path: str | None, weights: Path, classes: int
) -> tuple[str, ...]:
  """Names of the classes: of a file, or of the config.json beside the weights.

  transformers' configs have them as "id2label", timm's as "label_names", COCO's
  annotations as "categories"; where there are none, classes are called by their
  numbers.

  Raises:
    ValueError: if there are not as many names as classes.
  """
  file = weights.parent / "config.json" if path is None else Path(path)
  if path is not None and file.suffix != ".json":
    names = tuple(file.read_text().splitlines())
  else:
    names = _names_in_json(file, classes) if path or file.is_file() else ()
  if not names and path is None:
    return tuple(f"class {i}" for i in range(classes))
  if len(names) != classes:
    raise ValueError(
      f"{file} names {len(names)} classes, and the weights have {classes}."
    )
  return names


def _names_in_json(file: Path, classes: int) -> tuple[str, ...]:
  stored = json.loads(file.read_text())
  if isinstance(stored, dict) and "categories" in stored:
    # Of COCO, by their ids, as heads of DETR have them.
    names = {c["id"]: c["name"] for c in stored["categories"]}
    most = max(classes, *(i + 1 for i in names))
    return tuple(names.get(i, f"(id {i})") for i in range(most))
  if isinstance(stored, dict):
    stored = stored.get("id2label") or stored.get("label_names") or stored
  if isinstance(stored, dict):  # By number, among what else a config says.
    numbers = sorted((k for k in stored if k.isdecimal()), key=int)
    stored = [stored[k] for k in numbers]
  return tuple(map(str, stored))


def write_run(
  folder: Path,
  config: ConfigDict,
  variables: api.PyTree,
  names: Sequence[str],
  *,
  source: str,
  **extra: Any,
) -> None:
  """A run folder with one checkpoint, of step 0; `extra` is for run.json."""
  record.record_run(
    folder,
    config.to_json_best_effort(),
    {"label_names": list(names), "converted_from": source, **extra},
    overview=trees.overview(variables["params"]),
  )
  state = api.TrainState(
    step=jnp.zeros((), jnp.int32),
    params=variables["params"],
    model_state={k: v for k, v in variables.items() if k != "params"},
    opt_state=(),
    rng=jax.random.key(0),
  )
  state = jax.tree.map(jnp.asarray, state)
  path = folder / checkpoint.FOLDER
  with checkpoint.Checkpointer(path) as checkpoints:
    checkpoints.save(0, state, {"step": 0, "data": 0})
