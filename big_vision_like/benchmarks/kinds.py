"""Where a forward pass spends its time: products, or what is bound by memory.

EfficientViT (arXiv 2305.07027, section 2.1) counts reshapes, element-wise
functions and normalisations, which read and write memory and compute little.
The times are those of a profile of the compiled program, by its instructions;
what each does is read from the program's text. A fusion counts as one kind: as
products if it holds one, otherwise as the kind of its last operation.
"""

import collections
import dataclasses
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax

from big_vision_like.benchmarks import measure, models

KINDS = (
  "products",
  "depthwise",
  "normalisation",
  "softmax",
  "element-wise",
  "reshapes",
)
MODELS = (
  models.Pair("vit", "Ti/16", "", 224),
  models.Pair("deepvit", "16B", "", 224),
  models.Pair("mobilevit", "S", "", 256),
  models.Pair("mobilevit_v2", "1.0", "", 256),
  models.Pair("efficientvit", "M0", "", 224),
  models.Pair("efficientvit", "M4", "", 224),
)
_MOVES = frozenset(
  "bitcast broadcast concatenate copy dynamic-slice dynamic-update-slice "
  "gather pad reshape reverse scatter slice transpose".split()
)
_FREE = frozenset("constant get-tuple-element iota parameter tuple".split())
_CONTROL = frozenset("call conditional while".split())
_PRODUCTS = re.compile(r"dot|convolution|matmul|gemm|conv")
_NORMS = re.compile(r"(\w*_)?(ln|norm|bn)\d*|(Layer|Batch|RMS)Norm_\d+")
_CONVOLUTIONS = re.compile(r"conv\d*|local|dw\d*")
_ATTENTION = re.compile(r"attn|mixer")
_SOFTMAX = frozenset({"exponential", "reduce", "divide", "maximum"})


def run(
  *,
  pairs: Sequence[models.Pair] = MODELS,
  batch: int = 16,
  repeats: int = 5,
) -> str:
  """The table.

  Args:
    pairs: the models, BatchNorms folded.
    batch: images.
    repeats: calls that are profiled.
  """
  rows = []
  for pair in pairs:
    compiled, call, _ = models.compiled_forward(pair, batch)
    times = measure.interleaved({"": call}, repeats=repeats)
    seconds = shares(compiled.as_text(), profile(call, repeats))
    rows.append(
      {
        "model": f"{pair.name} {pair.variant}",
        "images/s": batch / times.median(""),
        **{kind: f"{seconds.get(kind, 0.0):.0%}" for kind in KINDS},
      }
    )
  note = (
    f"Shares of the time in the instructions of a forward pass, float32, "
    f"batches of {batch}, on {jax.device_count()} x "
    f"{jax.devices()[0].device_kind}; instructions that run side by side count "
    "each. products: matrix products and other convolutions; depthwise: "
    "convolutions of single channels, which a CPU computes as multiply-adds of "
    "shifted maps; BatchNorms are folded into their convolutions."
  )
  return measure.table("Time by kind of operation", rows, note)


def profile(call: Callable[[], object], repeats: int) -> dict[str, float]:
  """Seconds by HLO instruction, of all calls together."""
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder, profiler_options=options):
      for _ in range(repeats):
        call()
    (file,) = Path(folder).rglob("*.xplane.pb")
    data = jax.profiler.ProfileData.from_file(str(file))
  seconds: dict[str, float] = collections.defaultdict(float)
  for plane in data.planes:
    for line in plane.lines:
      for event in line.events:
        name = dict(event.stats).get("hlo_op")
        if name is not None:
          seconds[name] += event.duration_ns / 1e9
  return seconds


def shares(text: str, seconds: Mapping[str, float]) -> dict[str, float]:
  """The share of each kind in the time of a program's instructions.

  Args:
    text: of the compiled module.
    seconds: by instruction; those of control flow, whose insides count, and
      of other modules are left out.

  Raises:
    ValueError: if no instruction of the module took any time.
  """
  instructions, bodies = _parse(text)
  by_kind: dict[str, float] = collections.defaultdict(float)
  for name, time in seconds.items():
    found = instructions.get(name)
    if found is not None and found.opcode not in _CONTROL:
      by_kind[_kind(found, bodies)] += time
  total = sum(by_kind.values())
  if not total:
    raise ValueError("The profile has no instruction of this program.")
  return {kind: time / total for kind, time in by_kind.items()}


@dataclasses.dataclass(frozen=True)
class _Instruction:
  """`path` is where in the model it comes from, `target` what it calls."""

  opcode: str
  path: tuple[str, ...]
  body: str
  target: str


_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{")
_LINE = re.compile(
  r"^\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?:\(.*?\)|\S+) (?P<opcode>[\w\-]+)\("
)


def _parse(
  text: str,
) -> tuple[dict[str, _Instruction], dict[str, list[_Instruction]]]:
  """All instructions by name, and those of each computation."""
  instructions: dict[str, _Instruction] = {}
  bodies: dict[str, list[_Instruction]] = {}
  current: list[_Instruction] = []
  for line in text.splitlines():
    if header := _HEADER.match(line):
      current = bodies.setdefault(header[1], [])
    elif found := _LINE.match(line):

      def after(pattern, line=line):
        match = re.search(pattern, line)
        return match[1] if match else ""

      one = _Instruction(
        found["opcode"],
        tuple(after(r'op_name="([^"]*)"').split("/")),
        after(r"calls=%?([\w.\-]+)"),
        after(r'custom_call_target="([^"]*)"'),
      )
      instructions[found["name"]] = one
      current.append(one)
  return instructions, bodies


def _inside(
  one: _Instruction, bodies: Mapping[str, Sequence[_Instruction]]
) -> Iterator[_Instruction]:
  if one.body not in bodies:
    yield one
  for inner in bodies.get(one.body, ()):
    yield from _inside(inner, bodies)


def _kind(
  one: _Instruction, bodies: Mapping[str, Sequence[_Instruction]]
) -> str:
  inside = [x for x in _inside(one, bodies) if x.opcode not in _FREE]
  opcodes = {x.opcode for x in inside}
  if opcodes & {"dot", "convolution"} or any(
    _PRODUCTS.search(x.target) for x in inside
  ):
    return "products"
  if opcodes <= _MOVES or one.path[-1] in _MOVES:
    return "reshapes"

  def comes_from(names):
    return any(map(names.fullmatch, one.path[:-1]))

  if comes_from(_NORMS):
    return "normalisation"
  if comes_from(_ATTENTION) and opcodes & _SOFTMAX:
    return "softmax"
  return "depthwise" if comes_from(_CONVOLUTIONS) else "element-wise"
