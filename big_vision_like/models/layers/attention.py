"""Softmax attention, for single images and for packed rows: one function.

Rows that hold several images carry segment ids, and tokens attend where ids
are equal. Which program computes that is the `backend`:

  xla        the whole score matrix under a mask; any platform, any mask
  blockwise  blockwise.py: pure JAX, memory O(L), skips foreign blocks
  splash     splash.py: the TPU kernel, skips foreign blocks
  cudnn      cudnn.py: variable-length attention on Hopper GPUs and later
  auto       the fastest of them for the platform and shapes, see `choose`

All give the same numbers, for every id including 0, which marks padding.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from big_vision_like.api import BATCH_AXES
from big_vision_like.models.layers import blockwise, cudnn, splash

BACKENDS = ("auto", "xla", "blockwise", "splash", "cudnn")
# Finite, so that no softmax ever sees a row of -inf.
_LOWEST = -1e30
_CPU_GROUPS = 4


def attention(
  q: Float[Array, "b l k d"],
  k: Float[Array, "b s k d"],
  v: Float[Array, "b s k d"],
  *,
  segment_ids: Int[Array, "b l"] | None = None,
  kv_segment_ids: Int[Array, "b s"] | None = None,
  mask: Bool[Array, "#b #k #l #s"] | None = None,
  backend: str = "auto",
  max_segments: int | None = None,
) -> Float[Array, "b l k d"]:
  """softmax(q kᵀ / sqrt(d)) v, each query over the keys that it may see.

  The softmax is computed in float32 (in float64 for float64 inputs). A query
  that may see no key at all, such as that of an empty image slot, gets 0.

  Args:
    q: queries.
    k: keys.
    v: values.
    segment_ids: the queries' ids; None: all attend to all. A query sees the
      keys with its own id; padding has id 0 and so sees only padding.
    kv_segment_ids: the keys' ids, if the keys are not the queries' tokens.
    mask: True where a query may see a key; of the backends, xla takes it.
    backend: one of BACKENDS.
    max_segments: the most ids above 0 that a row can hold. cudnn works on that
      many sequences a row, by default on one for each token.

  Raises:
    ValueError: for an unknown backend, or one that cannot do what is asked.
  """
  if backend not in BACKENDS:
    raise ValueError(
      f"Unknown attention backend {backend!r}. There are: "
      f"{', '.join(BACKENDS)}."
    )
  if kv_segment_ids is None:
    if segment_ids is not None and q.shape[1] != k.shape[1]:
      raise ValueError(
        f"{q.shape[1]} queries and {k.shape[1]} keys: segment_ids alone are "
        "for self-attention; give kv_segment_ids too."
      )
    kv_segment_ids = segment_ids
  if (segment_ids is None) != (kv_segment_ids is None):
    raise ValueError("kv_segment_ids need the queries' segment_ids.")
  if backend == "auto":
    backend = choose(q, k, packed=segment_ids is not None, mask=mask)
  if backend == "xla":
    out = _grouped(q, k, v, _allowed(segment_ids, kv_segment_ids, mask))
    return checkpoint_name(out, "attn_out")
  if mask is not None:
    raise ValueError(
      f"Attention backend {backend!r} takes segment ids and no mask; use xla."
    )
  if segment_ids is None:
    segment_ids = jnp.zeros(q.shape[:2], jnp.int32)
    kv_segment_ids = jnp.zeros(k.shape[:2], jnp.int32)
  kernel = _kernel(backend, q, k, max_segments)
  return _sharded(kernel, q, k, v, segment_ids, kv_segment_ids)


def attention_weights(
  q: Float[Array, "b l k d"],
  k: Float[Array, "b s k d"],
  *,
  segment_ids: Int[Array, "b l"] | None = None,
  mask: Bool[Array, "#b #k #l #s"] | None = None,
) -> Float[Array, "b k l s"]:
  """What self-`attention` multiplies the values by, whatever its backend.

  float32 at least. The arguments are those of `attention`.
  """
  return _weights(q, k, _allowed(segment_ids, segment_ids, mask))


def choose(
  q: Array | jax.ShapeDtypeStruct,
  k: Array | jax.ShapeDtypeStruct,
  *,
  packed: bool,
  mask: Array | None,
) -> str:
  """What "auto" stands for.

  A mask goes to xla, and so do few scores, up to 512 x 512 a head; on a CPU up
  to 1,024 x 1,024 where no foreign blocks can be skipped. More scores go to
  the platform's kernel if it takes these shapes and dtypes, else to blockwise.
  """
  if mask is not None:
    return "xla"
  platform = target_platform()
  skips = packed and q.shape[1] == k.shape[1]
  side = 1024 if platform == "cpu" and not skips else 512
  if q.shape[1] * k.shape[1] <= side**2:
    return "xla"
  if platform == "tpu" and splash.refusal(q, k) is None:
    return "splash"
  if platform == "gpu" and cudnn.refusal(q, k) is None:
    return "cudnn"
  return "blockwise"


def target_platform() -> str:
  """The platform of the mesh that is set, which may be one we only compile
  for, or else the default backend's: cpu, gpu or tpu."""
  device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
  return getattr(device, "platform", None) or jax.default_backend()


def _kernel(backend, q, k, max_segments):
  """The function of (q, k, v, ids, ids of the keys) for one shard."""
  platform = target_platform()
  if backend == "blockwise":
    # A CPU's cache likes small blocks, and skipping likes single rows.
    sizes = (64, 1) if platform == "cpu" else (128, None)
    return functools.partial(
      blockwise.blockwise_attention, block=sizes[0], rows=sizes[1]
    )
  module = {"splash": splash, "cudnn": cudnn}[backend]
  reason = module.refusal(q, k)
  if reason:
    raise ValueError(f"Attention backend {backend!r} needs {reason}.")
  if backend == "splash":
    kernel = functools.partial(
      splash.splash_attention, interpret=platform != "tpu"
    )
  else:
    kernel = functools.partial(cudnn.cudnn_attention, max_segments=max_segments)
  return lambda q, k, v, ids, kv_ids: kernel(q, k, v, ids)


def batch_axes(rows: int) -> tuple[str, ...]:
  """The mesh axes that split a batch of `rows`; none without a mesh.

  None either inside a shard_map, and where the rows do not divide, as those
  need not that only initialise a model.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if AxisType.Manual in mesh.axis_types:
    return ()
  axes = tuple(a for a in BATCH_AXES if a in mesh.axis_names)
  return () if rows % math.prod(mesh.shape[a] for a in axes) else axes


def _allowed(segment_ids, kv_segment_ids, mask):
  """The mask [b 1|k l s], or None where every query sees every key."""
  if segment_ids is None:
    return mask
  same = segment_ids[:, None, :, None] == kv_segment_ids[:, None, None, :]
  return same if mask is None else same & mask


def _grouped(q, k, v, mask):
  """`_xla`, on a CPU in groups of rows that do not depend on each other.

  XLA computes a batched product of small matrices on one core of a CPU, but
  independent products side by side: two cores took 0.75 of the time.
  """
  groups = min(_CPU_GROUPS, q.shape[0])
  one_device = jax.sharding.get_abstract_mesh().size <= 1
  if target_platform() != "cpu" or not one_device or groups == 1:
    return _xla(q, k, v, mask)
  if mask is not None:
    mask = jnp.broadcast_to(mask, (q.shape[0], *mask.shape[1:]))
  parts = (
    [None] * groups if x is None else jnp.array_split(x, groups)
    for x in (q, k, v, mask)
  )
  return jnp.concatenate([_xla(*part) for part in zip(*parts)])


def _xla(q, k, v, mask):
  """Materialises the scores, heads before tokens: no product transposes."""
  dtype = jnp.promote_types(q.dtype, jnp.float32)
  p, v = _weights(q, k, mask).astype(v.dtype), v.swapaxes(1, 2)
  out = jnp.einsum("bkls,bksd->bkld", p, v, preferred_element_type=dtype)
  return out.swapaxes(1, 2).astype(q.dtype)


def _weights(q, k, mask):
  dtype = jnp.promote_types(q.dtype, jnp.float32)
  q = (q * q.shape[-1] ** -0.5).swapaxes(1, 2)
  k = k.transpose(0, 2, 3, 1)
  s = jnp.einsum("bkld,bkds->bkls", q, k, preferred_element_type=dtype)
  if mask is not None:
    s = jnp.where(mask, s, _LOWEST)
  p = jnp.exp(s - jax.lax.stop_gradient(s.max(-1, keepdims=True)))
  if mask is not None:
    p = jnp.where(mask, p, 0)
  total = p.sum(-1, keepdims=True)
  return p / jnp.where(total == 0, 1, total)


def _sharded(kernel, q, k, v, ids, kv_ids):
  """Runs per shard of the batch and of the heads, if a mesh is set.

  Kernels cannot be partitioned by the compiler, and blockwise skips more where
  it looks at the rows of one device only.
  """
  batch = batch_axes(q.shape[0])
  if not batch:
    return kernel(q, k, v, ids, kv_ids)
  shape = jax.sharding.get_abstract_mesh().shape
  split_heads = "tensor" in shape and q.shape[2] % shape["tensor"] == 0
  heads = "tensor" if split_heads else None
  rows, tokens = P(batch, None), P(batch, None, heads, None)
  return jax.shard_map(
    kernel,
    in_specs=(tokens, tokens, tokens, rows, rows),
    out_specs=tokens,
    check_vma=False,
  )(q, k, v, ids, kv_ids)
