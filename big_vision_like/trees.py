"""Parameter paths and the one rule language over them.

A rule list is `[(regex, value), ...]`: the first regex that matches a
parameter's whole path ("blocks/mlp/fc1/kernel") gives its value, and a
parameter that no rule covers is an error. Learning rates, weight decay,
freezing, sharding and initialisation from a checkpoint all use it.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from big_vision_like.api import PyTree

Rules = Sequence[tuple[str, Any]]


def path_name(path: tuple[Any, ...]) -> str:
  """ "a/b/0" for a key path of `jax.tree_util`."""
  return "/".join(
    str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k))))
    for k in path
  )


def flatten(tree: PyTree) -> dict[str, Any]:
  """The leaves by path, in tree order."""
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {path_name(path): leaf for path, leaf in leaves}


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
  """Nested dicts from leaves by path; the inverse of `flatten` on dicts."""
  tree: dict[str, Any] = {}
  for name, leaf in flat.items():
    *parents, last = name.split("/")
    node = tree
    for key in parents:
      node = node.setdefault(key, {})
    node[last] = leaf
  return tree


def match(name: str, rules: Rules, section: str) -> Any:
  """The value of the first rule whose regex matches all of `name`."""
  for regex, value in rules:
    if re.fullmatch(regex, name):
      return value
  raise ValueError(
    f"No rule of {section} covers the parameter {name!r}. The rules are "
    f"{[r for r, _ in rules]}; end the list with ('.*', default)."
  )


def map_rules(tree: PyTree, rules: Rules, section: str) -> PyTree:
  """A tree like `tree` that holds each leaf's rule value."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: match(path_name(path), rules, section), tree
  )


def frozen_mask(params: PyTree, frozen: Sequence[str]) -> PyTree:
  """A tree like `params`: True where a regex matches the whole path.

  Raises:
    ValueError: if a regex matches nothing, since a misspelt one would train
      what was meant to stay; or if nothing is left to train.
  """
  names = list(flatten(params))
  for regex in frozen:
    if not any(re.fullmatch(regex, k) for k in names):
      tops = dict.fromkeys(k.split("/")[0] + "/..." for k in names)
      raise ValueError(
        f"config.optim.frozen: {regex!r} matches no parameter. It has to match "
        f"a whole path; the paths are {', '.join(tops)}."
      )
  rules = (*((regex, True) for regex in frozen), (".*", False))
  mask = map_rules(params, rules, "config.optim.frozen")
  if all(jax.tree.leaves(mask)):
    raise ValueError(
      f"config.optim.frozen = {list(frozen)} leaves no parameter to train."
    )
  return mask


def split(params: PyTree, frozen: Sequence[str]) -> tuple[PyTree, PyTree]:
  """(trained, frozen): trees like `params`, each with None for the other's.

  None is a tree without leaves, so whatever maps over one part sees nothing
  of the other. `merge` puts them together again.
  """
  mask = frozen_mask(params, frozen)
  return (
    jax.tree.map(lambda x, stays: None if stays else x, params, mask),
    jax.tree.map(lambda x, stays: x if stays else None, params, mask),
  )


def merge(trained: PyTree, frozen: PyTree) -> PyTree:
  """The inverse of `split`."""
  return jax.tree.map(
    lambda x, y: y if x is None else x,
    trained,
    frozen,
    is_leaf=lambda x: x is None,
  )


def count(tree: PyTree) -> int:
  """Number of scalars in all leaves."""
  return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


def overview(params: PyTree) -> str:
  """One line a parameter: path, shape, dtype, size; then the total."""
  flat = flatten(params)
  width = max(map(len, flat), default=0)
  lines = [
    f"{name:{width}}  {tuple(x.shape)!s:24} {x.dtype.name:9} {count(x):>12,}"
    for name, x in flat.items()
  ]
  return "\n".join([*lines, f"{'total':{width}}  {count(params):>48,}"])
