"""Freed memory stays: touching it again faults in no new pages."""

import subprocess
import sys

import pytest

CODE = """
import resource, sys
import numpy as np
from big_vision_like import allocator

def faults():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  for _ in range(4):
    np.empty(1 << 27, np.uint8)[::4096] = 1
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

usual = faults()
done = allocator.keep_freed_memory()
faults()  # grows the heap once
print(done, usual, faults())
"""


def test_freed_memory_is_used_again():
  out = subprocess.run(
    [sys.executable, "-c", CODE], capture_output=True, text=True, check=True
  ).stdout.split()
  if out[0] == "False":
    pytest.skip("an accelerator is present, or the C library is not glibc")
  usual, kept = int(out[1]), int(out[2])
  assert usual > 100  # new pages every time, be they small or huge
  assert kept < usual / 10
