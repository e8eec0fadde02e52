"""Keeps freed memory in the process, for steps that are computed on a CPU.

glibc hands large buffers back to the system as they are freed, and a CPU step
frees all of its activations: the next one then faults every page in again,
which took a third of the time of a small ViT's step. Only the main thread's
arena can be told to keep them, so the main thread dispatches the steps itself
and allocates what they need. One arena for all threads is no way out:
convolutions, whose threads allocate all the time, took twice as long.
"""

import ctypes
import glob
import sys

import jax

# Of glibc's malloc.h: parameter, value.
_OPTIONS = (
  (-4, 0),  # M_MMAP_MAX: nothing is too large to be kept, as mapped blocks are.
  (-1, -1),  # M_TRIM_THRESHOLD: never.
  (-2, 64 << 20),  # M_TOP_PAD
)


def keep_freed_memory() -> bool:
  """Call it before JAX starts its backend; returns whether it did anything.

  Programs of one CPU device are then dispatched by the thread that calls them.
  It does nothing where an accelerator is present, whose host may have many
  threads at work, nor where the C library is not glibc.
  """
  accelerators = ("/dev/nvidia[0-9]*", "/dev/accel*", "/dev/vfio/[0-9]*")
  if not sys.platform.startswith("linux") or any(map(glob.glob, accelerators)):
    return False
  libc = ctypes.CDLL(None)
  if not hasattr(libc, "gnu_get_libc_version"):
    return False
  jax.config.update("jax_cpu_enable_async_dispatch", False)
  return all([libc.mallopt(key, value) for key, value in _OPTIONS])
