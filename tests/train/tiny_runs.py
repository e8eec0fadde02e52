"""Runs of seconds, and what they leave behind, for the tests beside it."""

import json
import pathlib

import jax
import numpy as np

from big_vision_like import build, checkpoint, pictures
from configs import navit_jft


def tiny(arg: str = "", module=navit_jft, **changes):
  """A config cut down to seconds: one narrow layer, two short rows a device."""
  c = module.get_config(arg)
  with c.unlocked():
    c.total_steps = 6
    c.batch_size = 8
    c.log_every = 1
    small = dict(width=24, depth=2, mlp=32, heads=2)
    if c.model.name in ("vit", "navit", "flexivit"):
      c.model.sizes = small
    if c.model.name == "deepvit":
      c.model.sizes = dict(small, mixing=1)
    if c.model.name == "efficientvit":
      c.model.sizes = dict(depths=(1, 1, 1))
    if "grid" in c.static:
      c.static.grid = c.static.grid[:2]
    if c.model.name == "detr":
      c.model.sizes = dict(width=24, mlp=32, heads=2, encoder_depth=1)
    if c.model.name == "two_towers":
      c.model.image.sizes = c.model.text.sizes = small
    c.model.dtype = "float32"
    if c.data.pack is not None:
      c.data.pack.length = 64
    c.evals = dict(val=c.evals.val)
    c.evals.val.every = 0
    c.evals.val.data.limit = 16
    c.data.workers = 0
    c.checkpoint.every = 2
    c.checkpoint.best = None
    c.optim.schedule = dict(name="constant", warmup=0.1)
    for key, value in changes.items():
      c.update_from_flattened_dict({key: value})
  return c


def skip_what_is_slow(monkeypatch):
  """Pictures and the count of FLOPs, each seconds in a run."""
  for name in ("training_batch", "learning_curves"):
    monkeypatch.setattr(pictures, name, lambda *args: None)
  monkeypatch.setattr(build, "count_step_flops", lambda *args: 1.0)


def losses(workdir) -> dict[int, float]:
  lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
  records = [json.loads(line) for line in lines]
  return {r["step"]: r["train/loss"] for r in records if "train/loss" in r}


def params(workdir):
  return checkpoint.load_params(workdir)


def assert_same_run(one, other):
  """Bitwise: losses of all steps, and the final parameters."""
  assert losses(one) == losses(other)
  jax.tree.map(np.testing.assert_array_equal, params(one), params(other))


def assert_close(one, other):
  reference, found = losses(one), losses(other)
  assert reference.keys() == found.keys() == set(range(1, 7))
  for step, loss in reference.items():
    np.testing.assert_allclose(found[step], loss, rtol=2e-5, err_msg=str(step))
