"""ResNet's sizes, maps and standardised blocks against their equations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vision_like import trees
from big_vision_like.models import resnet


def shapes(model, height=224, width=224):
  image = jax.ShapeDtypeStruct((2, height, width, 3), jnp.float32)
  return jax.eval_shape(
    lambda x: model.init(jax.random.key(0), x, train=False), image
  )


@pytest.mark.parametrize(
  ("variant", "total", "norms"),
  [("R50", 25_557_032, 53_120), ("R101", 44_549_160, 105_344)],
)
def test_parameter_counts_are_the_published_ones(variant, total, norms):
  variables = shapes(resnet.Model(variant=variant, num_classes=1000))
  assert trees.count(variables["params"]) == total
  assert trees.count(variables["batch_stats"]) == norms
  # DETR's body: no head, and all four vectors of a norm are constants.
  body = resnet.Model(variant=variant, frozen=True, dilation=True)
  variables = shapes(body)
  head = 2048 * 1000 + 1000
  assert trees.count(variables["params"]) == total - head - norms
  assert trees.count(variables["batch_stats"]) == 2 * norms


@pytest.mark.parametrize("dilation", [False, True])
def test_maps_shrink_by_halves_rounded_up(dilation):
  model = resnet.Model(num_classes=7, dilation=dilation, dtype="bfloat16")
  image = jax.ShapeDtypeStruct((2, 101, 67, 3), jnp.float32)
  out = jax.eval_shape(
    lambda v, x: model.apply(v, x, train=False), shapes(model), image
  )
  sides = [(26, 17), (13, 9), (7, 5), (7, 5) if dilation else (4, 3)]
  assert [x.shape for x in out["stages"]] == [
    (2, *side, 256 * 2**i) for i, side in enumerate(sides)
  ]
  assert out["stages"][-1].dtype == jnp.bfloat16
  assert out["pooled"].shape == (2, 2048)
  assert out["logits"].shape == (2, 7)
  assert out["logits"].dtype == jnp.float32


def test_dilation_reads_every_second_pixel():
  """A dilated block sees two pixels away, and not one, through its kernel."""
  block = resnet.Bottleneck(features=3, dilation=2)
  image = jnp.zeros((1, 9, 9, 12))
  init = jax.jit(functools.partial(block.init, train=False))
  variables = init(jax.random.key(0), image)
  run = jax.jit(lambda x: block.apply(variables, x, train=False))
  moved = jnp.abs(run(image.at[0, 4, 4].set(1.0)) - run(image)).sum(-1)[0] > 0
  reached = {tuple(at) for at in np.argwhere(moved)}
  assert reached <= {(y, x) for y in (2, 4, 6) for x in (2, 4, 6)}
  assert {(2, 2), (6, 4)} <= reached


def test_frozen_norms_do_not_move(monkeypatch):
  monkeypatch.setitem(resnet.VARIANTS, "tiny", dict(stages=(1,)))
  model = resnet.Model(variant="tiny", frozen=True)
  image = jax.random.normal(jax.random.key(0), (2, 9, 7, 3))
  init = jax.jit(functools.partial(model.init, train=False))
  variables = init(jax.random.key(0), image)
  apply = jax.jit(
    functools.partial(model.apply, mutable="batch_stats"),
    static_argnames="train",
  )
  out, state = apply(variables, image, train=True)
  jax.tree.map(
    np.testing.assert_array_equal,
    state["batch_stats"],
    variables["batch_stats"],
  )
  still, _ = apply(variables, image, train=False)
  np.testing.assert_array_equal(out["pooled"], still["pooled"])


def conv_same(x, kernel, stride):
  """TensorFlow's SAME in float64: the odd pixel lies below and right."""
  k = kernel.shape[0]
  out = [-(-n // stride) for n in x.shape[:2]]
  total = [max((o - 1) * stride + k - n, 0) for o, n in zip(out, x.shape[:2])]
  x = np.pad(x, [(t // 2, t - t // 2) for t in total] + [(0, 0)])
  return np.array(
    [
      [
        np.tensordot(
          x[i * stride : i * stride + k, j * stride : j * stride + k], kernel, 3
        )
        for j in range(out[1])
      ]
      for i in range(out[0])
    ]
  )


def standardised(kernel):
  mean, spread = kernel.mean((0, 1, 2)), kernel.std((0, 1, 2))
  return (kernel - mean) / (spread + 1e-5)


def group_norm(x, p):
  h, w, c = x.shape
  y = x.reshape(h, w, 32, c // 32)
  y = y - y.mean((0, 1, 3), keepdims=True)
  y = y / np.sqrt((y**2).mean((0, 1, 3), keepdims=True) + 1e-6)
  return y.reshape(h, w, c) * p["scale"] + p["bias"]


def block_in_numpy(x, p, stride):
  def conv_gn(name, x, stride=1):
    y = conv_same(x, standardised(p[f"{name}_conv"]["kernel"]), stride)
    return group_norm(y, p[f"{name}_gn"])

  y = np.maximum(conv_gn("conv1", x), 0)
  y = np.maximum(conv_gn("conv2", y, stride), 0)
  shortcut = conv_gn("proj", x, stride) if "proj_conv" in p else x
  return np.maximum(conv_gn("conv3", y) + shortcut, 0)


@pytest.mark.parametrize(("height", "stride"), [(7, 2), (6, 2), (5, 1)])
def test_standardised_block_is_its_equations(height, stride):
  rng = np.random.default_rng(0)
  block = resnet.StdBottleneck(features=32, stride=stride)
  channels = 128 if stride == 1 else 13
  x = rng.normal(size=(1, height, 4, channels)).astype(np.float32)
  params = jax.eval_shape(
    lambda: block.init(jax.random.key(0), jnp.asarray(x))
  )["params"]
  params = jax.tree.map(
    lambda s: rng.normal(0.5, 0.3, s.shape).astype(np.float32), params
  )
  got = jax.jit(block.apply)({"params": params}, jnp.asarray(x))[0]
  double = jax.tree.map(lambda v: v.astype(np.float64), params)
  want = block_in_numpy(x[0].astype(np.float64), double, stride)
  # Float32 against float64.
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_a_standardised_block_starts_as_its_shortcut():
  block = resnet.StdBottleneck(features=32)
  x = jax.random.normal(jax.random.key(0), (1, 3, 5, 128))
  variables = jax.jit(block.init)(jax.random.key(1), x)
  got = jax.jit(block.apply)(variables, x)
  np.testing.assert_array_equal(got, np.maximum(x, 0))


def test_the_hybrids_trunk_halves_twice_and_then_by_stages():
  for stages, sides in (((), (17, 26)), ((1, 1, 1), (5, 7))):
    trunk = resnet.StdResNet(stages=stages)
    image = jnp.zeros((1, 67, 101, 3))
    out = jax.eval_shape(
      functools.partial(trunk.init_with_output, jax.random.key(0)), image
    )[0]
    assert out.shape == (1, *sides, 1024 if stages else 64)


def test_refusals():
  with pytest.raises(ValueError, match=r"Unknown variant 'R18'\. .*R50, R101"):
    resnet.Model(variant="R18")
