"""Convolutions and batch normalisation: equations, without torch."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vision_like.models.layers import convolution
from big_vision_like.models.layers.convolution import BatchNorm, Conv, ConvBN


def normal(*shape, seed=0):
  x = np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(x, jnp.float32)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (5, 1), (3, 2)])
def test_taps_are_the_grouped_convolution(
  kernel, stride, dilation, monkeypatch
):
  x, w = normal(2, 11, 7, 5), normal(kernel, kernel, 1, 5, seed=1)
  settings = dict(
    stride=stride, padding=dilation * (kernel - 1) // 2, dilation=dilation
  )

  def run(x, w):
    return convolution.depthwise(x, w, **settings)

  taps, back = jax.vjp(run, x, w)
  gradients = back(jnp.ones_like(taps))
  monkeypatch.setattr(convolution, "target_platform", lambda: "tpu")
  grouped, back = jax.vjp(run, x, w)
  # Sums of 25 products in float32, in another order.
  np.testing.assert_allclose(taps, grouped, atol=1e-5)
  for got, want in zip(gradients, back(jnp.ones_like(grouped))):
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("moving", ["x", "kernel", "both"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
  ("kernel", "padding", "dilation"),
  [(3, 1, 1), (3, 2, 2), (1, 0, 1), (4, 0, 1)],
)
def test_derivatives_on_a_cpu_are_those_of_the_convolution(
  kernel, padding, dilation, stride, moving
):
  """Forward and backward, where one argument is a constant too."""
  x, w = normal(2, 11, 7, 9), normal(kernel, kernel, 9, 4, seed=1)
  settings = dict(stride=stride, padding=padding, dilation=dilation)

  def theirs(x, w):
    pad = (padding, padding)
    return jax.lax.conv_general_dilated(
      x,
      w,
      (stride, stride),
      (pad, pad),
      rhs_dilation=(dilation, dilation),
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )

  def derivatives(convolve):
    function, args = {
      "x": (lambda x: convolve(x, w), (x,)),
      "kernel": (lambda w: convolve(x, w), (w,)),
      "both": (convolve, (x, w)),
    }[moving]
    y, back = jax.vjp(function, *args)
    _, change = jax.jvp(function, args, args)
    return y, change, *back(y)

  ours = derivatives(lambda *a: convolution.convolve(*a, **settings))
  for got, want in zip(ours, derivatives(theirs)):
    # Sums of hundreds of products in float32, in another order.
    scale = np.abs(want).max()
    np.testing.assert_allclose(got, want, rtol=0, atol=3e-6 * scale)


@pytest.mark.parametrize("hw", [(7, 12), (8, 5)])
def test_a_pool_of_taps_is_the_pool(hw):
  """Its gradient too, where the values of a window differ."""
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, *hw, 3)))
  pads = ((1, 1), (1, 1))
  theirs = lambda x: nn.max_pool(x, (3, 3), strides=(2, 2), padding=pads)
  ours = lambda x: convolution.max_pool(x, 3, stride=2, padding=1)
  np.testing.assert_array_equal(ours(x), theirs(x))
  weights = np.random.default_rng(1).normal(size=theirs(x).shape)
  loss = lambda x, pool: (pool(x) * weights).sum()
  grads = [jax.grad(loss)(x, pool) for pool in (ours, theirs)]
  np.testing.assert_allclose(*grads, rtol=1e-6, atol=1e-6)


def test_running_statistics_move_as_torchs_do():
  x = normal(3, 4, 5, 7) * 2 + 1
  norm = BatchNorm(momentum=0.3)
  variables = norm.init(jax.random.key(0), x, train=False)
  y, moved = norm.apply(variables, x, train=True, mutable=["batch_stats"])
  mean, var = x.mean((0, 1, 2)), np.var(x, (0, 1, 2), ddof=1)
  stats = moved["batch_stats"]
  np.testing.assert_allclose(stats["mean"], 0.3 * mean, rtol=1e-5)
  np.testing.assert_allclose(stats["var"], 0.7 + 0.3 * var, rtol=1e-5)
  np.testing.assert_allclose(y.mean((0, 1, 2)), 0, atol=1e-5)
  np.testing.assert_allclose(y.std((0, 1, 2)), 1, rtol=1e-4)


def test_frozen_statistics_do_not_move_and_have_no_parameters():
  x = normal(2, 3, 5, 7)
  norm = BatchNorm(frozen=True)
  variables = norm.init(jax.random.key(0), x, train=True)
  assert set(variables) == {"batch_stats"}
  y, after = norm.apply(variables, x, train=True, mutable=["batch_stats"])
  np.testing.assert_allclose(y, x / np.sqrt(1 + 1e-5), rtol=1e-6)
  jax.tree.map(
    np.testing.assert_array_equal,
    after["batch_stats"],
    variables["batch_stats"],
  )


class Net(nn.Module):
  fused: bool = False

  @nn.compact
  def __call__(self, x, *, train):
    x = ConvBN(7, kernel=3, stride=2, fused=self.fused, name="one")(
      x, train=train
    )
    x = ConvBN(7, kernel=3, groups=7, fused=self.fused, name="two")(
      x, train=train
    )
    return BatchNorm(name="last")(x, train=train)


def test_folded_is_unfolded_and_a_lone_norm_stays():
  x = normal(2, 9, 11, 3)
  variables = Net().init(jax.random.key(0), x, train=False)
  leaves, tree = jax.tree.flatten(variables)
  leaves = [
    1 + 0.3 * jnp.abs(normal(*v.shape, seed=i)) for i, v in enumerate(leaves)
  ]
  variables = jax.tree.unflatten(tree, leaves)
  folded = convolution.fuse(variables)
  assert set(folded["params"]["one"]["conv"]) == {"kernel", "bias"}
  want = Net().apply(variables, x, train=False)
  got = Net(fused=True).apply(folded, x, train=False)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


def test_groups_that_do_not_divide_are_refused():
  with pytest.raises(ValueError, match=r"5 channels to 6 .* 3 groups"):
    Conv(6, groups=3).init(jax.random.key(0), normal(1, 4, 4, 5))
