"""Starting from weights that exist: of another run, or published ones."""

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from big_vision_like import api, checkpoint, trees
from big_vision_like.weights import engine

HUB = "hf://"
# What transformers and timm call the weights of a repository.
_HUB_FILES = ("model.safetensors", "open_clip_model.safetensors")


def load(
  source: str,
  *,
  name: str,
  model: nn.Module,
  shapes: api.PyTree,
  resize: Sequence[str] = (),
) -> api.PyTree:
  """The variables that `config.init_from` names, by our paths.

  Args:
    source: a run folder or checkpoint; a file of published weights in any
      layout that weights/<name>.py knows; or "hf://org/name", whose weights
      are downloaded.
    name: of the model's file.
    model: that shall hold the weights.
    shapes: of its variables.
    resize: what may be resized to fit, see `engine.resize_ours`.

  Raises:
    ValueError: if nothing is there, or a file does not match.
  """
  if source.startswith(HUB):
    source = str(download(source))
  if Path(source).suffix not in engine.SUFFIXES:
    return engine.resize_ours(
      checkpoint.load_variables(source),
      name=name,
      model=model,
      shapes=shapes,
      resize=resize,
    )
  variables, _ = engine.to_ours(
    engine.read(source), name=name, model=model, shapes=shapes, resize=resize
  )
  return variables


def download(source: str) -> Path:
  """The file of weights of a "hf://org/name", from the hub or its cache.

  Beside it lies the repository's config.json, if there is one.

  Raises:
    ValueError: if huggingface_hub is not installed, nothing can be reached, or
      the repository has no such file.
  """
  repository = source.removeprefix(HUB)
  if repository.count("/") != 1:
    raise ValueError(f"{source}: write hf://organisation/name.")
  try:
    import huggingface_hub
  except ImportError as e:
    raise ValueError(
      f"{source} is downloaded with huggingface_hub, which is not installed: "
      "pip install 'big-vision-like[hub]'. Or give the path of a file."
    ) from e
  problems = []
  for file in _HUB_FILES:
    try:
      path = Path(huggingface_hub.hf_hub_download(repository, file))
      with contextlib.suppress(huggingface_hub.errors.EntryNotFoundError):
        huggingface_hub.hf_hub_download(repository, "config.json")
      return path
    except Exception as e:  # Of many kinds, by version and cause.
      problems.append(f"{file}: {str(e).strip().splitlines()[0]}")
  raise ValueError(
    f"{source} cannot be downloaded, and is not in the cache. Without a "
    "network, give the path of a file.\n" + "\n".join(problems)
  )


def init_from(
  params: api.PyTree, loaded: api.PyTree, *, skip: Sequence[str] = ()
) -> tuple[api.PyTree, str]:
  """Replaces fresh parameters by loaded ones of the same names and shapes.

  Args:
    params: fresh parameters; they give dtypes and shardings.
    loaded: arrays by the same paths, such as those of `load`.
    skip: regexes of whole paths: these stay fresh, and are ignored if only
      the checkpoint has them.

  Returns:
    The parameters, and a table of what was taken and what was not.

  Raises:
    ValueError: if anything outside `skip` is missing, left over or of another
      shape; it names the parameters on both sides. Also if a regex of `skip`
      matches nothing.
  """
  fresh, given = trees.flatten(params), trees.flatten(loaded)
  skipped = _matching([*fresh, *given], skip)
  here, there = (
    {k: tuple(x.shape) for k, x in flat.items() if k not in skipped}
    for flat in (fresh, given)
  )
  if here != there:
    same = sum(here[k] == there.get(k) for k in here)
    raise ValueError(
      f"config.init_from: {same} of {len(fresh)} parameters of the model match "
      "the checkpoint, and these do not.\n"
      f"{checkpoint.differences(here, there)}"
      "Regexes in config.init_skip, such as ('head/.*',), say what may stay "
      "freshly initialised."
    )
  taken = {k: _place(given[k], fresh[k]) for k in here}
  params = jax.tree_util.tree_map_with_path(
    lambda path, x: taken.get(trees.path_name(path), x), params
  )
  stays = {k: x.shape for k, x in fresh.items() if k not in taken}
  unused = {k: x.shape for k, x in given.items() if k not in taken}
  return params, (
    checkpoint.listing(f"Taken, {trees.count(taken):,} numbers", here)
    + checkpoint.listing("Freshly initialised", stays)
    + checkpoint.listing("Unused in the checkpoint", unused)
  ).rstrip()


def _matching(names: list[str], regexes: Sequence[str]) -> set[str]:
  found = {
    regex: {k for k in names if re.fullmatch(regex, k)} for regex in regexes
  }
  for regex, hits in found.items():
    if not hits:
      raise ValueError(
        f"config.init_skip: {regex!r} matches no parameter of the model or the "
        "checkpoint. It has to match a whole path."
      )
  return set().union(*found.values())


def _place(value: Any, like: Any) -> Any:
  value = np.asarray(value).astype(like.dtype)
  if not isinstance(like, jax.Array):
    return value
  return jax.make_array_from_callback(
    like.shape, like.sharding, lambda index: value[index]
  )
