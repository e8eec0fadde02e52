"""The TPU's splash attention kernel, with foreign blocks skipped.

The stock kernel masks by segment ids but visits every block. Which blocks of a
row can share an id follows from the ids, so we hand the kernel a block mask
that is computed and not a constant, and it skips what is foreign.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel,
  splash_attention_mask_info,
)
from jaxtyping import Array, Float, Int

# Padding and what fills up blocks go behind the images: ids stay sorted.
_PADDING = jnp.iinfo(jnp.int32).max - 1
_FILLER = _PADDING + 1
_ALL_MAY_ATTEND = 2  # The kernel's code for a block without a mask of its own.


def refusal(
  q: Array | jax.ShapeDtypeStruct, k: Array | jax.ShapeDtypeStruct
) -> str | None:
  """What the kernel needs and does not get, or None if it can run."""
  if q.shape[1] != k.shape[1]:
    return f"self-attention, not {q.shape[1]} queries on {k.shape[1]} keys"
  if q.dtype not in (jnp.bfloat16, jnp.float32):
    return f"bfloat16 or float32, not {q.dtype}"
  return None


def splash_attention(
  q: Float[Array, "b l k d"],
  k: Float[Array, "b l k d"],
  v: Float[Array, "b l k d"],
  segment_ids: Int[Array, "b l"],
  *,
  interpret: bool,
) -> Float[Array, "b l k d"]:
  """Self-attention between equal ids, as attention.py defines it.

  Rows are lengthened to whole blocks: of 128 tokens below rows of 2,048, where
  larger blocks would skip nothing, of 256 from there on.

  Args:
    q: queries; they are scaled by 1/sqrt(d) here.
    k: keys.
    v: values.
    segment_ids: the tokens' ids.
    interpret: run the kernel in plain JAX, off a TPU: right, and so slow that
      it is for tests only.
  """
  length = q.shape[1]
  block = 256 if length >= 2048 else 128
  extra = -length % block

  def heads_first(x):
    return jnp.pad(x, ((0, 0), (0, extra), (0, 0), (0, 0))).swapaxes(1, 2)

  ids = jnp.where(segment_ids == 0, _PADDING, segment_ids).astype(jnp.int32)
  ids = jnp.pad(ids, ((0, 0), (0, extra)), constant_values=_FILLER)
  rows = *map(heads_first, (q * q.shape[-1] ** -0.5, k, v)), ids
  out = jax.lax.map(lambda row: _row(*row, block, interpret), rows)
  return out.swapaxes(1, 2)[:, :length]


def _row(q, k, v, ids, block, interpret):
  """One row, [k l d] and [l]."""
  sizes = splash_attention_kernel.BlockSizes(
    block_q=block,
    block_kv=block,
    block_kv_compute=block,
    block_q_dkv=block,
    block_kv_dkv=block,
    block_kv_dkv_compute=block,
    block_q_dq=block,
    block_kv_dq=block,
  )
  by_query, by_key = _visits(ids, block)
  kernel = splash_attention_kernel.SplashAttentionKernel(
    by_query,
    by_query,
    by_key,
    block_sizes=sizes,
    is_mqa=False,
    save_residuals=False,
    mask_value=splash_attention_kernel.DEFAULT_MASK_VALUE,
    attn_logits_soft_cap=None,
    residual_checkpoint_name="attn_out",
    mask_function=None,
    interpret=interpret,
  )
  segments = splash_attention_kernel.SegmentIds(ids, ids)
  return kernel(q, k, v, segment_ids=segments)


def _visits(ids, block):
  """The kernel's block masks, for its sweeps over queries and over keys.

  Two blocks can share an id only if their ranges of ids overlap. A skipped
  step points at a block that is resident anyway, so that nothing is fetched.
  """
  ids = ids.reshape(-1, block)
  low, high = ids.min(1), ids.max(1)
  meet = (low[:, None] <= high) & (low <= high[:, None])

  def info(axis):
    count = meet.shape[axis]
    index = jax.lax.broadcasted_iota(jnp.int32, meet.shape, axis)
    first = jnp.where(meet, index, count).min(axis, keepdims=True)
    last = jnp.where(meet, index, -1).max(axis, keepdims=True)
    return splash_attention_mask_info.MaskInfo(
      data_next=jnp.clip(index, first, last)[None],
      mask_next=None,
      block_mask=jnp.where(meet, _ALL_MAY_ATTEND, 0)[None].astype(jnp.int32),
      partial_mask_blocks=None,
      q_sequence=None,
      is_dynamic_mask=True,
    )

  return info(1), info(0)
