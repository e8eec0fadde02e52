"""Attention between equal ids in pure JAX: memory O(L), foreign blocks skipped.

The softmax is computed online over blocks of keys (Rabe and Staats, arXiv
2112.05682; Dao et al., arXiv 2205.14135), and its own backward pass recomputes
the scores. What packing adds: a block of queries visits only the blocks of
keys that can hold one of its ids, so a row of many images costs what its
images cost and not what its length would.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

# Ids sort as the tokens do: images 1..M, padding, then what fills up blocks.
# Fillers of queries and of keys differ, so that nothing attends to a filler.
_PADDING = jnp.iinfo(jnp.int32).max - 2
_QUERY_FILLER = _PADDING + 1
_KEY_FILLER = _PADDING + 2
# Finite, so that the difference of two maxima of nothing is 0 and not NaN.
_LOWEST = -1e30


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Static sizes: queries and keys a block, batch rows worked on at once."""

  q: int
  kv: int
  rows: int


def blockwise_attention(
  q: Float[Array, "b l k d"],
  k: Float[Array, "b s k d"],
  v: Float[Array, "b s k d"],
  segment_ids: Int[Array, "b l"],
  kv_segment_ids: Int[Array, "b s"],
  *,
  block: int = 128,
  rows: int | None = None,
) -> Float[Array, "b l k d"]:
  """Each query attends to the keys that carry its id; any length, any dtype.

  Right for every arrangement of ids, fast where equal ids are neighbours. A
  query whose id no key carries gets 0. Statistics and sums are kept in
  float32, or in float64 for float64 inputs.

  Args:
    q: queries; they are scaled by 1/sqrt(d) here.
    k: keys.
    v: values.
    segment_ids: the queries' ids; 0, as any id, sees only itself.
    kv_segment_ids: the keys' ids.
    block: queries, and keys, a block.
    rows: batch rows that share one loop. Their blocks are visited together, so
      few rows skip more and many rows fill a wide device. They divide b; all
      by default.
  """
  batch, q_len, _, depth = q.shape
  sizes = Blocks(min(block, q_len), min(block, k.shape[1]), rows or batch)
  q_ids = _fill(_sortable(segment_ids), 1, sizes.q, _QUERY_FILLER)
  k_ids = _fill(_sortable(kv_segment_ids), 1, sizes.kv, _KEY_FILLER)
  q, k, v = (
    _fill(x.swapaxes(1, 2), 2, size, 0)
    for x, size in ((q, sizes.q), (k, sizes.kv), (v, sizes.kv))
  )
  out = _attend(q * depth**-0.5, k, v, q_ids, k_ids, sizes)
  return out[:, :, :q_len].swapaxes(1, 2)


def _sortable(ids):
  return jnp.where(ids == 0, _PADDING, ids).astype(jnp.int32)


def _fill(x, axis, block, value):
  """Lengthens an axis to a whole number of blocks."""
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, -x.shape[axis] % block)
  return jnp.pad(x, widths, constant_values=value)


def _visits(ids, other, block, other_block, rows):
  """Which blocks of `other` the blocks of `ids` need: [first, last), [n].

  Two blocks can share an id only if their ranges of ids overlap, whatever the
  order of the ids; n counts groups of `rows` rows, and blocks within them.
  """

  def ranges(x, size):
    x = x.reshape(x.shape[0] // rows, rows, -1, size)
    return x.min(-1), x.max(-1)

  low, high = ranges(ids, block)
  other_low, other_high = ranges(other, other_block)
  meet = (low[..., :, None] <= other_high[..., None, :]) & (
    other_low[..., None, :] <= high[..., :, None]
  )
  meet = meet.any(1)  # group, block, other block
  count = meet.shape[-1]
  index = jnp.arange(count, dtype=jnp.int32)
  first = jnp.where(meet, index, count).min(-1)
  last = jnp.where(meet, index + 1, 0).max(-1)
  return first.reshape(-1), last.reshape(-1)


def _start(x, group, i, rows, block):
  """Where the i-th block of a group of rows begins; tokens are on axis -2.

  All indices get one dtype, which float64 programs would else mix.
  """
  index = (
    (group * rows, 0, i * block, 0) if x.ndim > 2 else (group * rows, i * block)
  )
  return [jnp.asarray(n, jnp.int32) for n in index[: x.ndim]]


def _take(x, group, i, rows, block):
  shape = (rows, block) if x.ndim == 2 else (rows, x.shape[1], block)
  return lax.dynamic_slice(
    x, _start(x, group, i, rows, block), shape + x.shape[3:]
  )


def _put(x, block, group, i):
  start = _start(x, group, i, block.shape[0], block.shape[2])
  return lax.dynamic_update_slice(x, block.astype(x.dtype), start)


def _same(q_ids, k_ids):
  return q_ids[:, None, :, None] == k_ids[:, None, None, :]


def _dot(subscripts, a, b, dtype):
  return jnp.einsum(subscripts, a, b, preferred_element_type=dtype)


def _forward(q, k, v, q_ids, k_ids, sizes):
  """Output and log-sum-exp of the scores, [b k l d] and [b k l]."""
  batch, heads, q_len, _ = q.shape
  dtype = jnp.promote_types(q.dtype, jnp.float32)
  blocks = q_len // sizes.q
  first, last = _visits(q_ids, k_ids, sizes.q, sizes.kv, sizes.rows)

  def query_block(n, carry):
    out, lse = carry
    group, i = n // blocks, n % blocks
    q_i = _take(q, group, i, sizes.rows, sizes.q)
    ids_i = _take(q_ids, group, i, sizes.rows, sizes.q)

    def key_block(j, carry):
      top, total, acc = carry
      k_j, v_j = (_take(x, group, j, sizes.rows, sizes.kv) for x in (k, v))
      ids_j = _take(k_ids, group, j, sizes.rows, sizes.kv)
      same = _same(ids_i, ids_j)
      s = jnp.where(same, _dot("bkld,bksd->bkls", q_i, k_j, dtype), _LOWEST)
      new_top = jnp.maximum(top, s.max(-1))
      p = jnp.where(same, jnp.exp(s - new_top[..., None]), 0)
      shrink = jnp.exp(top - new_top)
      update = _dot("bkls,bksd->bkld", p.astype(v.dtype), v_j, dtype)
      return (
        new_top,
        total * shrink + p.sum(-1),
        acc * shrink[..., None] + update,
      )

    rows = (sizes.rows, heads, sizes.q)
    top, total, acc = lax.fori_loop(
      first[n],
      last[n],
      key_block,
      (
        jnp.full(rows, _LOWEST, dtype),
        jnp.zeros(rows, dtype),
        jnp.zeros((*rows, q.shape[-1]), dtype),
      ),
    )
    total = jnp.where(total == 0, 1, total)
    return (
      _put(out, acc / total[..., None], group, i),
      _put(lse, top + jnp.log(total), group, i),
    )

  empty = jnp.zeros_like(q), jnp.zeros(q.shape[:3], dtype)
  steps = batch // sizes.rows * blocks
  return lax.fori_loop(0, steps, query_block, empty)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q, k, v, q_ids, k_ids, sizes):
  return _forward(q, k, v, q_ids, k_ids, sizes)[0]


def _attend_fwd(q, k, v, q_ids, k_ids, sizes):
  out, lse = _forward(q, k, v, q_ids, k_ids, sizes)
  # Named here, where the backward pass reads them: a remat policy that saves
  # these names does not run the loops again.
  out = checkpoint_name(out, "attn_out")
  lse = checkpoint_name(lse, "attn_lse")
  return out, (q, k, v, q_ids, k_ids, out, lse)


def _attend_bwd(sizes, residuals, g):
  """One sweep over blocks of keys; the queries' gradient is summed in place."""
  q, k, v, q_ids, k_ids, out, lse = residuals
  dtype = lse.dtype
  blocks = k.shape[2] // sizes.kv
  first, last = _visits(k_ids, q_ids, sizes.kv, sizes.q, sizes.rows)
  # The part of the softmax's gradient that all keys of a query share.
  shared = jnp.einsum("bkld,bkld->bkl", g, out, preferred_element_type=dtype)

  def key_block(n, carry):
    dq, dk, dv = carry
    group, j = n // blocks, n % blocks
    k_j, v_j = (_take(x, group, j, sizes.rows, sizes.kv) for x in (k, v))
    ids_j = _take(k_ids, group, j, sizes.rows, sizes.kv)

    def query_block(i, carry):
      dq, dk_j, dv_j = carry
      q_i, g_i, dq_i, lse_i, shared_i, ids_i = (
        _take(x, group, i, sizes.rows, sizes.q)
        for x in (q, g, dq, lse, shared, q_ids)
      )
      s = _dot("bkld,bksd->bkls", q_i, k_j, dtype)
      p = jnp.exp(s - lse_i[..., None])
      p = jnp.where(_same(ids_i, ids_j), p, 0)
      dp = _dot("bkld,bksd->bkls", g_i, v_j, dtype)
      ds = (p * (dp - shared_i[..., None])).astype(q.dtype)
      dq_i += _dot("bkls,bksd->bkld", ds, k_j, dtype)
      dk_j += _dot("bkls,bkld->bksd", ds, q_i, dtype)
      dv_j += _dot("bkls,bkld->bksd", p.astype(g.dtype), g_i, dtype)
      return _put(dq, dq_i, group, i), dk_j, dv_j

    zeros = jnp.zeros(k_j.shape, dtype)
    dq, dk_j, dv_j = lax.fori_loop(
      first[n], last[n], query_block, (dq, zeros, zeros)
    )
    return dq, _put(dk, dk_j, group, j), _put(dv, dv_j, group, j)

  steps = q.shape[0] // sizes.rows * blocks
  empty = jnp.zeros(q.shape, dtype), jnp.zeros_like(k), jnp.zeros_like(v)
  dq, dk, dv = lax.fori_loop(0, steps, key_block, empty)
  return dq.astype(q.dtype), dk, dv, None, None


_attend.defvjp(_attend_fwd, _attend_bwd)
