"""Runs an evaluator or a meter on a trained or imported model.

  evaluate --run runs/NAME --evaluator val
  evaluate --run runs/NAME --evaluator attention_similarity
  evaluate --run runs/vit_b16 --evaluator head_similarity \\
      --data folder:/path/to/photos --set images=64
  evaluate --run runs/detr_r50 --evaluator coco \\
      --data coco:/coco --source raw_ids=True

An evaluator is an entry of the run's config.evals, with its settings, or a file
in evaluators/. Its tables and pictures, and scores.json, go into the folder
evaluations/ of the run.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from big_vision_like import build, compilation, sharding
from big_vision_like.commands import predict
from big_vision_like.data import sources

BATCH_SIZE = 16
# Arguments that are settings of an evaluation's data.
_DATA_FLAGS = ("split", "limit", "tokens", "batch_size")
# What config.data of an imported model does not say.
_DATA = dict(workers=0, threads=2, prefetch=2, max_broken=0.05)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """The run, the evaluator, and the images."""
  add = parser.add_argument
  add("--run", required=True, metavar="DIR", help="run folder")
  add("--evaluator", required=True, metavar="NAME", help="what to run")
  add("--step", type=predict.step, default="latest", help="see predict")
  add("--set", nargs="+", default=(), metavar="KEY=VALUE", help="its settings")
  add(
    "--static", nargs="+", default=(), metavar="KEY=VALUE", help="of the model"
  )
  add("--data", metavar="SPEC", help="as in configs; without, the run's")
  add(
    "--source", nargs="+", default=(), metavar="KEY=VALUE", help="of the data"
  )
  add("--split", help="train or validation")
  add("--limit", type=int, metavar="N", help="images, if not a setting of it")
  add("--tokens", type=int, metavar="N", help="most tokens of a packed image")
  add("--batch-size", type=int, metavar="N", help="images, or packed rows")


def main(args: argparse.Namespace) -> None:
  """Prints the scores, and where the rest is."""
  compilation.enable_compilation_cache()
  run = predict.load_run(args.run, step=args.step)
  folder = Path(args.run) / "evaluations"
  entry = _entry(run.config, args)
  batch_size = entry["data"].pop("batch_size", BATCH_SIZE)
  scores = evaluate(
    run,
    {args.evaluator: entry},
    folder,
    data=args.data,
    source=predict.settings(args.source),
    batch_size=batch_size,
  )
  width = max(map(len, scores), default=0)
  for name, score in scores.items():
    print(f"{name:{width}}  {score:.4g}")
  target = folder / args.evaluator
  record = {"step": args.step, "scores": scores}
  (target / "scores.json").write_text(json.dumps(record, indent=1) + "\n")
  print(f"Everything is in {target}.")


def _entry(config: ConfigDict, args: argparse.Namespace) -> dict[str, Any]:
  """The entry of config.evals that the arguments ask for."""
  entries = config.get("evals") or {}
  entry = {"name": args.evaluator}
  if args.evaluator in entries:
    entry = entries[args.evaluator].to_dict()
  data = {k: getattr(args, k) for k in _DATA_FLAGS}
  data = {k: v for k, v in data.items() if v is not None}
  entry["data"] = entry.get("data", {}) | data
  entry["static"] = entry.get("static", {}) | predict.settings(args.static)
  return entry | predict.settings(args.set)


def evaluate(
  run: predict.Run,
  evals: dict[str, Any],
  folder: Path,
  *,
  data: str | None,
  batch_size: int,
  source: Mapping[str, Any] | None = None,
) -> dict[str, float]:
  """The scores of evaluations, as training gives them.

  Args:
    run: from `predict.load_run`.
    evals: as config.evals.
    folder: for their tables and pictures.
    data: a source as configs name it; None: the run's.
    batch_size: rows, made up to whole shares of the devices.
    source: further settings of the source, such as raw_ids of COCO.

  Raises:
    ValueError: if no data is named, and the run has none.
  """
  parts = _parts(run, evals, data, batch_size, dict(source or {}))
  everywhere = sharding.replicated(parts.mesh)
  state = jax.device_put(run.state(), everywhere)
  shardings = jax.tree.map(lambda _: everywhere, state)
  evaluations = build.make_evaluations(parts)
  measures = build.jit_measures(parts, evaluations, shardings)
  scores = {}
  with jax.set_mesh(parts.mesh):
    for evaluation in evaluations:
      scores |= build.run_evaluation(
        evaluation, measures[evaluation.name], state, folder
      )
  return scores


def _parts(run, evals, data, batch_size, source) -> build.Parts:
  config = run.config.to_dict()
  mesh = sharding.make_mesh({"data": -1})
  config["batch_size"] = -(-batch_size // mesh.size) * mesh.size
  config["evals"] = evals
  unset = dict.fromkeys(("pack", "text", "objects"))
  config["data"] = {**unset, **_DATA, **config["data"]}
  if data is not None:
    config["data"]["source"] = sources.settings(data)
  config["data"].get("source", {}).update(source)
  if "source" not in config["data"]:
    raise ValueError(
      "An imported model does not say on which images to run it: give --data, "
      "such as folder:/path or digit_scenes."
    )
  config = ConfigDict(config)
  source = build.make_source(config, "validation")
  if tuple(source.label_names) != run.label_names:
    print(
      "The classes of the data are not those of the model: what reads labels "
      "says nothing."
    )
  return build.Parts(
    config=config,
    mesh=mesh,
    source=source,
    train_data=None,
    batch_spec={},
    model=run.model,
    task=run.task,
    text=build.make_text(config),
  )
