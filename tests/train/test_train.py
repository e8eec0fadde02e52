"""The loop: resume is bitwise, devices agree, refusals speak."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from tiny_runs import (
  assert_close,
  assert_same_run,
  losses,
  skip_what_is_slow,
  tiny,
)

from big_vision_like import checkpoint, train
from configs import vit_jft

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def brief(straight, monkeypatch):
  """Drawing and counting FLOPs take seconds; `straight` has done both."""
  skip_what_is_slow(monkeypatch)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
  """A run of six steps without any interruption."""
  workdir = tmp_path_factory.mktemp("straight")
  train.train(tiny(), workdir)
  return workdir


def test_a_run_folder_holds_what_it_promises(straight):
  run = json.loads((straight / "run.json").read_text())
  assert run["config"]["total_steps"] == 6
  assert run["label_names"][3] == "three"
  assert re.fullmatch(r"[0-9a-f]{12}", run["data"])
  for name in ("params.txt", "summary.txt", "pictures/learning_curves.png"):
    assert (straight / name).stat().st_size > 0
  assert (straight / "pictures" / "training_batch.png").exists()
  assert list((straight / "tensorboard").iterdir())
  assert set(losses(straight)) == set(range(1, 7))
  record = json.loads((straight / "metrics.jsonl").read_text().splitlines()[-2])
  assert {"fill", "images_per_s", "tokens_per_s", "train/lr"} <= set(record)


def stop_after(step, monkeypatch, kind=signal.SIGTERM):
  """Sends this process a signal once a run has done `step` steps."""
  advance = train._Run._advance

  def advance_and_stop(run):
    advance(run)
    if run.step == step:
      os.kill(os.getpid(), kind)

  monkeypatch.setattr(train._Run, "_advance", advance_and_stop)


@pytest.mark.parametrize("step", [1, 4])
def test_a_clean_stop_resumes_bitwise(straight, tmp_path, monkeypatch, step):
  """After a step at which a checkpoint was due, and after one at which not."""
  with monkeypatch.context() as patched:
    stop_after(step, patched)
    train.train(tiny(), tmp_path)
  assert checkpoint.load_params(tmp_path, step=step)
  # The number of threads that read must not matter either.
  train.train(tiny(**{"data.threads": 1}), tmp_path)
  assert_same_run(straight, tmp_path)


def test_stopping_says_how_to_continue(tmp_path, monkeypatch, capsys):
  stop_after(1, monkeypatch, signal.SIGINT)
  train.train(tiny(), tmp_path, command="python launch.py --workdir here")
  out = capsys.readouterr().out
  assert "Stopped after step 1 of 6" in out
  assert "To continue:\n  python launch.py --workdir here" in out


def test_trains_on_a_folder_with_broken_photographs(tmp_path, caplog):
  rng = np.random.default_rng(0)
  for split, count in (("train", 12), ("val", 4)):
    for name in ("cat", "dog"):
      folder = tmp_path / "photos" / split / name
      folder.mkdir(parents=True)
      for i in range(count):
        pixels = rng.integers(0, 256, (64 + 8 * i, 83, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.jpg")
    whole = (folder / "3.jpg").read_bytes()
    (folder / "3.jpg").write_bytes(whole[: len(whole) // 3])
  config = tiny(
    f"data=folder:{tmp_path / 'photos'}",
    **{"data.max_broken": 0.2, "data.pack.length": 256},
  )
  run = tmp_path / "run"
  train.train(config, run)
  assert np.isfinite(list(losses(run).values())).all()
  for name in ("train/dog/3.jpg", "val/dog/3.jpg"):
    assert name in caplog.text


# The main job, small, of as many steps as leave time to stop them.
BRIEF = """
from configs import navit_jft

def get_config():
  c = navit_jft.get_config()
  with c.unlocked():
    c.total_steps = 60
    c.log_every = 1
    c.model.sizes = dict(width=24, depth=2, mlp=32, heads=2)
    c.data.pack.length = 64
    c.checkpoint.every = 5
    c.checkpoint.best = None
    c.evals = dict(val=c.evals.val)
    c.evals.val.data.limit = 8
  return c
"""


@pytest.mark.slow
def test_killed_or_stopped_from_outside_resumes_bitwise(tmp_path):
  """In its own process, with another number of workers afterwards."""
  config = tmp_path / "brief.py"
  config.write_text(BRIEF)
  command = [sys.executable, "launch.py", f"--config={config}"]
  env = {**os.environ, "XLA_FLAGS": ""}

  def launch(workdir, *more):
    return subprocess.Popen(
      [*command, f"--workdir={workdir}", *more],
      cwd=ROOT,
      env=env,
      stdout=subprocess.PIPE,
      text=True,
    )

  whole = tmp_path / "whole"
  with launch(whole) as process:
    assert process.communicate(timeout=300)
    assert process.returncode == 0
  for kind, step in ((signal.SIGKILL, 12), (signal.SIGTERM, 17)):
    cut = tmp_path / kind.name
    with launch(cut, "--config.data.workers=1") as process:
      deadline = time.time() + 300
      while time.time() < deadline and process.poll() is None:
        if (cut / "metrics.jsonl").exists() and len(losses(cut)) >= step:
          break
        time.sleep(0.05)
      assert process.poll() is None, "it ended before it could be stopped"
      process.send_signal(kind)
      out, _ = process.communicate(timeout=120)
    assert len(losses(cut)) < 60
    assert ("To continue:" in out) == (kind == signal.SIGTERM)
    with launch(cut) as process:
      assert process.communicate(timeout=300)
      assert process.returncode == 0
    assert_same_run(whole, cut)


@pytest.mark.parametrize(
  ("mesh", "rules"),
  [
    (dict(data=8), "data"),
    pytest.param(dict(data=2, fsdp=4), "fsdp", marks=pytest.mark.slow),
    (dict(data=2, fsdp=2, tensor=2), "tensor"),
  ],
)
def test_eight_devices_agree_with_one(
  straight, tmp_path, mesh, rules, devices, monkeypatch
):
  """Only the order of float32 sums differs, over six steps."""
  monkeypatch.setitem(devices, "count", 8)
  changes = {f"mesh.{axis}": size for axis, size in mesh.items()}
  train.train(tiny(sharding=rules, **changes), tmp_path)
  assert_close(straight, tmp_path)


def test_non_finite_loss_names_step_examples_and_checkpoint(tmp_path):
  c = tiny(**{"optim.lr": 1e38, "optim.clip": 0.0})
  with pytest.raises(
    FloatingPointError,
    match=r"loss of step \d is (nan|inf).*Examples of its batch: \[\d+",
  ):
    train.train(c, tmp_path)


def test_starting_from_another_run(straight, tmp_path, capsys):
  c = tiny(init_from=str(straight))
  c.total_steps = 1
  train.train(c, tmp_path)
  assert "Parameters from" in capsys.readouterr().out
  c = tiny("", vit_jft, init_from=str(straight))
  with pytest.raises(
    ValueError, match=r"config\.init_from: \d+ of \d+ .*match"
  ):
    train.train(c, tmp_path / "other")


def test_the_workdir_of_another_config_is_refused(straight):
  with pytest.raises(ValueError, match=r"another config.*\n.*optim/lr"):
    train.train(tiny(**{"optim.lr": 0.5}), straight)


@pytest.mark.parametrize(
  ("changes", "sentence"),
  [
    ({"accum_steps": 3}, r"not divisible by config\.accum_steps = 3"),
    ({"model.name": "navitt"}, r"Unknown name 'navitt' in models.*'navit'"),
    ({"data.ops": "decode|flipp"}, r"flipp"),
    ({"task.num_classes": 3}, r"outside the class count|3 classes"),
    ({"mesh.fsdp": 3}, r"mesh"),
  ],
)
def test_refusals(changes, sentence, tmp_path):
  c = tiny()
  with c.unlocked():
    for key, value in changes.items():
      c.update_from_flattened_dict({key: value})
  with pytest.raises(ValueError, match=sentence):
    train.train(c, tmp_path)


def test_a_batch_that_the_mesh_cannot_share_is_refused(
  tmp_path, devices, monkeypatch
):
  monkeypatch.setitem(devices, "count", 8)
  with pytest.raises(
    ValueError, match=r"config\.batch_size = 9 cannot be shared .* 8 devices"
  ):
    train.train(tiny(batch_size=9), tmp_path)


def test_an_unreadable_data_path_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r"nowhere"):
    train.train(tiny(f"data=folder:{tmp_path}/nowhere"), tmp_path / "run")


def test_typos_on_the_command_line_suggest_the_key():
  done = subprocess.run(
    [
      sys.executable,
      "launch.py",
      "--config=configs/navit_jft.py",
      "--config.optim.lrr=1",
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode != 0
  assert "lr" in done.stderr
  assert "lrr" in done.stderr
