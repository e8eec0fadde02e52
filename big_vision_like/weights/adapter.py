"""Tasks of a learnable memory as files of their own, kilobytes each.

A .safetensors with the parameters of one task (`cls`, `memory`, `head/kernel`
and `head/bias`) and, as metadata, all that it takes to use it: the names of
its classes, the fingerprint of the backbone that it belongs to, the tasks that
it extends with theirs, and how images are prepared. Tasks that were tuned apart
are put beside each other by `join`.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from big_vision_like import trees
from big_vision_like.api import PyTree
from big_vision_like.models import memory
from big_vision_like.models.layers.encoder import unstack_blocks
from big_vision_like.weights import engine

SUFFIX = ".safetensors"
_FORMAT = "big_vision_like memory 1"
# Of a backbone, what no task reads: it may come with or without.
_UNREAD = ("head", "pre_logits")


@dataclasses.dataclass(frozen=True)
class Adapter:
  """A task, apart from its backbone.

  Attributes:
    task: its name.
    params: its parameters, a nested dict of numpy arrays.
    label_names: of its classes, in order.
    loss_name: "softmax" or "sigmoid", as its logits are to be read.
    backbone: fingerprint of the parameters that it was trained on.
    inputs: how images are prepared: eval_ops, mean, std.
    mask: whether the backbone's tokens did not see it.
    extends: fingerprints of the tasks that it looks at, by name.
  """

  task: str
  params: Mapping[str, Any]
  label_names: tuple[str, ...]
  loss_name: str
  backbone: str
  inputs: Mapping[str, Any]
  mask: bool = True
  extends: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    classes = self.params["head"]["kernel"].shape[1]
    if len(self.label_names) != classes:
      raise ValueError(
        f"The task {self.task!r} names {len(self.label_names)} classes, and "
        f"its head has {classes}."
      )

  @property
  def cells(self) -> int:
    """A layer."""
    return self.params["memory"].shape[1] if "memory" in self.params else 0

  @property
  def width(self) -> int:
    return self.params["cls"].shape[0]

  @property
  def fingerprint(self) -> str:
    return fingerprint(self.params)

  @property
  def settings(self) -> dict[str, Any]:
    """Those of config.model.tasks."""
    return dict(
      cells=self.cells,
      num_classes=len(self.label_names),
      extends=tuple(self.extends),
    )


def fingerprint(params: PyTree) -> str:
  """Twelve digits that say which parameters these are.

  The same whether layers are scanned or not, and with or without a head.
  """
  digest = hashlib.sha256()
  for name, x in sorted(trees.flatten(unstack_blocks(dict(params))).items()):
    x = np.asarray(x)
    digest.update(f"{name} {x.shape} {x.dtype.name}".encode())
    digest.update(np.ascontiguousarray(x).tobytes())
  return digest.hexdigest()[:12]


def of_backbone(params: Mapping[str, PyTree]) -> str:
  """The fingerprint of a backbone."""
  return fingerprint({k: x for k, x in params.items() if k not in _UNREAD})


def save(path: str | Path, adapter: Adapter) -> None:
  """Writes a new file.

  Raises:
    ValueError: if there is one, or its name has another suffix.
  """
  path = Path(path)
  if path.suffix != SUFFIX or path.exists():
    raise ValueError(
      f"{path}: adapters are new files that end in {SUFFIX}; nothing was "
      "written."
    )
  rest = {
    f.name: getattr(adapter, f.name)
    for f in dataclasses.fields(adapter)
    if f.name != "params"
  }
  path.parent.mkdir(parents=True, exist_ok=True)
  tensors = trees.flatten(jax.device_get(dict(adapter.params)))
  engine.write(path, tensors, {"format": _FORMAT, **rest})


def load(path: str | Path) -> Adapter:
  """Reads a file that `save` wrote.

  Raises:
    ValueError: if it is none; the sentence names it.
  """
  tensors = engine.read(path)
  metadata = {k: json.loads(v) for k, v in _metadata(Path(path)).items()}
  if metadata.pop("format", None) != _FORMAT:
    raise ValueError(
      f"{path} is no adapter: its metadata do not say {_FORMAT!r}."
    )
  metadata["label_names"] = tuple(metadata["label_names"])
  try:
    return Adapter(params=trees.unflatten(tensors), **metadata)
  except ValueError as e:
    raise ValueError(f"{path}: {e}") from e


def _metadata(path: Path) -> dict[str, str]:
  if path.suffix != SUFFIX:
    return {}
  from safetensors import safe_open

  with safe_open(path, "numpy") as file:
    texts = file.metadata() or {}
  return texts if "format" in texts and "task" in texts else {}


def join(
  backbone: PyTree, adapters: Mapping[str, Adapter]
) -> tuple[dict[str, dict[str, Any]], dict[str, PyTree]]:
  """Puts tasks that were tuned apart beside each other.

  Args:
    backbone: parameters.
    adapters: by the file that each is from, for messages.

  Returns:
    The settings of config.model.tasks, and the parameters of all tasks.

  Raises:
    ValueError: naming the files, for an adapter of another backbone, width or
      depth, for two of one name, with and without mask, with other inputs, and
      for an extension without its very base.
  """
  for path, adapter in adapters.items():
    _check_fits(path, adapter, backbone)
  paths = _by_name(adapters)
  by_name = {k: adapters[path] for k, path in paths.items()}
  first = next(iter(by_name.values()), None)
  for name, adapter in by_name.items():
    for what in ("mask", "inputs"):
      if getattr(adapter, what) != getattr(first, what):
        raise ValueError(
          f"{paths[name]} and {paths[first.task]} cannot answer together: "
          f"their {what} are {getattr(adapter, what)} and "
          f"{getattr(first, what)}."
        )
    _check_bases(adapter, paths, by_name)
  return (
    {k: x.settings for k, x in by_name.items()},
    {k: x.params for k, x in by_name.items()},
  )


def _check_fits(path, adapter, backbone):
  norm = backbone["encoder"]["norm"]["scale"]
  depth = 0
  for name in trees.flatten(unstack_blocks(dict(backbone["encoder"]))):
    block = name.split("/")[0]
    if block.startswith("blocks_"):
      depth = max(depth, 1 + int(block.removeprefix("blocks_")))
  layers = adapter.params["memory"].shape[0] if adapter.cells else depth
  if (adapter.width, layers) != (len(norm), depth):
    raise ValueError(
      f"{path} is for a width of {adapter.width} and {layers} layers, and the "
      f"backbone has a width of {len(norm)} and {depth} layers."
    )
  if adapter.backbone != (here := of_backbone(backbone)):
    raise ValueError(
      f"{path} belongs to the backbone {adapter.backbone}, and this one is "
      f"{here}: it was trained on other parameters."
    )


def _by_name(adapters):
  """The file of each task."""
  paths: dict[str, str] = {}
  for path, adapter in adapters.items():
    if adapter.task in paths:
      raise ValueError(
        f"{paths[adapter.task]} and {path} are both called {adapter.task!r}. "
        "Train, or save, one under another name: --task NAME."
      )
    paths[adapter.task] = path
  return paths


def _check_bases(adapter, paths, by_name):
  for base, wanted in adapter.extends.items():
    if base not in by_name:
      raise ValueError(
        f"{paths[adapter.task]} extends the task {base!r}, which is not "
        f"loaded; there are: {', '.join(by_name)}."
      )
    if (here := by_name[base].fingerprint) != wanted:
      raise ValueError(
        f"{paths[adapter.task]} extends the task {base!r} {wanted}, and "
        f"{paths[base]} is {here}: another training of it."
      )


@dataclasses.dataclass(frozen=True)
class Labels:
  """What the logits of a task stand for."""

  names: tuple[str, ...]
  loss_name: str


def attach(
  settings: Mapping[str, Any],
  params: Mapping[str, PyTree],
  adapters: Mapping[str, Adapter],
) -> tuple[dict[str, Any], dict[str, PyTree]]:
  """A model with tasks from a backbone, or a model with more tasks.

  Args:
    settings: of the model, as those of config.model; the backbone's head stays
      if they say num_classes.
    params: of the model.
    adapters: of the tasks that are there and of those that join, by file.

  Returns:
    The settings and parameters of models/memory.py.

  Raises:
    ValueError: see `join`.
  """
  backbone, own = dict(settings), params
  if settings["name"] == "memory":
    backbone, own = settings[memory.BACKBONE], params[memory.BACKBONE]
  tasks, task_params = join(own, adapters)
  has_head = bool(backbone.get("num_classes"))
  return (
    dict(
      name="memory",
      backbone=backbone,
      tasks=tasks,
      task=memory.BACKBONE if has_head else next(iter(tasks)),
      mask=next(iter(adapters.values())).mask,
      attention="auto",
    ),
    {memory.BACKBONE: own, memory.TASKS: task_params},
  )


def of_run(
  params: Mapping[str, PyTree],
  model: memory.MemoryViT,
  *,
  task: str,
  name: str,
  labels: Labels,
  inputs: Mapping[str, Any],
) -> Adapter:
  """The adapter of a task of a trained model.

  Args:
    params: of the model.
    model: the model, not folded.
    task: which one.
    name: what it shall be called.
    labels: of the task.
    inputs: see Adapter.

  Raises:
    ValueError: if the task is not there.
  """
  tasks = params[memory.TASKS]
  if task not in tasks:
    raise ValueError(
      f"There is no task {task!r} to save; there are: {', '.join(tasks)}."
    )
  bases = model.tasks[task].get("extends", ())
  return Adapter(
    task=name,
    params=jax.device_get(tasks[task]),
    label_names=labels.names,
    loss_name=labels.loss_name,
    # As they come back from a file.
    inputs=json.loads(json.dumps(inputs)),
    backbone=of_backbone(params[memory.BACKBONE]),
    mask=model.mask,
    extends={k: fingerprint(tasks[k]) for k in bases},
  )
