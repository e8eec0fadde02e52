"""The command `convert`, with a small model of our own making."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vision_like import __main__ as command_line
from big_vision_like.commands import convert
from big_vision_like.models import vit
from big_vision_like.weights import engine

NAMES = ("wug", "zorp", "blick")
SIZES = dict(width=24, depth=2, mlp=29, heads=3)
WORDS = ("--model", "vit", "--variant", "Ti/32", "--set", f"sizes={SIZES}")


def run(*words):
  return command_line.main(["convert", *map(str, words)])


@pytest.fixture(scope="module")
def file(tmp_path_factory):
  """A file in Google's layout, of images of 224 pixels."""
  model = vit.Model("Ti/32", len(NAMES), SIZES)
  image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  shapes = jax.eval_shape(
    lambda x: model.init(jax.random.key(0), x, train=False), image
  )
  rng = np.random.default_rng(0)
  variables = jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(np.float32), shapes
  )
  path = tmp_path_factory.mktemp("weights") / "weights.npz"
  tensors = engine.export_weights(
    variables, name="vit", model=model, layout="google"
  )
  engine.write(path, tensors)
  return path


@pytest.fixture(scope="module")
def converted(file, tmp_path_factory):
  target = tmp_path_factory.mktemp("runs") / "vit"
  assert run(file, target, *WORDS) == 0
  return target


def test_there_and_back(file, converted, tmp_path, capsys):
  stored = json.loads((converted / "run.json").read_text())
  assert stored["label_names"] == ["class 0", "class 1", "class 2"]
  assert stored["config"]["task"]["mean"] == [0.5] * 3
  assert stored["config"]["data"]["eval_ops"] == "decode|resize(224)"
  assert run(converted, tmp_path / "back.npz", "--layout", "google") == 0
  assert "in the google layout" in capsys.readouterr().out
  got, want = engine.read(tmp_path / "back.npz"), engine.read(file)
  assert set(got) == set(want)
  for k, x in want.items():
    np.testing.assert_array_equal(got[k], x, err_msg=k)


@pytest.mark.parametrize(
  ("name", "text"),
  [
    ("names.txt", "\n".join(NAMES)),
    ("names.json", json.dumps(NAMES)),
    ("names.json", json.dumps(dict(enumerate(NAMES)))),
    ("config.json", json.dumps({"id2label": dict(enumerate(NAMES)), "x": 1})),
    ("config.json", json.dumps({"label_names": NAMES, "num_classes": 3})),
  ],
)
def test_names_of_classes(name, text, tmp_path):
  (tmp_path / name).write_text(text)
  beside = tmp_path / "weights.npz"
  path = None if name == "config.json" else str(tmp_path / name)
  assert convert.label_names(path, beside, 3) == NAMES
  with pytest.raises(ValueError, match="names 3 classes, and the weights have"):
    convert.label_names(path, beside, 4)


def test_a_config_without_names_gives_numbers(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps({"architectures": ["X"]}))
  names = convert.label_names(None, tmp_path / "weights.npz", 2)
  assert names == ("class 0", "class 1")


@pytest.mark.parametrize(
  ("words", "sentence"),
  [
    (("FILE", "NEW"), "say whose they are: --model NAME --variant V"),
    (("FILE", "RUN", *WORDS), "exists already; nothing was written"),
    (("RUN", "NEW"), "say how: --layout NAME"),
    (("RUN", "NEW.npz", "--layout", "flax"), "no layout 'flax'; it has google"),
    (("FILE", "NEW", *WORDS, "depth"), "--set depth: write KEY=VALUE"),
    (("FILE", "NEW", *WORDS[:4]), "nothing was loaded"),
    (("NEW.npz", "NEW", *WORDS), "There is no file of weights"),
  ],
)
def test_refusals(words, sentence, file, converted, tmp_path, capsys):
  places = {"FILE": file, "RUN": converted}
  places |= {k: tmp_path / k for k in ("NEW", "NEW.npz")}
  assert run(*(places.get(w, w) for w in words)) != 0
  assert sentence in capsys.readouterr().err
