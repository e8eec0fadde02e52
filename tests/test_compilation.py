"""The compilation cache and the guard against recompilations."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from big_vision_like import compilation

OPTIONS = (
  "jax_compilation_cache_dir",
  "jax_persistent_cache_min_compile_time_secs",
  "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture
def home(tmp_path, monkeypatch):
  """A fresh home without cache settings; JAX's own come back afterwards."""
  before = {name: getattr(jax.config, name) for name in OPTIONS}
  jax.config.update("jax_compilation_cache_dir", None)
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.delenv("BIG_VISION_LIKE_CACHE", raising=False)
  yield tmp_path
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


def test_programs_are_kept_even_after_a_first_compilation(home):
  jax.jit(lambda x: x * 3)(jnp.ones(5))
  folder = compilation.enable_compilation_cache()
  assert folder == str(home / ".cache" / "big_vision_like" / "jax")
  jax.jit(lambda x: x * 7 + 11)(jnp.ones(13)).block_until_ready()
  kept = set(os.listdir(folder))
  assert any("jit" in name for name in kept)
  other = compilation.enable_compilation_cache(home / "other")
  jax.jit(lambda x: x * 5 + 13)(jnp.ones(13)).block_until_ready()
  assert any("jit" in name for name in os.listdir(other))
  assert set(os.listdir(folder)) == kept


def test_whose_folder_is_taken(home, monkeypatch):
  monkeypatch.setenv("BIG_VISION_LIKE_CACHE", str(home / "ours"))
  assert compilation.enable_compilation_cache() == str(home / "ours" / "jax")
  # JAX_COMPILATION_CACHE_DIR comes to us through JAX's own configuration.
  jax.config.update("jax_compilation_cache_dir", str(home / "of_jax"))
  assert compilation.enable_compilation_cache() == str(home / "of_jax")
  assert compilation.enable_compilation_cache("~/mine") == str(home / "mine")


def test_a_folder_that_cannot_be_written_is_no_error(home, caplog):
  (home / "file").write_text("in the way")
  assert compilation.enable_compilation_cache(home / "file" / "jax") is None
  assert "No compilation cache: cannot write to" in caplog.text
  assert jax.config.jax_compilation_cache_dir is None
  assert jax.jit(lambda x: x + 1)(1) == 2


def batch(rows=4, length=7, dtype=np.uint8):
  return {
    "patches": np.zeros((rows, length, 12), dtype),
    "label": np.zeros(rows, np.int32),
  }


def test_the_guard_names_the_argument_that_changed():
  guard = compilation.RecompileGuard()
  assert guard.check(batch()) is None
  assert guard.check(batch()) is None
  said = guard.check(batch(length=5))
  assert "`patches` went from uint8[4,7,12] to uint8[4,5,12]" in said
  assert "label" not in said
  assert "program 2" in said
  assert guard.check(batch(length=5)) is None
  assert guard.check(batch()) is None


def test_the_guard_compares_with_the_most_similar_call():
  guard = compilation.RecompileGuard()
  guard.check(batch(rows=4))
  guard.check(batch(rows=3))
  said = guard.check(batch(rows=3, dtype=np.float32))
  assert "`patches` went from uint8[3,7,12] to float32[3,7,12]" in said
  assert "label" not in said


def test_the_guard_knows_static_and_missing_arguments():
  guard = compilation.RecompileGuard()
  guard.check(batch(), (("grid", 15),))
  assert guard.check(batch(), (("grid", 15),)) is None
  said = guard.check(batch(), (("grid", 12),))
  assert "`static grid` went from 15 to 12" in said
  smaller = batch()
  del smaller["label"]
  said = guard.check(smaller, (("grid", 12),))
  assert "`label` went from int32[4] to absent" in said


def test_the_guard_agrees_with_jax_on_shardings_and_weak_types():
  mesh = jax.make_mesh(
    (len(jax.devices()),), ("data",), axis_types=(AxisType.Auto,)
  )
  step = jax.jit(lambda batch: batch["x"] * 2)
  if not hasattr(step, "_cache_size"):
    pytest.skip("this JAX does not tell how many programs a function has")
  x = jnp.ones((2 * len(jax.devices()), 3))
  calls = [
    x,
    jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))),
    jax.device_put(x, NamedSharding(mesh, PartitionSpec())),
    x,
    jnp.full(x.shape, 2.0),
    jnp.asarray(2.0),
    jax.lax.add(jnp.asarray(2.0), 1.0),
  ]
  guard = compilation.RecompileGuard()
  traces = []
  for value in calls:
    before = step._cache_size()
    new = guard.check({"x": value}) is not None or not traces
    step({"x": value})
    traces.append(step._cache_size() > before)
    assert new == traces[-1], value.aval
  assert traces.count(True) >= 3


def test_the_guard_is_silent_on_expected_shapes_once_each():
  shapes = [jax.eval_shape(lambda n=n: batch(rows=n)) for n in (4, 3, 2)]
  guard = compilation.RecompileGuard(expected=shapes)
  for rows in (4, 3, 4, 2, 3):
    assert guard.check(batch(rows=rows)) is None
  assert "uint8[4,7,12] to uint8[1,7,12]" in guard.check(batch(rows=1))
  # A second program for an expected shape is a surprise all the same.
  said = guard.check(batch(rows=3), (("grid", 15),))
  assert "`static grid` went from absent to 15" in said
  assert "program 5" in said


def test_the_guard_is_silent_on_expected_static_arguments():
  statics = [(("grid", n),) for n in (6, 8)]
  guard = compilation.RecompileGuard([batch()], statics)
  for n in (8, 6, 8):
    assert guard.check(batch(), (("grid", n),)) is None
  assert "went from" in guard.check(batch(), (("grid", 7),))
