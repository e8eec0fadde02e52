"""The config files: arguments, locks, suggestions, the paper's numbers."""

import importlib
import pathlib
import re

import coco_files
import numpy as np
import pytest

from big_vision_like import build, optim, trees
from big_vision_like.data import sources
from configs import (
  common,
  deepvit_i1k,
  detr_coco,
  detr_coco_panoptic,
  memory_transfer,
  navit_jft,
  navit_webli,
  vit_jft,
)

FILES = sorted(
  p.stem
  for p in (pathlib.Path(__file__).parent.parent / "configs").glob("*.py")
  if p.stem != "common"
)


def test_arguments_parse_over_their_defaults():
  a = common.arguments("data=folder:/a/b,steps=7", data="x", steps=0, size="s")
  assert (a.data, a.steps, a.size) == ("folder:/a/b", 7, "s")


@pytest.mark.parametrize(
  ("arg", "sentence"),
  [
    ("sizes=L/16", r"'sizes=L/16'.*Did you mean 'size'"),
    ("local", r"'local' is not of the form key=value"),
  ],
)
def test_unknown_arguments_are_refused(arg, sentence):
  with pytest.raises(ValueError, match=sentence):
    navit_jft.get_config(arg)


def test_unknown_sizes_are_listed():
  for config in (navit_jft, navit_webli, vit_jft):
    with pytest.raises(ValueError, match=r"no size=H/14.*B/16"):
      config.get_config("size=H/14")


def test_a_typo_in_a_key_names_the_nearest():
  c = navit_jft.get_config()
  with pytest.raises(AttributeError, match=r"optim"):
    c.optimm = 1
  with pytest.raises(AttributeError, match=r"batch_size"):
    c.batch_sise = 1


def test_sources_take_what_stands_behind_the_colon():
  settings = sources.settings
  assert settings("folder:/a:b") == dict(name="folder", path="/a:b")
  assert settings("digit_scenes") == dict(name="digit_scenes")
  assert settings("digit_scenes:photo/color") == dict(
    name="digit_scenes", level="photo", target="color"
  )
  assert settings("coco:/a") == dict(name="coco", path="/a")
  assert settings("tfds:coco/2017:1.1.0") == dict(
    name="tfds", dataset="coco/2017:1.1.0"
  )


@pytest.mark.parametrize(
  ("arg", "length", "steps", "cooldown"),
  [
    ("size=B/32", 64, 98_000, 10_000),
    ("size=B/16", 256, 93_000, 10_000),
    ("size=L/16,steps=480000", 256, 480_000, 100_000),
    ("size=L/16,steps=1000", 256, 1000, 0.1),
  ],
)
def test_navit_follows_table_2(arg, length, steps, cooldown):
  c = navit_jft.get_config(arg)
  assert c.batch_size == 4096
  assert (c.data.pack.length, c.total_steps) == (length, steps)
  assert c.optim.schedule.cooldown == cooldown
  assert (c.optim.lr, c.optim.wd) == (8e-4, 0.03)
  assert dict(c.optim.wd_mults)["head/kernel"] * c.optim.wd == 3.0


def test_deepvit_may_be_deeper_and_a_plain_vit():
  sizes = {
    arg: deepvit_i1k.get_config(arg).model.get("sizes")
    for arg in ("", "depth=24,width=48", "depth=24,plain=1")
  }
  assert [x and x.to_dict() for x in sizes.values()] == [
    None,
    dict(depth=24, mixing=24, width=48, mlp=144),
    dict(depth=24, mixing=0),
  ]


@pytest.mark.parametrize(
  ("arg", "sentence"),
  [
    ("method=adapter", "no method=adapter; it has: full, head, head_cls, mem"),
    ("extends=color", "method=memory with extends=TASK takes run= with a fol"),
    ("run=nowhere", "nowhere is not a run folder: it has no run.json"),
  ],
)
def test_memory_transfer_refuses(arg, sentence):
  with pytest.raises(ValueError, match=sentence):
    memory_transfer.get_config(arg)


def test_memory_transfer_holds_the_papers_methods():
  """SGD with momentum, clipping, a warmup of 5 steps, 512 images a step."""
  for method in memory_transfer.METHODS:
    c = memory_transfer.get_config(f"method={method},size=B/32")
    assert (c.optim.name, c.optim.settings.momentum) == ("sgd", 0.9)
    assert (c.optim.clip, c.optim.schedule.warmup) == (1.0, 5)
    assert (c.batch_size, c.total_steps) == (512, 20_000)
  assert c.optim.frozen == ("backbone/.*",)
  assert c.model.tasks.digit_scenes.cells == 5
  assert memory_transfer.get_config("method=full").optim.frozen == ()


@pytest.mark.parametrize(
  ("arg", "length", "row"),
  [
    ("size=B/32,text=sentencepiece:/t5", 24, 128),
    ("size=L/16", 64, 341),  # Bytes need more tokens for as many words.
  ],
)
def test_navit_with_texts_follows_the_paper(arg, length, row):
  c = navit_webli.get_config(arg)
  c_jft = navit_jft.get_config(arg.partition(",")[0])
  for key in ("pack", "sizes", "drop"):
    assert c.data[key] == c_jft.data[key]
  assert c.optim.schedule == c_jft.optim.schedule
  assert (c.total_steps, c.batch_size) == (c_jft.total_steps, 4096)
  assert (c.optim.lr, c.optim.wd) == (3e-3, 1e-6)
  assert (c.data.text.length, c.data.text.row) == (length, row)
  assert c.model.text.length == length
  for key in ("bias", "qk_norm"):
    assert key not in c.model.image  # NaViT's own defaults.
  assert (c.model.text.bias, c.model.text.qk_norm) == (False, "layer")


def test_detr_follows_the_paper():
  """Section 4 and its code: 500 epochs, a tenth of the rate after 400."""
  c = detr_coco.get_config("size=R101-DC5,init=resnet101.pth")
  assert c.total_steps == 500 * 118_287 // 64
  assert (c.batch_size, c.optim.lr, c.optim.clip) == (64, 1e-4, 0.1)
  schedule = dict(name="steps", drops=(0.8,), warmup=0)
  fn = optim.make_schedule(
    **{**c.optim.schedule, **schedule}, lr=1e-4, total_steps=500
  )
  np.testing.assert_allclose([fn(399), fn(400)], [1e-4, 1e-5], rtol=1e-6)
  rates = [
    trees.match(path, c.optim.lr_mults, "lr_mults")
    for path in ("backbone/stage3_block0/conv1_conv/kernel", "query_embed")
  ]
  assert rates == [0.1, 1.0]
  assert c.optim.wd_mults == ((".*", 1.0),)
  (frozen,) = c.optim.frozen
  for stage in ("stem", "stage0_block2/conv1", "stage0_block0/proj"):
    assert re.fullmatch(frozen, f"backbone/{stage}_conv/kernel")
  assert not re.fullmatch(frozen, "backbone/stage1_block0/conv1_conv/kernel")
  assert c.model.backbone.to_dict() == dict(
    name="resnet", variant="R101", frozen=True, dilation=True
  )
  assert c.data.ops.count("480, 512, 544, 576, 608, 640, 672, 704") == 1
  with pytest.raises(ValueError, match="init= is for the backbone alone"):
    detr_coco.get_config("init=a,tune=b")
  with pytest.raises(ValueError, match="pretrain=1 is for the local size"):
    detr_coco.get_config("size=R50,pretrain=1")


def test_the_steps_of_a_fine_tuning_grow_with_the_data(tmp_path):
  coco_files.instances(tmp_path, "train")
  few = detr_coco.get_config(f"size=R50,data=coco:{tmp_path},tune=detr.pth")
  many = detr_coco.get_config("tune=runs/a")
  assert (few.total_steps, few.batch_size) == (600, 8)
  assert many.total_steps == 60 * 100_000 // 8
  assert few.init_skip == ("class_head/.*",)


def test_panoptic_files_are_read_with_their_masks(tmp_path):
  for split in ("train", "val"):
    coco_files.instances(tmp_path, split)
    coco_files.panoptic(tmp_path, split, count=7)
  arg = f"size=R50,data=coco:{tmp_path}"
  for boxes, masks in ((0, True), (1, False)):
    c = detr_coco_panoptic.get_config(f"{arg},boxes={boxes}")
    example = build.make_source(c, "train")[0]
    assert ("instance_mask" in example) == c.data.objects.masks == masks
    assert "configs/detr_coco.py" not in c.notice


def test_notices_name_their_own_config():
  c = detr_coco_panoptic.get_config("tune=runs/boxes")
  assert "configs/detr_coco_panoptic.py:size=R50" in c.notice
  assert "fresh" not in c.notice
  assert "fresh" in detr_coco.get_config().notice


def test_the_mask_head_is_trained_alone():
  c = detr_coco_panoptic.get_config("size=R50,tune=runs/boxes")
  (frozen,) = c.optim.frozen
  names = ("backbone/a", "query_embed", "mask_attn/q", "mask_head/gn1/scale")
  assert [bool(re.fullmatch(frozen, x)) for x in names] == [1, 1, 0, 0]
  assert c.total_steps == 25 * 118_287 // 64
  assert (c.model.backbone.frozen, c.init_resize) == (True, ("frozen",))
  # Intervals are those of this run, not of the detector's.
  assert c.evals.val.every == c.total_steps // 5
  assert c.checkpoint.every == c.total_steps // 10
  with pytest.raises(ValueError, match="which boxes=1 leaves out"):
    detr_coco_panoptic.get_config("tune=runs/boxes,boxes=1")
  boxes = detr_coco_panoptic.get_config("size=R50,boxes=1")
  assert not boxes.model.masks
  assert not boxes.data.objects.masks
  assert boxes.evals.val.name == "coco"


@pytest.mark.parametrize("name", FILES)
def test_a_config_is_one_page_and_says_how_to_run_it(name):
  module = importlib.import_module(f"configs.{name}")
  assert f"python launch.py --config configs/{name}.py" in module.__doc__
  assert re.search(r"arXiv \d{4}\.\d{5}", module.__doc__)
