"""Each measure against a value computed by hand, loop by loop."""

import itertools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vision_like import api, capture, pictures
from big_vision_like.evaluators import (
  attention_similarity,
  channel_importance,
  head_similarity,
)
from big_vision_like.models import vit
from big_vision_like.tasks import classification

RNG = np.random.default_rng(0)
# Rows of 7 tokens: images of 3 and 2 tokens, one of 5.
IDS = np.array([[1, 1, 1, 2, 2, 0, 0], [1, 1, 1, 1, 1, 0, 0]])
MEMBERS = IDS[:, None] == np.array([[1], [2]])
IMAGES = ((0, 0), (0, 1), (1, 0))


def packed_maps(*shape):
  """Random maps [...,7,7] of the two rows, 0 between images."""
  same = IDS[:, :, None] == IDS[:, None]
  x = RNG.normal(size=(*shape, 7, 7)) * same[:, None, None]
  return x.astype(np.float32)


def cosine(a, b):
  return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def test_columns_of_layers_are_compared_image_by_image():
  maps = packed_maps(3, 2, 1, 2)  # layers, rows, windows, heads
  similarity, chance = attention_similarity.compare(maps, MEMBERS)
  for (row, slot), p, r in itertools.product(IMAGES, range(3), range(3)):
    own = np.flatnonzero(MEMBERS[row, slot])
    pairs = {
      (s, t): np.mean(
        [
          cosine(maps[p, row, 0, h, own, s], maps[r, row, 0, h, own, t])
          for h in range(2)
        ]
      )
      for s in own
      for t in own
    }
    same = np.mean([pairs[t, t] for t in own])
    other = np.mean([x for (s, t), x in pairs.items() if s != t])
    np.testing.assert_allclose(similarity[row, slot, p, r], same, atol=1e-5)
    np.testing.assert_allclose(chance[row, slot, p, r], other, atol=1e-5)


def test_windows_of_an_image_count_alike():
  maps = RNG.uniform(size=(2, 3, 4, 2, 5, 5)).astype(np.float32)
  members = np.ones((3, 1, 5), bool)
  whole = attention_similarity.compare(maps, members)
  parts = [
    attention_similarity.compare(maps[:, :, [g]], members) for g in range(4)
  ]
  for got, each in zip(whole, zip(*parts)):
    np.testing.assert_allclose(got, np.mean(each, 0), rtol=1e-5)


def test_a_token_that_no_one_reads_is_like_nothing():
  maps = np.ones((2, 1, 1, 1, 3, 3), np.float32)
  maps[0, ..., 0] = 0
  similarity, _ = attention_similarity.compare(maps, np.ones((1, 1, 3), bool))
  np.testing.assert_allclose(
    similarity[0, 0], [[2 / 3, 2 / 3], [2 / 3, 1]], rtol=1e-6
  )


def test_independent_uniform_maps_are_alike_by_chance():
  # The trap of the measure, with the figures of independent random logits.
  for spread, expected in ((0.1, 0.99), (1.0, 0.40)):
    logits = (
      np.random.default_rng(1).normal(size=(2, 1, 1, 2, 197, 197)) * spread
    )
    maps = np.float32(jax.nn.softmax(logits))
    similarity, chance = attention_similarity.compare(
      maps, np.ones((1, 1, 197), bool)
    )
    assert float(similarity[0, 0, 0, 1]) == pytest.approx(expected, abs=0.02)
    assert float(chance[0, 0, 0, 1]) == pytest.approx(
      float(similarity[0, 0, 0, 1]), abs=0.01
    )


def test_layers_of_other_shapes_are_not_compared():
  layers = [
    capture.Layer(str(n), jnp.ones((2, 1, 1, n, n)), jnp.ones((2, 1, n), bool))
    for n in (3, 4, 3, 1)
  ]
  summed = attention_similarity.compare_layers(layers, jnp.ones((2, 1), bool))
  similarity, _ = attention_similarity.means(jax.tree.map(np.asarray, summed))
  nan = np.nan
  want = [[1, nan, 1, nan], [nan, 1, nan, nan], [1, nan, 1, nan], [nan] * 4]
  np.testing.assert_allclose(similarity, want, rtol=1e-6)


def test_whole_maps_of_heads_are_compared_image_by_image():
  maps = packed_maps(2, 1, 3)  # rows, windows, heads
  similarity, chance = head_similarity.compare_heads(maps, MEMBERS)
  for (row, slot), k, j in itertools.product(IMAGES, range(3), range(3)):
    own = MEMBERS[row, slot]
    a, b = (maps[row, 0, h][own][:, own] for h in (k, j))
    got = similarity[row, slot, k, j]
    np.testing.assert_allclose(got, cosine(a.ravel(), b.ravel()), atol=1e-5)
    shuffles = itertools.permutations(range(own.sum()))
    want = np.mean([cosine(a.ravel(), b[:, list(s)].ravel()) for s in shuffles])
    np.testing.assert_allclose(chance[row, slot, k, j], want, atol=1e-5)


class Two(nn.Module):
  """A hidden layer, by a name that we know, and a head."""

  @nn.compact
  def __call__(self, x, *, train):
    del train
    x = nn.Dense(5, name="fc1")(x)
    return {"logits": nn.Dense(3, name="head")(jnp.tanh(x))}


def test_importance_is_what_the_loss_loses_by_a_channel():
  # For a loss that is linear in a channel, the first order is all there is.
  model, x = Two(), jnp.asarray(RNG.normal(size=(11, 4)), jnp.float32)
  params = model.init(jax.random.key(0), x, train=False)["params"]
  params = jax.tree.map(lambda p: p + 0.1, params)

  def loss(params):
    y = x @ params["fc1"]["kernel"] + params["fc1"]["bias"]
    return (y @ params["head"]["kernel"]).mean()

  found = channel_importance.channels(params, jax.grad(loss)(params), [])
  (block,) = found.values()
  assert float(block["FFN"]["width"]) == 4
  for c in range(5):
    gone = jax.tree.map(np.array, params)
    gone["fc1"]["kernel"][:, c] = gone["fc1"]["bias"][c] = 0
    change = abs(float(loss(params) - loss(gone)))
    assert float(block["FFN"]["scores"][c]) == pytest.approx(change, abs=1e-5)


def test_names_tell_the_kinds_and_batch_norm_stands_for_its_layer():
  def leaf(*shape):
    return RNG.normal(size=shape).astype(np.float32)

  params = {
    "stage10_block0": {
      # 4 channels in: values are 4 wide, queries and keys 3.
      "mixer": {
        f"qkv{i}": {
          "conv": {"kernel": leaf(1, 1, 4, 10)},
          "bn": {"scale": leaf(10), "bias": leaf(10)},
        }
        for i in range(2)
      },
    },
    "stage2_block0": {
      f"ffn{i}": {
        "pw1": {"conv": {"kernel": leaf(1, 1, 8, 16), "bias": leaf(16)}}
      }
      for i in range(2)
    },
    "blocks": {"attn": {"query": {"kernel": leaf(2, 6, 3, 2)}}},
    "monkey": {"kernel": leaf(2, 2)},
  }
  grads = jax.tree.map(lambda x: RNG.normal(size=x.shape), params)
  found = channel_importance.channels(params, grads, ["stage10_block0"])
  found = {capture.layer_name(k): v for k, v in found.items()}
  assert list(found) == [
    "stage10_block0",
    "blocks_0",
    "blocks_1",
    "stage2_block0",
  ]
  p, g = params["stage10_block0"]["mixer"], grads["stage10_block0"]["mixer"]
  for kind, width, at in (("Q", 3, 0), ("K", 3, 3), ("V", 4, 6)):
    want = [
      abs(sum(p[n]["bn"][k][c] * g[n]["bn"][k][c] for k in ("scale", "bias")))
      for n in ("qkv0", "qkv1")
      for c in range(at, at + width)
    ]
    got = found["stage10_block0"][kind]
    np.testing.assert_allclose(got["scores"], want, rtol=1e-5)
    assert float(got["width"]) == 8
  assert found["stage2_block0"]["FFN"]["scores"].shape == (32,)
  assert float(found["stage2_block0"]["FFN"]["width"]) == 16
  p, g = (x["blocks"]["attn"]["query"]["kernel"] for x in (params, grads))
  for i in range(2):
    got = found[f"blocks_{i}"]["Q"]
    want = np.abs((p[i] * g[i]).sum(0)).ravel()
    np.testing.assert_allclose(got["scores"], want, rtol=1e-5)


def test_queries_and_keys_of_vit_are_equally_important():
  # Scores depend on their products only, so scaling one against the other
  # changes nothing: q dL/dq = k dL/dk, channel by channel.
  model = vit.ViT("Ti/5", 5, sizes=dict(width=12, depth=2, mlp=17, heads=2))
  task = classification.Task(5)
  batch = {
    "image": jnp.asarray(RNG.integers(0, 256, (3, 10, 10, 3), np.uint8)),
    "label": jnp.arange(3),
    "_mask": jnp.ones(3, bool),
  }
  inputs, _ = task.prepare(batch, None)
  params = model.init(jax.random.key(0), train=False, **inputs)["params"]
  params = jax.tree.map(lambda p: p + 0.1 * RNG.normal(size=p.shape), params)
  params = jax.tree.map(jnp.float32, params)
  state = api.TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    model_state={},
    opt_state=(),
    rng=jax.random.key(0),
  )
  measure = channel_importance.Evaluator().measure(model, task)
  found = jax.jit(measure)(state, batch)["layers"]
  assert [capture.layer_name(k) for k in found] == [
    "encoder/blocks_0",
    "encoder/blocks_1",
  ]
  for block in found.values():
    assert block["FFN"]["scores"].shape == (17,)
    scale = float(block["Q"]["scores"].max())
    np.testing.assert_allclose(
      block["Q"]["scores"], block["K"]["scores"], atol=1e-4 * scale
    )


def test_the_least_important_channels_go():
  found = {
    "000 a": {
      "Q": {"scores": np.array([4.0, 1.0]), "width": np.float32(2)},
      "FFN": {"scores": np.array([0.5, 3.0, 1.5, 0.0]), "width": 2.0},
    }
  }
  q, ffn = channel_importance.table(found, 0.5)
  assert (q["kept"], q["channels"], q["share"]) == (1, 2, 0.5)
  assert (ffn["kept"], ffn["channels"], ffn["width"]) == (2, 4, 2)
  assert ffn["importance"] == 1.25
  assert ffn["scores"] == [0.5, 3.0, 1.5, 0.0]


class Batches:
  """Two batches; remembers how many images were asked for."""

  def __call__(self, *, limit):
    self.limit = limit
    return iter([(0, {}), (1, {})])


def test_similarity_reports_neighbours_and_their_chance(tmp_path):
  def layer(*similar):
    return {
      "similarity": np.array(similar) * 3,
      "chance": np.full(3, 0.25) * 3,
      "images": np.full(3, 3.0),
    }

  layers = capture.by_layer(
    [
      ("a", layer(1, 0.5, 0.1)),
      ("b", layer(0.5, 1, 0.95)),
      ("c", layer(0.1, 0.95, 1)),
    ]
  )
  batches = Batches()
  scores = attention_similarity.Evaluator(images=7).run(
    predict=lambda batch: {"attention": layers, "features": {}},
    batches=batches,
    folder=tmp_path,
  )
  assert batches.limit == 7
  assert scores == {
    "attention": pytest.approx(0.725),
    "attention_chance": pytest.approx(0.25),
    "similar_blocks": 1,
  }
  rows = json.loads((tmp_path / "attention_similarity.json").read_text())
  assert len(rows) == 6
  assert (rows[1]["layer"], rows[1]["other"]) == ("a", "b")
  assert rows[1]["similarity"] == pytest.approx(0.5)


def test_the_trap_stands_below_the_figure(monkeypatch, tmp_path):
  figures, save = [], pictures.save_figure
  monkeypatch.setattr(
    pictures, "save_figure", lambda f, path: (figures.append(f), save(f, path))
  )
  curves = {
    "x": np.array([1.0, 2]),
    "x before": np.ones(2),
    "chance": np.ones(2),
  }
  parts = {"matrix": np.eye(3), "curves": curves}
  pictures.panels(parts, tmp_path / "a.png", note="Beware.")
  (figure,) = figures
  assert figure.get_supxlabel() == "Beware."
  lines = figure.axes[1].lines
  assert [line.get_linestyle() for line in lines] == ["-", "--", "--"]
  assert lines[0].get_color() == lines[1].get_color() != lines[2].get_color()


@pytest.mark.parametrize(
  ("evaluator", "sentence"),
  [
    (attention_similarity, "lends neither attention maps nor features"),
    (head_similarity, "lends no attention maps of several heads"),
    (channel_importance, "has no layer for queries"),
  ],
)
def test_models_without_what_is_measured_are_refused(evaluator, sentence):
  class Plain(nn.Module):
    @nn.compact
    def __call__(self, image, *, train):
      del train
      pooled = nn.Dense(5, name="head")(image.mean((1, 2)))
      return {"logits": pooled, "pooled": pooled}

  batch = {
    "image": jnp.zeros((2, 4, 4, 3), jnp.uint8),
    "label": jnp.zeros(2, jnp.int32),
    "_mask": jnp.ones(2, bool),
  }
  task, model = classification.Task(5), Plain()
  inputs, _ = task.prepare(batch, None)
  params = model.init(jax.random.key(0), train=False, **inputs)["params"]
  state = api.TrainState(jnp.zeros(()), params, {}, (), jax.random.key(0))
  measure = evaluator.Evaluator().measure(model, task)
  with pytest.raises(ValueError, match=f"Plain {sentence}"):
    measure(state, batch)


def test_a_share_is_above_0():
  with pytest.raises(ValueError, match="keep = 0; it is the share"):
    channel_importance.Evaluator(keep=0)
