"""What a loss computes on each device's own rows of the batch."""

import math
from collections.abc import Callable, Sequence

import jax
from jax.sharding import PartitionSpec as P

from big_vision_like.api import BATCH_AXES


def batch_axes() -> tuple[str, ...]:
  """The axes of the current mesh that share the batch; none without a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  return tuple(axis for axis in BATCH_AXES if axis in mesh.axis_names)


def count() -> int:
  """How many parts the current mesh cuts a batch into."""
  mesh = jax.sharding.get_abstract_mesh()
  return math.prod(mesh.shape[axis] for axis in batch_axes())


def by_device(fn: Callable, inputs: Sequence[int], outputs: int) -> Callable:
  """`fn` of arrays, run by every device on its rows alone.

  Args:
    fn: never mixes rows of the batch.
    inputs: which dimension of each argument is the batch.
    outputs: which one it is in all results.
  """
  axes = batch_axes()
  if not axes:
    return fn
  spec = lambda dim: P(*[None] * dim, axes)
  return jax.shard_map(
    fn,
    in_specs=tuple(map(spec, inputs)),
    out_specs=spec(outputs),
    check_vma=False,
  )


def check_rows(rows: int, what: str) -> None:
  """Refuses rows that the mesh does not share evenly.

  Raises:
    ValueError: naming the axes.
  """
  if rows % count():
    mesh = jax.sharding.get_abstract_mesh()
    sizes = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in batch_axes())
    raise ValueError(
      f"{what} of {rows} rows cannot be shared evenly by the {count()} devices "
      f"of the mesh axes {sizes}."
    )
