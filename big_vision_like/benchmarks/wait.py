"""The share of training steps that is spent waiting for data."""

import contextlib
import statistics
import sys
import tempfile
from pathlib import Path

from ml_collections import ConfigDict

from big_vision_like import observe, train
from big_vision_like.benchmarks import measure
from big_vision_like.commands import check

CONFIG = "configs/navit_jft.py"


def run(
  *, config: str = CONFIG, steps: int = 60, every: int = 10, **overrides: int
) -> str:
  """The table, from a real run of `steps` steps without evaluations.

  Args:
    config: as `--config` of launch.py takes it.
    steps: how many.
    every: steps between two looks; the first look, which compiles, is left
      out.
    **overrides: further top-level keys of the config, such as batch_size.
  """
  c = check.load_config(config)
  with c.unlocked():
    c.update(total_steps=steps, log_every=every, **overrides)
    c.evals = ConfigDict()
    c.checkpoint.best = None
  with (
    tempfile.TemporaryDirectory() as folder,
    contextlib.redirect_stdout(sys.stderr),
  ):
    train.train(c, folder)
    metrics = observe.read_metrics(Path(folder) / observe.METRICS_FILE)
  looks = [x for x in metrics if x["step"] > every]
  row = {
    "config": config,
    "steps": steps,
    "steps/s": statistics.median(x["steps_per_s"] for x in looks),
    "images/s": statistics.median(x["images_per_s"] for x in looks),
    "waiting": f"{statistics.median(x['data_wait'] for x in looks):.2%}",
    "worst": f"{max(x['data_wait'] for x in looks):.2%}",
  }
  note = (
    f"Medians over windows of {every} steps, after the first. Waiting should "
    "be under 3 %."
  )
  return measure.table("Waiting for data", [row], note)
