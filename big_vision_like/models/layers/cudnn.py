"""cuDNN's variable-length attention, for Hopper GPUs and later.

JAX offers it in a private function only, so everything that may move with a
version of JAX is in this file.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def refusal(
  q: Array | jax.ShapeDtypeStruct, k: Array | jax.ShapeDtypeStruct
) -> str | None:
  """What cuDNN needs and does not get, or None if it can run."""
  if q.shape[1] != k.shape[1]:
    return f"self-attention, not {q.shape[1]} queries on {k.shape[1]} keys"
  if q.dtype not in (jnp.bfloat16, jnp.float16):
    return f"bfloat16 or float16, not {q.dtype}"
  if q.shape[-1] % 8 or q.shape[-1] > 256:
    return f"heads of a multiple of 8 and at most 256, not {q.shape[-1]}"
  return device_refusal()


def device_refusal() -> str | None:
  """What cuDNN needs of this machine and of JAX, or None."""
  if jax.default_backend() != "gpu":
    return f"a GPU; this is a {jax.default_backend()}"
  device = jax.local_devices()[0]
  capability = getattr(device, "compute_capability", "0.0")
  if float(capability) < 9:
    return f"a Hopper GPU (9.0) or later; this is a {capability}"
  try:
    _private()
  except ImportError:
    return f"a function that JAX {jax.__version__} no longer has"
  return None


def _private():
  from jax._src.cudnn import fused_attention_stablehlo

  return fused_attention_stablehlo


def cudnn_attention(
  q: Float[Array, "b l k d"],
  k: Float[Array, "b l k d"],
  v: Float[Array, "b l k d"],
  segment_ids: Int[Array, "b l"],
  *,
  max_segments: int | None,
) -> Float[Array, "b l k d"]:
  """Self-attention between equal ids, as attention.py defines it.

  Here alone the tokens of one id have to be neighbours.

  Args:
    q: queries; they are scaled by 1/sqrt(d) here.
    k: keys.
    v: values.
    segment_ids: the tokens' ids.
    max_segments: the most ids above 0 in a row, by default its length.
  """
  # Padding is one more sequence, so that its output is defined too.
  sequences = 1 + (q.shape[1] if max_segments is None else max_segments)
  lengths, starts = runs(segment_ids, sequences)
  private = _private()
  return private.dot_product_attention(
    q,
    k,
    v,
    q_seqlen=lengths,
    kv_seqlen=lengths,
    q_offsets=starts,
    kv_offsets=starts,
    scale=q.shape[-1] ** -0.5,
    mask_type=private.MaskType.PADDING,
  )


def runs(
  segment_ids: Int[Array, "b l"], count: int
) -> tuple[Int[Array, "b n"], Int[Array, "b n_plus_1"]]:
  """Lengths of the runs of equal ids, and where they start; -1 where none is.

  `count` runs a row at most; the starts have one more entry, as cuDNN's do.
  """
  change = segment_ids[:, 1:] != segment_ids[:, :-1]
  run = jnp.pad(jnp.cumsum(change, 1, dtype=jnp.int32), ((0, 0), (1, 0)))
  row = jnp.arange(segment_ids.shape[0])[:, None]
  lengths = jnp.zeros((len(row), count + 1), jnp.int32).at[row, run].add(1)
  starts = jnp.cumsum(lengths, 1, dtype=jnp.int32) - lengths
  used = lengths > 0
  starts = jnp.where(used, starts, -1)
  return jnp.where(used, lengths, -1)[:, :count], starts
