"""Every config trains; runs go on from others; every task on eight devices."""

import importlib
import pathlib

import jax
import numpy as np
import pytest
from tiny_runs import (
  assert_close,
  losses,
  params,
  skip_what_is_slow,
  tiny,
)

from big_vision_like import __main__ as command_line
from big_vision_like import build, checkpoint, resolve, train
from big_vision_like.models.layers import position_table
from configs import memory_transfer, vit_i1k, vit_jft, vit_transfer

ROOT = pathlib.Path(__file__).parent.parent.parent
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


@pytest.fixture(autouse=True)
def brief(monkeypatch):
  skip_what_is_slow(monkeypatch)


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
def test_the_papers_step_is_a_program(name, monkeypatch):
  """Of the published size and batch: built and traced, not run."""
  module = importlib.import_module(f"configs.{name}")
  c = module.get_config(f"size={PAPERS[name]}")
  if c.data.objects is not None:  # Each canvas is traced.
    c.data.objects.canvases = c.data.objects.canvases[-1:]
  monkeypatch.undo()  # It counts.
  parts = build.build(c)
  tx, _ = build.make_optimizer(parts)
  assert build.count_step_flops(parts, tx) > 5e11


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
