"""EfficientViT against its equations, and its sizes against the published."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vision_like import trees
from big_vision_like.models import efficientvit

pytestmark = pytest.mark.usefixtures("compile_quickly")

TINY = dict(widths=(16, 24, 40), depths=(1, 1, 1), heads=(2, 3, 2))


def normal(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


def shapes(module, x):
  return jax.eval_shape(lambda: module.init(jax.random.key(0), x, train=False))


def randomised(module, x):
  """Variables of which none is what it starts as."""
  rng = np.random.default_rng(1)

  def draw(name, shape):
    if name.endswith("/var"):
      return rng.uniform(0.5, 1.5, shape)
    values = rng.normal(size=shape)
    if name.endswith("/scale"):
      return 1 + 0.2 * values
    if name.endswith("kernel"):
      return values * np.prod(shape[:-1]) ** -0.5
    return 0.3 * values

  flat = trees.flatten(shapes(module, x))
  return trees.unflatten(
    {k: jnp.asarray(draw(k, s.shape), s.dtype) for k, s in flat.items()}
  )


def run(module, variables, x, train=False):
  apply = lambda v, x: module.apply(
    v, x, train=train, mutable=["batch_stats"] if train else False
  )
  return jax.jit(apply)(variables, x)


def tiny(**kw):
  return efficientvit.Model("M0", sizes=TINY, **{"num_classes": 7, **kw})


@pytest.mark.parametrize(
  ("variant", "total", "folded"),
  [
    ("M0", 2_349_436, 2_334_916),
    ("M1", 2_980_560, 2_964_256),
    ("M2", 4_187_554, 4_168_338),
    ("M3", 6_900_722, 6_875_890),
    ("M4", 8_804_228, 8_776_340),
    ("M5", 12_473_772, 12_436_260),
  ],
)
def test_parameter_counts_are_the_published_ones(variant, total, folded):
  image = jnp.zeros((1, 224, 224, 3))
  model = efficientvit.Model(variant, 1000)
  variables = shapes(model, image)
  assert trees.count(variables["params"]) == total
  wanted = shapes(model.clone(fused=True), image)
  assert set(wanted) == {"params"}
  assert trees.count(wanted) == folded
  got = jax.eval_shape(efficientvit.fuse, variables)
  sizes = lambda tree: {k: x.shape for k, x in trees.flatten(tree).items()}
  assert sizes(got) == sizes(wanted)


@pytest.mark.parametrize("side", [4, 7])
def test_biases_stand_in_the_order_in_which_distances_are_first_seen(side):
  """The authors' loop over pairs of pixels."""
  seen, index = {}, []
  for a, b in itertools.product(np.ndindex(side, side), repeat=2):
    distance = (abs(a[0] - b[0]), abs(a[1] - b[1]))
    index.append(seen.setdefault(distance, len(seen)))
  index = np.reshape(index, (side**2, side**2))
  np.testing.assert_array_equal(efficientvit.offsets(side), index)


def conv_bn_in_numpy(x, p, s):
  """[h,w,C]: a convolution that keeps the size, and a BatchNorm."""
  kernel = p["conv"]["kernel"]
  k, (h, w) = kernel.shape[0], x.shape[:2]
  x = np.pad(x, ((k // 2, k // 2), (k // 2, k // 2), (0, 0)))
  y = 0
  for i, j in np.ndindex(k, k):
    tap = x[i : i + h, j : j + w]
    depthwise = kernel.shape[2] == 1
    y = y + (tap * kernel[i, j, 0] if depthwise else tap @ kernel[i, j])
  scale = p["bn"]["scale"] / np.sqrt(s["bn"]["var"] + 1e-5)
  return (y - s["bn"]["mean"]) * scale + p["bn"]["bias"]


def window_in_numpy(x, p, s, heads):
  """Cascaded group attention in one window [r,r,C]."""
  side, outputs = x.shape[0], []
  for i, share in enumerate(np.split(x, heads, -1)):
    if i:
      share = share + outputs[-1]
    y = conv_bn_in_numpy(share, p[f"qkv{i}"], s[f"qkv{i}"])
    q, k, v = y[..., :16], y[..., 16:32], y[..., 32:]
    q = conv_bn_in_numpy(q, p[f"dw{i}"], s[f"dw{i}"])
    out = np.zeros_like(v)
    for at in np.ndindex(side, side):
      scores = np.zeros((side, side))
      for to in np.ndindex(side, side):
        distance = abs(at[0] - to[0]) * side + abs(at[1] - to[1])
        scores[to] = q[at] @ k[to] / 4 + p["attention_biases"][i, distance]
      weights = np.exp(scores - scores.max())
      out[at] = np.tensordot(weights / weights.sum(), v)
    outputs.append(out)
  x = np.maximum(np.concatenate(outputs, -1), 0)
  return conv_bn_in_numpy(x, p["proj"], s["proj"])


def test_attention_is_the_equations_in_padded_windows():
  module = efficientvit.CascadedGroupAttention(2, (5, 3))
  x = normal(2, 11, 7, 26)
  variables = randomised(module, x)
  got = run(module, variables, x)
  p, s = (
    jax.tree.map(lambda a: np.asarray(a, np.float64), variables[k])
    for k in ("params", "batch_stats")
  )
  padded = np.pad(np.asarray(x, np.float64), ((0, 0), (0, 3), (0, 0), (0, 0)))
  for image, result in zip(padded, got):
    windows = [window_in_numpy(image[y : y + 7], p, s, 2) for y in (0, 7)]
    # Float32 against float64.
    np.testing.assert_allclose(
      result, np.concatenate(windows)[:11], rtol=1e-4, atol=1e-4
    )


def test_windows_do_not_see_each_other():
  module = efficientvit.CascadedGroupAttention(2, (5, 3))
  x = normal(1, 14, 7, 26)
  variables = randomised(module, x)
  before = run(module, variables, x)
  after = run(module, variables, x.at[:, 7].add(1.0))
  np.testing.assert_array_equal(before[:, :7], after[:, :7])
  assert (jnp.abs(before - after)[:, 7:] > 1e-3).any(-1).all()


def test_residual_branches_start_as_nothing():
  attention = efficientvit.CascadedGroupAttention(2, (3, 3))
  block = efficientvit.Sandwich(attention)
  x = normal(2, 5, 5, 6)
  init = lambda: block.init(jax.random.key(0), x, train=False)
  variables = jax.jit(init)()
  for train in (False, True):
    y = run(block, variables, x, train)
    np.testing.assert_array_equal(y[0] if train else y, x)
  down = efficientvit.Sandwich(efficientvit.PatchMerging(10))
  scales = trees.flatten(
    jax.jit(lambda: down.init(jax.random.key(0), x, train=False)["params"])()
  )
  zero = {k for k, p in scales.items() if k.endswith("scale") and not p.any()}
  assert zero == {f"ffn{i}/pw2/bn/scale" for i in (0, 1)}


@pytest.mark.parametrize("distillation", [False, True])
def test_folded_is_unfolded(distillation):
  model = tiny(distillation=distillation)
  image = normal(3, 128, 97, 3)
  variables = randomised(model, image)
  wanted = run(model, variables, image)
  folded = efficientvit.fuse(variables)
  assert set(folded) == {"params"}
  got = run(model.clone(fused=True), folded, image)
  # Rounding of the products, through 40 layers.
  for key, x in wanted.items():
    np.testing.assert_allclose(got[key], x, rtol=1e-3, atol=1e-4 * x.std())


def test_two_heads_are_averaged_in_evaluation_only():
  model, image = tiny(distillation=True), normal(3, 64, 64, 3)
  variables = randomised(model, image)
  for train in (False, True):
    out = run(model, variables, image, train)
    out, stats = out if train else (out, variables)
    heads = {}
    for name in ("head", "head_dist"):
      p = variables["params"][name]
      x = np.asarray(out["pooled"])
      s = variables["batch_stats"][name]["bn"]
      mean, var = (x.mean(0), x.var(0)) if train else (s["mean"], s["var"])
      x = (x - mean) / np.sqrt(var + 1e-5)
      x = x * p["bn"]["scale"] + p["bn"]["bias"]
      heads[name] = x @ p["linear"]["kernel"] + p["linear"]["bias"]
    if not train:
      heads["head"] = (heads["head"] + heads["head_dist"]) / 2
    for key, name in (("logits", "head"), ("distillation_logits", "head_dist")):
      # Three images only: the batch's variance may be small.
      np.testing.assert_allclose(out[key], heads[name], rtol=1e-3, atol=1e-3)
    assert set(stats["batch_stats"]) == set(variables["batch_stats"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_images_than_initialised_on(dtype):
  """The windows stay: 7, 4 and 2 pixels of 112, here of maps 9 x 14 and on."""
  model = tiny(dtype=dtype)
  variables = randomised(model, normal(1, 112, 112, 3))
  sides = [
    variables["params"][f"stage{s}_block0"]["mixer"]["attention_biases"].shape
    for s in range(3)
  ]
  assert sides == [(2, 49), (3, 16), (2, 4)]
  image = normal(2, 131, 211, 3)
  out = run(model, variables, image)
  assert out["map"].shape == (2, 3, 4, 40)
  assert out["map"].dtype == dtype
  assert out["logits"].dtype == out["pooled"].dtype == jnp.float32
  # The mean may be of values that are not yet rounded.
  mean = np.asarray(out["map"], np.float64).mean((1, 2))
  rounding = 4 * float(jnp.finfo(dtype).eps) * np.abs(out["map"]).max()
  np.testing.assert_allclose(out["pooled"], mean, rtol=0, atol=rounding)


def test_no_head():
  out = jax.eval_shape(
    lambda x: tiny(num_classes=None).init_with_output(
      jax.random.key(0), x, train=False
    ),
    jnp.zeros((2, 64, 64, 3)),
  )
  assert set(out[0]) == {"pooled", "map"}
  assert "head" not in out[1]["params"]


@pytest.mark.parametrize(
  ("kw", "sentence"),
  [
    (dict(variant="M6"), "Unknown variant 'M6'.*M0.*M5"),
    (dict(sizes=dict(width=(1, 2, 3))), "no \\['width'\\].*widths"),
    (dict(sizes=dict(depths=(1, 2))), "Three stages"),
    (dict(sizes=dict(heads=(3, 4, 4))), "64 channels in 3 heads"),
    (dict(sizes=dict(kernels=(3, 3))), "each has a kernel"),
  ],
)
def test_refusals(kw, sentence):
  with pytest.raises(ValueError, match=sentence):
    shapes(efficientvit.Model(**kw), jnp.zeros((1, 64, 64, 3)))
