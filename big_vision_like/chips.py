"""The accelerators that a run can be planned for, without having them.

TPU slices are described by libtpu (extra `tpu`), whose compiler then makes the
program that they would run. On a machine without a GPU there is no compiler for
GPUs: simulated devices stand for them, and what is said of them is an estimate.
"""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from big_vision_like import flops

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """What one jax device can do, by the data sheets.

  Attributes:
    kind: as `jax.Device.device_kind` has it; `flops.py` knows its peak.
    memory: bytes; of TPUs, what the compiler lets a program have.
    bandwidth: bytes/s of that memory.
    link: bytes/s of a link to another chip, one way.
    axes: of a TPU's torus; 0: not a TPU.
    network: bytes/s of a GPU to other hosts.
    options: of the topology's description.
  """

  kind: str
  memory: float
  bandwidth: float
  link: float
  axes: int = 0
  network: float = 0.0
  options: tuple[tuple[str, str], ...] = ()

  @property
  def peak(self) -> float:
    return flops.peak_of_kind(self.kind)


CHIPS = {
  # Without megacore, a v4 chip would be two devices, as it was on old JAX.
  "v4": Chip(
    "TPU v4",
    30.75 * GIB,
    1228e9,
    45e9,
    axes=3,
    options=(("chip_config_name", "megacore"),),
  ),
  "v5e": Chip("TPU v5 lite", 15.75 * GIB, 819e9, 45e9, axes=2),
  "v5p": Chip("TPU v5", 95.73 * GIB, 2765e9, 90e9, axes=3),
  "v6e": Chip("TPU v6 lite", 31.24 * GIB, 1640e9, 90e9, axes=2),
  "a100": Chip("NVIDIA A100", 80e9, 2039e9, 300e9, network=25e9),
  "h100": Chip("NVIDIA H100", 80e9, 3350e9, 450e9, network=50e9),
  "h200": Chip("NVIDIA H200", 141e9, 4800e9, 450e9, network=50e9),
  "b200": Chip("NVIDIA B200", 180e9, 8000e9, 900e9, network=50e9),
}


@dataclasses.dataclass(frozen=True)
class Slice:
  """So many chips, as `parse` reads them from "v5e:16x16" or "h100:4x8"."""

  name: str
  chip: Chip
  shape: tuple[int, ...]

  @property
  def is_tpu(self) -> bool:
    return self.chip.axes > 0

  @property
  def size(self) -> int:
    return math.prod(self.shape)

  def devices(self) -> list[Any]:
    """Devices to compile for, or simulated ones in the place of GPUs.

    Call it before JAX has started any device: it then starts no other than the
    CPU, also where there are TPUs.

    Raises:
      ValueError: if libtpu is missing, or knows no such slice.
    """
    jax.config.update("jax_platforms", "cpu")
    if not self.is_tpu:
      jax.config.update("jax_num_cpu_devices", self.size)
      return jax.devices("cpu")
    return self._tpu_devices()

  def _tpu_devices(self) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None:
      raise ValueError(
        f"--topology {self.name} is compiled by libtpu, which is not "
        'installed: pip install -e ".[tpu]".'
      )
    for key, value in _LIBTPU.items():
      os.environ.setdefault(key, value)
    try:
      found = topologies.get_topology_desc(
        self.name, "tpu", **dict(self.chip.options)
      )
    except jax.errors.JaxRuntimeError as e:
      reason = str(e).splitlines()[0]
      raise ValueError(
        f"libtpu does not know the slice {self.name}: {reason}"
      ) from e
    return found.devices


# Compiling needs no chip, and several processes may do it at once. Without the
# two last, libtpu asks the cloud's metadata server, which takes minutes where
# there is none.
_LIBTPU = {
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-16",
  "TPU_WORKER_HOSTNAMES": "localhost",
}


def parse(name: str) -> Slice:
  """Reads "v5e:16x16", "v4:4x4x8", and of GPUs "h100:8", or "h100:4x8" (hosts).

  Raises:
    ValueError: for an unknown chip, or a shape that its slices cannot have.
  """
  kind, _, shape = name.partition(":")
  if kind not in CHIPS:
    raise ValueError(
      f"--topology {name}: there is no chip {kind!r}. There are: "
      f"{', '.join(CHIPS)}; with the slice behind a colon, as in v5e:16x16."
    )
  chip = CHIPS[kind]
  lengths = (chip.axes,) if chip.axes else (1, 2)
  example = {0: "8 or 4x8, hosts x GPUs", 2: "16x16", 3: "4x4x4"}[chip.axes]
  if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) or (
    shape.count("x") + 1 not in lengths
  ):
    raise ValueError(
      f"--topology {name}: the chips of {kind} are given as in "
      f"{kind}:{example}."
    )
  return Slice(name, chip, tuple(map(int, shape.split("x"))))


def links(devices: Sequence[Any]) -> int:
  """Links of a chip into the part of a torus that these TPU devices span.

  Two along each axis, but one where the axis is two chips long.
  """
  coords = np.array([device.coords for device in devices])
  spans = [len(np.unique(axis)) for axis in coords.T]
  return max(1, sum(min(span - 1, 2) for span in spans))
