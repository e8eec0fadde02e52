"""`predict`: its scores are those of the model on each image alone."""

import json

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from big_vision_like import __main__ as command_line
from big_vision_like import (
  api,
  checkpoint,
  record,
  resolve,
  sharding,
)
from big_vision_like.commands import predict
from big_vision_like.data import packing
from big_vision_like.tasks.classification import PACKED_INPUTS

NAMES = ("cat", "dog", "eel")
NAVIT = dict(
  name="navit",
  variant="local",
  attention="cudnn",  # of the machine that trained
  sizes=dict(width=12, depth=1, mlp=17, heads=3, patch=5),
)
VIT = dict(
  name="vit",
  variant="Ti/7",
  sizes=dict(width=12, depth=1, mlp=17, heads=3),
)
PACK = dict(length=23, patch=5, max_images=3)
# Multiples of the patch: nothing is resized on its way into a row.
SIZES = ((10, 15), (5, 35), (20, 20), (5, 5), (15, 30))


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
  """A packed run with averaged parameters, the model, those by step."""
  folder = tmp_path_factory.mktemp("packed")
  return folder, *make_run(folder, NAVIT, PACK)


@pytest.fixture
def images(tmp_path):
  folder = tmp_path / "images"
  rng = np.random.default_rng(0)
  for i, hw in enumerate(SIZES):
    path = folder / ("deep" if i % 2 else ".") / f"{i}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), rng.integers(0, 256, (*hw, 3), np.uint8))
  (folder / "notes.txt").write_text("not an image, and not meant to be one")
  return folder


def make_run(folder, model, pack):
  """A run folder as training leaves it, with random parameters."""
  task = dict(name="classification", loss_name="softmax")
  if pack:
    task.update(loss_name="sigmoid", labels="multi_label")
  ops = "decode" if pack else "decode|resize(14, 21)"
  config = dict(model=model, task=task, data=dict(pack=pack, eval_ops=ops))
  record.record_run(folder, json.dumps(config), {"label_names": list(NAMES)})
  here = {**model, "num_classes": 3, "attention": "xla"}
  made = resolve.make("models", "Model", "", here)
  inputs = {"image": jnp.zeros((1, 14, 21, 3))}
  if pack:
    inputs = packed_inputs(np.zeros((5, 5, 3), np.uint8))
  shapes = jax.eval_shape(
    lambda key: made.init(key, train=False, **inputs)["params"],
    jax.random.key(0),
  )
  averages = {}
  with checkpoint.Checkpointer(
    folder / checkpoint.FOLDER, best=["val/score", "max"]
  ) as checkpointer:
    for step in (2, 3):
      rng = np.random.default_rng(step)
      params, averages[step] = (
        jax.tree.map(
          lambda x, rng=rng: np.float32(0.5 * rng.normal(size=x.shape)), shapes
        )
        for _ in range(2)
      )
      state = api.TrainState(
        step=jnp.asarray(step),
        params=params,
        model_state={},
        opt_state=(),
        rng=jax.random.key(step),
        ema={"params": averages[step]},
      )
      checkpointer.save(step, state, {}, {"val/score": 1 / step})
  return made, averages


def packed_inputs(image):
  """An image alone in a row, normalised by hand."""
  spec = packing.PackSpec(**PACK)
  batch = packing.blank(spec, 1)
  packing.put(batch, 0, 0, 0, image=image, keep=None, spec=spec)
  inputs = {key: jnp.asarray(batch[key]) for key in PACKED_INPUTS}
  return inputs | {"patches": inputs["patches"] / 127.5 - 1}


def expected(made, params, images):
  """Logits and features of the images in the order of their names."""
  apply = jax.jit(lambda x: made.apply({"params": params}, train=False, **x))
  files = sorted(images.rglob("*.png"))
  outputs = []
  for file in files:
    image = np.ascontiguousarray(cv2.imread(str(file))[..., ::-1])
    out = apply(packed_inputs(image))
    outputs.append((out["logits"][0, 0], out["pooled"][0, 0]))
  logits, features = map(np.array, zip(*outputs))
  return [str(f) for f in files], logits, features


def predict_cli(run, *argv):
  return command_line.main(["predict", "--run", str(run), *map(str, argv)])


def test_packed_scores_are_those_of_each_image_alone(
  packed, tmp_path, images, capsys
):
  (run, made, averages), out = packed, tmp_path / "out.npz"
  assert predict_cli(run, images, "--features", out, "--top", 2) == 0
  names, logits, features = expected(made, averages[3], images)
  stored = np.load(out)
  assert stored["names"].tolist() == names
  assert stored["label_names"].tolist() == list(NAMES)
  scores = special.expit(logits)
  # Float32 sums in another order.
  np.testing.assert_allclose(stored["scores"], scores, atol=1e-5)
  np.testing.assert_allclose(stored["features"], features, rtol=0, atol=1e-4)
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == len(SIZES)
  for line, name, row in zip(lines, names, scores):
    first, second = np.argsort(-row)[:2]
    words = line.split()
    assert words[0] == name
    assert words[1:4:2] == [NAMES[first], NAMES[second]]
    # Three digits are printed.
    assert float(words[2]) == pytest.approx(row[first], abs=6e-4)
    assert float(words[4]) == pytest.approx(row[second], abs=6e-4)


def test_stacked_images_are_resized_by_the_ops_of_the_run(tmp_path, images):
  run, out = tmp_path / "run", tmp_path / "out.npz"
  made, averages = make_run(run, VIT, None)
  argv = (images, "--features", out, "--batch-size", 2, "--step", "best")
  assert predict_cli(run, *argv) == 0
  stored = np.load(out)
  np.testing.assert_allclose(stored["scores"].sum(1), 1, rtol=1e-6)
  assert len(stored["names"]) == len(SIZES)
  # One that grows on both sides is resized by OpenCV, so we know how.
  at = [n.endswith("0.png") for n in stored["names"]].index(True)
  image = cv2.imread(stored["names"][at])[..., ::-1]
  image = cv2.resize(image, (21, 14), interpolation=cv2.INTER_LINEAR)
  inputs = {"image": jnp.asarray(np.float32(image)[None] / 127.5 - 1)}
  variables = {"params": averages[2]}
  apply = jax.jit(lambda x: made.apply(variables, train=False, **x)["logits"])
  np.testing.assert_allclose(
    stored["scores"][at], special.softmax(apply(inputs)[0]), atol=1e-5
  )


def test_steps_best_and_latest(packed):
  run, _, averages = packed
  for step, expected_step in (("best", 2), ("latest", 3), (2, 2)):
    loaded = predict.load_run(str(run), step=step).variables["params"]
    jax.tree.map(np.testing.assert_array_equal, loaded, averages[expected_step])


def test_tokens_bound_the_images(packed, images):
  run = predict.load_run(str(packed[0]))
  files, _ = predict.find_images([str(images)])
  mesh = sharding.make_mesh({"data": -1})
  data = predict._eval_data(run, files, mesh, batch_size=8, tokens=4)
  tokens = [np.asarray(batch["grid_hw"]).prod(-1) for batch, _ in data]
  assert max(map(np.max, tokens)) == 4
  assert sum(map(np.count_nonzero, tokens)) == len(SIZES)


def test_unreadable_images_are_named_and_skipped(
  packed, tmp_path, images, capsys
):
  run, out = packed[0], tmp_path / "out.npz"
  whole = (images / "0.png").read_bytes()
  cut, text = images / "00cut.png", images / "text.jpg"
  cut.write_bytes(whole[:-100])
  text.write_text("no image")
  missing = tmp_path / "missing.jpg"
  assert predict_cli(run, images, missing, "--features", out) == 1
  captured = capsys.readouterr()
  for name in (cut, text, missing):
    assert f"skipped {name}: " in captured.err
    assert str(name) not in captured.out
  assert len(captured.out.splitlines()) == len(SIZES)
  assert np.load(out)["features"].shape == (len(SIZES), 12)


def test_nothing_readable_is_an_error(packed, tmp_path, images, capsys):
  cut = tmp_path / "cut.png"
  cut.write_bytes((images / "0.png").read_bytes()[:-100])
  for name in (cut, tmp_path / "missing.jpg"):
    assert predict_cli(packed[0], name) == 2
    error = capsys.readouterr().err
    assert "error: No" in error
    assert str(name) in error


def test_refusals(packed, tmp_path, images, capsys):
  empty = tmp_path / "empty"
  empty.mkdir()
  other = tmp_path / "other"
  config = dict(task=dict(name="contrastive"))
  record.record_run(other, json.dumps(config), {"label_names": []})
  for argv, sentence in (
    ((empty, images), "is not a run folder: it has no run.json"),
    ((other, images), "is 'contrastive'"),
    ((packed[0], empty), "holds no image (.jpg"),
    ((packed[0], images, "--step", "8"), "no checkpoint 8"),
    ((packed[0], images, "--tokens", "24"), "do not fit rows of 23"),
  ):
    assert predict_cli(*argv) == 2
    assert sentence in capsys.readouterr().err
  with pytest.raises(SystemExit):
    predict_cli(packed[0], images, "--step", "last")
  assert "'last' is neither a step" in capsys.readouterr().err
