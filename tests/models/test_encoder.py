"""Blocks against their equations; scan, remat and the mesh change nothing."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import vit_in_numpy
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from big_vision_like.models.layers.blocks import BlockConfig
from big_vision_like.models.layers.encoder import (
  REMAT,
  Encoder,
  stack_blocks,
  unstack_blocks,
)

CONFIG = BlockConfig(heads=3, mlp=23, qk_norm="layer", attention="xla")
DEPTH, WIDTH = 2, 21


def tokens(batch=2, length=11):
  rng = np.random.default_rng(0)
  return jnp.asarray(rng.normal(size=(batch, length, WIDTH)), jnp.float32)


@functools.cache
def random_params():
  """Of the unrolled encoder."""
  shapes = jax.eval_shape(
    lambda: Encoder(DEPTH, CONFIG, scan=False).init(
      jax.random.key(0), tokens(), train=False
    )
  )["params"]
  return vit_in_numpy.random_params(shapes)


def apply(params, x, *, scan=False, config=CONFIG, rngs=None, **kw):
  encoder = Encoder(
    DEPTH,
    config,
    kw.pop("stochastic_depth", 0.0),
    kw.pop("remat", "none"),
    scan,
  )
  kw.setdefault("train", False)
  return encoder.apply({"params": params}, x, rngs=rngs, **kw)


def test_encoder_is_its_equations():
  params, x = random_params(), tokens()
  out = jax.jit(apply)(params, x)
  params, x = vit_in_numpy.float64((params, x))
  for row, got in zip(x, out):
    # Float32 against float64, two layers.
    np.testing.assert_allclose(
      got, vit_in_numpy.encoder(row, params), rtol=0, atol=2e-5
    )


def test_stack_and_unstack_lead_from_one_layout_to_the_other():
  params = random_params()
  stacked = stack_blocks({"encoder": params, "other": jnp.ones(2)})
  kernel = stacked["encoder"]["blocks"]["mlp"]["fc1"]["kernel"]
  assert kernel.shape == (DEPTH, WIDTH, CONFIG.mlp)
  back = unstack_blocks(stacked)
  assert jax.tree.structure(back["encoder"]) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, back["encoder"], params)
  started = jax.eval_shape(
    lambda: Encoder(DEPTH, CONFIG).init(jax.random.key(0), tokens(), train=True)
  )
  assert jax.tree.structure(started["params"]) == jax.tree.structure(
    stacked["encoder"]
  )


def gradient(params, *, remat, scan, config=CONFIG):
  kw = dict(remat=remat, scan=scan, config=config, train=True)
  return jax.grad(lambda p: (apply(p, tokens(), **kw) ** 2).sum())(params)


def test_scan_and_remat_change_no_gradient():
  params = random_params()
  run = jax.jit(gradient, static_argnames=("remat", "scan"))
  want = run(params, remat="none", scan=False)
  for remat in ("none", "names"):
    got = run(stack_blocks(params), remat=remat, scan=True)
    jax.tree.map(
      # The same operations, fused differently: float32's last digits.
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
      unstack_blocks(got),
      want,
    )


def primitives(jaxpr, counts):
  for eqn in jaxpr.eqns:
    counts[eqn.primitive.name] += 1
    for inner in jax.tree.leaves(
      list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
    ):
      inner = getattr(inner, "jaxpr", inner)
      if hasattr(inner, "eqns"):
        primitives(inner, counts)
  return counts


def test_remat_recomputes_what_its_name_says():
  params = stack_blocks(random_params())
  config = dataclasses.replace(CONFIG, attention="blockwise")
  counts = {}
  for remat in REMAT:
    program = functools.partial(gradient, remat=remat, scan=True, config=config)
    jaxpr = jax.make_jaxpr(program)(params).jaxpr
    counts[remat] = primitives(jaxpr, collections.Counter())
  # The loops of blockwise attention run again only where they are not named.
  loops = {remat: count["while"] for remat, count in counts.items()}
  assert loops["names"] == loops["none"] < loops["full"]
  products = {remat: count["dot_general"] for remat, count in counts.items()}
  # Of a block's products, names recomputes attention's output projection.
  assert products["names"] == products["none"] + 1
  assert products["none"] < products["dots"] < products["full"]


def test_stochastic_depth_leaves_out_whole_images():
  x = tokens(3, 13)
  ids = jnp.asarray(np.repeat([[1, 2, 3, 0]], 3, 0).repeat([4, 5, 2, 2], 1))
  rate = 0.6

  @jax.jit
  def run(params, key):
    return apply(
      params,
      x,
      scan=True,
      stochastic_depth=rate,
      segment_ids=ids,
      train=True,
      rngs={"dropout": key},
    )

  params = random_params()
  # Only the last layer's MLP has an effect, so that its branch shows alone.
  silent = jax.tree.map(jnp.zeros_like, params)
  last = f"blocks_{DEPTH - 1}"
  silent[last] = {**silent[last], "mlp": params[last]["mlp"]}
  silent[last]["ln2"] = params[last]["ln2"]
  silent["norm"] = {"scale": jnp.ones(WIDTH), "bias": jnp.zeros(WIDTH)}
  silent = stack_blocks(silent)
  before, p = vit_in_numpy.float64((x, params[last]))
  norm = lambda x: vit_in_numpy.layer_norm(x, {"scale": 1.0})
  branch = vit_in_numpy.mlp(vit_in_numpy.layer_norm(before, p["ln2"]), p["mlp"])
  without, within = norm(before), norm(before + branch / (1 - rate))
  dropped = []
  for seed in range(40):
    out = run(silent, jax.random.key(seed))
    for b, image in np.ndindex(3, 3):
      own = np.asarray(ids[b]) == image + 1
      left_out = np.abs(out[b, own] - without[b, own]).max() < 1e-5
      dropped.append(left_out)
      want = without if left_out else within
      np.testing.assert_allclose(out[b, own], want[b, own], atol=2e-5)
  # 360 draws: three standard deviations are 0.08.
  assert abs(np.mean(dropped) - rate) < 0.08


def test_a_mesh_changes_nothing_and_splits_the_batch():
  mesh = jax.make_mesh(
    (2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3
  )
  params, x = stack_blocks(random_params()), tokens(8)
  run = jax.jit(lambda p, x: apply(p, x, scan=True, remat="names"))
  want = run(params, x)
  with jax.set_mesh(mesh):
    split = NamedSharding(mesh, P(("data", "fsdp")))
    got = run(params, jax.device_put(x, split))
    assert got.sharding.is_equivalent_to(split, got.ndim)
    # Three rows do not divide by four; they run all the same.
    np.testing.assert_allclose(run(params, x[:3]), want[:3], atol=1e-5)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_refusals():
  x = tokens()
  for match, encoder in (
    ("remat is 'some'; it is one of", Encoder(2, CONFIG, remat="some")),
    (
      r"stochastic_depth is 1.0; it is a rate in \[0, 1\)",
      Encoder(2, CONFIG, stochastic_depth=1.0),
    ),
    (
      "A width of 21 does not divide into 4 heads",
      Encoder(2, dataclasses.replace(CONFIG, heads=4)),
    ),
  ):
    with pytest.raises(ValueError, match=match):
      encoder.init(jax.random.key(0), x, train=False)
  with pytest.raises(ValueError, match="gelu is 'relu'; it is one of"):
    BlockConfig(heads=2, mlp=3, gelu="relu")
  with pytest.raises(ValueError, match="qk_norm is 'batch'; it is one of"):
    BlockConfig(heads=2, mlp=3, qk_norm="batch")
