"""What a training step takes on chips that are not here.

On TPU slices the step is compiled, and memory, kernels and collectives are the
compiler's. For GPUs they are estimated from the traced step. The least time of
a step is a roofline: that of its products at the chip's peak, of its traffic
with main memory, or of the collectives that overlap, whichever is longest, and
that of the collectives that do not overlap on top.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from big_vision_like import api, build, chips, hlo, sharding, train_step

# How near the search for the largest batch comes.
NEAR = 0.03


@dataclasses.dataclass(frozen=True)
class Traffic:
  """Collectives of one kind in a step, on one chip.

  Attributes:
    op: one of `hlo.COLLECTIVES`.
    dtype: of the arrays.
    chips: how many exchange with each other.
    runs: how often it runs in a step.
    bytes: of the results of all runs.
    seconds: on the chip's links, at their peak.
    overlaps: other work goes on meanwhile.
  """

  op: str
  dtype: str
  chips: int
  runs: int
  bytes: int
  seconds: float
  overlaps: bool


@dataclasses.dataclass(frozen=True)
class Step:
  """What one step takes.

  Attributes:
    rows: of its global batch.
    used: bytes on a chip.
    memory: these by kind; {} if the compiler refused the program.
    products: seconds of the matrix products, what runs twice counted twice.
    traffic: collectives.
    memory_seconds: of the traffic with main memory; 0 where it is not known.
    kernels: calls of hand-written kernels by name.
    model_flops: by the convention of `build.count_step_flops`, for all chips.
    peak: FLOP/s of all chips.
  """

  rows: int
  used: float
  memory: Mapping[str, float] = dataclasses.field(default_factory=dict)
  products: float = 0.0
  traffic: Sequence[Traffic] = ()
  memory_seconds: float = 0.0
  kernels: Mapping[str, int] = dataclasses.field(default_factory=dict)
  model_flops: float = 0.0
  peak: float = 1.0

  def exchange(self, *, overlaps: bool) -> float:
    """Seconds of the collectives that do, or do not, overlap."""
    return sum(t.seconds for t in self.traffic if t.overlaps == overlaps)

  @property
  def seconds(self) -> float:
    """The least that the step can take."""
    longest = max(
      self.products, self.memory_seconds, self.exchange(overlaps=True)
    )
    return longest + self.exchange(overlaps=False)

  @property
  def bound(self) -> float:
    """The most of the peak that model FLOPs can use."""
    return self.model_flops / (self.peak * self.seconds)


class Plan:
  """A run on a slice of chips.

  Attributes:
    limit: bytes that a program may use on a chip.
    unit: what a batch has to be a multiple of.
  """

  def __init__(self, parts: build.Parts, target: chips.Slice):
    self.parts, self.target = parts, target
    self.limit = target.chip.memory
    _, part_count = sharding.held_parts(parts.mesh)
    self.unit = part_count * parts.config.accum_steps
    self._tx, _ = build.make_optimizer(parts)
    with jax.set_mesh(parts.mesh):
      self.state = build.abstract_state(parts, self._tx)
    rows = parts.config.batch_size
    # On a CPU, depthwise convolutions would be sums that no one counts.
    platform = "tpu" if target.is_tpu else "gpu"
    with jax.sharding.use_abstract_mesh(_abstract(platform)):
      self._flops_of_row = [
        build.count_step_flops(parts, self._tx, remat=remat) / rows
        for remat in (False, True)
      ]

  def step(self, rows: int) -> Step:
    """Compiles or estimates the step on a batch of so many rows."""
    make = self._compiled if self.target.is_tpu else self._estimated
    found = make(rows)
    model, run = (rows * flops for flops in self._flops_of_row)
    peak = self.target.size * self.target.chip.peak
    return dataclasses.replace(
      found, products=run / peak, model_flops=model, peak=peak
    )

  @property
  def held(self) -> float:
    """Bytes on a chip that no batch changes: those of the training state."""
    given = self._given(self.unit)
    return sum(given.values()) - given["batch"]

  def _batch(self, rows: int) -> api.Batch:
    place = sharding.batch_sharding(self.parts.mesh)
    return {
      k: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=place)
      for k, x in self.parts.batch_spec.items()
    }

  def _given(self, rows: int) -> dict[str, float]:
    """Bytes on a chip of what the step is given."""
    state = self.state
    return {
      "parameters": shard_bytes(state.params),
      "moving average": shard_bytes(state.ema),
      "optimizer state": shard_bytes(state.opt_state),
      "other state": shard_bytes(state.model_state),
      "batch": shard_bytes(self._batch(rows)),
    }

  # -- TPUs -------------------------------------------------------------------

  def _compiled(self, rows: int) -> Step:
    places = jax.tree.map(lambda x: x.sharding, self.state)
    try:
      with jax.set_mesh(self.parts.mesh):
        step = build.jit_train_step(self.parts, self._tx, places)
        compiled = step.lower(self.state, self._batch(rows), ()).compile()
    except jax.errors.JaxRuntimeError as e:
      if "RESOURCE_EXHAUSTED" not in str(e):
        raise
      return Step(rows, used=needed_bytes(str(e)))
    sizes = compiled.memory_analysis()
    given = self._given(rows)
    outputs = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    memory = given | {
      "padding of these": sizes.argument_size_in_bytes - sum(given.values()),
      "activations, temporaries": sizes.temp_size_in_bytes,
      "metrics": outputs,
      "program": sizes.generated_code_size_in_bytes,
    }
    program = hlo.Program(compiled.as_text())
    bandwidth = self.target.chip.bandwidth
    return Step(
      rows,
      used=sum(memory.values()),
      memory=memory,
      traffic=self._traffic(program),
      memory_seconds=program.memory_bytes() / bandwidth,
      kernels=program.kernels(),
    )

  def _traffic(self, program: hlo.Program) -> list[Traffic]:
    mesh = self.parts.mesh
    devices, rows = mesh.devices.ravel(), collections.defaultdict(list)
    for c in program.collectives(mesh.size):
      key = (c.op, c.dtype, len(c.group), c.overlaps)
      links = chips.links([devices[i] for i in c.group])
      if c.op == "collective-permute":
        links = 1
      seconds = c.sent / (links * self.target.chip.link)
      rows[key].append((c.runs, c.bytes * c.runs, seconds))
    return [
      Traffic(op, dtype, count, *map(sum, zip(*each)), overlaps)
      for (op, dtype, count, overlaps), each in sorted(rows.items())
    ]

  # -- GPUs -------------------------------------------------------------------

  def _estimated(self, rows: int) -> Step:
    """Counts what the backward pass keeps, and the gradients' exchange."""
    params = self.state.params
    memory = self._given(rows) | {
      "gradients": shard_bytes(params),
      "activations": self._kept_bytes * rows / self.unit,
    }
    return Step(
      rows,
      used=sum(memory.values()),
      memory=memory,
      traffic=self._gradient_traffic(),
    )

  @functools.cached_property
  def _kept_bytes(self) -> float:
    """What the backward pass finds saved, for each row of a batch.

    Of two batch sizes we take the difference, since parameters are kept too.
    """
    parts, state = self.parts, self.state
    loss = train_step.make_loss(parts.model, parts.task)

    def backward(params, batch):
      rng = jax.random.key(0)
      return jax.vjp(
        lambda p: loss(p, state.model_state, batch, rng), params, has_aux=True
      )[1]

    def kept(rows):
      batch = {
        k: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype)
        for k, x in parts.batch_spec.items()
      }
      params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state.params
      )
      with jax.sharding.use_abstract_mesh(_abstract("gpu")):
        found = jax.tree.leaves(jax.eval_shape(backward, params, batch))
      return sum(x.size * x.dtype.itemsize for x in found)

    return (kept(4) - kept(2)) / 2

  def _gradient_traffic(self) -> list[Traffic]:
    mesh, chip = self.parts.mesh, self.target.chip
    dtype = np.dtype(getattr(self.parts.model, "dtype", "float32"))
    moved = collections.Counter()
    for x in jax.tree.leaves(self.state.params):
      axes = {a for entry in x.sharding.spec for a in sharding.spec_axes(entry)}
      split = [a for a in api.BATCH_AXES if a in axes]
      rest = [a for a in api.BATCH_AXES if a not in axes]
      shard = math.prod(x.sharding.shard_shape(x.shape)) * dtype.itemsize
      parts = math.prod(mesh.shape[a] for a in split)
      moved["all-reduce", math.prod(mesh.shape[a] for a in rest), 1] += shard
      moved["all-gather", parts, 2] += 2 * shard * parts
      moved["reduce-scatter", parts, 1] += shard
    found = []
    for (op, count, runs), size in moved.items():
      if count > 1 and size:
        c = hlo.Collective(op, dtype.name, size, 1, tuple(range(count)), True)
        near = count <= self.target.shape[-1]
        speed = chip.link if near else chip.network
        found.append(
          Traffic(op, dtype.name, count, runs, size, c.sent / speed, True)
        )
    return found


def _abstract(platform: str) -> jax.sharding.AbstractMesh:
  """What tells the models' code which platform they are traced for."""
  device = jax.sharding.AbstractDevice(platform, 1, platform)
  return jax.sharding.AbstractMesh((), (), abstract_device=device)


def shard_bytes(tree: api.PyTree) -> int:
  """Bytes of abstract arrays on one device."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )


def needed_bytes(message: str) -> float:
  """What a program would need, from the compiler's refusal; else infinity."""
  found = re.search(r"[Uu]sed ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", message)
  if found is None:
    return math.inf
  power = 1 + "KMGT".index(found.group(2))
  return float(found.group(1)) * 1024**power


def largest_batch(
  used: Callable[[int], float],
  first: int,
  first_used: float,
  *,
  empty: float,
  limit: float,
  unit: int,
  tries: int,
) -> dict[int, float]:
  """Searches the largest batch that fits, with `tries` calls of `used`.

  Each guess is where the line through the two nearest batches meets the limit,
  the first one where that through `first` and `empty` does, what a step uses
  at least without any batch. That is rather too low: a compiler takes several
  times as long for a program that does not fit, since it tries to make it.
  The search ends early when a batch that fits leaves less than NEAR of the
  memory, or when one that does not is within NEAR, or a unit, of it.

  Returns:
    The bytes that each batch that was looked at uses.
  """
  known = {first: first_used}
  for _ in range(tries):
    low = max((b for b, u in known.items() if u <= limit), default=0)
    high = min((b for b, u in known.items() if u > limit), default=math.inf)
    full = known.get(low, 0.0) >= (1 - NEAR) * limit
    if full or high - low <= max(unit, NEAR * low):
      break
    guess = int(_where(known, empty, limit)) // unit * unit
    if not low < guess < high:
      middle = 2 * low if high == math.inf else (low + high) // 2
      guess = middle // unit * unit
    known[guess] = used(guess)
  return known


def _where(known: Mapping[int, float], empty: float, limit: float) -> float:
  """The batch that just fits, on a line through two known ones."""
  finite = {b: u for b, u in known.items() if u < math.inf}
  if len(finite) < 2:
    finite[0] = empty
  nearest = sorted(finite, key=lambda b: abs(finite[b] - limit))[:2]
  if len(nearest) < 2:
    return max(known) / 2  # The compiler has refused it, and said no number.
  (a, ua), (b, ub) = ((n, finite[n]) for n in nearest)
  if ua == ub:
    return 2 * max(a, b)
  aim = (1 - NEAR / 2) * limit
  return a + (aim - ua) * (b - a) / (ub - ua)
