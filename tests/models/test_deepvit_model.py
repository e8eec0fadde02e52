"""DeepViT: re-attention against its equation, and BatchNorm of its maps."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import vit_in_numpy

from big_vision_like import trees
from big_vision_like.models import deepvit
from big_vision_like.models.layers.encoder import unstack_blocks

TINY = dict(width=21, depth=3, mlp=29, heads=3, patch=2, mixing=2)
HEADS, WIDTH, TOKENS = 3, 21, 11


def normal(*shape, seed=0, scale=1.0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(0.0, scale, shape), jnp.float32)


def randomised(module, *inputs, **kw):
  """Variables of which nothing is as initialisation made it."""
  shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs, **kw))
  variables = vit_in_numpy.random_params(shapes)
  stats = variables.get("batch_stats", {})
  # Maps vary by a thousandth.
  rescale = lambda path, x: (
    jnp.abs(x) * 1e-6 if trees.path_name(path).endswith("var") else x
  )
  stats = jax.tree_util.tree_map_with_path(rescale, stats)
  return {**variables, **({"batch_stats": stats} if stats else {})}


def maps_in_numpy(x, p):
  """softmax(q kᵀ / sqrt(d)) of one image, and its values, in float64."""
  project = lambda name: np.tensordot(x, p[name]["kernel"], 1) + p[name]["bias"]
  q, k, v = (project(name) for name in ("query", "key", "value"))
  scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1])
  return vit_in_numpy.softmax(scores), v


def re_attention_in_numpy(x, p, stats=None, scale=1.0):
  """The paper's equation for images [B,N,D]; no stats: those of the batch."""
  pairs = [maps_in_numpy(image, p) for image in x]
  maps, v = (np.stack(y) for y in zip(*pairs))
  # Θᵀ A, with Θ [input head, output head].
  mixed = np.einsum("hg,bhqk->bgqk", p["mix"]["kernel"], maps)
  mixed = mixed + p["mix"]["bias"][:, None, None]
  if stats is None:
    stats = {"mean": mixed.mean((0, 2, 3)), "var": mixed.var((0, 2, 3))}
  columns = lambda y: y[:, None, None]
  normed = (mixed - columns(stats["mean"])) / columns(
    np.sqrt(stats["var"] + 1e-5)
  )
  normed = normed * columns(p["norm"]["scale"]) + columns(p["norm"]["bias"])
  out = np.einsum("bgqk,bkgd->bqgd", scale * normed, v)
  out = np.einsum("bqgd,gdw->bqw", out, p["out"]["kernel"]) + p["out"]["bias"]
  return out, stats, normed


@pytest.mark.parametrize("scale_maps", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_re_attention_is_the_equation(scale_maps, train):
  x = normal(2, TOKENS, WIDTH)
  layer = deepvit.ReAttention(HEADS, scale_maps)
  variables = randomised(layer, x, train=False)
  got, new = layer.apply(variables, x, train=train, mutable=["batch_stats"])
  exact = vit_in_numpy.float64(variables)
  stats = exact["batch_stats"]["norm"]
  scale = (WIDTH // HEADS) ** -0.5 if scale_maps else 1.0
  want, batch_stats, _ = re_attention_in_numpy(
    np.asarray(x, np.float64), exact["params"], None if train else stats, scale
  )
  # BatchNorm multiplies what float32 rounds off the maps by up to 316.
  error = np.linalg.norm(got - want) / np.linalg.norm(want)
  assert error < 1e-4
  if train:
    count = 2 * TOKENS**2
    moved = {
      "mean": 0.9 * stats["mean"] + 0.1 * batch_stats["mean"],
      "var": 0.9 * stats["var"]
      + 0.1 * batch_stats["var"] * count / (count - 1),
    }
  else:
    moved = stats
  for key, value in moved.items():
    np.testing.assert_allclose(
      new["batch_stats"]["norm"][key], value, rtol=1e-5
    )


def test_rows_of_normalised_maps_have_one_sum():
  """N times the bias in training; the batch's mean is known beforehand."""
  x = np.asarray(normal(2, TOKENS, WIDTH), np.float64)
  layer = deepvit.ReAttention(HEADS)
  variables = randomised(layer, normal(1, TOKENS, WIDTH), train=False)
  p = vit_in_numpy.float64(variables["params"])
  _, stats, normed = re_attention_in_numpy(x, p)
  sums = TOKENS * p["norm"]["bias"][None, :, None]
  np.testing.assert_allclose(
    normed.sum(-1), np.broadcast_to(sums, (2, HEADS, TOKENS)), atol=1e-9
  )
  mean = p["mix"]["kernel"].sum(0) / TOKENS + p["mix"]["bias"]
  np.testing.assert_allclose(stats["mean"], mean, atol=1e-12)
  # So equal values are mapped to that sum times them, for every query.
  layer_params = dict(variables["params"])
  value = layer_params["value"]
  layer_params["value"] = {
    "kernel": jnp.zeros_like(value["kernel"]),
    "bias": jnp.ones_like(value["bias"]),
  }
  width = WIDTH // HEADS
  layer_params["out"] = {
    "kernel": jnp.eye(WIDTH).reshape(HEADS, width, WIDTH),
    "bias": jnp.zeros(WIDTH),
  }
  out, _ = layer.apply(
    {**variables, "params": layer_params},
    jnp.asarray(x, jnp.float32),
    train=True,
    mutable=["batch_stats"],
  )
  want = np.repeat(TOKENS * p["norm"]["bias"], width)
  np.testing.assert_allclose(
    out, np.broadcast_to(want, out.shape), rtol=1e-3, atol=1e-3
  )


def test_unmixed_maps_are_plain_attention():
  x = normal(2, TOKENS, WIDTH)
  layer = deepvit.ReAttention(HEADS)
  variables = randomised(layer, x, train=False)
  params = dict(variables["params"])
  params["mix"] = {"kernel": jnp.eye(HEADS), "bias": jnp.zeros(HEADS)}
  params["norm"] = {"scale": jnp.ones(HEADS), "bias": jnp.zeros(HEADS)}
  stats = {"mean": jnp.zeros(HEADS), "var": jnp.full(HEADS, 1 - 1e-5)}
  got = layer.apply(
    {"params": params, "batch_stats": {"norm": stats}}, x, train=False
  )
  projections = {k: v for k, v in params.items() if k not in ("mix", "norm")}
  want = deepvit.PlainAttention(HEADS).apply({"params": projections}, x)
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_maps_vary_less_than_eps_and_survive_bfloat16():
  """At initialisation, on the tokens of a real image size."""
  x = normal(2, 197, 48)
  layer = deepvit.ReAttention(12)
  variables = layer.init(jax.random.key(0), x, train=False)
  high, new = layer.apply(variables, x, train=True, mutable=["batch_stats"])
  var = (new["batch_stats"]["norm"]["var"] - 0.9) / 0.1
  assert var.max() < 1e-6  # Of BatchNorm, whose eps is 1e-5.
  low, _ = layer.clone(dtype="bfloat16").apply(
    variables, x, train=True, mutable=["batch_stats"]
  )
  assert low.dtype == jnp.bfloat16
  # A few roundings to 8 bits. With maps in bfloat16 this would be 0.7.
  error = np.linalg.norm(low - high) / np.linalg.norm(high)
  assert 0 < error < 0.05


@pytest.mark.parametrize("mixing", [False, True])
def test_a_doubled_block_is_a_block_between_halves(mixing):
  """2 (y + f(LN(y))) for y = x / 2: what the authors' code computes."""
  x = normal(2, TOKENS, WIDTH, scale=1e-2)  # Where LayerNorm's eps counts.
  block = functools.partial(
    deepvit.Block, HEADS, 13, mixing=mixing, scale_maps=True, train=False
  )
  variables = randomised(block(branch=1), x)
  want = 2 * block(branch=1).apply(variables, x / 2)[0]
  got = block(branch=2).apply(variables, x)[0]
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def tiny(**kw):
  sizes = TINY | kw.pop("sizes", {})
  return deepvit.Model(variant="S", sizes=sizes, num_classes=7, **kw)


@functools.partial(jax.jit, static_argnames=("model", "train"))
def run(model, variables, image, train=False):
  return model.apply(
    variables, image, train=train, mutable=["batch_stats"] if train else False
  )


def test_scanned_and_unrolled_blocks_are_the_same():
  image = normal(2, 6, 10, 3)
  model = tiny(scan=True)
  variables = randomised(model, image, train=False)
  out, new = run(model, variables, image, train=True)
  assert out["tokens"].shape == (2, 15, 21)
  assert out["logits"].shape == (2, 7)
  assert out["logits"].dtype == jnp.float32
  unrolled, new_unrolled = run(
    tiny(scan=False), unstack_blocks(variables), image, train=True
  )
  for key in out:
    np.testing.assert_allclose(unrolled[key], out[key], rtol=1e-4, atol=1e-4)
  new = trees.flatten(unstack_blocks(new))
  for key, value in trees.flatten(new_unrolled).items():
    np.testing.assert_allclose(new[key], value, rtol=1e-4, atol=1e-6)
  # Recomputing the blocks changes nothing.
  again, _ = run(tiny(remat="full"), variables, image, train=True)
  np.testing.assert_allclose(again["logits"], out["logits"], atol=1e-4)


def test_stochastic_depth_grows_over_all_blocks():
  seen = {}

  def watch(next_fun, args, kwargs, context):
    if isinstance(context.module, deepvit.Blocks):
      seen[context.module.name] = context.module.rates
    return next_fun(*args, **kwargs)

  model = tiny(stochastic_depth=0.3, sizes=dict(depth=4, mixing=3))
  with nn.intercept_methods(watch):
    jax.eval_shape(
      lambda: model.init(jax.random.key(0), normal(1, 4, 4, 3), train=False)
    )
  np.testing.assert_allclose(seen["plain"] + seen["mixing"], [0, 0.1, 0.2, 0.3])


def test_a_dropped_branch_leaves_its_image_as_it_was():
  x = normal(64, 2, WIDTH)
  block = deepvit.Block(
    HEADS, 13, branch=2, mixing=False, scale_maps=False, train=True
  )
  variables = randomised(block, x)
  params = dict(variables["params"])
  params["fc2"] = jax.tree.map(jnp.zeros_like, params["fc2"])
  run = lambda rate: block.apply(
    {"params": params}, x, rate, rngs={"dropout": jax.random.key(0)}
  )[0]
  branch = run(None) - x
  out = run(jnp.float32(0.25))
  kept = np.abs(out - x).max((1, 2)) > 0
  assert 0.6 < kept.mean() < 0.9
  want = x + branch * kept[:, None, None] / 0.75
  np.testing.assert_allclose(out, want, atol=1e-4)


def count(pixels=224, **kw):
  model = deepvit.Model(**kw)
  image = jax.ShapeDtypeStruct((1, pixels, pixels, 3), jnp.float32)
  init = lambda x: model.init(jax.random.key(0), x, train=False)
  return trees.count(jax.eval_shape(init, image)["params"])


@pytest.mark.parametrize(
  ("variant", "pixels", "total", "without_mixing"),
  [
    ("16B", 224, 24_426_664, 24_423_784),
    ("24B", 224, 36_261_448, 36_257_128),
    ("32B", 224, 48_096_232, 48_090_472),
    ("S", 224, 27_312_632, 27_312_632 - 5 * 180),
    ("L", 224, 58_883_708, 58_883_708 - 12 * 180),
    ("L", 384, 59_043_308, 59_043_308 - 12 * 180),
  ],
)
def test_parameter_counts_are_the_authors(
  variant, pixels, total, without_mixing
):
  assert count(pixels, variant=variant, num_classes=1000) == total
  plain = count(pixels, variant=variant, num_classes=1000, sizes=dict(mixing=0))
  assert plain == without_mixing


def test_no_head_for_no_classes():
  for none in (None, 0):
    model = deepvit.Model(variant="S", sizes=TINY, num_classes=none)
    shapes = jax.eval_shape(
      lambda model=model: model.init_with_output(
        jax.random.key(0), normal(1, 4, 4, 3), train=False
      )
    )
    assert "logits" not in shapes[0]
    assert "head" not in shapes[1]["params"]
  assert hash(tiny()) == hash(tiny())


def test_refusals():
  def start(image=(4, 4), **kw):
    model = tiny(**kw)
    model.init(jax.random.key(0), normal(1, *image, 3), train=False)

  for match, kw in (
    ("5 x 4 pixels is no whole number of 2 x 2", dict(image=(5, 4))),
    ("3 x 3 patches, of even size", dict(image=(6, 6), sizes=dict(patch=3))),
    ("4 of 3 blocks cannot mix", dict(sizes=dict(mixing=4))),
    ("21 does not divide into 4 heads", dict(sizes=dict(heads=4))),
    ("remat is 'some'", dict(remat="some")),
    ("stochastic_depth is 1.0; it is a rate", dict(stochastic_depth=1.0)),
  ):
    with pytest.raises(ValueError, match=match):
      start(**kw)
  with pytest.raises(ValueError, match="Unknown variant 'XL'"):
    deepvit.Model(variant="XL").init(
      jax.random.key(0), normal(1, 4, 4, 3), train=False
    )
