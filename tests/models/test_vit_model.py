"""ViT against its equations, and its sizes against the published counts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import vit_in_numpy
from scipy import ndimage

from big_vision_like import trees
from big_vision_like.models import resnet, vit
from big_vision_like.models.layers import position_table
from big_vision_like.models.layers.encoder import unstack_blocks
from big_vision_like.weights import vit as weights

TINY = dict(width=24, depth=2, mlp=29, heads=3)


def images(height=6, width=10):
  rng = np.random.default_rng(0)
  return jnp.asarray(rng.normal(size=(2, height, width, 3)), jnp.float32)


def randomised(model, **inputs):
  return vit_in_numpy.random_params(
    jax.eval_shape(
      lambda: model.init(jax.random.key(0), **inputs, train=False)["params"]
    )
  )


def tiny(**kw):
  return vit.Model(variant="Ti/2", sizes=TINY, num_classes=7, **kw)


def forward_in_numpy(image, p, pool, position):
  """The paper's equations 1 to 4 for one image, class token first."""
  h, w = image.shape[0] // 2, image.shape[1] // 2
  patches = image.reshape(h, 2, w, 2, 3).transpose(0, 2, 1, 3, 4)
  kernel = p["embed"]["kernel"].reshape(12, -1)
  x = patches.reshape(h * w, 12) @ kernel + p["embed"]["bias"]
  if position == "sincos2d":
    omega = 10_000 ** -np.linspace(0, 1, 6)
    x = x + [
      np.concatenate(
        [f(c * omega) for c in (col, row) for f in (np.sin, np.cos)]
      )
      for row in range(h)
      for col in range(w)
    ]
  if pool == "tok":
    x = np.concatenate([p["cls"][0], x])
  if position == "learn":
    x = x + p["pos_embed"][0]
  x = vit_in_numpy.encoder(x, p["encoder"])
  if pool == "tok":
    y = x[0]
  else:
    map_head = lambda: vit_in_numpy.attention_pool(x, p["pool"])
    y = map_head() if pool == "map" else x.mean(0)
  if "pre_logits" in p:
    y = np.tanh(vit_in_numpy.dense(y, p["pre_logits"]))
  return vit_in_numpy.dense(y, p["head"]), y, x[pool == "tok" :]


@pytest.mark.parametrize(
  ("pool", "position", "rep_size"),
  [("tok", "learn", True), ("gap", "sincos2d", False), ("map", "learn", 13)],
)
def test_forward_is_the_equations(pool, position, rep_size):
  model = tiny(pool=pool, position=position, rep_size=rep_size)
  params = randomised(model, image=images())
  out = run(model, params, images())
  assert out["logits"].dtype == jnp.float32
  assert out["tokens"].shape == (2, 15, 24)
  params = vit_in_numpy.float64(unstack_blocks(params))
  for i, image in enumerate(np.asarray(images(), np.float64)):
    wanted = forward_in_numpy(image, params, pool, position)
    for key, want in zip(("logits", "pooled", "tokens"), wanted):
      # Float32 against float64.
      np.testing.assert_allclose(out[key][i], want, rtol=1e-4, atol=1e-4)


def count(pixels=224, **kw):
  model = vit.Model(**kw)
  image = jax.ShapeDtypeStruct((1, pixels, pixels, 3), jnp.float32)
  return trees.count(
    jax.eval_shape(
      lambda x: model.init(jax.random.key(0), x, train=False), image
    )
  )


@pytest.mark.parametrize(
  ("variant", "pixels", "classes", "total"),
  [
    ("Ti/16", 224, 1000, 5_717_416),
    ("Ti/16", 224, 21_843, 9_740_115),
    ("S/32", 224, 1000, 22_878_952),
    ("S/32", 224, 21_843, 30_903_507),
    ("S/16", 224, 1000, 22_050_664),
    ("B/32", 224, 1000, 88_224_232),
    ("B/16", 224, 1000, 86_567_656),
    ("B/16", 384, 0, 86_090_496),
    ("B/8", 224, None, 85_807_872),
    ("L/32", 384, 1000, 306_632_680),
    ("L/16", 224, 1000, 304_326_632),
    ("L/16", 384, 1000, 304_715_752),
    ("H/14", 224, 1000, 632_045_800),
    ("R+Ti/16", 224, 1000, 6_337_704),
    ("R26+S/32", 224, 21_843, 44_456_467),
    ("R50+B/16", 224, 0, 97_890_112),
    ("R50+L/32", 224, 1000, 328_994_856),
  ],
)
def test_parameter_counts_are_the_published_ones(
  variant, pixels, classes, total
):
  assert count(pixels, variant=variant, num_classes=classes) == total


def test_larger_sizes_are_those_of_their_source():
  """g, G and So400m: 12 D² a block from the widths, and known depths."""
  for name, depth, width, mlp in (
    ("So400m", 27, 1152, 4304),
    ("g", 40, 1408, 6144),
    ("G", 48, 1664, 8192),
  ):
    block = 4 * width * (width + 1) + 2 * width * mlp + mlp + width + 4 * width
    rest = (3 * 14 * 14 + 1) * width + 2 * width + 257 * width + width
    assert count(variant=f"{name}/14") == depth * block + rest


def test_a_hybrid_is_a_vit_on_the_map_of_its_resnet():
  image = images(64, 96)
  hybrid = vit.Model(variant="R+Ti/16", sizes=TINY, num_classes=7)
  params = randomised(hybrid, image=image)
  trunk = resnet.StdResNet(stages=())
  maps = jax.jit(trunk.apply)({"params": params["resnet"]}, image)
  assert maps.shape == (2, 16, 24, 64)
  plain = vit.Model(variant="Ti/8", sizes=TINY, num_classes=7)
  rest = {k: v for k, v in params.items() if k != "resnet"}
  want, got = run(plain, rest, maps), run(hybrid, params, image)
  assert want["tokens"].shape == (2, 6, 24)
  for key in want:
    # The same operations in two programs.
    np.testing.assert_allclose(got[key], want[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("old", "new"), [(14, 24), (7, 12), (16, 12), (1, 3)])
def test_corner_resize_is_scipys_zoom(old, new):
  """What Google's code does; jax.image.resize is another function."""
  table = np.random.default_rng(0).normal(size=(1, 1 + old * old, 5))
  got = position_table.resize_positions(
    table, (new, new), kind="corners", prefix=1
  )
  zoom = (new / old, new / old, 1)
  want = ndimage.zoom(table[0, 1:].reshape(old, old, 5), zoom, order=1)
  np.testing.assert_array_equal(got[:, :1], table[:, :1])
  # Rounding of float64.
  np.testing.assert_allclose(got[0, 1:], want.reshape(-1, 5), atol=1e-13)
  if old > 1:
    grid = jnp.asarray(table[0, 1:].reshape(old, old, 5), jnp.float32)
    other = jax.image.resize(grid, (new, new, 5), "linear")
    assert np.abs(other.reshape(-1, 5) - got[0, 1:]).max() > 0.1


def test_antialiased_resize_is_jaxs():
  table = np.random.default_rng(0).normal(size=(1, 35, 3)).astype(np.float32)
  for size in ((11, 13), (3, 2), (5, 7)):
    got = position_table.resize_positions(
      table, size, kind="antialias", old_size=(5, 7)
    )
    want = jax.image.resize(table.reshape(5, 7, 3), (*size, 3), "linear")
    # Its weights are float32, ours float64.
    np.testing.assert_allclose(got[0], want.reshape(-1, 3), atol=1e-5)


def test_positions_that_are_no_grid_are_refused():
  resize = position_table.resize_positions
  for match, rows, kw in (
    ("one of .*'corners'", 9, dict(kind="bicubic")),
    ("10 positions are no square grid", 10, dict(kind="corners")),
    ("of 10 positions, 1 of them", 10, dict(old_size=(2, 5), prefix=1)),
  ):
    kw = dict(kind="corners") | kw
    with pytest.raises(ValueError, match=match):
      resize(np.zeros((1, rows, 3)), (4, 4), **kw)


def test_what_may_be_resized_of_published_weights():
  """Positions, patches and the head of a Ti/4 model in another's shapes."""
  rng = np.random.default_rng(0)

  def flat(model, pixels):
    shapes = jax.eval_shape(
      lambda: model.init(
        jax.random.key(0), jnp.zeros((1, pixels, pixels, 3)), train=False
      )
    )
    return {k: x.shape for k, x in trees.flatten(shapes).items()}

  old = {
    k: rng.normal(size=x).astype(np.float32)
    for k, x in flat(
      vit.Model(variant="Ti/4", sizes=TINY, num_classes=7), 12
    ).items()
  }
  model = vit.Model(variant="Ti/2", sizes=TINY, num_classes=5)
  shapes = flat(model, 10)
  new = dict(old)
  for kind in ("positions", "patch", "head"):
    new = weights.RESIZE[kind](model, new, shapes)
  fresh = {"params/head/kernel", "params/head/bias"}
  assert {k: x.shape for k, x in new.items()} == {
    k: x for k, x in shapes.items() if k not in fresh
  }
  resized = {"params/pos_embed", "params/embed/kernel"}
  for k in set(old) - fresh - resized:
    assert new[k] is old[k]
  table = old["params/pos_embed"]
  corners = [1, 5, 21, 25]
  np.testing.assert_allclose(
    new["params/pos_embed"][0, corners], table[0, [1, 3, 7, 9]], rtol=1e-6
  )
  # Nothing to do: everything stays.
  for kind in weights.RESIZE:
    again = weights.RESIZE[kind](model, new, shapes)
    jax.tree.map(np.testing.assert_array_equal, again, new)
  other = weights.RESIZE["positions_antialias"](model, old, shapes)
  assert np.abs(other["params/pos_embed"] - new["params/pos_embed"]).max() > 0.1


@functools.partial(jax.jit, static_argnames=("model", "train"))
def run(model, params, image, train=False, key=None):
  rngs = None if key is None else {"dropout": key}
  return model.apply({"params": params}, image, train=train, rngs=rngs)


@functools.partial(jax.jit, static_argnums=0)
def init(model, image):
  key = jax.random.key(0, impl="rbg")  # Compiles in less time than threefry.
  return model.init(key, image, train=False)["params"]


def test_head_options():
  image = images()
  zero = tiny(head_zero_init=True, head_bias=-6.9)
  head = init(zero, image)["head"]
  assert not head["kernel"].any()
  np.testing.assert_array_equal(head["bias"], np.full(7, -6.9, np.float32))
  params = init(tiny(), image)
  assert params["head"]["kernel"].any()
  # A model is hashable, whatever it was made with, and equal to its like.
  assert hash(tiny()) == hash(tiny())
  del params["head"]
  for none in (None, 0):
    model = vit.Model(variant="Ti/2", sizes=TINY, num_classes=none)
    assert "logits" not in jax.eval_shape(
      lambda model=model: run(model, params, image)
    )


def test_dropout_is_for_training_only():
  model, image = tiny(dropout=0.5), images()
  params = randomised(model, image=image)
  logits = [
    run(model, params, image, train, jax.random.key(seed))["logits"]
    for train in (False, True)
    for seed in (0, 1)
  ]
  np.testing.assert_array_equal(logits[0], logits[1])
  assert (logits[2] != logits[3]).all()


def test_bfloat16_computes_low_and_answers_in_float32():
  image = images()
  high = tiny(pool="gap", position="sincos2d")
  low = high.clone(dtype="bfloat16")
  params = randomised(high, image=image)
  out = run(low, params, image)
  assert out["tokens"].dtype == jnp.bfloat16
  assert out["logits"].dtype == jnp.float32
  started = jax.eval_shape(functools.partial(init, low), image)
  assert {x.dtype for x in jax.tree.leaves(started)} == {jnp.dtype("float32")}
  want = run(high, params, image)["logits"]
  error = np.linalg.norm(out["logits"] - want) / np.linalg.norm(want)
  # A handful of roundings to 8 bits.
  assert 0 < error < 0.05


def test_refusals():
  def start(image, **kw):
    jax.eval_shape(lambda: init(vit.Model(**kw), image))

  for match, kw in (
    (
      "Unknown variant 'R26\\+B/16'. Hybrids are as in R",
      {"variant": "R26+B/16"},
    ),
    ("Unknown variant 'X\\+B/16'. Hybrids", {"variant": "X+B/16"}),
    ("Unknown variant 'XL/16'. The sizes are local, Ti", {"variant": "XL/16"}),
    ("needs a patch size, as in 'B/16'", {"variant": "B"}),
    ("'x' is no patch size; write B/16", {"variant": "B/x"}),
    (r"sizes has no \['dpeth'\]", {"sizes": {"dpeth": 3}}),
    ("pool is 'max'; it is one of", {"pool": "max"}),
    ("position is 'rope'; it is one of", {"position": "rope"}),
  ):
    with pytest.raises(ValueError, match=match):
      start(images(), **kw)
  with pytest.raises(ValueError, match="30 x 48 pixels is no whole number"):
    start(images(30, 48), variant="Ti/16")
