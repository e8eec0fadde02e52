"""Matching against scipy's solver, on devices alone and together."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from big_vision_like import chips, hlo, sharding
from big_vision_like.losses import matching

assign = jax.jit(matching.assign)


def random(rng, shape):
  return rng.normal(size=shape)


def ties(rng, shape):
  return rng.integers(-1, 2, shape)


def constant(rng, shape):
  return np.full(shape, -7)


def large(rng, shape):
  return rng.integers(-(10**6), 10**6, shape)


def product(rng, shape):
  """All targets rank the queries alike: every search is a long one."""
  slots, queries = shape[-2:]
  return np.broadcast_to(np.outer(np.arange(slots), np.arange(queries)), shape)


def crowd(rng, shape):
  """Many objects over one another; each query is near one of them."""
  center = rng.random((*shape[:2], 1, 1)) + 0.01 * rng.random((*shape[:3], 1))
  near = center + 0.02 * rng.random((*shape[:2], 1, shape[3]))
  return 5 * np.abs(center - near) - rng.random(shape)


def spread(rng, shape):
  """Costs of very different sizes."""
  return 10.0 ** rng.integers(-4, 5, shape) * rng.integers(-1, 2, shape)


KINDS = (random, ties, constant, large, product, crowd, spread)
# Slots, queries.
SIZES = ((7, 11), (11, 11), (2, 53), (1, 1))


def check(cost, valid, targets):
  """Each target has one query, and the total is scipy's."""
  for index in np.ndindex(cost.shape[:2]):
    one, there = cost[index].astype(np.float64), valid[index[1]]
    query = np.flatnonzero(targets[index] >= 0)
    target = targets[index][query]
    assert sorted(target) == np.flatnonzero(there).tolist()
    rows = one[there]
    want = rows[linear_sum_assignment(rows)].sum()
    # Whole numbers are added without rounding. Others are rounded to 2**-24 of
    # the largest, a few times for each target on a path.
    exact = (rows == np.rint(rows)).all()
    slack = 0 if exact else 2.0**-20 * len(rows) * np.abs(rows).max()
    assert abs(one[target, query].sum() - want) <= slack


@pytest.mark.parametrize("kind", KINDS)
def test_total_is_scipys(kind):
  rng = np.random.default_rng(0)
  for slots, queries in SIZES:
    cost = kind(rng, (2, 97, slots, queries)).astype(np.float32)
    # From none to all of the slots, and not only the first ones.
    valid = rng.random((97, slots)) < rng.uniform(-0.2, 1.2, (97, 1))
    assert valid.all(1).any()
    assert (~valid).all(1).any()
    check(cost, valid, np.asarray(assign(cost, valid)))


def test_detr_sizes():
  rng = np.random.default_rng(1)
  cost = crowd(rng, (6, 2, 63, 100)).astype(np.float32)
  valid = np.arange(63) < np.array([[63], [17]])
  check(cost, valid, np.asarray(assign(cost, valid)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_costs_that_are_none_are_paid_last(bad):
  rng = np.random.default_rng(2)
  cost = random(rng, (1, 97, 5, 7)).astype(np.float32)
  broken = rng.random(cost.shape) < 0.5
  broken[:, 0] = True
  broken[:, 1, 2] = True  # One target whose costs are all none.
  broken[:, 2, :, :5] = True  # Five queries of seven.
  valid = np.ones((97, 5), bool)
  out = np.asarray(assign(np.where(broken, bad, cost), valid))
  dear = np.where(broken, 1e3, cost)
  for one, targets in zip(dear[0], out[0]):
    query = np.flatnonzero(targets >= 0)
    assert sorted(targets[query]) == list(range(5))
    got, want = one[targets[query], query], one[linear_sum_assignment(one)]
    assert (got == 1e3).sum() == (want == 1e3).sum()
    np.testing.assert_allclose(got.sum(), want.sum(), rtol=1e-5, atol=1e-3)


def test_the_largest_numbers_end_as_well():
  rng = np.random.default_rng(3)
  most = np.finfo(np.float32).max
  cost = rng.choice([most, -most, 0, 1], (1, 97, 5, 7)).astype(np.float32)
  out = np.asarray(assign(cost, np.ones((97, 5), bool)))
  assert ((out >= 0).sum(-1) == 5).all()


def test_no_gradient_passes():
  cost = jnp.asarray(random(np.random.default_rng(4), (1, 2, 3, 5)))
  valid = jnp.ones((2, 3), bool)

  def loss(cost):
    return jnp.where(
      matching.assign(cost, valid)[:, :, None] >= 0, cost, 0
    ).sum()

  grad = jax.jit(jax.grad(loss))(cost)
  assert set(np.unique(grad)) == {0.0, 1.0}


@pytest.mark.parametrize(
  "shape", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}]
)
def test_devices_solve_their_own_rows(shape):
  rng = np.random.default_rng(5)
  cost = crowd(rng, (3, 16, 7, 11)).astype(np.float32)
  valid = rng.random((16, 7)) < rng.random((16, 1))
  want = assign(cost, valid)
  mesh = sharding.make_mesh(shape)
  rows = sharding.batch_sharding(mesh)
  layered = jax.NamedSharding(mesh, jax.P(None, *rows.spec))
  with jax.set_mesh(mesh):
    program = (
      jax.jit(
        matching.assign, in_shardings=(layered, rows), out_shardings=layered
      )
      .lower(cost, valid)
      .compile()
    )
    out = program(jax.device_put(cost, layered), jax.device_put(valid, rows))
  np.testing.assert_array_equal(out, want)
  text = program.as_text()
  assert "while(" in text
  assert not [op for op in hlo.COLLECTIVES if op in text]


@pytest.mark.slow
def test_compiles_for_a_tpu_slice():
  pytest.importorskip("libtpu")
  mesh = sharding.make_mesh({"data": 16}, chips.parse("v5e:4x4").devices())
  rows = sharding.batch_sharding(mesh)
  layered = jax.NamedSharding(mesh, jax.P(None, *rows.spec))
  spec = jax.ShapeDtypeStruct
  with jax.set_mesh(mesh):
    program = assign.lower(
      spec((6, 64, 100, 100), jnp.float32, sharding=layered),
      spec((64, 100), bool, sharding=rows),
    ).compile()
  assert not hlo.Program(program.as_text()).collectives(16)


def test_more_slots_than_queries_are_refused():
  sentence = (
    "A batch with room for 5 objects an image, and a model with 3 queries: "
    "each object needs a query of its own. Raise config.model.num_queries"
  )
  with pytest.raises(ValueError, match=re.escape(sentence)):
    matching.assign(jnp.zeros((1, 2, 5, 3)), jnp.ones((2, 5), bool))


def test_rows_that_do_not_divide_are_refused():
  sentence = (
    "A batch to be matched of 3 rows cannot be shared evenly by the 8 devices "
    "of the mesh axes data 8 x fsdp 1."
  )
  with (
    jax.set_mesh(sharding.make_mesh({"data": 8})),
    pytest.raises(ValueError, match=re.escape(sentence)),
  ):
    matching.assign(jnp.zeros((1, 3, 2, 3)), jnp.ones((3, 2), bool))
