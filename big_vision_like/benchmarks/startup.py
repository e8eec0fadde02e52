"""Seconds from the command to the first step."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from big_vision_like import observe
from big_vision_like.benchmarks import measure

ROOT = Path(__file__).parents[2]
CONFIG = "configs/navit_jft.py"


def run(
  *, config: str = CONFIG, repeats: int = 3, extra: Sequence[str] = ()
) -> str:
  """The table: cold, and with a filled compilation cache.

  Args:
    config: as `--config` of launch.py takes it.
    repeats: pairs of a cold and a warm start, each with a cache of its own.
    extra: further arguments of launch.py.
  """
  cold, warm = [], []
  for _ in range(repeats):
    with tempfile.TemporaryDirectory() as folder:
      for seconds in (cold, warm):
        seconds.append(_first_step(config, Path(folder), extra))
  row = {
    "config": config,
    "cold, s": statistics.median(cold),
    "with the cache, s": statistics.median(warm),
    "cold / cached": statistics.median(a / b for a, b in zip(cold, warm)),
  }
  note = (
    "From the start of the process until the loss of the first step is "
    f"written; medians of {repeats}."
  )
  return measure.table("Starting", [row], note)


def _first_step(config: str, folder: Path, extra: Sequence[str]) -> float:
  with tempfile.TemporaryDirectory(dir=folder) as workdir:
    command = [sys.executable, "launch.py", "--config", config]
    command += ["--config.total_steps=1", "--config.log_every=1", *extra]
    command += ["--workdir", workdir]
    environment = os.environ | {"BIG_VISION_LIKE_CACHE": str(folder)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    # A file: nobody reads while we wait, and a full pipe would block.
    with tempfile.TemporaryFile() as errors:
      start = time.time()
      process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=errors,
      )
      try:
        done = _wait(process, Path(workdir) / observe.METRICS_FILE)
        if done is None:
          errors.seek(0)
          text = errors.read().decode(errors="replace").strip()
          raise RuntimeError(f"Training ended early: {text[-2000:]}")
        return done - start
      finally:
        # The evaluations that would follow are not our question.
        process.kill()
        process.wait()


def _wait(process: subprocess.Popen, metrics: Path) -> float | None:
  """When the first line of the metrics was written; None if none was."""
  while True:
    ended = process.poll() is not None
    text = metrics.read_text() if metrics.exists() else ""
    if "\n" in text:
      return json.loads(text.partition("\n")[0])["time"]
    if ended:
      return None
    time.sleep(0.05)
