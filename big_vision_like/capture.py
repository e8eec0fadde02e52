"""Reads what is inside a model: attention maps and features, layer by layer.

A model sows them into `api.INTERMEDIATES`, which costs nothing unless someone
asks for that collection:

  maps         float32 [b,K,Q,S], the weights that meet the values; b is B, or
               B times the windows of an image, all of an image's one after the
               other. Sown more than once in a layer: its heads, in order
  softmax      likewise, where maps are mixed before they meet the values
  features     [b,...,D], the output of a block
  segment_ids  int32 [B,S], beside them where rows are packed

A model from outside does the same with `nn.Module.sow` to be measured.
"""

import dataclasses
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from big_vision_like import api


@dataclasses.dataclass(frozen=True)
class Layer:
  """What one layer has lent.

  Attributes:
    name: its path, with a number of its own for each layer of a scan.
    values: maps [B,G,K,Q,S], of G windows an image, or features [B,S,D].
    members: bool [B,M,S], which tokens are those of which image; unpacked
      batches have M = 1.
  """

  name: str
  values: Float[Array, "b ..."]
  members: Bool[Array, "b m s"]


def run(
  model: nn.Module,
  task: api.Task,
  state: api.TrainState,
  batch: api.Batch,
  static: api.Static = (),
) -> api.PyTree:
  """The intermediates of a forward pass in evaluation.

  Read them where it is traced: keys that have left a jit are sorted, and the
  order of the layers is lost.
  """
  inputs, _ = task.prepare(batch, None)
  _, lent = model.apply(
    state.variables(),
    train=False,
    mutable=[api.INTERMEDIATES],
    **inputs,
    **dict(static),
  )
  return lent.get(api.INTERMEDIATES, {})


def images(batch: api.Batch) -> Bool[Array, "b m"]:
  """Where in a batch there are images."""
  return batch.get("example_mask", batch["_mask"][:, None])


def maps(
  intermediates: api.PyTree, batch: api.Batch, *, softmax: bool = False
) -> list[Layer]:
  """The attention maps of all layers, first to last; [] if it lends none.

  Args:
    intermediates: from `run`.
    batch: which was run.
    softmax: take those before heads are mixed, where a layer mixes them.
  """
  found = _find(intermediates, "maps")
  if softmax:
    found |= _find(intermediates, "softmax")
  layers = []
  for name, heads in found.items():
    x = jnp.concatenate(heads, 1).astype(jnp.float32)
    x = x.reshape(len(batch["_mask"]), -1, *x.shape[1:])
    members = _members(intermediates, batch, name, x.shape[-1])
    layers.append(Layer(name, x, members))
  return layers


def features(intermediates: api.PyTree, batch: api.Batch) -> list[Layer]:
  """The outputs of all blocks, first to last; see `maps`."""
  layers = []
  for name, (x,) in _find(intermediates, "features").items():
    x = x.astype(jnp.float32).reshape(len(batch["_mask"]), -1, x.shape[-1])
    members = _members(intermediates, batch, name, x.shape[1])
    layers.append(Layer(name, x, members))
  return layers


def _members(intermediates, batch, name, tokens) -> Bool[Array, "b m s"]:
  ids = _find(intermediates, "segment_ids").get(name)
  if ids is None:
    return jnp.ones((len(batch["_mask"]), 1, tokens), bool)
  slots = jnp.arange(1, images(batch).shape[1] + 1)
  return ids[0][:, None, :] == slots[:, None]


def by_layer(layers: Iterable[tuple[str, Any]]) -> dict[str, Any]:
  """(name, value) pairs as a dict that jit, which sorts keys, keeps in order.

  `layer_name` gives the name of a key.
  """
  return {f"{i:03} {name}": value for i, (name, value) in enumerate(layers)}


def layer_name(key: str) -> str:
  return key.partition(" ")[2]


def _find(tree: api.PyTree, name: str) -> dict[str, list[Array]]:
  """What was sown under a name, by the path of who sowed it."""
  found = {}
  for path, sown in _walk(tree, name):
    if api.SCANNED not in path:
      found["/".join(path)] = list(sown)
      continue
    at = path.index(api.SCANNED)
    for i in range(len(sown[0])):
      layer = (*path[:at], f"{api.SCANNED}_{i}", *path[at + 1 :])
      found["/".join(layer)] = [x[i] for x in sown]
  return found


def _walk(
  tree: api.PyTree, name: str, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], tuple[Array, ...]]]:
  # flax keeps the order in which layers ran.
  for key, value in tree.items():
    if key == name:
      yield path, value
    elif isinstance(value, dict):
      yield from _walk(value, name, (*path, key))


def total(
  measure: Callable[[api.Batch], dict[str, Any]],
  batches: Iterable[tuple[api.Batch, dict[str, Any]]],
) -> dict[str, Any]:
  """The sum of what `measure` gives for each batch.

  Raises:
    ValueError: if there is no batch.
  """
  summed = None
  for batch, _ in batches:
    found = measure(batch)
    summed = (
      found if summed is None else jax.tree.map(operator.add, summed, found)
    )
  if summed is None:
    raise ValueError(
      "There is nothing to evaluate: the evaluation data has no example. Look "
      "at its split and limit in config.evals."
    )
  return summed
