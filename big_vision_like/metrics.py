"""Metrics: pytrees of sums, so that merging is addition."""

import flax
import jax.numpy as jnp

from big_vision_like.api import Array


@flax.struct.dataclass
class Mean:
  """A weighted mean as (total, count); an empty one computes to 0."""

  total: Array
  count: Array

  @classmethod
  def of(cls, values: Array, mask: Array | None = None) -> "Mean":
    """Mean of `values` where `mask` (broadcast to values) is True."""
    values = jnp.asarray(values, jnp.float32)
    if mask is None:
      return cls(values.sum(), jnp.asarray(values.size, jnp.float32))
    mask = jnp.broadcast_to(mask, values.shape)
    total = jnp.where(mask, values, 0.0).sum()
    return cls(total, mask.sum(dtype=jnp.float32))

  def merge(self, other: "Mean") -> "Mean":
    return Mean(self.total + other.total, self.count + other.count)

  def compute(self) -> Array:
    return self.total / jnp.maximum(self.count, 1.0)
