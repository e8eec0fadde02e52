"""Other classes and queries of DETR, and backbones that classifiers were."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from big_vision_like import api, train, trees
from big_vision_like.models import detr as models
from big_vision_like.models import resnet
from big_vision_like.weights import detr, engine


def head(classes, queries=3):
  """Of a file: each column of the kernel, and bias, is its number."""
  numbers = np.arange(classes + 1, dtype=np.float32)
  return {
    "params/class_head/kernel": np.tile(numbers, (8, 1)),
    "params/class_head/bias": numbers,
    "params/query_embed": np.full((queries, 8), 7, np.float32),
  }


def fitted(kind, classes, queries=3):
  shapes = {k: x.shape for k, x in head(classes, queries).items()}
  return detr.RESIZE[kind](None, head(5), shapes)


def test_fewer_classes_keep_the_first_and_no_object():
  got = fitted("classes", 2)
  np.testing.assert_array_equal(got["params/class_head/bias"], [0, 1, 5])
  np.testing.assert_array_equal(got["params/class_head/kernel"][3], [0, 1, 5])
  same = fitted("classes", 5)
  for k, x in head(5).items():
    np.testing.assert_array_equal(same[k], x)


def test_more_classes_start_fresh_before_no_object():
  got = fitted("classes", 8)
  bias, kernel = (got[f"params/class_head/{k}"] for k in ("bias", "kernel"))
  np.testing.assert_array_equal(bias[[0, 1, 2, 3, 4, 8]], range(6))
  np.testing.assert_array_equal(kernel[2, [0, 1, 2, 3, 4, 8]], range(6))
  for fresh in (bias[5:8], kernel[:, 5:8]):
    assert 0 < np.abs(fresh).max() <= 8**-0.5
  again = fitted("classes", 8)["params/class_head/kernel"]
  np.testing.assert_array_equal(again, kernel)
  assert kernel.dtype == np.float32


def test_queries_are_cut_or_drawn():
  got = fitted("queries", 5, queries=2)["params/query_embed"]
  np.testing.assert_array_equal(got, np.full((2, 8), 7))
  got = fitted("queries", 5, queries=103)["params/query_embed"]
  np.testing.assert_array_equal(got[:3], np.full((3, 8), 7))
  assert abs(got[3:].std() - 1) < 0.1
  assert got.dtype == np.float32


def test_norms_that_a_run_has_trained_become_constants():
  run, tuned = (
    random_variables(
      models.Model(
        variant="local",
        num_classes=2,
        backbone=dict(name="resnet", variant="local", frozen=frozen),
      )
    )
    for frozen in (False, True)
  )
  shapes = {k: x.shape for k, x in trees.flatten(tuned).items()}
  got = trees.flatten(
    engine.resize_ours(
      run, name="detr", model=None, shapes=tuned, resize=("frozen",)
    )
  )
  assert {k: x.shape for k, x in got.items()} == shapes
  path = "/backbone/stem_bn/scale"
  source = trees.flatten(run)[f"params{path}"]
  np.testing.assert_array_equal(got[f"batch_stats{path}"], source)


def test_what_layouts_have_no_place_for():
  backbone = dict(name="mobilevit", variant="XS")
  with pytest.raises(ValueError, match=r"stand on resnet, .* 'mobilevit'"):
    detr.detr(models.Model(backbone=backbone))
  model = models.Model(variant="local", num_classes=2, pre_norm=True)
  with pytest.raises(ValueError, match="no place for:\n  params/encoder/norm"):
    engine.export_weights(
      random_variables(model), name="detr", model=model, layout="hf"
    )
  with pytest.raises(ValueError, match=r"can: classes, queries, frozen\."):
    engine.resize_ours(
      {}, name="detr", model=model, shapes={}, resize=("positions",)
    )


def random_variables(model):
  image = jnp.zeros((1, 32, 32, 3))
  shapes = jax.eval_shape(
    lambda: model.init(jax.random.key(0), image, train=False)
  )
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda s: rng.normal(size=s.shape).astype(np.float32), dict(shapes)
  )


def test_a_classifier_becomes_the_backbone(tmp_path):
  """Its file, of trained BatchNorms and a head, into init_into="backbone"."""
  classifier = resnet.Model(variant="local", num_classes=3)
  trained = random_variables(classifier)
  file = tmp_path / "resnet.npz"
  tensors = engine.export_weights(
    trained, name="resnet", model=classifier, layout="torchvision"
  )
  engine.write(file, tensors)
  backbone = dict(name="resnet", variant="local", frozen=True)
  model = models.Model(variant="local", num_classes=2, backbone=backbone)
  fresh = random_variables(model)
  state = api.TrainState(
    step=0,
    params=fresh["params"],
    model_state={"batch_stats": fresh["batch_stats"]},
    opt_state=(),
    rng=None,
  )
  config = ConfigDict(
    dict(
      model=dict(name="detr", backbone=backbone),
      init_from=str(file),
      init_into="backbone",
      init_resize=(),
      init_skip=(),
      init_collections={},
    )
  )
  parts = types.SimpleNamespace(config=config, params_shape=fresh["params"])
  run = types.SimpleNamespace(config=config, parts=parts)
  got = train._Run._init_from(run, state)

  frozen = {
    "params": got.params["backbone"],
    "batch_stats": got.model_state["batch_stats"]["backbone"],
  }
  want = dict(trees.flatten(trained))
  for path, x in trees.flatten(frozen).items():
    if "_bn/" in path:
      source = path if path in want else path.replace("batch_stats", "params")
      assert path.startswith("batch_stats")
    else:
      source = path
    np.testing.assert_array_equal(x, want.pop(source), err_msg=path)
  assert set(want) == {"params/head/kernel", "params/head/bias"}
  np.testing.assert_array_equal(
    got.params["query_embed"], fresh["params"]["query_embed"]
  )

  # A run's variables instead of a file.
  alone = model.make_backbone(parent=None)
  moved = engine.resize_ours(
    trained,
    name="resnet",
    model=alone,
    shapes=frozen,
    resize=("frozen", "head"),
  )
  assert set(trees.flatten(moved)) == set(trees.flatten(frozen))
  for path, x in trees.flatten(moved).items():
    np.testing.assert_array_equal(x, trees.flatten(frozen)[path], err_msg=path)
