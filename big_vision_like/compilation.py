"""Few compilations: a cache on disk, and a guard that reports new ones."""

import os
import tempfile
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental.compilation_cache import compilation_cache

from big_vision_like import trees
from big_vision_like.api import PyTree


def enable_compilation_cache(
  folder: str | os.PathLike[str] | None = None,
) -> str | None:
  """Makes JAX keep compiled programs on disk; returns the folder.

  Without `folder` we take JAX_COMPILATION_CACHE_DIR, else `jax` under
  $BIG_VISION_LIKE_CACHE, else ~/.cache/big_vision_like/jax. If it cannot be
  written, a warning says so, nothing is cached, and None comes back.
  """
  default = (
    os.environ.get("BIG_VISION_LIKE_CACHE") or "~/.cache/big_vision_like"
  )
  path = folder or jax.config.jax_compilation_cache_dir or Path(default) / "jax"
  path = os.path.expanduser(path)
  try:
    if "://" not in path:
      os.makedirs(path, exist_ok=True)
      with tempfile.TemporaryFile(dir=path):
        pass
  except OSError as e:
    logging.warning("No compilation cache: cannot write to %s (%s).", path, e)
    jax.config.update("jax_compilation_cache_dir", None)
    return None
  jax.config.update("jax_compilation_cache_dir", path)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
  # JAX settles at its first compilation whether there is a cache.
  compilation_cache.reset_cache()
  return path


class RecompileGuard:
  """Notices when the arguments of a jitted step make it compile once more.

  It compares the shapes, dtypes and shardings of each call with those seen, and
  the static arguments: some microseconds for a batch of ten arrays.
  """

  def __init__(
    self,
    expected: Sequence[PyTree] = (),
    statics: Sequence[Sequence[tuple[str, Hashable]]] = ((),),
  ) -> None:
    """Takes what a call may look like: nothing is said of the first of each.

    Args:
      expected: batches or their shapes and dtypes, as `pipeline.specs` gives.
      statics: the static arguments that may come with each of them.
    """
    self._seen: dict[tuple, dict[str, tuple[Any, Any]]] = {}
    self._expected = {
      (_shapes(batch), tuple(static))
      for batch in expected
      for static in statics
    }

  def check(
    self, batch: PyTree, static: Sequence[tuple[str, Hashable]] = ()
  ) -> str | None:
    """Call it before each step; a new kind of call gives a sentence.

    The sentence names the arguments that changed, against the most similar call
    before. The first call of all gives None.
    """
    signature = {k: _abstract(v) for k, v in trees.flatten(batch).items()}
    signature |= {f"static {k}": (v, None) for k, v in static}
    key = tuple(sorted(signature.items(), key=lambda item: item[0]))
    if key in self._seen:
      return None
    changes = [_differences(old, signature) for old in self._seen.values()]
    self._seen[key] = signature
    call = (_shapes(batch), tuple(static))
    if call in self._expected:
      self._expected.remove(call)
      return None
    if not changes:
      return None
    return (
      f"{'; '.join(min(changes, key=len))}. This is program "
      f"{len(self._seen)} of the step; a closed set of shapes avoids more."
    )


def _shapes(batch: PyTree) -> frozenset[tuple[str, str]]:
  """Dtype and shape of every array, by path."""
  return frozenset(
    (k, _abstract(v)[0]) for k, v in trees.flatten(batch).items()
  )


def _abstract(leaf: Any) -> tuple[str, Any]:
  """Dtype and shape as text, and the sharding of a jax array."""
  shape = ",".join(map(str, np.shape(leaf)))
  dtype = getattr(leaf, "dtype", type(leaf).__name__)
  weak = "*" if getattr(leaf, "weak_type", False) else ""
  return f"{dtype}{weak}[{shape}]", getattr(leaf, "sharding", None)


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
  found, absent = [], ("absent", None)
  for key in sorted(old.keys() | new.keys()):
    before, after = old.get(key, absent), new.get(key, absent)
    if before != after:
      # Shardings are long: we show them only where they alone changed.
      shown = 1 if before[0] == after[0] else 0
      found.append(f"`{key}` went from {before[shown]} to {after[shown]}")
  return found
