"""The record of a run: what was run, with which code, on which devices."""

import collections
import datetime
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

RUN_FILE = "run.json"
PARAMS_FILE = "params.txt"
_PACKAGES = (
  "big-vision-like",
  "jax",
  "jaxlib",
  "flax",
  "optax",
  "orbax-checkpoint",
  "grain",
  "numpy",
)


def record_run(
  folder: str | os.PathLike[str],
  config_json: str,
  extra: Mapping[str, Any] | None = None,
  *,
  overview: str = "",
) -> dict[str, Any]:
  """Writes what a run is: `run.json` and, with `overview`, `params.txt`.

  `run.json` holds the resolved `config`, what is in `extra` (the fingerprint of
  the data, say), and `starts`: for each time the run was started or resumed the
  time, command, versions, git commit and devices.

  Args:
    folder: of the run; made if missing. Process 0 writes.
    config_json: the resolved config.
    extra: further entries of `run.json`.
    overview: of the parameters, see `trees.overview`.

  Returns:
    What `run.json` holds.
  """
  folder = Path(folder)
  path = folder / RUN_FILE
  starts = json.loads(path.read_text())["starts"] if path.exists() else []
  run = {
    "config": json.loads(config_json),
    **(extra or {}),
    "starts": [*starts, _describe_start()],
  }
  if jax.process_index() == 0:
    folder.mkdir(parents=True, exist_ok=True)
    # In one go, so that a kill leaves the old file or the new one.
    part = path.with_suffix(".part")
    part.write_text(json.dumps(run, indent=2) + "\n")
    part.replace(path)
    if overview:
      (folder / PARAMS_FILE).write_text(overview + "\n")
  return run


def read_run(folder: str | os.PathLike[str]) -> dict[str, Any]:
  """What `run.json` holds, with tuples where JSON has lists.

  Raises:
    ValueError: if the folder is not that of a run.
  """
  path = Path(folder) / RUN_FILE
  if not path.is_file():
    raise ValueError(
      f"{folder} is not a run folder: it has no {path.name}. Training with "
      "launch.py --workdir makes one."
    )
  return as_tuples(json.loads(path.read_text()))


def as_tuples(tree: Any) -> Any:
  """Tuples, as configs have them, for the lists of JSON."""
  if isinstance(tree, dict):
    return {k: as_tuples(v) for k, v in tree.items()}
  return tuple(map(as_tuples, tree)) if isinstance(tree, list) else tree


def _describe_start() -> dict[str, Any]:
  now = datetime.datetime.now(datetime.UTC)
  return {
    "time": now.isoformat(timespec="seconds"),
    "command": sys.argv,
    "host": socket.gethostname(),
    "platform": platform.platform(),
    "versions": versions(),
    "git": git_state(),
    "devices": _kinds(jax.devices()),
    "processes": jax.process_count(),
  }


def versions() -> dict[str, str | None]:
  """Of Python and the packages that a run depends on."""
  found: dict[str, str | None] = {"python": platform.python_version()}
  for package in _PACKAGES:
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      found[package] = None  # run from a checkout that is not installed
  return found


def local_devices() -> dict[str, int]:
  """The number of this process's devices, by kind."""
  return _kinds(jax.local_devices())


def _kinds(devices: Sequence[jax.Device]) -> dict[str, int]:
  return dict(collections.Counter(d.device_kind for d in devices))


def git_state(root: Path | None = None) -> dict[str, Any] | None:
  """Commit and state of our checkout; None if the code lies in none."""
  root = Path(__file__).resolve().parent.parent if root is None else root

  def ask(*words: str) -> str | None:
    try:
      done = subprocess.run(
        ["git", "-C", str(root), *words],
        capture_output=True,
        text=True,
        timeout=10,
      )
    except (OSError, subprocess.TimeoutExpired):
      return None  # no git here, or a file system that does not answer
    return done.stdout.strip() if done.returncode == 0 else None

  top = ask("rev-parse", "--show-toplevel")
  # An installed package may lie inside a checkout of something else.
  if top is None or Path(top).resolve() != root.resolve():
    return None
  commit, changes = ask("rev-parse", "HEAD"), ask("status", "--porcelain")
  return {"commit": commit, "dirty": bool(changes)}
