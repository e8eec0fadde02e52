"""Starting from the weights of another run, or from published ones."""

import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from big_vision_like import sharding, trees, warm_start
from big_vision_like.weights import engine

SHAPES = {
  "blocks/attn/query/kernel": (3, 8, 4, 5),
  "blocks/mlp/fc1/kernel": (3, 8, 16),
  "head/kernel": (8, 11),
  "head/bias": (11,),
}


def random_params(seed=0):
  rng = np.random.default_rng(seed)
  params = {k: rng.normal(size=s).astype("float32") for k, s in SHAPES.items()}
  return jax.tree.map(jnp.asarray, trees.unflatten(params))


def test_init_from_takes_values_and_keeps_dtype_and_layout():
  mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
  split = NamedSharding(mesh, P("fsdp"))
  fresh = jax.tree.map(
    lambda x: jax.device_put(x, split) if x.shape[0] == 8 else x,
    random_params(0),
  )
  fresh["head"]["kernel"] = fresh["head"]["kernel"].astype(jnp.bfloat16)
  loaded = jax.device_get(random_params(1))
  got, report = warm_start.init_from(fresh, loaded)
  for name, x in trees.flatten(got).items():
    like, value = trees.flatten(fresh)[name], trees.flatten(loaded)[name]
    assert (x.dtype, x.sharding) == (like.dtype, like.sharding)
    np.testing.assert_array_equal(
      np.asarray(x), np.asarray(value).astype(like.dtype)
    )
  total = trees.count(loaded)
  assert report.startswith(f"Taken, {total:,} numbers (4):")
  assert re.search(r"blocks/mlp/fc1/kernel +\(3, 8, 16\)", report)
  assert "Freshly" not in report
  assert "Unused" not in report


def test_a_half_matching_checkpoint_is_refused_with_names_on_both_sides():
  fresh, loaded = random_params(0), random_params(1)
  fresh["memory"] = {"tokens": np.ones((2, 8), np.float32)}
  loaded["head"]["kernel"] = np.ones((8, 17), np.float32)
  loaded["pre_logits"] = {"bias": np.ones(8, np.float32)}
  with pytest.raises(ValueError, match=r"config\.init_from: 3 of 5 ") as e:
    warm_start.init_from(fresh, loaded)
  assert "Only in the model (1):\n  memory/tokens  (2, 8)\n" in str(e.value)
  assert "Only in the checkpoint (1):\n  pre_logits/bias  (8,)\n" in str(
    e.value
  )
  assert (
    "Different (model, checkpoint) (1):\n  head/kernel  (8, 11), (8, 17)\n"
    in str(e.value)
  )
  assert "config.init_skip, such as ('head/.*',)" in str(e.value)

  skip = ("head/.*", "memory/.*", "pre_logits/.*")
  got, report = warm_start.init_from(fresh, loaded, skip=skip)
  np.testing.assert_array_equal(got["head"]["kernel"], fresh["head"]["kernel"])
  np.testing.assert_array_equal(got["memory"]["tokens"], np.ones((2, 8)))
  np.testing.assert_array_equal(
    got["blocks"]["mlp"]["fc1"]["kernel"],
    loaded["blocks"]["mlp"]["fc1"]["kernel"],
  )
  fresh_rows = report.split("Freshly initialised (3):")[1].split("Unused")[0]
  for name in ("head/kernel", "head/bias", "memory/tokens"):
    assert name in fresh_rows
  assert "pre_logits/bias" in report.split("Unused in the checkpoint (3):")[1]


def test_a_skip_rule_that_matches_nothing_is_refused():
  params = random_params()
  with pytest.raises(ValueError, match=r"config\.init_skip: 'haed/\.\*' match"):
    warm_start.init_from(params, params, skip=("haed/.*",))


def test_what_is_no_checkpoint_is_refused_at_the_door(tmp_path):
  asked = dict(name="vit", model=None, shapes={})
  with pytest.raises(ValueError, match="No checkpoint at"):
    warm_start.load(str(tmp_path / "nowhere"), **asked)
  with pytest.raises(ValueError, match="There is no file of weights"):
    warm_start.load(str(tmp_path / "nothing.safetensors"), **asked)
  with pytest.raises(ValueError, match="write hf://organisation/name"):
    warm_start.load("hf://vit", **asked)


@pytest.mark.parametrize("name", ["vit", "deepvit"])
def test_positions_of_a_run_are_resized(name):
  """As those of a file: the class token's entry stays, the grid stretches."""
  rng = np.random.default_rng(0)
  table = rng.normal(size=(1, 1 + 3 * 3, 5)).astype(np.float32)
  variables = {"params": {"cls": np.ones((1, 1, 5)), "pos_embed": table}}
  shapes = jax.eval_shape(
    lambda: {"params": {"pos_embed": jnp.ones((1, 17, 5))}}
  )
  kw = dict(name=name, model=None, shapes=shapes)
  got = engine.resize_ours(variables, resize=("positions",), **kw)
  want = scipy.ndimage.zoom(
    table[0, 1:].reshape(3, 3, 5), (4 / 3, 4 / 3, 1), order=1
  )
  np.testing.assert_array_equal(got["params"]["pos_embed"][0, 0], table[0, 0])
  np.testing.assert_allclose(
    got["params"]["pos_embed"][0, 1:], want.reshape(16, 5), rtol=1e-5, atol=1e-6
  )
  with pytest.raises(
    ValueError, match=f"'patches' of {name} cannot be resized"
  ):
    engine.resize_ours(variables, resize=("patches",), **kw)


def test_without_the_hub_it_says_what_to_do(monkeypatch):
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  with pytest.raises(ValueError, match=r"big-vision-like\[hub\]"):
    warm_start.download("hf://google/vit-base-patch16-224")


def test_the_config_comes_along_where_there_is_one(monkeypatch, tmp_path):
  class EntryNotFoundError(Exception):
    pass

  asked, there = [], {"model.safetensors"}

  def fetch(repository, file):
    asked.append(file)
    if file not in there:
      raise EntryNotFoundError(file)
    return str(tmp_path / repository / file)

  errors = types.SimpleNamespace(EntryNotFoundError=EntryNotFoundError)
  hub = types.SimpleNamespace(hf_hub_download=fetch, errors=errors)
  monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
  for file in ("model.safetensors", "config.json"):
    there.add(file)
    path = warm_start.download("hf://google/vit")
    assert path == tmp_path / "google" / "vit" / "model.safetensors"
    assert asked == ["model.safetensors", "config.json"]
    asked.clear()


def test_offline_it_says_so(monkeypatch):
  def refuse(repository, file):
    raise OSError(f"cannot reach the hub for {repository}/{file}")

  hub = types.SimpleNamespace(hf_hub_download=refuse)
  monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
  with pytest.raises(ValueError, match="Without a network, give the path"):
    warm_start.download("hf://google/vit-base-patch16-224")
