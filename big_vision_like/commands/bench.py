"""Prints tables of speed: training against others, loader, padding, start.

  bench             all of them
  bench step        images/s in training, packed, against published programs
  bench models      images/s of single models, against timm's
  bench loader      decoding, resizing and packing on one core
  bench padding     the share of packed rows that is padding
  bench wait        the share of a training step spent waiting for data
  bench startup     seconds from the command to the first step
  bench attention   time and memory over packed rows, by backend
  bench tokens      time and memory of attention, separable and not, by tokens
  bench share       speed of networks by their share of attention layers
  bench kinds       time in products, and in what is bound by memory
  bench contrastive time and memory of the contrastive losses, chunked and dense
  bench detr        matching against scipy's, DETR's steps against transformers'
  bench utilisation of a GPU or a TPU in training, beside torch's

Every ratio is measured in one run, as the median of interleaved rounds. The
published programs are in the extra `parity`; those that are not installed are
left out.
"""

import argparse
import importlib
import os

from big_vision_like import allocator

TABLES = (
  "step",
  "models",
  "loader",
  "padding",
  "wait",
  "startup",
  "attention",
  "tokens",
  "share",
  "kinds",
  "contrastive",
  "detr",
  "utilisation",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Which tables, and how long to measure."""
  add = parser.add_argument
  add("table", nargs="?", default="all", choices=[*TABLES, "all"])
  add("--repeats", type=int, metavar="N", help="rounds of what is timed")
  step = parser.add_argument_group("the table step")
  step.add_argument("--images", type=int, default=32, help="a step")
  step.add_argument(
    "--lengths", type=int, nargs="+", default=[256, 1024, 4096], help="of rows"
  )
  step.add_argument(
    "--drops", type=float, nargs="+", default=[0.0, 0.5], help="shares dropped"
  )
  step.add_argument("--dtype", default="float32", help="or bfloat16")


def main(args: argparse.Namespace) -> None:
  """Prints each table as soon as it is measured."""
  # torch lives on the same GPU, of which JAX would take three quarters at once.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  # As training does it. It serves the programs that we compare with as well.
  allocator.keep_freed_memory()
  for name in TABLES if args.table == "all" else (args.table,):
    # Each imports what it measures: `step` needs neither grain nor a source.
    table = importlib.import_module(f"big_vision_like.benchmarks.{name}")
    print(table.run(**_settings(name, args)) + "\n", flush=True)


def _settings(name: str, args: argparse.Namespace) -> dict[str, object]:
  settings: dict[str, object] = {}
  if args.repeats is not None and name not in ("padding", "wait"):
    settings["repeats"] = args.repeats
  if name == "step":
    settings |= {
      "images": args.images,
      "lengths": args.lengths,
      "drops": args.drops,
      "dtype": args.dtype,
    }
  return settings
