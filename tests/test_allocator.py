"""Freed memory stays: touching it again faults in no new pages."""

import subprocess
import sys

import pytest

ARRAYS = """
import resource, sys
import numpy as np
from big_vision_like import allocator

def faults():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  for _ in range(4):  # The larger one is beyond what an int can say.
    np.empty(1 << 27, np.uint8)[::4096] = 1
    np.empty(5 << 29, np.uint8)[:: 1 << 20] = 1
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

usual = faults()
done = allocator.keep_freed_memory()
faults()  # grows the heap once
print(done, usual, faults())
"""

# 96 MB each, which no arena but the main one keeps.
STEPS = """
import resource, sys
import jax, jax.numpy as jnp
from big_vision_like import allocator

def faults(step, x):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  for _ in range(64):
    jax.block_until_ready(step(x))
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

done = sys.argv[1] == "usual" or allocator.keep_freed_memory()
w = jnp.eye(8)
step = jax.jit(lambda x: jnp.tanh(x @ w))
x = jnp.ones((3 << 20, 8))
faults(step, x)
print(done, faults(step, x))
"""

# JAX has no public way to ask.
TRAINING = """
import sys
from jax._src import xla_bridge
from big_vision_like import allocator, train
from configs import vit_i1k

def called():
  sys.exit(f"started before: {xla_bridge.backends_are_initialized()}")

allocator.keep_freed_memory = called
train.train(vit_i1k.get_config(), sys.argv[1])
"""


def test_training_asks_for_it_before_jax_starts(tmp_path):
  """Afterwards the steps would be computed by another thread."""
  done = subprocess.run(
    [sys.executable, "-c", TRAINING, str(tmp_path)],
    capture_output=True,
    text=True,
  )
  assert done.stderr.splitlines()[-1] == "started before: False"


def test_a_step_touches_no_new_pages():
  counts = {}
  for mode in ("usual", "kept"):
    done, count = run(STEPS, mode)
    counts[mode] = int(count)
  if done == "False":
    pytest.skip("an accelerator is present, or the C library is not glibc")
  assert counts["usual"] > 100
  # What is small may settle in a freed place, and the heap grow once for it.
  assert counts["kept"] < counts["usual"] / 10


def run(code, *argv):
  return subprocess.run(
    [sys.executable, "-c", code, *argv],
    capture_output=True,
    text=True,
    check=True,
  ).stdout.split()


def test_freed_memory_is_used_again():
  out = run(ARRAYS)
  if out[0] == "False":
    pytest.skip("an accelerator is present, or the C library is not glibc")
  usual, kept = int(out[1]), int(out[2])
  assert usual > 100  # new pages every time, be they small or huge
  assert kept < usual / 10
