"""Compiles a run for chips that are not here: memory, traffic, largest batch.

  preflight --config configs/navit_jft.py:size=L/16 --topology v5e:16x16
  preflight --config ... --topology v5p:4x4x4 --set mesh.fsdp=4 sharding=fsdp
  preflight --config ... --topology h100:8

For TPU slices (v4, v5e, v5p, v6e) the training step of the config is compiled
by libtpu (extra `tpu`) on the mesh of the slice, on any CPU. For GPUs (a100,
h100, h200, b200; hosts x GPUs as in h100:4x8) there is no compiler without one,
and all that is printed is an estimate from the traced step. The bound of the
utilisation is a roofline, which leaves out what it cannot know.
"""

import argparse
import ast
from collections.abc import Sequence

from ml_collections import ConfigDict

from big_vision_like import build, chips, sharding, trees
from big_vision_like import preflight as preflight_lib
from big_vision_like.benchmarks import measure
from big_vision_like.chips import GIB
from big_vision_like.commands import check


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Which run, for which chips."""
  add = parser.add_argument
  add("--config", required=True, metavar="FILE[:ARG]", help="of the run")
  add("--topology", required=True, help="v5e:16x16, v4:4x4x4, h100:8, ...")
  change = "keys of the config, such as mesh.fsdp=16 batch_size=8192"
  add("--set", nargs="+", default=[], metavar="KEY=VALUE", help=change)
  search = "batches to try in search of the largest; 0: no search"
  add("--tries", type=int, default=6, metavar="N", help=search)


def main(args: argparse.Namespace) -> int:
  """Prints the tables; 1 if the config does not fit."""
  target = chips.parse(args.topology)
  config = check.load_config(args.config)
  override(config, args.set)
  mesh = sharding.make_mesh(dict(config.mesh), target.devices())
  plan = preflight_lib.Plan(build.build(config, mesh=mesh), target)
  label = "" if target.is_tpu else " (estimate)"
  print(f"{args.config} on {target.name}: {describe(plan)}\n", flush=True)
  step = plan.step(config.batch_size)
  for table in tables(step, plan, label):
    print(table + "\n", flush=True)
  if args.tries:
    print(search(step, plan, label, args.tries))
  return 0 if step.used <= plan.limit else 1


def override(config: ConfigDict, changes: Sequence[str]) -> None:
  """Sets keys of a config, from "optim.lr=1e-3" and the like.

  Raises:
    ValueError: for what is no change, or a key that the config does not have.
  """
  for change in changes:
    key, equals, text = change.partition("=")
    if not equals:
      raise ValueError(f"--set {change}: give a key and a value, as in a.b=1.")
    try:
      value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
      value = text  # a name, such as sharding=fsdp
    try:
      config.update_from_flattened_dict({key: value})
    except (AttributeError, KeyError, TypeError) as e:
      reason = " ".join(str(e.args[0]).split())
      raise ValueError(f"--set {change}: {reason}") from e


def describe(plan: preflight_lib.Plan) -> str:
  """The chips, the mesh, the model and the batch in a line."""
  axes = plan.parts.mesh.shape.items()
  return (
    f"{plan.target.size} x {plan.target.chip.kind}, mesh "
    f"{' x '.join(f'{axis} {n}' for axis, n in axes)}, "
    f"{trees.count(plan.state.params):,} parameters, batches of "
    f"{plan.parts.config.batch_size:,}"
  )


def tables(
  step: preflight_lib.Step, plan: preflight_lib.Plan, label: str
) -> list[str]:
  """Memory; and if the compiler took the program, collectives and speed."""
  found = [_memory(step, plan, label)]
  if step.memory:
    found += [_collectives(step, label), _speed(step, plan, label)]
  return found


def _memory(step, plan, label) -> str:
  sizes = {**step.memory, "total": step.used}
  rows = [{"kind": k, "GiB": f"{v / GIB:.3f}"} for k, v in sizes.items() if v]
  fits = "It fits" if step.used <= plan.limit else "It does not fit"
  note = f"{fits}: a program may use {plan.limit / GIB:.2f} GiB."
  return measure.table(f"Memory of one chip{label}", rows, note)


def _collectives(step, label) -> str:
  rows = [
    {
      "collective": t.op,
      "dtype": t.dtype,
      "chips": t.chips,
      "runs": t.runs,
      "MB": f"{t.bytes / 1e6:,.1f}",
      "ms": f"{1e3 * t.seconds:.2f}",
      "overlaps": "yes" if t.overlaps else "no",
    }
    for t in step.traffic
  ]
  note = "Results on one chip in one step, and the least time on its links."
  return measure.table(
    f"Collectives{label}", rows or [{"collective": "none"}], note
  )


def _speed(step, plan, label) -> str:
  rows = {
    "model TFLOPs": f"{step.model_flops / 1e12:,.1f}",
    "products at the peak": _ms(step.products),
    "traffic with main memory": _ms(step.memory_seconds),
    "collectives that overlap": _ms(step.exchange(overlaps=True)),
    "collectives that do not": _ms(step.exchange(overlaps=False)),
    "at least": _ms(step.seconds),
    "rows/s, at most": f"{step.rows / step.seconds:,.0f}",
    "utilisation, at most": f"{step.bound:.1%}",
  }
  if not step.memory_seconds:
    del rows["traffic with main memory"]  # It is not estimated.
  kernels = ", ".join(f"{k} ({n} calls)" for k, n in step.kernels.items())
  note = (
    f"Of a chip's {plan.target.chip.peak / 1e12:,.0f} TFLOP/s in bfloat16. "
    f"Hand-written kernels: {kernels or 'none'}."
  )
  return measure.table(
    f"A step{label}", [{"step": k, "value": v} for k, v in rows.items()], note
  )


def _ms(seconds: float) -> str:
  return f"{1e3 * seconds:,.2f} ms"


def search(
  step: preflight_lib.Step, plan: preflight_lib.Plan, label: str, tries: int
) -> str:
  """The table of the batches that were tried."""

  def used(rows):
    print(f"Trying batches of {rows:,}.", flush=True)
    return plan.step(rows).used

  known = preflight_lib.largest_batch(
    used,
    step.rows,
    step.used,
    empty=plan.held,
    limit=plan.limit,
    unit=plan.unit,
    tries=tries,
  )
  rows = [
    {
      "batch": f"{batch:,}",
      "GiB": f"{size / GIB:.2f}",
      "fits": "yes" if size <= plan.limit else "no",
    }
    for batch, size in sorted(known.items())
  ]
  best = max((b for b, size in known.items() if size <= plan.limit), default=0)
  note = f"The largest that fits, of these: {best:,}."
  return measure.table(f"Batches{label}", rows, note)
