"""The speed of bare matrix products, above which no model can get."""

import jax
import jax.numpy as jnp

from big_vision_like.benchmarks import measure

_PRODUCTS = 16


def of_products(side: int, dtype: str, *, repeats: int) -> float:
  """FLOP/s of products of square matrices, one after the other; the fastest."""
  x = jax.random.normal(jax.random.key(0), (side, side), dtype)

  @jax.jit
  def products(x):
    y = x
    for _ in range(_PRODUCTS):  # In a loop of XLA's, a CPU has one core.
      # Each needs the one before; the scale keeps them finite.
      y = (y @ x) * jnp.asarray(side**-0.5, dtype)
    return y

  calls = {"products": lambda: jax.block_until_ready(products(x))}
  seconds = measure.interleaved(calls, repeats=repeats).seconds["products"]
  return 2 * side**3 * _PRODUCTS / min(seconds)
