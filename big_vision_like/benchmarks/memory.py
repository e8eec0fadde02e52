"""Learnable memory in miniature: arXiv 2203.15243 on digit scenes.

A ViT learns to read digits on plain grounds. Then, each apart, it learns which
digit stands on a photograph, its colour, and what the photograph shows, by
every method of the paper. The tasks of a method are joined from their files,
and all answers are scored again: with the mask none may change, without it all
do.

Everything runs by the configs and files that anyone would use. What is done
already is not done again.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from big_vision_like import (
  api,
  attach,
  build,
  observe,
  pictures,
  train,
  train_step,
  trees,
)
from big_vision_like.benchmarks import measure
from big_vision_like.commands import check, predict
from big_vision_like.evaluators import classification
from big_vision_like.models import memory
from big_vision_like.weights import adapter

OWN = "digit, plain"
TASKS = ("digit", "color", "background")
DATA = {OWN: "digit_scenes:plain/digit"} | {
  task: f"digit_scenes:photo/{task}" for task in TASKS
}
BACKBONE_STEPS, STEPS = 1500, 300
# What configs/memory_transfer.py is told.
METHODS = {
  "full": "method=full,lr=0.03",
  "head": "method=head,lr=0.1",
  "head, class token": "method=head_cls,lr=0.1",
  "5 cells": "method=memory,mask=0,cells=5,lr=0.1",
  "5 cells, mask": "method=memory,mask=1,cells=5,lr=0.1",
}
# Those that can be joined, and what their joining is called.
JOINED = {"5 cells, mask": "mask", "5 cells": "no mask"}
IMAGES, SHOWN = 1000, 18

Run = Any  # commands/predict.py's


def run(
  workdir: str, *, backbone_steps: int = BACKBONE_STEPS, steps: int = STEPS
) -> str:
  """Trains and joins all tasks; returns the tables as text."""
  folder = Path(workdir)
  folder.mkdir(parents=True, exist_ok=True)
  backbone = folder / "backbone"
  _train(
    f"configs/vit_i1k.py:data={DATA[OWN]},steps={backbone_steps}", backbone
  )
  tuned = {
    method: {task: _tune(backbone, method, task, steps=steps) for task in TASKS}
    for method in METHODS
  }
  drops = _interference(backbone, tuned)
  answers = folder / "answers.png"
  _draw(_join(backbone, tuned, next(iter(JOINED))), answers)
  picture = folder / "methods.png"
  rows = [_row(method, of) for method, of in tuned.items()]
  pictures.methods(rows, drops, TASKS, picture)
  return "\n\n".join(
    [
      measure.table(
        "A ViT that reads digits on plain grounds learns other tasks",
        [_text(row) for row in rows],
        "Held-out accuracy by method. Parameters that are trained, and seconds "
        f"of {steps} steps, are those of {TASKS[0]}.",
      ),
      measure.table(
        "All tasks in one model",
        [_text(row) for row in drops],
        "Held-out accuracy of each task alone, and with all of them joined.",
      ),
      f"Pictures: {picture} and {answers}",
    ]
  )


def _train(spec: str, folder: Path) -> float:
  """Runs a config; what it prints goes to a file. Held-out accuracy."""
  config = check.load_config(spec)
  with config.unlocked():
    config.evals.val.every = 0
    config.evals.val.data.limit = IMAGES
    config.checkpoint.every = 0
  with (
    folder.with_suffix(".log").open("a") as log,
    contextlib.redirect_stdout(log),
    contextlib.redirect_stderr(log),
  ):
    accuracy = train.train(config, folder)["val/accuracy"]
  print(f"{folder}: {accuracy:.1%} of held-out images", flush=True)
  return accuracy


def _tune(
  backbone: Path, method: str, task: str, *, steps: int
) -> dict[str, Any]:
  """A task by a method: its accuracy, parameters, seconds and file."""
  name = method.replace(",", "").replace(" ", "_")
  folder = backbone.parent / f"{task}_{name}"
  spec = (
    f"configs/memory_transfer.py:run={backbone},data={DATA[task]},"
    f"steps={steps},{METHODS[method]}"
  )
  accuracy = _train(spec, folder)
  parts = build.build(check.load_config(spec))
  trained, _ = trees.split(parts.params_shape, parts.config.optim.frozen)
  records = observe.read_metrics(folder / "metrics.jsonl")
  speeds = [r["images_per_s"] for r in records if "images_per_s" in r]
  file = folder.with_suffix(adapter.SUFFIX)
  if method in JOINED and not file.exists():
    adapter.save(file, attach.saved(predict.load_run(str(folder)), task))
  return {
    "accuracy": accuracy,
    "parameters": trees.count(trained),
    "seconds": steps * parts.config.batch_size / float(np.median(speeds)),
    "file": str(file),
  }


def _row(method: str, of: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
  first = of[TASKS[0]]
  return {
    "method": method,
    "parameters": f"{first['parameters']:,}",
    "seconds": f"{first['seconds']:.1f}",
    **{task: of[task]["accuracy"] for task in TASKS},
  }


def _text(row: Mapping[str, Any]) -> dict[str, str]:
  return {
    k: f"{v:.1%}" if isinstance(v, float) else str(v) for k, v in row.items()
  }


def _join(backbone: Path, tuned: Mapping[str, Any], method: str) -> Run:
  files = [tuned[method][task]["file"] for task in TASKS]
  return attach.folded(attach.join(predict.load_run(str(backbone)), files))


def _interference(backbone: Path, tuned) -> list[dict[str, Any]]:
  """Of each task: its accuracy alone, and joined with and without the mask."""
  before = _scores(predict.load_run(str(backbone)))[OWN]
  rows = [{"task": task} for task in (OWN, *TASKS)]
  for method, called in JOINED.items():
    after = _scores(_join(backbone, tuned, method))
    for row in rows:
      task = row["task"]
      alone = before if task == OWN else tuned[method][task]["accuracy"]
      row[f"alone, {called}"] = alone
      row[f"joined, {called}"] = after[task]
      row[f"drop, {called}"] = alone - after[task]
  return rows


def _scores(run: Run) -> dict[str, float]:
  """Held-out accuracy of all tasks of a run, each on its own images."""
  answers = _answers(run)
  scores = {}
  for task in (OWN, *TASKS):
    key = _key(run, task)
    if key is not None:
      data = classification.gather(answers, _batches(run, task, IMAGES))
      scores[task] = float((data[key].argmax(1) == data["label"]).mean())
  return scores


def _answers(run: Run) -> api.Predict:
  state = api.TrainState(0, run.variables["params"], {}, (), jax.random.key(0))
  apply = jax.jit(train_step.make_predict(run.model, run.task))
  return lambda batch: jax.device_get(apply(state, batch))


def _key(run: Run, task: str) -> str | None:
  """Where a run answers a task, if it does."""
  if task == OWN:
    return "logits" if "" in run.labels else f"logits/{memory.BACKBONE}"
  return f"logits/{task}" if task in run.labels else None


def _batches(run: Run, task: str, limit: int):
  config = check.load_config(f"configs/memory_transfer.py:data={DATA[task]}")
  with config.unlocked():
    config.data.eval_ops = run.config.data.eval_ops
  settings = {"split": "validation", "limit": limit}
  return build.EvalBatches(build.build(config), settings)()


def _draw(run: Run, path: Path) -> None:
  """Held-out images with the answers of all tasks but the ViT's own."""
  answers, names, said, true = _answers(run), [], [], []
  for task in TASKS:
    labels = run.labels[task].names
    data = classification.gather(answers, _batches(run, task, SHOWN))
    one_hot = np.eye(len(labels), dtype=bool)
    said.append(one_hot[data[_key(run, task)].argmax(1)])
    true.append(one_hot[data["label"]])
    names += labels
  source = build.make_source(
    check.load_config(f"configs/memory_transfer.py:data={DATA[TASKS[0]]}"),
    "validation",
  )
  images = [source[int(i)]["image"] for i in data["example_id"]]
  said, true = np.concatenate(said, 1), np.concatenate(true, 1)
  pictures.predictions(images, said, true, names, path)
