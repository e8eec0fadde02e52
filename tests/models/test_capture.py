"""Captured maps are those of the equations, and capturing changes nothing.

Each layer's map is computed in NumPy from the output of the block before it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import vit_in_numpy as plain

from big_vision_like import api, capture
from big_vision_like.models import (
  deepvit,
  efficientvit,
  mobilevit,
  mobilevit_v2,
  navit,
  vit,
)
from big_vision_like.models.layers.encoder import unstack_blocks
from big_vision_like.tasks import classification

pytestmark = pytest.mark.usefixtures("compile_quickly")

SMALL = dict(width=12, depth=3, mlp=17, heads=2)
TASK = classification.Task(num_classes=5)
RNG = np.random.default_rng(0)
# float32 sums in another order, behind a softmax.
CLOSE = dict(rtol=1e-4, atol=1e-6)


def stacked(side, rows=3):
  pixels = RNG.integers(0, 256, (rows, side, side, 3), np.uint8)
  return {
    "image": jnp.asarray(pixels),
    "label": jnp.zeros(rows, jnp.int32),
    "_mask": jnp.ones(rows, bool),
  }


def packed():
  """Images of 4 and 3 tokens and padding; one of 6 and padding."""
  grids = np.array([[[2, 2], [1, 3]], [[2, 3], [1, 1]]], np.int32)
  ids = np.array([[1, 1, 1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1, 0, 0]], np.int32)
  positions = np.zeros((2, 8, 2), np.int32)
  for row, slot in ((0, 0), (0, 1), (1, 0)):
    h, w = grids[row, slot]
    at = np.stack(np.divmod(np.arange(h * w), w), -1)
    positions[row, ids[row] == slot + 1] = at
  batch = {
    "patches": RNG.integers(0, 256, (2, 8, 75), np.uint8),
    "segment_ids": ids,
    "positions": positions,
    "grid_hw": grids,
    "example_mask": np.array([[True, True], [True, False]]),
    "label": np.zeros((2, 2), np.int32),
    "_mask": np.ones(2, bool),
  }
  return jax.tree.map(jnp.asarray, batch)


def lend(model, batch):
  """Random variables; the maps, features and softmax maps that are lent."""
  inputs, _ = TASK.prepare(batch, None)
  shapes = jax.eval_shape(
    lambda: model.init(jax.random.key(0), train=False, **inputs)
  )
  assert api.INTERMEDIATES not in shapes
  variables = dict(plain.random_params(shapes))
  if "batch_stats" in variables:
    positive = jax.tree.map(
      lambda x: jnp.abs(x) + 0.5, variables["batch_stats"]
    )
    variables["batch_stats"] = positive
  state = api.TrainState(
    step=jnp.zeros((), jnp.int32),
    params=variables["params"],
    model_state={k: v for k, v in variables.items() if k != "params"},
    opt_state=(),
    rng=jax.random.key(0),
  )

  @jax.jit
  def both(state):
    lent = capture.run(model, TASK, state, batch)
    named = [
      {x.name: x for x in get(lent, batch)}
      for get in (
        capture.maps,
        capture.features,
        functools.partial(capture.maps, softmax=True),
      )
    ]
    names.extend(list(x) for x in named)
    values = [{k: (x.values, x.members) for k, x in n.items()} for n in named]
    return values, model.apply(state.variables(), train=False, **inputs)

  names: list[list[str]] = []
  values, outputs = both(state)
  values = [
    [(name, *map(np.asarray, found[name])) for name in order]
    for order, found in zip(names, values)
  ]
  again, _ = jax.jit(
    lambda v: model.apply(v, train=False, mutable=[api.INTERMEDIATES], **inputs)
  )(state.variables())
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, **CLOSE), outputs, again
  )
  return plain.float64(variables), *values


def weights(x, p, eps=1e-6):
  """softmax(q kᵀ / sqrt(d)) [K,Q,S] of a block's input [N,D]."""
  y = plain.layer_norm(x, p["ln1"], eps)
  q, k = (
    np.tensordot(y, p["attn"][name]["kernel"], 1)
    + p["attn"][name].get("bias", 0)
    for name in ("query", "key")
  )
  if "query_ln" in p["attn"]:
    q = plain.layer_norm(q, p["attn"]["query_ln"])
    k = plain.layer_norm(k, p["attn"]["key_ln"])
  return plain.softmax(np.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1]))


@pytest.mark.parametrize(
  ("scan", "attention", "remat"),
  [(True, "blockwise", "none"), (False, "xla", "full")],
)
def test_vit(scan, attention, remat):
  model = vit.ViT(
    "Ti/5", 5, sizes=SMALL, scan=scan, attention=attention, remat=remat
  )
  variables, maps, features, _ = lend(model, stacked(15))
  assert [m[0] for m in maps] == [f"encoder/blocks_{i}/attn" for i in range(3)]
  assert [f[0] for f in features] == [f"encoder/blocks_{i}" for i in range(3)]
  blocks = unstack_blocks(variables["params"])["encoder"]
  for i in (1, 2):
    _, values, members = maps[i]
    assert values.shape == (3, 1, 2, 10, 10)
    assert members.all()
    for row, x in enumerate(features[i - 1][1]):
      want = weights(x, blocks[f"blocks_{i}"])
      np.testing.assert_allclose(values[row, 0], want, **CLOSE)


def test_navit_image_by_image():
  batch = packed()
  model = navit.NaViT("Ti/5", 5, sizes=SMALL, attention="blockwise")
  variables, maps, features, _ = lend(model, batch)
  blocks = unstack_blocks(variables["params"])["encoder"]
  ids = np.asarray(batch["segment_ids"])
  for i in (1, 2):
    _, values, members = maps[i]
    np.testing.assert_array_equal(members, ids[:, None] == [[1], [2]])
    np.testing.assert_array_equal(members, features[i][2])
    for row, slot in ((0, 0), (0, 1), (1, 0)):
      own = members[row, slot]
      got = values[row, 0][:, own]
      want = weights(features[i - 1][1][row, own], blocks[f"blocks_{i}"])
      np.testing.assert_allclose(got[..., own], want, **CLOSE)
      assert not got[..., ~own].any()


def test_navit_counts_the_tokens_it_adds_to_an_image():
  model = navit.NaViT("Ti/5", 5, sizes=SMALL, pool="tok", registers=2)
  _, maps, features, _ = lend(model, packed())
  for _, _, members in (*maps, *features):
    np.testing.assert_array_equal(members.sum(-1), [[7, 6], [9, 0]])


def test_deepvit_before_and_after_mixing():
  sizes = {**SMALL, "patch": 5, "mixing": 1}
  model = deepvit.DeepViT("local", 5, sizes=sizes)
  variables, maps, features, before = lend(model, stacked(15))
  names = ["plain/blocks_0", "plain/blocks_1", "mixing/blocks_0"]
  assert [f[0] for f in features] == names
  assert [m[0] for m in maps] == [f"{name}/attn" for name in names]
  params = unstack_blocks(variables["params"])
  x = features[0][1]
  want = np.stack([weights(y, params["plain"]["blocks_1"]) for y in x])
  np.testing.assert_allclose(maps[1][1][:, 0], want, **CLOSE)

  p = params["mixing"]["blocks_0"]
  stats = unstack_blocks(variables["batch_stats"])["mixing"]["blocks_0"]
  stats, norm = stats["attn"]["norm"], p["attn"]["norm"]
  soft = np.stack([weights(y, p) for y in features[1][1]])
  assert [m[0] for m in before] == [f"{name}/attn" for name in names]
  np.testing.assert_allclose(before[2][1][:, 0], soft, **CLOSE)
  mixed = np.einsum("bkqs,kg->bqsg", soft, p["attn"]["mix"]["kernel"])
  mixed = mixed + p["attn"]["mix"]["bias"] - stats["mean"]
  mixed = mixed / np.sqrt(stats["var"] + 1e-5) * norm["scale"] + norm["bias"]
  mixed = mixed.transpose(0, 3, 1, 2)
  np.testing.assert_allclose(maps[2][1][:, 0], mixed, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_efficientvit_windows_and_heads():
  # Maps of 8 x 8 pixels: four windows of 7 x 7, padded.
  sizes = dict(
    widths=(24, 30, 36), depths=(1, 1, 1), heads=(3, 2, 3), kernels=(3, 3, 3)
  )
  model = efficientvit.EfficientViT("local", 5, sizes=sizes)
  batch = stacked(128, rows=2)
  variables, maps, features, _ = lend(model, batch)
  names = [f"stage{i}_block0" for i in range(3)]
  assert [f[0] for f in features] == names
  assert [m[0] for m in maps] == [f"{name}/mixer" for name in names]
  assert [m[1].shape for m in maps] == [
    (2, 4, 3, 49, 49),
    (2, 1, 2, 16, 16),
    (2, 1, 3, 4, 4),
  ]
  inputs, _ = TASK.prepare(batch, None)
  _, seen = model.apply(
    jax.tree.map(jnp.float32, variables),
    train=False,
    capture_intermediates=lambda m, _: type(m).__name__ == "ConvBN",
    **inputs,
  )
  seen = seen["intermediates"]["stage0_block0"]["mixer"]
  table = variables["params"]["stage0_block0"]["mixer"]["attention_biases"]
  y, x = np.divmod(np.arange(49), 7)
  offset = 7 * np.abs(y[:, None] - y) + np.abs(x[:, None] - x)
  for head in range(3):
    k = np.asarray(seen[f"qkv{head}"]["__call__"][0])[..., 16:32]
    q = np.asarray(seen[f"dw{head}"]["__call__"][0])
    q, k = (z.reshape(2, 4, 49, 16) for z in (q, k))
    scores = np.einsum("bgqd,bgkd->bgqk", q, k) / 4 + table[head][offset]
    got = maps[0][1][:, :, head]
    np.testing.assert_allclose(got, plain.softmax(scores), rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_mobilevit_has_a_sequence_for_each_phase():
  variables, maps, features, _ = lend(
    mobilevit.MobileViT("local", 5), stacked(64, rows=2)
  )
  assert [m[1].shape[1:] for m in maps[:3]] == [(4, 4, 16, 16)] * 2 + [
    (4, 4, 4, 4)
  ]
  assert features[0][1].shape == (2, 4 * 16, 32)
  p = variables["params"]["level3_vit"]["blocks_1"]
  x = features[0][1].reshape(2, 4, 16, 32)
  want = [[weights(phase, p, 1e-5) for phase in image] for image in x]
  np.testing.assert_allclose(maps[1][1], want, **CLOSE)


def test_models_without_maps_lend_none():
  _, maps, features, _ = lend(
    mobilevit_v2.MobileViTV2("local", 5), stacked(64, rows=2)
  )
  assert not maps
  assert len(features) == 9


def test_keys_keep_their_order_and_names():
  found = capture.by_layer((f"blocks_{i}", i) for i in range(12))
  assert list(found.values()) == list(range(12))
  assert sorted(found) == list(found)
  assert capture.layer_name(list(found)[10]) == "blocks_10"


def test_no_data_is_an_error():
  with pytest.raises(ValueError, match="nothing to evaluate"):
    capture.total(lambda batch: {}, [])
