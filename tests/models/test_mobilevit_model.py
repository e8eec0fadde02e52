"""MobileViT v1 and v2 against their equations and the published counts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vision_like import trees
from big_vision_like.models import mobilevit, mobilevit_v2
from big_vision_like.models.layers import mobilenet
from big_vision_like.models.layers.convolution import fuse

pytestmark = pytest.mark.usefixtures("compile_quickly")

BOTH = (mobilevit, mobilevit_v2)


def randomised(shapes):
  """Variables of the given shapes; variances are positive."""
  rng = np.random.default_rng(0)

  def draw(path, x):
    if path[-1].key == "var":
      return jnp.asarray(rng.uniform(0.5, 1.5, x.shape), x.dtype)
    if path[-1].key == "kernel":
      fan_in = np.prod(x.shape[:-1])
      return jnp.asarray(rng.normal(0, fan_in**-0.5, x.shape), x.dtype)
    mean = 1.0 if path[-1].key == "scale" else 0.0
    return jnp.asarray(rng.normal(mean, 0.2, x.shape), x.dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes)


def variables_of(module, *args, **kw):
  init = lambda: module.init(jax.random.key(0), *args, **kw)
  return randomised(jax.eval_shape(init))


def maps(*shape):
  return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)


# All counts, with a head, are in tests/commands/test_models.py.
@pytest.mark.parametrize(
  ("model", "variant", "body"),
  [(mobilevit, "XXS", 951_024), (mobilevit_v2, "0.5", 1_370_593 - 257_000)],
)
@pytest.mark.parametrize("classes", [None, 0])
def test_without_classes_there_is_no_head(model, variant, body, classes):
  image = jnp.zeros((1, 64, 64, 3))
  module = model.Model(variant=variant, num_classes=classes)
  shapes = jax.eval_shape(
    lambda: module.init(jax.random.key(0), image, train=False)
  )
  assert trees.count(shapes["params"]) == body


@pytest.mark.parametrize(
  ("model", "map_hw"), [(mobilevit, (3, 2)), (mobilevit_v2, (4, 2))]
)
def test_any_size_and_what_comes_out(model, map_hw):
  """Sides that no level divides; v2 keeps what it enlarged."""
  image = maps(2, 67, 41, 3)
  module = model.Model(variant="local", num_classes=7)
  variables = variables_of(module, image, train=False)
  out = jax.jit(lambda v, x: module.apply(v, x, train=False))(variables, image)
  channels = out["map"].shape[-1]
  assert out["map"].shape == (2, *map_hw, channels)
  assert (out["logits"].shape, out["logits"].dtype) == ((2, 7), jnp.float32)
  head = variables["params"]["head"]
  want = out["pooled"] @ head["kernel"] + head["bias"]
  np.testing.assert_allclose(out["logits"], want, rtol=1e-5, atol=1e-5)
  assert "logits" not in jax.eval_shape(
    lambda: model.Model(variant="local").apply(variables, image, train=False)
  )
  # Folding is exact but for float32's rounding, layer by layer.
  fused = module.clone(fused=True)
  folded = jax.jit(lambda v, x: fused.apply(v, x, train=False))(
    fuse(variables), image
  )
  assert "batch_stats" not in fuse(variables)
  np.testing.assert_allclose(
    folded["logits"], out["logits"], rtol=1e-3, atol=1e-3
  )


def test_v1_layer_is_the_equation():
  layer = mobilevit.TransformerLayer(0.0, "float32", "auto")
  x = maps(2, 5, 16)
  variables = variables_of(layer, x, train=False)
  run = lambda x: layer.apply(variables, x, train=False)
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"])
  np.testing.assert_allclose(run(x), layer_in_numpy(x, p), rtol=1e-4, atol=1e-4)


def layer_norm(x, p, axes=(-1,)):
  x = np.asarray(x, np.float64)
  center = x - x.mean(axes, keepdims=True)
  x = center / np.sqrt((center**2).mean(axes, keepdims=True) + 1e-5)
  return x * p["scale"] + p["bias"]


def dense(x, p):
  return x @ p["kernel"] + p["bias"]


def silu(x):
  return x / (1 + np.exp(-x))


def softmax(x, axis):
  x = np.exp(x - x.max(axis, keepdims=True))
  return x / x.sum(axis, keepdims=True)


def layer_in_numpy(x, p):
  y, attn = layer_norm(x, p["ln1"]), p["attn"]
  q, k, v = (
    np.einsum("bnd,dkf->bknf", y, attn[name]["kernel"])
    + attn[name]["bias"][:, None]
    for name in ("query", "key", "value")
  )
  scores = softmax(np.einsum("bknf,bkmf->bknm", q, k) * q.shape[-1] ** -0.5, -1)
  y = np.einsum("bknm,bkmf->bnkf", scores, v)
  y = np.einsum("bnkf,kfd->bnd", y, attn["out"]["kernel"])
  x = x + y + attn["out"]["bias"]
  return x + dense(silu(dense(layer_norm(x, p["ln2"]), p["fc1"])), p["fc2"])


def test_v1_cuts_the_map_into_phases(monkeypatch):
  """The sequences of a map of 0..15 are those of the paper's unfolding."""
  block = mobilevit.MobileViTBlock(4, 1, 0.0, True, "float32", "auto")
  x = jnp.arange(16.0).reshape(1, 4, 4, 1)
  params = dict(variables_of(block, x, train=False)["params"])
  # Local convolutions that pass the map on; SiLU(x + 50) is x + 50.
  identity = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1.0)
  params["local"] = {"conv": {"kernel": identity, "bias": jnp.full(1, 50.0)}}
  params["to_tokens"] = {"kernel": jnp.ones((1, 1, 1, 4))}
  seen = []

  def record(self, x, *, train):
    seen.append(x[..., 0] - 50)
    return x

  monkeypatch.setattr(mobilevit.TransformerLayer, "__call__", record)
  block.apply({"params": params}, x, train=False)
  phases = [[0, 2, 8, 10], [1, 3, 9, 11], [4, 6, 12, 14], [5, 7, 13, 15]]
  np.testing.assert_allclose(seen[0], phases, atol=1e-4)


def test_v2_is_the_equation():
  """Keys projected token by token and then summed, as the paper writes it."""
  layer = mobilevit_v2.TransformerLayer("float32")
  x = maps(2, 4, 6, 5)
  variables = variables_of(layer, x)
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"])

  want = np.asarray(x, np.float64)
  y = layer_norm(want, p["norm1"], (1, 2, 3))
  attended = np.zeros_like(y)
  for row in range(2):
    for column in range(2):
      phase = y[:, row::2, column::2].reshape(2, -1, 5)
      weights = softmax(dense(phase, p["attn"]["scores"]), 1)
      keys = dense(phase, p["attn"]["key"])
      context = (weights * keys).sum(1, keepdims=True)
      values = np.maximum(dense(phase, p["attn"]["value"]), 0) * context
      out = dense(values, p["attn"]["out"])
      attended[:, row::2, column::2] = out.reshape(2, 2, 3, 5)
  want = want + attended
  y = layer_norm(want, p["norm2"], (1, 2, 3))
  want = want + dense(silu(dense(y, p["fc1"])), p["fc2"])
  np.testing.assert_allclose(
    layer.apply(variables, x), want, rtol=1e-4, atol=1e-4
  )


def test_resizing_by_hand():
  x = jnp.asarray([0.0, 1.0, 3.0]).reshape(1, 1, 3, 1)
  resize = functools.partial(mobilenet.resize_bilinear, x, 1)
  # Corners stay: at 0, 2/3, 4/3 and 2. Else centres at -1/8, 5/8, 11/8, 17/8.
  np.testing.assert_allclose(
    resize(4, align_corners=True).ravel(), [0, 2 / 3, 5 / 3, 3], rtol=1e-6
  )
  np.testing.assert_allclose(
    resize(4, align_corners=False).ravel(), [0, 0.625, 1.75, 3], rtol=1e-6
  )
  # Half the size without antialiasing: 3 of 4 pixels are not read.
  y = jnp.asarray([0.0, 1.0, 5.0, 7.0]).reshape(1, 4, 1, 1)
  half = mobilenet.resize_bilinear(y, 2, 1, align_corners=False)
  np.testing.assert_allclose(half.ravel(), [0.5, 6.0], rtol=1e-6)


def test_hidden_widths_are_multiples_of_eight():
  divisible = mobilenet.make_divisible
  assert [divisible(x) for x in (3, 12, 15, 16, 35, 36)] == [
    8, 16, 16, 16, 32, 40,
  ]  # fmt: skip
  assert divisible(18, 16) == 32  # 16 would lose more than a tenth.


@pytest.mark.parametrize("model", BOTH)
def test_unknown_variants_are_listed(model):
  names = ", ".join(model.VARIANTS)
  with pytest.raises(ValueError, match=f"'XL'. There are: {names}"):
    model.Model(variant="XL")
  assert hash(model.Model()) == hash(model.Model())


@pytest.mark.parametrize("model", BOTH)
def test_bfloat16_keeps_float32_parameters_and_logits(model):
  image = maps(2, 64, 32, 3)
  low = model.Model(variant="local", num_classes=7, dtype="bfloat16")
  started = jax.eval_shape(
    lambda: low.init(jax.random.key(0), image, train=False)
  )
  assert {x.dtype for x in jax.tree.leaves(started)} == {jnp.dtype("float32")}
  out = jax.eval_shape(
    lambda v: low.apply(v, image, train=True, mutable=["batch_stats"])[0],
    started,
  )
  assert out["map"].dtype == jnp.bfloat16
  assert out["logits"].dtype == jnp.float32


def test_dropout_is_for_training_only():
  model = mobilevit.Model(
    variant="local", num_classes=7, dropout=0.5, head_dropout=0.5
  )
  image = maps(1, 32, 32, 3)
  variables = variables_of(model, image, train=False)

  @functools.partial(jax.jit, static_argnums=0)
  def run(train, seed):
    out, _ = model.apply(
      variables,
      image,
      train=train,
      rngs={"dropout": jax.random.key(seed)},
      mutable=["batch_stats"],
    )
    return out["logits"]

  np.testing.assert_array_equal(run(False, 0), run(False, 1))
  assert (run(True, 0) != run(True, 1)).any()
