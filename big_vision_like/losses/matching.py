"""Which target each query answers for: exact, and inside the compiled step.

DETR (Carion et al., arXiv 2005.12872, section 3.1) pairs the targets of an
image with queries so that the sum of costs is least. The reference does it with
scipy on the host (facebookresearch/detr @ 29901c5, models/matcher.py); we do it
where the costs are, as a callback would stop every step and, on several
devices, wait for itself.

The algorithm is that of scipy, shortest augmenting paths with prices of the
queries (Jonker and Volgenant 1987; Crouse 2016), written for many small
problems at once. Targets that prefer different queries are matched at the
start. Then one loop advances all problems by one look at one query, wherever in
its search a problem is; none waits for another before all are done, and empty
target slots take no time. A search looks at every query once at most, so that
the loop ends whatever the costs are.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from big_vision_like.losses import shards

# Costs beyond it count as this much. Sums of them stay finite in float32.
LIMIT = 1e30


def assign(
  cost: Float[Array, "l b t q"], valid: Bool[Array, "b t"]
) -> Int[Array, "l b q"]:
  """The target of each query, -1 for none, at the least total cost.

  Every valid target gets a query of its own, in each of `l` layers. Where a
  mesh is set, the batch is split over its batch axes, and each device solves
  its own rows without a word to others. No gradient passes.

  A cost that is NaN or infinite is paid last: as few of them are part of a
  match as can be, and among the rest the sum is still the least. Costs alone
  never make a match invalid.

  Args:
    cost: of target t with query q, in float32 or float64.
    valid: False for the slots without a target, which may lie anywhere.

  Raises:
    ValueError: if there are more slots than queries, or rows that the mesh does
      not share evenly.
  """
  layers, rows, slots, queries = cost.shape
  if slots > queries:
    raise ValueError(
      f"A batch with room for {slots} objects an image, and a model with "
      f"{queries} queries: each object needs a query of its own. Raise "
      "config.model.num_queries, or have the data keep fewer objects."
    )
  shards.check_rows(rows, "A batch to be matched")

  def solve(cost, valid):
    valid = jnp.broadcast_to(valid, cost.shape[:3]).reshape(-1, slots)
    targets = _solve(cost.reshape(-1, slots, queries), valid)
    return targets.reshape(layers, -1, queries)

  return shards.by_device(solve, (1, 0), 1)(lax.stop_gradient(cost), valid)


class _Search(NamedTuple):
  """N problems, each at its own place.

  Matched so far, as index or -1:

    target_of [N,Q]  query_of [N,T]
    price [N,Q]      at which no target would rather have another query

  The search for the shortest path from an unmatched target to a free query:

    row [N]          target whose costs are looked at next; -1: all are matched
    offset [N]       what adds to its costs: the way to it, less its own match
    distance [N,Q]   of queries from the start of the path
    via [N,Q]        the target before each of them
    seen [N,Q]       queries whose distance is final
    end [N]          once found, the query whose match is changed next; or -1
  """

  target_of: Array
  query_of: Array
  price: Array
  row: Array
  offset: Array
  distance: Array
  via: Array
  seen: Array
  end: Array


def _solve(cost, valid):
  """The target of each query [n q] for costs [n t q]."""
  cost = _finite(cost)
  return lax.while_loop(
    lambda s: (s.row >= 0).any(),
    lambda s: _next_target(*_flip(_look(cost, s)), valid),
    _start(cost, valid),
  ).target_of


def _finite(cost):
  """The costs, with a price on those that are none which outweighs all."""
  cost = cost.astype(jnp.promote_types(cost.dtype, jnp.float32))
  real = jnp.isfinite(cost)
  cost = jnp.clip(jnp.where(real, cost, 0), -LIMIT, LIMIT)
  high = cost.max((1, 2), keepdims=True)
  unit = jnp.maximum(high - cost.min((1, 2), keepdims=True), jnp.abs(high))
  return jnp.where(
    real, cost, high + (cost.shape[1] + 1) * jnp.maximum(unit, 1)
  )


def _start(cost, valid):
  """Each target has its cheapest query, unless another came before it."""
  n, targets, queries = cost.shape
  best = _first(cost == cost.min(-1, keepdims=True), 2)
  target_of = _first(_at(best, queries) & valid[..., None], 1)
  own = jnp.take_along_axis(target_of, best, 1) == jnp.arange(targets)
  zeros = jnp.zeros((n, queries), cost.dtype)
  blank = jnp.zeros(n, jnp.int32)
  search = _Search(
    target_of=target_of,
    query_of=jnp.where(own & valid, best, -1),
    price=zeros,
    row=blank,
    offset=zeros[:, 0],
    distance=zeros,
    via=target_of,
    seen=zeros > 0,
    end=blank - 1,
  )
  return _next_target(search, jnp.ones(n, bool), valid)


def _look(cost, s):
  """From one target to the nearest query that is not final yet."""
  problems = jnp.arange(len(cost))
  looks = (s.row >= 0) & (s.end < 0)
  length = cost[problems, s.row] + s.price + s.offset[:, None]
  nearer = looks[:, None] & ~s.seen & (length < s.distance)
  distance = jnp.where(nearer, length, s.distance)
  via = jnp.where(nearer, s.row[:, None], s.via)
  ahead = jnp.where(s.seen, jnp.inf, distance)
  least = ahead.min(1)
  nearest = ahead == least[:, None]
  # Of queries that are equally near, one that is free ends the search.
  free = _first(nearest & (s.target_of < 0), 1)
  query = jnp.where(free >= 0, free, _first(nearest, 1))
  target = s.target_of[problems, query]
  found, goes_on = looks & (target < 0), looks & (target >= 0)
  back = cost[problems, target, query] + s.price[problems, query]
  dearer = jnp.where(s.seen, least[:, None] - distance, 0)
  return s._replace(
    price=jnp.where(found[:, None], s.price + dearer, s.price),
    row=jnp.where(goes_on, target, s.row),
    offset=jnp.where(goes_on, least - back, s.offset),
    distance=distance,
    via=via,
    seen=s.seen | (_at(query, ahead.shape[1]) & goes_on[:, None]),
    end=jnp.where(found, query, s.end),
  )


def _flip(s):
  """The query at the end of a path goes to the target before it.

  That target's former query is the new end. Says which paths are at their
  start.
  """
  problems = jnp.arange(len(s.end))
  flips = s.end >= 0
  target = s.via[problems, s.end]
  former = s.query_of[problems, target]
  here = _at(s.end, s.target_of.shape[1]) & flips[:, None]
  there = _at(target, s.query_of.shape[1]) & flips[:, None]
  return s._replace(
    target_of=jnp.where(here, target[:, None], s.target_of),
    query_of=jnp.where(there, s.end[:, None], s.query_of),
    end=jnp.where(flips, former, s.end),
  ), flips & (former < 0)


def _next_target(s, done, valid):
  """Problems that are `done` with a path begin that of the next target."""
  row = _first(valid & (s.query_of < 0), 1)
  return s._replace(
    row=jnp.where(done, row, s.row),
    offset=jnp.where(done, 0, s.offset),
    distance=jnp.where(done[:, None], jnp.inf, s.distance),
    seen=s.seen & ~done[:, None],
  )


def _at(index, size):
  """bool [... size]: is this the index?"""
  return index[..., None] == jnp.arange(size, dtype=index.dtype)


def _first(hits, axis):
  """int32: the first index along an axis where there is a hit, or -1.

  A minimum is a loop that CPUs vectorise, and argmax is not.
  """
  size = hits.shape[axis]
  at = jnp.where(hits, lax.broadcasted_iota(jnp.int32, hits.shape, axis), size)
  first = at.min(axis)
  return jnp.where(first < size, first, -1)
