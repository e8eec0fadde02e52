"""Tasks of a learnable memory: save, list and join their files; a worked run.

  memory save RUN FILE.safetensors      the task that a run has trained
  memory list FILE...                   what adapter files hold
  memory join RUN FILE... --to DIR      a run folder with a backbone and tasks
  memory demo [--workdir DIR]           the table of the paper, in miniature

`configs/memory_transfer.py` trains tasks (arXiv 2203.15243). `predict --run
BACKBONE --adapters FILE...` answers several in one pass.
"""

import argparse
import dataclasses
from pathlib import Path

from big_vision_like import attach, trees
from big_vision_like.benchmarks import measure
from big_vision_like.commands import convert, predict
from big_vision_like.weights import adapter


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """What to do, and with which files."""
  add = parser.add_argument
  add("action", choices=list(ACTIONS))
  add("paths", nargs="*", metavar="PATH", help="run folders and adapter files")
  add("--task", metavar="NAME", help="save: of several tasks, this one")
  add("--name", help="save: what the task shall be called in the file")
  add("--step", type=predict.step, default="latest", help="save: of the run")
  add("--to", metavar="DIR", help="join: the run folder to make")
  add("--workdir", default="runs/memory_demo", help="demo: for its runs")


def main(args: argparse.Namespace) -> None:
  """Does it, and says what was written."""
  ACTIONS[args.action](args)


def _save(args: argparse.Namespace) -> None:
  if len(args.paths) != 2:
    raise ValueError("memory save takes a run folder and the file to write.")
  source, target = args.paths
  run = predict.load_run(source, step=args.step)
  task = args.task or getattr(run.model, "task", None)
  one = attach.saved(run, task, args.name)
  adapter.save(target, one)
  print(_table([target]))


def _list(args: argparse.Namespace) -> None:
  if not args.paths:
    raise ValueError("memory list takes adapter files.")
  print(_table(args.paths))


def _table(paths) -> str:
  return measure.table("Adapters", [_row(path) for path in paths], "")


def _row(path: str) -> dict[str, object]:
  one = adapter.load(path)
  return {
    "file": path,
    "task": one.task,
    "classes": len(one.label_names),
    "cells": one.cells,
    "width": one.width,
    "mask": "yes" if one.mask else "no",
    "extends": ", ".join(one.extends),
    "backbone": one.backbone,
    "parameters": f"{trees.count(one.params):,}",
    "kB": f"{Path(path).stat().st_size / 1000:,.1f}",
  }


def _join(args: argparse.Namespace) -> None:
  if len(args.paths) < 2 or not args.to:
    raise ValueError("memory join takes a run folder, files, and --to DIR.")
  if Path(args.to).exists():
    raise ValueError(f"{args.to} exists already; nothing was written.")
  source, *files = args.paths
  run = attach.join(predict.load_run(source), files)
  convert.write_run(
    Path(args.to),
    run.config,
    run.variables,
    run.label_names,
    source=source,
    tasks={k: dataclasses.astuple(v) for k, v in run.labels.items()},
  )
  print(f"The tasks {', '.join(run.model.tasks)} are in {args.to}.")


def _demo(args: argparse.Namespace) -> None:
  # It imports the training loop, which the others do without.
  from big_vision_like.benchmarks import memory

  print(memory.run(args.workdir))


ACTIONS = {"save": _save, "list": _list, "join": _join, "demo": _demo}
