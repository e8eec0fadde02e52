"""Tasks of a learnable memory on a loaded run: joined, chosen, folded, saved.

A run is what commands/predict.py loads: its config, its model and variables,
and `labels`, what the logits of each task stand for.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
from ml_collections import ConfigDict

from big_vision_like import build, record
from big_vision_like.models import memory
from big_vision_like.weights import adapter

Labels = dict[str, adapter.Labels]


def labels(
  model: nn.Module,
  names: Sequence[str],
  loss_name: str,
  stored: Mapping[str, Any],
) -> Labels:
  """By task; of a model without a memory, "" is the only one.

  Args:
    model: of the run.
    names: of the classes that the run was trained, or is asked, for.
    loss_name: likewise.
    stored: of further tasks, by name, as `memory join` leaves them.
  """
  own = adapter.Labels(tuple(names), loss_name)
  if not isinstance(model, memory.MemoryViT):
    return {"": own}
  return {model.asked(): own} | {
    k: adapter.Labels(*v) for k, v in stored.items()
  }


def join(run: Any, files: Sequence[str]) -> Any:
  """The run with more tasks, from files.

  Its own tasks stay, and so does the head of a backbone.

  Raises:
    ValueError: see `adapter.join`; and if files prepare their images in
      another way than each other.
  """
  adapters = {file: adapter.load(file) for file in files}
  params, settings = run.variables["params"], build.plain(run.config.model)
  if isinstance(run.model, memory.MemoryViT):
    own = [k for k in run.model.tasks if k in run.labels]
    adapters = {f"task {k}": saved(run, k) for k in own} | adapters
  elif run.label_names:
    settings["num_classes"] = run.task.num_classes
  settings, params = adapter.attach(settings, params, adapters)
  named = {k: v for k, v in run.labels.items() if k}
  if "" in run.labels and run.label_names:
    named[memory.BACKBONE] = run.labels[""]
  for one in adapters.values():
    named[one.task] = adapter.Labels(one.label_names, one.loss_name)
  inputs = next(iter(adapters.values())).inputs
  config = ConfigDict(run.config.to_dict())
  config.model = settings
  config.data.eval_ops = inputs["eval_ops"]
  for key in ("mean", "std"):
    config.task[key] = record.as_tuples(inputs[key])
  asked = named[settings["task"]]
  config.task.loss_name = asked.loss_name
  config.task.num_classes = len(asked.names)
  task = build.make_task(config, len(asked.names))
  return dataclasses.replace(
    run,
    config=config,
    label_names=asked.names,
    model=build.make_model(config, task.num_classes),
    task=task,
    variables={**run.variables, "params": params},
    labels=named,
  )


def saved(run: Any, task: str, name: str | None = None) -> adapter.Adapter:
  """A task of a run as it goes into a file.

  Raises:
    ValueError: if the run has no such task, or no memory at all.
  """
  if not isinstance(run.model, memory.MemoryViT):
    raise ValueError(
      f"The run is of {run.config.model.name!r}, and a memory has tasks: see "
      "configs/memory_transfer.py."
    )
  if task not in run.labels or task == memory.BACKBONE:
    raise ValueError(
      f"The run has no task {task!r} whose classes have names; it has: "
      f"{', '.join(k for k in run.labels if k != memory.BACKBONE)}."
    )
  return adapter.of_run(
    run.variables["params"],
    run.model,
    task=task,
    name=name or task,
    labels=run.labels[task],
    inputs=dict(
      eval_ops=run.config.data.eval_ops, mean=run.task.mean, std=run.task.std
    ),
  )


def chosen(run: Any, tasks: Sequence[str] | None) -> Any:
  """The run with the answers that are asked for.

  Raises:
    ValueError: if one is not loaded.
  """
  if tasks is None:
    return run
  for task in tasks:
    if task not in run.labels:
      raise ValueError(
        f"The task {task!r} is asked for, and not loaded; there are: "
        f"{', '.join(filter(None, run.labels)) or 'none, but the run itself'}."
      )
  return dataclasses.replace(run, labels={k: run.labels[k] for k in tasks})


def folded(run: Any) -> Any:
  """The run with the memory, if it has one, as constants."""
  if not isinstance(run.model, memory.MemoryViT):
    return run
  model, params = memory.fold(run.model, run.variables["params"])
  variables = {**run.variables, "params": params}
  return dataclasses.replace(run, model=model, variables=variables)
