"""Lets torchvision be imported beside a torch that its wheel was not made for.

timm, vit-pytorch and the parity tests import torchvision, and its import needs
two operators to exist. Where its compiled part does not load, it is enough to
declare them: nothing here calls them.
"""

import ctypes
import importlib.util
from pathlib import Path

import torch

_LIBRARIES = []  # What a torch library declares lives as long as it does.


def declare() -> None:
  """Call it before torchvision is imported; a second call does nothing."""
  found = importlib.util.find_spec("torchvision")
  if found is None or _LIBRARIES or hasattr(torch.ops.torchvision, "nms"):
    return
  compiled = list(Path(found.origin).parent.glob("_C*.so"))
  if compiled and all(map(_loads, compiled)):
    return
  library = torch.library.Library("torchvision", "FRAGMENT")
  for name in ("nms", "qnms"):
    signature = "(Tensor dets, Tensor scores, float threshold) -> Tensor"
    library.define(name + signature)
  _LIBRARIES.append(library)


def _loads(path: Path) -> bool:
  try:
    ctypes.CDLL(str(path))
  except OSError:
    return False
  return True
