"""The config files: arguments, locks, suggestions, the paper's numbers."""

import importlib
import pathlib
import re

import pytest

from big_vision_like.data import sources
from configs import (
  common,
  deepvit_i1k,
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


@pytest.mark.parametrize("name", FILES)
def test_a_config_is_one_page_and_says_how_to_run_it(name):
  module = importlib.import_module(f"configs.{name}")
  assert f"python launch.py --config configs/{name}.py" in module.__doc__
  assert re.search(r"arXiv \d{4}\.\d{5}", module.__doc__)
