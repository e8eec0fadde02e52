"""The program on hand-made COCO files: trains, scores, finds, draws."""

import functools
import json

import coco_files
import jax
import numpy as np
import pytest

from big_vision_like import __main__ as command_line
from big_vision_like import sharding, train
from big_vision_like.models import resnet
from configs import common

pytestmark = pytest.mark.slow

SMALL = dict(width=16, heads=2, mlp=24, encoder_depth=1, decoder_depth=2)


@pytest.fixture(scope="module", autouse=True)
def tiny(compile_quickly):
  """What compiles fast: one device, and a ResNet with a map at 1/8."""
  one = functools.partial(sharding.make_mesh, devices=jax.devices()[:1])
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, "make_mesh", one)
    patch.setitem(resnet.VARIANTS, "tiny", dict(stages=(1, 1), width=8))
    yield


def config(root, *, panoptic):
  c = common.base()
  with c.unlocked():
    c.total_steps, c.batch_size, c.log_every = 3, 8, 1
    c.task = dict(name="detection")
    c.model = dict(
      name="detr",
      variant="local",
      num_queries=9,
      masks=panoptic,
      sizes=SMALL,
      backbone=dict(name="resnet", variant="tiny", frozen=True),
    )
    kinds = dict(panoptic=True, masks=True) if panoptic else {}
    c.data.source = dict(name="coco", path=str(root), **kinds)
    c.data.ops = "decode|flip_lr|detr_resize((32, 40), 64)"
    c.data.eval_ops = "decode|detr_resize(40, 64)"
    c.data.objects = dict(canvases=((64, 64),), max_objects=9, masks=panoptic)
    c.evals.val = dict(name="coco", images=5)
    if panoptic:
      # An untrained model is sure of nothing.
      c.evals.pq = dict(name="panoptic", threshold=0.0, images=5)
  return c.lock()


def files(folder):
  return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("panoptic", [False, True])
def test_odd_files_train_and_evaluate(panoptic, tmp_path, capsys):
  root, run = tmp_path / "coco", tmp_path / "run"
  for split in ("train", "val"):
    coco_files.instances(root, split)
    if panoptic:
      coco_files.panoptic(root, split, count=7)
  scores = train.train(config(root, panoptic=panoptic), run)
  assert scores["val/examples"] == (7 if panoptic else 8)
  assert 0 <= scores["val/AP"] <= 1
  wanted = {"val/ap_by_class.csv", "val/detections.png"}
  if panoptic:
    assert scores["pq/examples"] == 7
    assert {"pq/PQ", "pq/PQ_things", "pq/PQ_stuff"} <= set(scores)
    wanted |= {"pq/pq_by_class.csv", "pq/detections.png"}
  assert files(run / "evaluations") == wanted
  assert files(run / "pictures") >= {"training_batch.png"}
  capsys.readouterr()

  def cli(*argv):
    return command_line.main([str(a) for a in (*argv, "--run", run)])

  if panoptic:  # It scores the same when it is read again.
    assert not cli("evaluate", "--evaluator", "pq", "--batch-size", 8)
    stored = (run / "evaluations" / "pq" / "scores.json").read_text()
    again = json.loads(stored)["scores"]
    before = {k: x for k, x in scores.items() if k.startswith("pq/")}
    assert again == pytest.approx(before, abs=1e-6)
  found = tmp_path / "found.json"
  images = root / "val2017"
  argv = ("--threshold", 0, "--json", found, "--batch-size", 8)
  argv += ("--attention",) if panoptic else ()
  assert not cli("predict", images, *argv)
  rows = json.loads(found.read_text())["images"]
  assert len(rows) == 8
  for row in rows:
    assert row["objects"]
    assert np.isfinite([one["score"] for one in row["objects"]]).all()
    if panoptic:
      area = sum(one["area"] for one in row["objects"])
      assert area == row["height"] * row["width"]
      assert {one["is_thing"] for one in row["objects"]} <= {True, False}
  names = [p.name for p in images.iterdir()]
  attention = [f"attention/{name}" for name in names if panoptic]
  assert files(run / "predictions") == {*names, *attention}
