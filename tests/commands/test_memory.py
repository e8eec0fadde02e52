"""Tasks as files: saved, listed, joined and answered in one pass."""

import json

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vision_like import __main__ as command_line
from big_vision_like import api, attach, checkpoint, record, trees
from big_vision_like.commands import predict
from big_vision_like.models import memory
from big_vision_like.weights import adapter, engine

SIZES = dict(width=12, depth=2, mlp=17, heads=3)
BACKBONE = dict(name="vit", variant="Ti/7", sizes=SIZES)
NAMES = {
  "animal": ("cat", "dog", "eel"),
  "colour": ("red", "green", "blue", "white", "black"),
  "place": ("in", "out"),
}
DATA = dict(pack=None, eval_ops="decode|resize(14, 21)")


def random_params(model, seed, classes):
  shapes = jax.eval_shape(
    lambda: model.init(
      jax.random.key(0), train=False, image=jnp.zeros((1, 14, 21, 3))
    )["params"]
  )
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: np.float32(0.5 * rng.normal(size=x.shape)), shapes
  )


def write_run(folder, model, params, names):
  task = dict(name="classification", loss_name="softmax")
  config = dict(model=model, task=task, data=DATA)
  record.record_run(folder, json.dumps(config), {"label_names": list(names)})
  state = api.TrainState(
    step=jnp.asarray(0),
    params=params,
    model_state={},
    opt_state=(),
    rng=jax.random.key(0),
  )
  with checkpoint.Checkpointer(folder / checkpoint.FOLDER) as checkpoints:
    checkpoints.save(0, state, {})
  return folder


def make_backbone(folder, *, seed=0, **changes):
  """A run that tells animals apart; its parameters without the head too."""
  settings = dict(BACKBONE, **changes)
  model = predict.build.make_model(
    predict.ConfigDict(dict(model=settings)), len(NAMES["animal"])
  )
  params = random_params(model, seed, 3)
  run = write_run(folder, settings, params, NAMES["animal"])
  return run, {k: v for k, v in params.items() if k != "head"}


def make_task(folder, name, own, *, seed=1, tasks=None, mask=True, others=None):
  """A run that has trained a task; the backbone is stored without its head."""
  tasks = tasks or {name: dict(cells=2)}
  settings = dict(
    name="memory", backbone=BACKBONE, tasks=tasks, task=name, mask=mask
  )
  model = predict.build.make_model(
    predict.ConfigDict(dict(model=settings)), len(NAMES[name])
  )
  params = random_params(model, seed, len(NAMES[name]))
  params["backbone"] = own
  params["tasks"].update(others or {})
  return write_run(folder, settings, params, NAMES[name])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """A backbone, and the files of two tasks and of one that extends colour."""
  folder = tmp_path_factory.mktemp("memory")
  run, own = make_backbone(folder / "backbone")
  colour = make_task(folder / "colour", "colour", own)
  of_colour = checkpoint.load_params(colour)["tasks"]
  tasks = {
    "colour": dict(cells=2, num_classes=5),
    "place": dict(cells=1, extends=("colour",)),
  }
  runs = {
    "colour": colour,
    "animal": make_task(folder / "animal", "animal", own, seed=2),
    "place": make_task(
      folder / "place", "place", own, tasks=tasks, others=of_colour
    ),
  }
  paths = {}
  for name, source in runs.items():
    paths[name] = folder / f"{name}.safetensors"
    assert cli("memory", "save", source, paths[name]) == 0
  return run, own, paths


@pytest.fixture
def images(tmp_path):
  rng = np.random.default_rng(0)
  folder = tmp_path / "images"
  folder.mkdir()
  for i in range(3):
    pixels = rng.integers(0, 256, (14, 21, 3), np.uint8)
    cv2.imwrite(str(folder / f"{i}.png"), pixels)
  return folder


def cli(*argv):
  return command_line.main([str(x) for x in argv])


def error(capsys, *argv):
  assert cli(*argv) == 2
  return capsys.readouterr().err


def test_a_file_holds_the_task_and_nothing_of_the_backbone(files, capsys):
  _, own, paths = files
  one = adapter.load(paths["place"])
  stored = trees.flatten(checkpoint.load_params(paths["place"].with_suffix("")))
  for name, x in trees.flatten(one.params).items():
    np.testing.assert_array_equal(x, stored[f"tasks/place/{name}"])
  assert one.label_names == NAMES["place"]
  assert (one.cells, one.width, one.mask) == (1, 12, True)
  assert one.backbone == adapter.of_backbone(own)
  base = adapter.load(paths["colour"])
  assert one.extends == {"colour": base.fingerprint}
  # L m D + D + (D + 1) C numbers of four bytes, and what they mean.
  assert trees.count(base.params) == 2 * 2 * 12 + 12 + 13 * 5
  assert paths["colour"].stat().st_size < 4 * 125 + 1500
  capsys.readouterr()
  assert cli("memory", "list", *paths.values()) == 0
  lines = capsys.readouterr().out.splitlines()
  row = next(line for line in lines if "place.safetensors" in line)
  cells = [x.strip() for x in row.strip("|").split("|")]
  assert cells[1:7] == ["place", "2", "1", "12", "yes", "colour"]
  assert cells[7:9] == [one.backbone, f"{trees.count(one.params)}"]


def test_fingerprints_are_of_what_tasks_read():
  params = {"encoder": {"blocks_0": {"w": np.ones((2, 3))}}}
  stacked = {"encoder": {"blocks": {"w": np.ones((1, 2, 3))}}}
  here = adapter.of_backbone(params)
  assert adapter.of_backbone({**params, "head": np.ones(3)}) == here
  assert adapter.of_backbone(stacked) == here
  other = {"encoder": {"blocks_0": {"w": np.ones((2, 3)) * 1.0001}}}
  assert adapter.of_backbone(other) != here


def scores(run, folder, adapters):
  loaded = predict.load_run(str(run))
  if adapters:
    loaded = attach.join(loaded, adapters)
  found, _ = predict.find_images([str(folder)])
  return predict.predict(attach.folded(loaded), found, batch_size=3).scores


def test_joined_tasks_answer_as_each_alone(files, images, capsys):
  """In one pass, and so does the head that the backbone came with."""
  run, _, paths = files
  order = [paths["place"], paths["colour"], paths["animal"]]
  together = scores(run, images, order)
  assert list(together) == ["backbone", "place", "colour", "animal"]
  same = np.testing.assert_array_equal  # The same products, bit by bit.
  same(together["backbone"], scores(run, images, [])[""])
  for name in ("colour", "animal"):
    same(together[name], scores(run, images, [paths[name]])[name])
    own = scores(paths[name].with_suffix(""), images, [])
    np.testing.assert_allclose(together[name], own[name], atol=1e-6)

  argv = ("--run", run, "--adapters", *order, "--tasks", "place", "colour")
  assert cli("predict", images, *argv, "--top", 1) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[0] == "place:"
  assert lines[4] == "colour:"
  for line, row in zip(lines[1:4], together["place"]):
    assert line.split()[1] == NAMES["place"][row.argmax()]
  assert "3 images: " in lines[8]
  # Bases first, since what extends them cannot be without.
  listed = [line.split()[0] for line in lines[9:]]
  assert sorted(listed) == ["animal", "colour", "place"]
  assert listed.index("colour") < listed.index("place")
  assert all(" adds " in line for line in lines[9:])


def test_a_joined_run_is_a_run(files, images, tmp_path, capsys):
  run, _, paths = files
  target = tmp_path / "joined"
  argv = (run, paths["colour"], paths["animal"], "--to", target)
  assert cli("memory", "join", *argv) == 0
  want = scores(run, images, [paths["colour"], paths["animal"]])
  got = scores(target, images, [])
  assert list(got) == ["backbone", "colour", "animal"]
  for name in want:
    np.testing.assert_array_equal(got[name], want[name])
  # More may join it, what is there can be saved again, under another name.
  more = scores(target, images, [paths["place"]])
  np.testing.assert_array_equal(more["colour"], want["colour"])
  other = tmp_path / "again.safetensors"
  argv = (target, other, "--task", "colour", "--name", "hue")
  assert cli("memory", "save", *argv) == 0
  again, first = adapter.load(other), adapter.load(paths["colour"])
  assert again.task == "hue"
  assert again.fingerprint == first.fingerprint
  assert "exists already" in error(
    capsys, "memory", "join", *argv[:2], "--to", target
  )


def test_refusals(files, images, tmp_path, capsys):
  run, own, paths = files
  colour, place = paths["colour"], paths["place"]
  ask = ("predict", images, "--run")
  other, _ = make_backbone(tmp_path / "other", seed=5)
  wide, _ = make_backbone(tmp_path / "wide", sizes=dict(SIZES, width=24))
  deep, _ = make_backbone(tmp_path / "deep", sizes=dict(SIZES, depth=3))
  for backbone, sentence in (
    (
      other,
      f"colour.safetensors belongs to the backbone {adapter.of_backbone(own)}",
    ),
    (
      wide,
      "is for a width of 12 and 2 layers, and the backbone has a width of 24",
    ),
    (deep, "and the backbone has a width of 12 and 3 layers"),
  ):
    assert sentence in error(capsys, *ask, backbone, "--adapters", colour)
  copy = tmp_path / "copy.safetensors"
  copy.write_bytes(colour.read_bytes())
  text = error(capsys, *ask, run, "--adapters", colour, copy)
  assert f"{colour} and {copy} are both called 'colour'" in text
  text = error(capsys, *ask, run, "--adapters", place)
  assert (
    "extends the task 'colour', which is not loaded; there are: place" in text
  )
  text = error(capsys, *ask, run, "--adapters", colour, "--tasks", "animal")
  assert "The task 'animal' is asked for, and not loaded; there are: " in text
  assert "backbone, colour" in text

  again = make_task(tmp_path / "again", "colour", own, seed=9)
  retrained = tmp_path / "retrained.safetensors"
  assert cli("memory", "save", again, retrained) == 0
  text = error(capsys, *ask, run, "--adapters", retrained, place)
  assert "another training of it" in text
  plain = make_task(tmp_path / "plain", "animal", own, mask=False)
  unmasked = tmp_path / "plain.safetensors"
  assert cli("memory", "save", plain, unmasked) == 0
  text = error(capsys, *ask, run, "--adapters", colour, unmasked)
  assert "cannot answer together: their mask are False and True" in text

  tensors = engine.read(colour)
  lost = {k: x for k, x in adapter._metadata(colour).items()}
  metadata = {k: json.loads(v) for k, v in lost.items()}
  broken = tmp_path / "broken.safetensors"
  engine.write(broken, tensors, {**metadata, "label_names": ["red", "green"]})
  text = error(capsys, "memory", "list", broken)
  assert (
    "broken.safetensors: The task 'colour' names 2 classes, and its head has 5"
    in text
  )
  engine.write(broken, tensors)
  assert "is no adapter" in error(capsys, "memory", "list", broken)
  for argv, sentence in (
    (("save", run, tmp_path / "x.safetensors"), "a memory has tasks"),
    (("save", again, tmp_path / "x.npz"), "end in .safetensors"),
    (("save", again, colour), "nothing was written"),
    (
      ("save", again, tmp_path / "x.safetensors", "--task", "hue"),
      "no task 'hue'",
    ),
    (("save", again), "takes a run folder and the file"),
    (("list",), "memory list takes adapter files"),
    (("join", run, colour), "and --to DIR"),
  ):
    assert sentence in error(capsys, "memory", *argv), argv


def test_a_memory_without_its_own_task_cannot_be_built():
  with pytest.raises(ValueError, match="is asked for, and not loaded"):
    memory.Model(backbone=BACKBONE, tasks={"a": {}}, task="b").asked()
