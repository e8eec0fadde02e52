"""Imports flow one way, and what must not be needed is not imported."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "big_vision_like"

FOUNDATION = {"api", "trees", "resolve", "metrics"}
# What each part may import of the package, besides its own folder.
ALLOWED = {
  "api": set(),
  "metrics": {"api"},
  "trees": {"api"},
  "resolve": {"api"},
  "models": FOUNDATION,
  "losses": FOUNDATION,
  "weights": FOUNDATION | {"models"},
  "tasks": FOUNDATION | {"losses"},
  "data": FOUNDATION,
  "evaluators": FOUNDATION
  | {"capture", "object_pictures", "pictures", "postprocess"},
  "allocator": set(),
  "capture": FOUNDATION,
  "optim": FOUNDATION,
  "sharding": FOUNDATION,
  "checkpoint": FOUNDATION,
  "compilation": FOUNDATION,
  "hlo": set(),
  "chips": {"flops"},
  "preflight": FOUNDATION | {"build", "chips", "hlo", "sharding", "train_step"},
  "flops": FOUNDATION,
  "processes": FOUNDATION,
  "record": FOUNDATION,
  "observe": FOUNDATION,
  "audit": FOUNDATION,
  "pictures": FOUNDATION | {"observe"},
  "object_pictures": FOUNDATION | {"pictures", "postprocess"},
  "postprocess": FOUNDATION,
  "detect": FOUNDATION
  | {"capture", "data", "object_pictures", "postprocess", "sharding"},
  "train_step": FOUNDATION,
  "warm_start": FOUNDATION | {"checkpoint", "weights"},
  "attach": FOUNDATION | {"build", "models", "record", "weights"},
  "build": FOUNDATION | {"data", "flops", "optim", "sharding", "train_step"},
}
EVERYTHING = {"train", "commands", "benchmarks", "__main__"}
# Runs in data workers, where touching a device would be a fault.
NO_JAX = (
  "data/ops.py",
  "data/augment.py",
  "data/packing.py",
  "data/budgets.py",
  "data/sources",
  "data/text.py",
  "data/coco_json.py",
  "data/objects.py",
  "data/segmentations.py",
  "data/tokenizers",
)


def imports(path: pathlib.Path) -> set[str]:
  """Dotted names of all modules that a file imports, anywhere in it."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      found |= {f"{node.module}.{alias.name}" for alias in node.names}
  return found


def part(path: pathlib.Path) -> str:
  return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_part_has_its_place():
  parts = {part(p) for p in PACKAGE.rglob("*.py")} - {"__init__"}
  assert parts == set(ALLOWED) | EVERYTHING


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_imports_flow_one_way(name):
  for path in PACKAGE.rglob("*.py"):
    if part(path) != name:
      continue
    for module in imports(path):
      if module.startswith("big_vision_like."):
        used = module.split(".")[1]
        assert used in ALLOWED[name] | {name}, f"{path} imports {module}"


def test_data_workers_do_not_import_jax():
  for where in NO_JAX:
    target = PACKAGE / where
    for path in [target] if target.is_file() else target.rglob("*.py"):
      for module in imports(path):
        assert module.split(".")[0] not in ("jax", "flax"), path


def test_neither_tensorflow_nor_torch_is_imported():
  code = (
    "import sys, big_vision_like.train, big_vision_like.data.sources.tfds\n"
    "print({'tensorflow', 'torch'} & set(sys.modules))"
  )
  out = subprocess.run(
    [sys.executable, "-c", code],
    capture_output=True,
    text=True,
    check=True,
    cwd=ROOT,
  )
  assert out.stdout.strip() == "set()"
