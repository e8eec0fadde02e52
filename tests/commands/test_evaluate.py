"""`evaluate`: any evaluator and every meter on the folder of any model."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vision_like import __main__ as command_line
from big_vision_like import api, checkpoint, record, resolve
from big_vision_like.data.sources import digit_scenes
from big_vision_like.tasks import classification

pytestmark = pytest.mark.usefixtures("compile_quickly")

SMALL = dict(width=12, depth=2, mlp=17, heads=3)
MODELS = {
  "vit": dict(name="vit", variant="Ti/7", sizes=SMALL),
  "deepvit": dict(
    name="deepvit", variant="local", sizes={**SMALL, "patch": 7, "mixing": 1}
  ),
  "efficientvit": dict(
    name="efficientvit",
    variant="local",
    sizes=dict(widths=(24, 30, 36), depths=(2, 1, 1), heads=(3, 2, 3)),
  ),
  "navit": dict(name="navit", variant="Ti/7", sizes=SMALL),
}
METERS = ("attention_similarity", "head_similarity", "channel_importance")
NAMES = digit_scenes.Source("train").label_names


def make_run(folder, name, *, source=True):
  """A run folder with parameters drawn at random."""
  side = 112 if name == "efficientvit" else 28
  pack = dict(length=47, patch=7, max_images=3) if name == "navit" else None
  data = dict(
    pack=pack, eval_ops="decode" if pack else f"decode|resize({side})"
  )
  if source:
    data["source"] = dict(name="digit_scenes", level="plain")
  task = dict(name="classification", loss_name="softmax")
  val = dict(name="classification", loss_name="softmax", data=dict(limit=9))
  config = dict(model=MODELS[name], task=task, data=data, evals=dict(val=val))
  record.record_run(folder, json.dumps(config), {"label_names": list(NAMES)})
  model = resolve.make(
    "models", "Model", "", {**MODELS[name], "num_classes": len(NAMES)}
  )
  batch = {
    "image": np.zeros((1, side, side, 3), np.uint8),
    "label": np.zeros(1, np.int32),
    "_mask": np.ones(1, bool),
  }
  if pack:
    batch = {
      "patches": np.zeros((1, 47, 147), np.uint8),
      "segment_ids": np.ones((1, 47), np.int32),
      "positions": np.zeros((1, 47, 2), np.int32),
      "grid_hw": np.full((1, 3, 2), 3, np.int32),
      "example_mask": np.ones((1, 3), bool),
      "label": np.zeros((1, 3), np.int32),
    }
  batch = jax.tree.map(jnp.asarray, batch)
  inputs, _ = classification.Task(len(NAMES)).prepare(batch, None)
  init = jax.jit(lambda key: model.init(key, train=False, **inputs))
  variables = dict(init(jax.random.key(0)))
  rng = np.random.default_rng(0)
  # EfficientViT's branches start at 0, and would lend nothing.
  params = jax.tree.map(
    lambda x: x + np.float32(0.1 * rng.normal(size=x.shape)),
    variables.pop("params"),
  )
  state = api.TrainState(
    step=jnp.asarray(3),
    params=params,
    model_state=variables,
    opt_state=(),
    rng=jax.random.key(0),
  )
  with checkpoint.Checkpointer(folder / checkpoint.FOLDER) as checkpointer:
    checkpointer.save(3, state, {})


def evaluate(run, *argv):
  return command_line.main(["evaluate", "--run", str(run), *map(str, argv)])


# Of EfficientViT's many kinds of layers each compiles.
@pytest.mark.parametrize(
  "name",
  [
    pytest.param(x, marks=[pytest.mark.slow] * (x == "efficientvit"))
    for x in MODELS
  ],
)
def test_every_meter_runs_on_every_kind_of_model(name, tmp_path, capsys):
  make_run(tmp_path, name)
  for meter in METERS:
    argv = ("--evaluator", meter, "--set", "images=11", "--batch-size", 8)
    assert evaluate(tmp_path, *argv) == 0, capsys.readouterr().err
    folder = tmp_path / "evaluations" / meter
    assert (folder / f"{meter}.png").stat().st_size > 0
    assert json.loads((folder / f"{meter}.json").read_text())
    scores = json.loads((folder / "scores.json").read_text())["scores"]
    assert scores
    assert all(k.startswith(f"{meter}/") for k in scores)
    assert np.isfinite(list(scores.values())).all()


def test_an_entry_of_the_run_brings_its_settings(tmp_path, capsys):
  make_run(tmp_path, "vit")
  assert evaluate(tmp_path, "--evaluator", "val") == 0
  out = capsys.readouterr().out
  assert "val/examples" in out
  path = tmp_path / "evaluations" / "val" / "scores.json"
  assert json.loads(path.read_text())["scores"]["val/examples"] == 9
  argv = ("--evaluator", "val", "--limit", 5, "--set", "bins=7")
  assert evaluate(tmp_path, *argv) == 0
  assert json.loads(path.read_text())["scores"]["val/examples"] == 5


def test_refusals(tmp_path, capsys):
  run, imported = tmp_path / "run", tmp_path / "imported"
  make_run(run, "vit")
  make_run(imported, "vit", source=False)
  for folder, argv, sentence in (
    (tmp_path, ("val",), "is not a run folder"),
    (run, ("atention_similarity",), "Did you mean 'attention_similarity'?"),
    (run, ("head_similarity", "--set", "image=3"), "Did you mean 'images'?"),
    (run, ("head_similarity", "--set", "images"), "write KEY=VALUE"),
    (imported, ("head_similarity",), "does not say on which images"),
  ):
    assert evaluate(folder, "--evaluator", *argv) == 2
    assert sentence in capsys.readouterr().err


def test_an_imported_model_takes_any_data(tmp_path, capsys):
  make_run(tmp_path, "vit", source=False)
  record_file = tmp_path / record.RUN_FILE
  stored = json.loads(record_file.read_text())
  stored["label_names"] = ["other"] * len(NAMES)
  record_file.write_text(json.dumps(stored))
  argv = ("--evaluator", "head_similarity", "--data", "digit_scenes:plain")
  assert evaluate(tmp_path, *argv, "--set", "images=4") == 0
  assert "what reads labels says nothing" in capsys.readouterr().out
