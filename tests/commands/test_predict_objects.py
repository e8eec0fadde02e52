"""`predict` of a detector: published weights in, objects and pictures out."""

import json

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from big_vision_like import __main__ as command_line
from big_vision_like import detect, object_pictures, postprocess
from big_vision_like.commands import convert, predict
from big_vision_like.data import ops
from big_vision_like.models import detr, resnet
from big_vision_like.tasks import detection
from big_vision_like.weights import engine

CATEGORIES = [{"id": 3, "name": "eel"}, {"id": 1, "name": "cat"}]
NAMES = ["(id 0)", "cat", "(id 2)", "eel"]
SETTINGS = dict(
  num_queries=5,
  sizes=dict(width=16, heads=2, mlp=24, encoder_depth=1, decoder_depth=2),
  backbone=dict(name="resnet", variant="tiny", frozen=True),
)
SIZES = ((90, 60), (64, 64), (50, 110))
CANVAS = (96, 96)


def cli(*argv):
  return command_line.main([str(a) for a in argv])


@pytest.fixture(scope="module", autouse=True)
def tiny():
  """A ResNet that compiles fast; its map is 1/8 of the image's sides."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(resnet.VARIANTS, "tiny", dict(stages=(1, 1), width=8))
    yield


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
  """The run folder of a tiny DETR in the authors' layout, and its variables."""
  folder = tmp_path_factory.mktemp("detr")
  model = detr.Model("local", 4, **SETTINGS)
  shapes = jax.eval_shape(
    lambda: model.init(
      jax.random.key(0), jnp.zeros((1, 64, 64, 3)), train=False
    )
  )
  rng = np.random.default_rng(0)
  variables = jax.tree.map(
    lambda x: np.float32(0.3 * rng.normal(size=x.shape)), shapes
  )
  for name in variables.keys() - {"params"}:  # variances among them
    variables[name] = jax.tree.map(np.abs, variables[name])
  tensors = engine.export_weights(
    variables, name="detr", model=model, layout="detr"
  )
  engine.write(folder / "weights.npz", tensors)
  labels = folder / "labels.json"
  labels.write_text(json.dumps({"categories": CATEGORIES}))
  words = [f"{k}={v}" for k, v in SETTINGS.items()]
  words = ("--variant", "local", "--set", *words, "--labels", labels)
  run = folder / "run"
  assert not cli(
    "convert", folder / "weights.npz", run, "--model", "detr", *words
  )
  # On canvases that take no seconds.
  stored = json.loads((run / "run.json").read_text())
  published = stored["config"]["data"].copy()
  stored["config"]["data"]["eval_ops"] = "decode|detr_resize(40, 80)"
  stored["config"]["data"]["objects"] = dict(canvases=[CANVAS])
  (run / "run.json").write_text(json.dumps(stored))
  return run, model, published


@pytest.fixture(scope="module")
def images(tmp_path_factory):
  folder = tmp_path_factory.mktemp("images")
  rng = np.random.default_rng(1)
  files = [folder / f"{i}.png" for i in range(len(SIZES) - 1)]
  files.append(folder / "deep" / "0.png")
  files[-1].parent.mkdir()
  for file, hw in zip(files, SIZES):
    cv2.imwrite(str(file), rng.integers(0, 256, (*hw, 3), np.uint8))
  return files


def test_a_converted_detector_knows_its_images(converted):
  run, _, data = converted
  stored = json.loads((run / "run.json").read_text())
  assert stored["label_names"] == NAMES
  assert stored["config"]["task"]["name"] == "detection"
  assert "is_thing" not in stored
  assert data["eval_ops"] == "decode|detr_resize(800, 1333)"
  canvases = [(800, 1088), (800, 1344), (1088, 800), (1344, 800), (1344, 1344)]
  assert list(map(tuple, data["objects"]["canvases"])) == canvases
  assert data["objects"]["masks"] is False


def test_of_many_categories_ids_are_the_classes(tmp_path):
  file = tmp_path / "labels.json"
  file.write_text(json.dumps({"categories": CATEGORIES}))
  names = convert.label_names(str(file), tmp_path, 6)
  assert names == (*NAMES, "(id 4)", "(id 5)")
  with pytest.raises(ValueError, match="names 4 classes, and the weights have"):
    convert.label_names(str(file), tmp_path, 3)


def alone(run, model, file):
  """What the model says of one image, prepared by hand."""
  variables = predict.load_run(str(run)).variables
  image = ops.decode(file.read_bytes())
  h, w = image.shape[:2]
  op = ops.parse("detr_resize(40, 80)")
  small = op({"image": image}, np.random.default_rng(0))["image"]
  batch = {
    "image": np.zeros((1, *CANVAS, 3), np.uint8),
    "size": np.array([small.shape[:2]], np.int32),
    "_mask": np.ones(1, bool),
  }
  batch["image"][0, : small.shape[0], : small.shape[1]] = small
  inputs, _ = detection.Task(num_classes=4).prepare(
    jax.tree.map(jnp.asarray, batch), None
  )
  apply = jax.jit(lambda v, x: model.apply(v, train=False, **x))
  out = apply(variables, inputs)
  last = {k: np.asarray(out[k][-1]) for k in ("logits", "boxes")}
  return postprocess.detections(
    last["logits"], last["boxes"], np.array([[h, w]])
  )


def test_objects_are_printed_written_and_drawn(
  converted, images, tmp_path, capsys
):
  run, model, _ = converted
  broken = tmp_path / "broken.png"
  broken.write_bytes(images[0].read_bytes()[:-100])
  found = tmp_path / "found.json"
  folder = tmp_path / "pictures"
  argv = ("--threshold", 0, "--json", found, "--pictures", folder)
  assert (
    cli("predict", "--run", run, *images, broken, *argv, "--attention") == 1
  )
  captured = capsys.readouterr()
  assert f"skipped {broken}: cannot be decoded" in captured.err
  lines = captured.out.splitlines()
  assert lines[-1] == f"Pictures of 3 images are in {folder}."
  rows = json.loads(found.read_text())["images"]
  assert [row["file"] for row in rows] == list(map(str, images))
  assert [(row["height"], row["width"]) for row in rows] == list(SIZES)
  for i, row in enumerate(rows):
    assert lines[6 * i] == f"{images[i]}: 5 objects"
    for line, one in zip(lines[6 * i + 1 :], row["objects"]):
      assert one["label"] == NAMES[one["class"]]
      x0, y0, x1, y1 = (round(x) for x in one["box"])
      words = " ".join(line.split())
      score = f"{one['score']:.3f}"
      assert words == f"{one['label']} {score} x {x0} to {x1}, y {y0} to {y1}"
  score, label, corners = alone(run, model, images[2])
  order = np.argsort(-score[0], kind="stable")
  got = rows[2]["objects"]
  assert [one["class"] for one in got] == label[0][order].tolist()
  # Float32 sums in another order, on eight devices.
  np.testing.assert_allclose([x["score"] for x in got], score[0][order], 1e-4)
  limit = np.array([110, 50] * 2)
  want = np.clip(corners[0][order], 0, limit)
  np.testing.assert_allclose([x["box"] for x in got], want, atol=1e-2)
  written = {str(p.relative_to(folder)) for p in folder.rglob("*.png")}
  names = ("0.png", "0_2.png", "1.png")
  assert written == {*names, *(f"attention/{name}" for name in names)}
  assert cv2.imread(str(folder / "0_2.png")).std() > 10


def test_the_default_threshold_and_folder(converted, images, capsys):
  run = converted[0]
  assert cli("predict", "--run", run, images[0], "--attention") == 0
  assert capsys.readouterr().out.startswith(f"{images[0]}: 0 objects\n")
  assert (run / "predictions" / "0.png").is_file()


@pytest.mark.parametrize(
  ("words", "sentence"),
  [
    (("--top", 3), "is detection, which has no --top."),
    (("--features", "f", "--tokens", 9), "has no --features, --tokens."),
  ],
)
def test_arguments_of_a_classification_are_refused(
  words, sentence, converted, images, capsys
):
  assert cli("predict", "--run", converted[0], images[0], *words) == 2
  assert sentence in capsys.readouterr().err


def test_maps_of_tokens_lie_on_the_image():
  weights = np.random.default_rng(0).random((2, 6))
  maps, stride = detect.grid_maps(weights, (64, 96))
  assert stride == 32
  assert maps.shape == (2, 2, 3)
  np.testing.assert_array_equal(maps[1, 1], weights[1, 3:])
  assert detect.grid_maps(np.zeros((1, 4 * 6)), (64, 96))[1] == 16
  with pytest.raises(
    ValueError, match="7 tokens are no grid of a canvas of 64"
  ):
    detect.grid_maps(np.zeros((1, 7)), (64, 96))


def test_segments_are_written_as_masks():
  ids = np.array([[1, 1, 2], [0, 2, 2]])
  found = postprocess.Found(
    *(np.arange(2), np.array([3, 1]), np.array([0.9, 0.8])),
    np.array([[0, 0, 2, 1], [1, 0, 3, 2.0]]),
    ids,
  )
  one = detect.Detection(0, (2, 3), found)
  row = detect.as_json("a.png", one, NAMES, (False, False, False, True))
  first, second = row["objects"]
  assert (first["is_thing"], second["is_thing"]) == (True, False)
  assert (first["area"], second["area"]) == (2, 3)
  mask = coco_mask.decode(json.loads(json.dumps(second["segmentation"])))
  np.testing.assert_array_equal(mask, ids == 2)
  drawn = object_pictures.found_objects(found, NAMES, by_class=False)
  assert list(drawn.texts) == ["eel 0.90", "cat 0.80"]
  assert list(drawn.colours) == [0, 1]
