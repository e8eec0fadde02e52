"""Reads a compiled program: its collectives, its memory traffic, its kernels.

XLA's own cost analysis counts the body of a loop once and takes no account of
what stays in the fast memory of a TPU. We read the text of the optimised HLO
instead: bodies count as often as they run, and arrays that the compiler has put
into fast memory (`S(1)` in their layout) cost no traffic. Padding to tiles is
left out, so that the bytes are a lower bound.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

COLLECTIVES = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
)
_BITS = {"pred": 8, "bf16": 16}  # of the others, the name says it: f32, s8, ...
_ARRAY = re.compile(r"\b(pred|bf16|[fsu]\d+\w*)\[([\d,]*)\](\{[^{}]*\})?")
_INSTRUCTION = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = (.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|called_computations)=\{?%?([\w.\-]+)")
# What moves no array: names, views, waiting, and control flow around others.
_FREE = {
  "parameter",
  "constant",
  "get-tuple-element",
  "tuple",
  "bitcast",
  "while",
  "conditional",
  "call",
  "iota",
  "after-all",
  "partition-id",
}


@dataclasses.dataclass(frozen=True)
class Instruction:
  """`name = type op(operands), attributes`; the root is the result."""

  name: str
  type: str
  op: str
  operands: tuple[str, ...]
  attributes: str
  root: bool

  @property
  def called(self) -> str | None:
    """The computation of a fusion, a call or an asynchronous operation."""
    found = _CALLED.search(self.attributes)
    return found.group(1) if found else None


@dataclasses.dataclass(frozen=True)
class Collective:
  """What devices exchange at one place of the program.

  Attributes:
    op: one of COLLECTIVES.
    dtype: of the arrays.
    bytes: of the result on one device, each time.
    runs: how often it runs in the program.
    group: the devices that exchange, as places in the mesh.
    overlaps: other work goes on meanwhile.
  """

  op: str
  dtype: str
  bytes: int
  runs: int
  group: tuple[int, ...]
  overlaps: bool

  @property
  def sent(self) -> float:
    """Bytes that a device sends, in the best of algorithms for a ring."""
    n = len(self.group)
    share = (n - 1) / n
    each = {
      "all-reduce": 2 * share,
      "all-gather": share,
      "reduce-scatter": n - 1,
      "all-to-all": share,
      "collective-permute": 1,
    }[self.op]
    return each * self.bytes * self.runs


def arrays(type: str) -> list[tuple[str, int, bool]]:
  """(dtype, bytes, in main memory?) of each array of a type."""
  found = []
  for dtype, dims, layout in _ARRAY.findall(type):
    bits = _BITS.get(dtype) or int(re.match(r"[fsu](\d+)", dtype).group(1))
    size = math.prod(int(d) for d in dims.split(",") if d)
    found.append((dtype, size * bits // 8, not re.search(r"S\(\d", layout)))
  return found


def _bytes(type: str) -> int:
  return sum(size for _, size, _ in arrays(type))


def _main_bytes(type: str) -> int:
  return sum(size for _, size, main in arrays(type) if main)


class Program:
  """The optimised program of one device, from `compiled.as_text()`."""

  def __init__(self, text: str):
    self.computations: dict[str, dict[str, Instruction]] = {}
    self.entry = ""
    current: dict[str, Instruction] = {}
    for line in text.splitlines():
      if line[:1] not in ("", " ", "}"):
        if opened := _COMPUTATION.match(line):
          current = self.computations.setdefault(opened.group(2), {})
          if opened.group(1):
            self.entry = opened.group(2)
      elif found := _INSTRUCTION.match(line):
        if instruction := _parse(*found.groups()):
          current[instruction.name] = instruction

  @functools.cached_property
  def runs(self) -> dict[str, int]:
    """How often each computation runs, those inside of fusions not."""
    counts: dict[str, int] = collections.Counter()

    def visit(name: str, times: int):
      counts[name] += times
      for instruction in self.computations[name].values():
        for inner, repeats in self._flow(instruction):
          visit(inner, times * repeats)

    visit(self.entry, 1)
    return counts

  def _flow(self, instruction: Instruction) -> Iterator[tuple[str, int]]:
    text = instruction.attributes
    if instruction.op == "while":
      condition = re.search(r"condition=%?([\w.\-]+)", text).group(1)
      repeats = self._trips(text, condition)
      yield condition, repeats
      yield re.search(r"body=%?([\w.\-]+)", text).group(1), repeats
    elif instruction.op == "conditional":
      branches = re.search(r"branch_computations=\{([^}]*)\}", text)
      names = branches.group(1) if branches else text.partition("metadata")[0]
      for name in re.findall(r"%([\w.\-]+)", names):
        yield name, 1
    elif instruction.op == "call":
      yield instruction.called, 1

  def _trips(self, attributes: str, condition: str) -> int:
    """Of a loop; 1 where the compiler does not say."""
    known = re.search(r'known_trip_count"?:\{"n":"(\d+)"', attributes)
    if known:
      return int(known.group(1))
    steps = self.computations[condition]
    for instruction in steps.values():
      if instruction.root and instruction.op == "compare":
        for name in instruction.operands:
          constant = steps.get(name)
          if constant and constant.op == "constant":
            last = int(constant.operands[0])
            return last + ("direction=LE" in instruction.attributes)
    return 1

  # -- collectives ------------------------------------------------------------

  def collectives(self, devices: int) -> list[Collective]:
    """Everything that the program's devices, so many, exchange."""
    found = []
    for name, runs in self.runs.items():
      steps = self.computations[name]
      for instruction in steps.values():
        inner, overlaps = self._exchange(instruction)
        if inner is None:
          continue
        op = inner.op.removesuffix("-start")
        group = replica_group(inner.attributes, devices)
        sizes = [(dtype, size) for dtype, size, _ in arrays(inner.type)]
        if inner.op.endswith("-start") and op != "all-reduce":
          sizes = [max(sizes, key=lambda x: x[1])]  # operand, result, contexts
        found.append(
          Collective(
            op,
            "+".join(sorted({dtype for dtype, _ in sizes})),
            sum(size for _, size in sizes),
            runs,
            group,
            overlaps,
          )
        )
    return [c for c in found if len(c.group) > 1]

  def _exchange(
    self, instruction: Instruction
  ) -> tuple[Instruction | None, bool]:
    """The collective that begins here, if any, and whether it overlaps."""
    op = instruction.op.removesuffix("-start")
    if op in COLLECTIVES:
      return instruction, instruction.op.endswith("-start")
    if instruction.op not in ("fusion", "async-start", "custom-call"):
      return None, False
    # v5e and later weave a collective into several fusions; the first counts.
    woven = re.match(r"async-collective-(\w+)", instruction.name)
    if woven and woven.group(1) != "start":
      return None, False
    for inner in self.computations.get(instruction.called or "", {}).values():
      if inner.op.removesuffix("-start") in COLLECTIVES:
        return inner, bool(woven) or instruction.op == "async-start"
    return None, False

  # -- kernels ----------------------------------------------------------------

  def kernels(self) -> dict[str, int]:
    """Calls of hand-written kernels (Pallas) by name."""
    found: dict[str, int] = collections.Counter()
    for name, runs in self.runs.items():
      for instruction in self.computations[name].values():
        if 'custom_call_target="tpu_custom_call"' in instruction.attributes:
          kernel = re.sub(r"[.\d]+$", "", instruction.name)
          found[kernel] += runs
    return dict(found)

  # -- memory traffic ---------------------------------------------------------

  def memory_bytes(self) -> int:
    """Bytes that go to and from main memory."""
    return sum(
      runs * self._traffic(steps, instruction)
      for name, runs in self.runs.items()
      for steps in [self.computations[name]]
      for instruction in steps.values()
    )

  def _traffic(self, steps, instruction) -> int:
    op = instruction.op
    if op in _FREE or op.endswith("-done"):
      return 0
    types = [steps[x].type for x in instruction.operands if x in steps]
    if op in ("dynamic-slice", "slice"):
      return 2 * _main_bytes(instruction.type)
    if op == "dynamic-update-slice":
      return 2 * _bytes(types[1])
    if op.endswith("-start"):
      # The type holds operand and result of a copy: what is not in main memory
      # on both sides moves once.
      sizes = [size for _, size, _ in arrays(instruction.type)[:2]]
      return min(sizes, default=0)
    fused = self.computations.get(instruction.called or "")
    if op != "fusion" or fused is None:
      return _main_bytes(instruction.type) + sum(map(_main_bytes, types))
    return self._written(fused, instruction) + sum(
      min(_main_bytes(type), self._read(fused, index))
      for index, type in enumerate(types)
    )

  def _read(self, fused: dict[str, Instruction], index: int) -> int:
    """Bytes of parameter `index` that a fusion reads: of slices, only those."""
    parameter = next(
      (
        x
        for x in fused.values()
        if x.op == "parameter" and x.operands == (str(index),)
      ),
      None,
    )
    if parameter is None:
      return 0
    total, names = 0, [parameter.name]
    while names:
      name = names.pop()
      for user in fused.values():
        if name not in user.operands:
          continue
        if user.op == "bitcast":
          names.append(user.name)
        elif user.op in ("dynamic-slice", "slice"):
          total += _bytes(user.type)
        elif user.op == "dynamic-update-slice" and user.operands[0] == name:
          pass  # It is updated in place.
        elif user.op == "fusion" and user.called in self.computations:
          inner = self.computations[user.called]
          total += sum(
            self._read(inner, i)
            for i, x in enumerate(user.operands)
            if x == name
          )
        else:
          return _bytes(parameter.type)
    return total

  def _written(self, fused, instruction) -> int:
    root = next(x for x in fused.values() if x.root)
    parts = root.operands if root.op == "tuple" else (root.name,)
    return sum(
      self._result_bytes(fused, part)
      for part, (_, _, main) in zip(parts, arrays(instruction.type))
      if main
    )

  def _result_bytes(self, fused, name: str) -> int:
    step = fused[name]
    if step.op == "bitcast" and step.operands[0] in fused:
      return self._result_bytes(fused, step.operands[0])
    if step.op == "dynamic-update-slice":
      return _bytes(fused[step.operands[1]].type)
    return _bytes(step.type)


def _parse(root: str | None, name: str, rest: str) -> Instruction | None:
  # A tuple's type has parentheses of its own, and so have layouts.
  end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
  type, rest = rest[:end], rest[end:].lstrip()
  op, bracket, _ = rest.partition("(")
  if not bracket or not re.fullmatch(r"[\w\-]+", op):
    return None
  end = _closing(rest, len(op))
  inside = rest[len(op) + 1 : end]
  operands = re.findall(r"%([\w.\-]+)", inside) or [inside.strip()]
  return Instruction(
    name, type, op, tuple(operands), rest[end + 1 :], bool(root)
  )


def _closing(text: str, start: int) -> int:
  """Where the bracket that opens at `start` closes."""
  depth = 0
  for i in range(start, len(text)):
    depth += (text[i] == "(") - (text[i] == ")")
    if depth == 0:
      return i
  return len(text) - 1


def replica_group(attributes: str, devices: int) -> tuple[int, ...]:
  """One of the groups that a collective of so many devices runs in.

  All are alike. XLA writes them out, or as a reshaped and transposed range, or
  as axes of a mesh, or parts of them; no groups: all devices.
  """
  pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes)
  if pairs:
    return _ints(",".join(pairs.groups()))
  listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
  if listed:
    return _ints(listed.group(1))
  ranged = re.search(
    r"replica_groups=\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes
  )
  if ranged:
    size, shape = int(ranged.group(1)), _ints(ranged.group(2))
    order = _ints(ranged.group(3)) if ranged.group(3) else range(len(shape))
    places = np.arange(math.prod(shape)).reshape(shape).transpose(order)
    return tuple(places.reshape(-1, size)[0].tolist())
  named = re.search(
    r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes
  )
  if named:
    return _axes_group(*named.groups())
  return tuple(range(devices))


def _axes_group(mesh: str, axes: str) -> tuple[int, ...]:
  """The group along axes of a mesh.

  "'a'=4,'b'=8" are the axes with their sizes, the last one innermost; "'b'" is
  one of them, "'b':(2)4" the part of 4 that has 2 outside of it.
  """
  sizes = {k: int(n) for k, n in re.findall(r"'?(\w+)'?=(\d+)", mesh)}
  group = np.zeros(1, int)
  stride = math.prod(sizes.values())
  spans = re.findall(r"'?(\b[a-z_]\w*)'?(?::\((\d+)\)(\d+))?", axes)
  along = {k: (int(a or 1), int(b or sizes[k])) for k, a, b in spans}
  for axis, size in sizes.items():
    stride //= size
    if axis in along:
      before, length = along[axis]
      step = stride * size // before // length
      group = (group[:, None] + step * np.arange(length)).ravel()
  return tuple(group.tolist())


def _ints(text: str) -> tuple[int, ...]:
  return tuple(map(int, text.split(",")))
