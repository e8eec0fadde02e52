"""The program: every config trains, resume is bitwise, refusals speak."""

import importlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

from big_vision_like import __main__ as command_line
from big_vision_like import (
  build,
  checkpoint,
  pictures,
  resolve,
  sharding,
  train,
)
from big_vision_like.models.layers import position_table
from configs import memory_transfer, navit_jft, vit_i1k, vit_jft, vit_transfer

ROOT = pathlib.Path(__file__).parent.parent
CONFIGS = sorted(
  p.stem for p in (ROOT / "configs").glob("*.py") if p.stem != "common"
)
# Convolutional networks, of whose many kinds of layers each compiles.
LONG = {
  "detr_coco",
  "detr_coco_panoptic",
  "efficientvit_i1k",
  "mobilevit_i1k",
  "mobilevit_v2_i1k",
}
BY_LENGTH = [
  pytest.param(x, marks=[pytest.mark.slow] * (x in LONG)) for x in CONFIGS
]


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


@pytest.fixture(scope="module", autouse=True)
def devices():
  """One device, which compiles sooner; a test may ask for all eight."""
  make_mesh, used = sharding.make_mesh, {"count": 1}
  with pytest.MonkeyPatch.context() as patched:
    patched.setattr(
      sharding,
      "make_mesh",
      lambda shape: make_mesh(shape, devices=jax.devices()[: used["count"]]),
    )
    yield used


@pytest.fixture(autouse=True)
def no_pictures(straight, monkeypatch):
  """Drawing takes seconds; the run of `straight` has drawn its pictures."""
  for name in ("training_batch", "learning_curves"):
    monkeypatch.setattr(pictures, name, lambda *args: None)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
  """A run of six steps without any interruption."""
  workdir = tmp_path_factory.mktemp("straight")
  train.train(tiny(), workdir)
  return workdir


@pytest.mark.parametrize("name", BY_LENGTH)
def test_every_config_trains(name, tmp_path):
  c = tiny("", importlib.import_module(f"configs.{name}"))
  c.total_steps = 2
  scores = train.train(c, tmp_path)
  assert scores["val/examples"] == 16
  assert np.isfinite(list(losses(tmp_path).values())).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["navit_jft", "navit_webli", "vit_jft"])
def test_the_paper_s_recipe_trains(name, tmp_path):
  c = tiny("size=B/16", importlib.import_module(f"configs.{name}"))
  c.total_steps = 2
  with c.unlocked():
    if c.data.pack is None:
      c.data.ops = c.data.eval_ops = "decode|resize(32)"
    else:
      c.data.sizes.high = 96
      c.data.sizes.low = 32
  train.train(c, tmp_path)
  assert np.isfinite(list(losses(tmp_path).values())).all()


# A size of the paper for each config.
PAPERS = {
  "deepvit_i1k": "S",
  "detr_coco": "R50-DC5",
  "detr_coco_panoptic": "R50",
  "efficientvit_i1k": "M0",
  "flexivit_i1k": "S",
  "memory_transfer": "B/32",
  "mobilevit_i1k": "XXS",
  "mobilevit_v2_i1k": "0.5",
  "navit_jft": "B/16",
  "navit_webli": "B/16",
  "vit_i1k": "R26+S/32",
  "vit_jft": "B/16",
  "vit_transfer": "B/16",
}


@pytest.mark.parametrize("name", BY_LENGTH)
def test_the_papers_step_is_a_program(name):
  """Of the published size and batch: built and traced, not run."""
  module = importlib.import_module(f"configs.{name}")
  c = module.get_config(f"size={PAPERS[name]}")
  if c.data.objects is not None:  # Each canvas is traced.
    c.data.objects.canvases = c.data.objects.canvases[-1:]
  parts = build.build(c)
  tx, _ = build.make_optimizer(parts)
  assert build.count_step_flops(parts, tx) > 5e11


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


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
  """A ViT of two steps that knows digits, at 32 pixels."""
  workdir = tmp_path_factory.mktemp("backbone")
  train.train(tiny("", vit_i1k, total_steps=2), workdir)
  return workdir


def frozen_part(workdir, *, skip=("head", "pre_logits")):
  return {k: v for k, v in params(workdir).items() if k not in skip}


def test_a_run_goes_on_at_a_higher_resolution(backbone, tmp_path, capsys):
  c = tiny(f"run={backbone},resolution=48", vit_transfer, total_steps=2)
  with c.unlocked():
    c.optim.frozen = (r"(?!head/).*",)  # So that what was loaded stays.
  scores = train.train(c, tmp_path)
  assert scores["val/examples"] == 16
  assert "Parameters from" in capsys.readouterr().out
  old, new = params(backbone), params(tmp_path)
  table = position_table.resize_positions(
    old["pos_embed"], (6, 6), kind="corners", prefix=1
  )
  np.testing.assert_array_equal(new["pos_embed"], table)
  jax.tree.map(np.testing.assert_array_equal, new["encoder"], old["encoder"])
  assert "pre_logits" in old
  assert "pre_logits" not in new


def test_a_task_is_learned_on_a_frozen_run(backbone, tmp_path):
  arg = f"run={backbone},data=digit_scenes:plain/color,cells=2"
  c = tiny(arg, memory_transfer, total_steps=3)
  assert (c.optim.name, c.optim.clip) == ("sgd", 1.0)
  scores = train.train(c, tmp_path)
  assert scores["val/examples"] == 16
  new = params(tmp_path)
  jax.tree.map(
    np.testing.assert_array_equal, new["backbone"], frozen_part(backbone)
  )
  task = new["tasks"]["color"]
  assert task["memory"].shape == (2, 2, 24)
  assert task["head"]["kernel"].shape == (24, 8)
  assert task["cls"].any()
  state = tmp_path / "checkpoints" / "3" / "train"
  # Three parameters with momentum, and no backbone.
  assert sum(f.stat().st_size for f in state.rglob("*")) < 60_000


@pytest.mark.slow
def test_a_task_extends_another(backbone, tmp_path):
  """Which stays, bit by bit; so do the backbone and its head."""
  color, joined, digit = (tmp_path / k for k in ("color", "joined", "digit"))
  data = "data=digit_scenes:plain"
  arg = f"run={backbone},{data}/color,cells=2"
  train.train(tiny(arg, memory_transfer, total_steps=3), color)
  file = tmp_path / "color.safetensors"
  assert command_line.main(["memory", "save", str(color), str(file)]) == 0
  argv = ["memory", "join", str(backbone), str(file), "--to", str(joined)]
  assert command_line.main(argv) == 0
  arg = f"run={joined},{data}/digit,extends=color"
  c = tiny(arg, memory_transfer, total_steps=3)
  assert c.model.tasks.digit.extends == ("color",)
  train.train(c, digit)
  old, new = params(joined), params(digit)
  for part in (lambda p: p["backbone"], lambda p: p["tasks"]["color"]):
    jax.tree.map(np.testing.assert_array_equal, part(new), part(old))
  assert old["backbone"]["head"]["kernel"].shape == (24, 10)
  assert np.abs(new["tasks"]["digit"]["head"]["kernel"]).max() > 0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "head", "head_cls"])
def test_baselines_train_what_they_say(backbone, tmp_path, method):
  arg = f"run={backbone},data=digit_scenes:plain/color,method={method}"
  train.train(tiny(arg, memory_transfer, total_steps=3), tmp_path)
  new, old = params(tmp_path), frozen_part(backbone)
  if method == "head_cls":
    assert "memory" not in new["tasks"]["color"]
    new = new["backbone"]
  rest = {k: v for k, v in new.items() if k != "head"}
  same = jax.tree.map(lambda a, b: np.array_equal(a, b), rest, old)
  assert all(jax.tree.leaves(same)) == (method != "full")


def distillation(**changes):
  c = tiny("", vit_jft, **changes)
  with c.unlocked():
    student = c.model.to_dict()
    del student["name"]
    c.model = dict(
      name="distill",
      student=dict(name="vit", **student),
      teacher=dict(name="vit", **student),
    )
    c.task = dict(name="distillation", labels="multi_label")
  return c


def test_a_student_learns_from_the_teacher_of_another_run(tmp_path):
  teacher = tiny("", vit_jft)
  teacher.total_steps = 2
  train.train(teacher, tmp_path / "teacher")
  c = distillation(total_steps=2)
  with c.unlocked():
    c.init_collections.teacher = str(tmp_path / "teacher")
  train.train(c, tmp_path / "student")
  got = checkpoint.load_variables(tmp_path / "student")
  jax.tree.map(
    np.testing.assert_array_equal,
    got["teacher"]["params"],
    params(tmp_path / "teacher"),
  )
  with c.unlocked():
    c.init_collections = dict(teachr=str(tmp_path / "teacher"))
  with pytest.raises(ValueError, match=r"names 'teachr'.*it has teacher\."):
    train.train(c, tmp_path / "typo")


@pytest.mark.slow
def test_killed_or_stopped_from_outside_resumes_bitwise(tmp_path):
  """In its own process, with another number of workers afterwards."""
  command = [
    sys.executable,
    "launch.py",
    "--config=configs/navit_jft.py",
    "--config.total_steps=40",
    "--config.log_every=1",
    "--config.checkpoint.every=5",
    "--config.batch_size=8",
    "--config.evals.val.data.limit=8",
    "--config.evals.fewshot.data.limit=8",
    "--config.evals.budget.data.limit=8",
  ]
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
    assert len(losses(cut)) < 40
    assert ("To continue:" in out) == (kind == signal.SIGTERM)
    with launch(cut) as process:
      assert process.communicate(timeout=300)
      assert process.returncode == 0
    assert_same_run(whole, cut)


@pytest.mark.parametrize(
  ("mesh", "rules"),
  [
    (dict(data=8), "data"),
    (dict(data=2, fsdp=4), "fsdp"),
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


def assert_close(one, other):
  reference, found = losses(one), losses(other)
  assert reference.keys() == found.keys() == set(range(1, 7))
  for step, loss in reference.items():
    np.testing.assert_allclose(found[step], loss, rtol=2e-5, err_msg=str(step))


def config_of(task):
  """A tiny config of a task; that of distillation has no file."""
  if task == "distillation":
    return distillation()
  for name in CONFIGS:
    c = tiny("", importlib.import_module(f"configs.{name}"))
    if c.task.name == task:
      return c
  raise AssertionError(f"no config trains the task {task}")


# Classification is what the other tests of eight devices train.
OTHER_TASKS = [x for x in resolve.available("tasks") if x != "classification"]


@pytest.mark.slow
@pytest.mark.parametrize("task", OTHER_TASKS)
def test_eight_devices_agree_with_one_in_every_other_task(
  task, tmp_path, devices, monkeypatch
):
  train.train(config_of(task), tmp_path / "one")
  monkeypatch.setitem(devices, "count", 8)
  c = config_of(task)
  c.mesh.update(data=2, fsdp=2, tensor=2)
  c.sharding = "tensor"
  train.train(c, tmp_path / "eight")
  assert_close(tmp_path / "one", tmp_path / "eight")


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
