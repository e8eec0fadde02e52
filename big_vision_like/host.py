"""What this machine is, and what XLA is told about it, before JAX starts."""

import glob
import importlib.metadata
import os
import sys

_DEVICES = ("/dev/nvidia[0-9]*", "/dev/accel*", "/dev/vfio/[0-9]*")
_FLAG = "xla_cpu_experimental_ynn_fusion_type"
_OWN = f"--{_FLAG}=-LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"
# XLA ends the process at a flag that it does not know; these know it.
_KNOWN_BY = "0.10."


def is_cpu_only() -> bool:
  """Whether this is a Linux machine on which no accelerator shows."""
  found = any(map(glob.glob, _DEVICES))
  return sys.platform.startswith("linux") and not found


def prefer_own_convolutions() -> bool:
  """Has a CPU's convolutions computed by XLA itself; says whether they are.

  By default XLA hands them to YNNPACK, with which EfficientViT-M2 takes a third
  longer, and DETR-R50 a twentieth. Call it before anything imports JAX, in a
  process of one's own. It does nothing where XLA_FLAGS has the flag already,
  where there is an accelerator, nor with a jaxlib not known to take it.
  """
  flags = os.environ.get("XLA_FLAGS", "")
  known = importlib.metadata.version("jaxlib").startswith(_KNOWN_BY)
  if _FLAG in flags or not known or not is_cpu_only():
    return False
  os.environ["XLA_FLAGS"] = f"{flags} {_OWN}".strip()
  return True
