"""Checks the law of packing on these devices, with the model of a run.

  check packing --config configs/navit_jft.py[:arg]   freshly initialised
  check packing --run DIR                             trained

Packed equals alone: images of random shapes, from 1 x N to N x 1 patches, give
the same outputs and the same gradient of the parameters packed into rows and
each in a row of its own. And new pixels of other images, or in the padding,
change no bit of an image's outputs. Every attention backend that these devices
have is checked, in float32 and in the compute dtype of the config.
"""

import argparse
import dataclasses
import functools
import importlib.util
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from big_vision_like import (
  api,
  build,
  compilation,
  sharding,
  train_step,
  trees,
)
from big_vision_like.commands import predict
from big_vision_like.data import packing, planning
from big_vision_like.models.layers import attention

# What is allowed, of how far the images' outputs are apart or of a parameter's
# largest gradient, and the rounding that it is for. A leak makes about 1.
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
ROUNDING = {"float32": 6e-8, "bfloat16": 4e-3, "float16": 5e-4}
# Gradients of parameters that have nearly none are compared at this share of
# the largest: there, rounding is all there is.
NEGLIGIBLE = 1e-3
# Of a model whose config leaves the number of classes to the data.
CLASSES = 7
# Default initialisations hide errors behind zeros and ones.
NOISE = 0.05
BACKENDS = tuple(b for b in attention.BACKENDS if b != "auto")
PLATFORMS = {"splash": "tpu", "cudnn": "gpu"}
# Plain JAX multiplies foreign values by an exact 0, so any bit that moves is a
# leak. Kernels of others have to keep to the tolerance, and the table says
# what they do.
BITWISE = ("xla", "blockwise")

Numpy = dict[str, np.ndarray]
Images = dict[int, np.ndarray]  # something of each image, by its number


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """What to check, of which model, where."""
  add = parser.add_argument
  add("what", choices=["packing"], help="the law to check")
  model = parser.add_mutually_exclusive_group(required=True)
  model.add_argument("--config", metavar="FILE[:ARG]", help="of a packed run")
  model.add_argument("--run", metavar="DIR", help="a run folder")
  add("--images", type=int, default=12, help="how many to pack")
  add("--seed", type=int, default=0, help="of shapes, pixels and parameters")
  slow = "attention backends; named ones also where they are slow"
  add("--backend", nargs="+", choices=BACKENDS, default=(), help=slow)
  add("--dtype", nargs="+", choices=list(TOLERANCES), help="compute dtypes")


def main(args: argparse.Namespace) -> int:
  """Prints a table; 1 if a line of it fails."""
  if args.images < 2:
    raise ValueError(f"--images {args.images}: packing takes at least 2.")
  compilation.enable_compilation_cache()
  case = make_case(args)
  print(case.describe())
  dtypes = args.dtype or sorted({"float32", case.dtype}, reverse=True)
  rows = [("backend", "dtype", "check", "result", "allowed", "")]
  for backend in args.backend or BACKENDS:
    for dtype in dtypes:
      rows += check(case, backend, dtype, forced=backend in args.backend)
  widths = [max(map(len, column)) for column in zip(*rows)]
  for row in rows:
    print("  ".join(f"{c:{w}}" for c, w in zip(row, widths)).rstrip())
  for dtype in dtypes:
    print(
      f"{dtype} rounds by {ROUNDING[dtype]:g}, layer by layer, in sums whose "
      f"order packing changes: {TOLERANCES[dtype]:g} of the spread is allowed."
    )
  failed = sum(row[-1] == "FAIL" for row in rows)
  print(f"{failed} checks failed." if failed else "The law of packing holds.")
  return 1 if failed else 0


def load_config(spec: str) -> ConfigDict:
  """The config of "path/to/file.py" or "path/to/file.py:argument"."""
  path, colon, argument = spec.partition(":")
  if not Path(path).is_file():
    raise ValueError(f"There is no config file {path}.")
  found = importlib.util.spec_from_file_location(Path(path).stem, path)
  module = importlib.util.module_from_spec(found)
  found.loader.exec_module(module)
  return module.get_config(*[argument] if colon else [])


@dataclasses.dataclass(frozen=True)
class Rows:
  """A packed batch, and where in it each image is: (row, slot)."""

  batch: Numpy
  places: dict[int, tuple[int, int]]

  def pick(self, values: np.ndarray) -> Images:
    """Of [B,M,...], what belongs to each image."""
    return {i: values[place] for i, place in self.places.items()}


@dataclasses.dataclass(frozen=True)
class Case:
  """A model's settings and variables, with images packed and alone."""

  config: ConfigDict
  mesh: jax.sharding.Mesh
  task: api.Task
  variables: dict[str, api.PyTree]
  packed: Rows
  alone: list[Rows]
  seed: int

  @property
  def dtype(self) -> str:
    return self.config.model.get("dtype", "float32")

  def model(self, backend: str, dtype: str):
    return build.make_model(
      self.config, self.task.num_classes, attention=backend, dtype=dtype
    )

  def describe(self) -> str:
    ids = self.packed.batch["segment_ids"]
    rows = int(self.packed.batch["_mask"].sum())
    device = self.mesh.devices.flat[0]
    return (
      f"{len(self.packed.places)} images in {rows} rows of {ids.shape[1]} "
      f"tokens ({(ids > 0).sum() / (rows * ids.shape[1]):.0%} full), "
      f"{trees.count(self.variables['params']):,} parameters, "
      f"{self.mesh.size} x {device.device_kind}"
    )


def make_case(args: argparse.Namespace) -> Case:
  """Reads the config or run, draws images, initialises the parameters."""
  rng = np.random.default_rng(args.seed)
  if args.run:
    run = predict.load_run(args.run)
    config, task, variables = run.config, run.task, run.variables
    mesh = {"data": -1}  # the run's may be for other devices than these
  else:
    config, variables = load_config(args.config), None
    mesh = build.plain(config.mesh)
    task = build.make_task(config, CLASSES)
  if config.task.name != "classification":
    raise ValueError(
      f"The check compares logits of classes, but the task of "
      f"{args.config or args.run} is {config.task.name!r}."
    )
  if config.data.pack is None:
    raise ValueError(
      f"{args.config or args.run} does not pack images: its data.pack is None."
    )
  spec = packing.PackSpec(**build.plain(config.data.pack))
  mesh = sharding.make_mesh(mesh)
  parts = math.prod(mesh.shape[axis] for axis in api.BATCH_AXES)
  packed, alone = pack_images(
    spec, args.images, rng, parts=parts, classes=task.num_classes
  )
  case = Case(config, mesh, task, variables, packed, alone, args.seed)
  if variables is None:
    case = dataclasses.replace(case, variables=_random_variables(case))
  return case


def _random_variables(case: Case) -> dict[str, api.PyTree]:
  model = case.model("xla", "float32")

  def init(key):
    batch = jax.tree.map(jnp.asarray, case.packed.batch)
    params, others = train_step.init_variables(model, case.task, key, batch)
    leaves, structure = jax.tree.flatten(params)
    noisy = [
      x + NOISE * jax.random.normal(jax.random.fold_in(key, i), x.shape)
      for i, x in enumerate(leaves)
    ]
    return {"params": jax.tree.unflatten(structure, noisy), **others}

  return jax.jit(init)(jax.random.key(case.seed))


def draw_grids(
  spec: packing.PackSpec, count: int, rng: np.random.Generator
) -> list[tuple[int, int]]:
  """Grids of at most half a row, the longest and the smallest among them."""
  most = max(1, spec.length // 2)
  side = min(most, spec.max_side or most)
  grids = [(1, side), (side, 1), (1, 1)]
  for tokens in rng.integers(1, most + 1, count):
    h = math.sqrt(tokens * math.exp(rng.uniform(-1.5, 1.5)))
    h = min(max(round(h), 1), side, int(tokens))
    grids.append((h, min(int(tokens) // h, side)))
  return grids[:count]


def pack_images(
  spec: packing.PackSpec,
  count: int,
  rng: np.random.Generator,
  *,
  parts: int,
  classes: int,
) -> tuple[Rows, list[Rows]]:
  """Images of noise, packed, and each in a row of its own.

  All batches have the same number of rows, a multiple of `parts`, so that one
  compiled program serves them all.
  """
  P = spec.patch
  images = [
    rng.integers(0, 256, (h * P, w * P, 3), np.uint8)
    for h, w in draw_grids(spec, count, rng)
  ]
  tokens = np.array([x.shape[0] * x.shape[1] // P**2 for x in images])
  members = planning.best_fit_decreasing(
    tokens, length=spec.length, max_images=spec.max_images
  )
  rows = -(-len(members) // parts) * parts
  lay = functools.partial(_lay_out, spec, images, rows=rows, classes=classes)
  alone = [
    lay([[i] for i in range(start, min(start + rows, count))])
    for start in range(0, count, rows)
  ]
  return lay(members), alone


def _lay_out(
  spec: packing.PackSpec,
  images: Sequence[np.ndarray],
  members: Sequence[Sequence[int]],
  *,
  rows: int,
  classes: int,
) -> Rows:
  batch, places = packing.blank(spec, rows), {}
  for row, of_row in enumerate(members):
    start = 0
    for slot, i in enumerate(of_row):
      places[i] = (row, slot)
      start += packing.put(
        batch, row, slot, start, image=images[i], keep=None, spec=spec
      )
  shape = (rows, spec.max_images)
  batch["label"] = np.full(shape, -1, np.int32)
  batch["multi_label"] = np.zeros((*shape, classes), np.uint8)
  return Rows(batch, places)


def check(
  case: Case, backend: str, dtype: str, *, forced: bool
) -> list[tuple[str, ...]]:
  """The lines of a backend in a dtype."""
  needs, here = PLATFORMS.get(backend), jax.default_backend()
  if needs not in (None, here) and not forced:
    reason = f"it is for {needs.upper()}s, and this is a {here.upper()}"
    return [(backend, dtype, "not run", reason, "", "")]
  precision = "highest" if dtype == "float32" else None
  try:
    with jax.set_mesh(case.mesh), jax.default_matmul_precision(precision):
      return list(_lines(Program(case, backend, dtype), case, backend, dtype))
  except ValueError as e:
    if not str(e).startswith("Attention backend"):
      raise
    return [(backend, dtype, "not run", str(e), "", "")]


class Program:
  """The compiled model: outputs per image, and the gradient.

  The gradient is that of a weighted sum of all outputs, with weights that each
  image keeps wherever it is packed.
  """

  def __init__(self, case: Case, backend: str, dtype: str):
    model = case.model(backend, dtype)
    others = {k: v for k, v in case.variables.items() if k != "params"}
    rules = case.config.sharding
    rules = sharding.RULES[rules] if isinstance(rules, str) else rules
    params = case.variables["params"]
    placed = sharding.tree_shardings(params, case.mesh, rules)
    self._params = jax.device_put(params, placed)
    self._rows = sharding.batch_sharding(case.mesh)
    self._count, self._seed = len(case.packed.places), case.seed

    def outputs(params, batch):
      inputs, _ = case.task.prepare(batch, None)
      variables = {"params": params, **others}
      out = model.apply(variables, train=False, **inputs)
      return {k: out[k].astype(jnp.float32) for k in ("logits", "pooled")}

    def loss(params, batch, weights):
      out = outputs(params, batch)
      return sum((out[k] * weights[k]).sum() for k in out), out

    self._shapes = functools.partial(jax.eval_shape, outputs, params)
    self._grad = jax.jit(jax.grad(loss, has_aux=True))

  def __call__(self, rows: Rows) -> tuple[dict[str, Images], Numpy]:
    """Outputs by name and image, and gradients by parameter path."""
    batch = jax.device_put(rows.batch, self._rows)
    weights = jax.device_put(self._weigh(rows, batch), self._rows)
    grads, out = jax.device_get(self._grad(self._params, batch, weights))
    return {k: rows.pick(v) for k, v in out.items()}, trees.flatten(grads)

  def _weigh(self, rows: Rows, batch: api.Batch) -> Numpy:
    weights = {}
    for key, shape in self._shapes(batch).items():
      rng = np.random.default_rng(self._seed)
      each = rng.normal(size=(self._count, shape.shape[-1]))
      weights[key] = np.zeros(shape.shape, np.float32)
      for i, place in rows.places.items():
        weights[key][place] = each[i]
    return weights


def _lines(
  program: Program, case: Case, backend: str, dtype: str
) -> Iterator[tuple[str, ...]]:
  tolerance = TOLERANCES[dtype]

  def line(check, error, *, allowed=tolerance, result=None):
    verdict = "PASS" if error <= allowed else "FAIL"  # NaN fails
    result = f"{error:.1e}" if result is None else result
    return (backend, dtype, check, result, f"{allowed:g}", verdict)

  packed, grads = program(case.packed)
  alone, alone_grads = _sum([program(rows) for rows in case.alone])
  for key in packed:
    error = difference(packed[key], alone[key]) / spread(alone[key])
    yield line(f"{key}: packed = alone", error)
  worst, error = gradient_error(grads, alone_grads)
  yield line("gradient: packed = alone", error, result=f"{error:.1e} {worst}")
  allowed = 0.0 if backend in BITWISE else tolerance
  error, same = foreign_pixels(program, case, packed)
  yield line(
    "new pixels elsewhere",
    error,
    allowed=allowed,
    result="bit-equal" if same else f"{error:.1e}",
  )


def _sum(results: Sequence[tuple[dict[str, Images], Numpy]]):
  outputs: dict[str, Images] = {}
  for out, _ in results:
    for key, by_image in out.items():
      outputs.setdefault(key, {}).update(by_image)
  return outputs, jax.tree.map(lambda *g: sum(g), *[g for _, g in results])


def difference(a: Images, b: Images) -> float:
  """The largest difference over the images of b; NaN if there is any."""
  return float(np.max([np.abs(a[i] - b[i]).max() for i in b]))


def spread(by_image: Images) -> float:
  """How far any number is from its mean over the images.

  The size of the numbers would not do: a head's bias may dwarf what it says.
  """
  values = np.stack(list(by_image.values()))
  return float(np.abs(values - values.mean(0)).max())


def gradient_error(a: Numpy, b: Numpy) -> tuple[str, float]:
  """The parameter whose gradients differ most, relative to their size."""
  sizes = {k: np.abs(x).max() for k, x in b.items()}
  least = NEGLIGIBLE * max(sizes.values())
  errors = {
    k: float(np.abs(a[k] - b[k]).max() / max(sizes[k], least)) for k in b
  }
  # NaN is larger than any number here.
  worst = max(errors, key=lambda k: (math.isnan(errors[k]), errors[k]))
  return worst, errors[worst]


def foreign_pixels(
  program: Program, case: Case, before: dict[str, Images]
) -> tuple[float, bool]:
  """What new pixels in every other slot and in the padding do to the rest.

  Returns:
    The largest relative difference, and whether all bits are the same.
  """
  rng = np.random.default_rng(case.seed + 1)
  error, same = 0.0, True
  for parity in (0, 1):
    batch = dict(case.packed.batch)
    ids = batch["segment_ids"]
    # Slots count from 0 and ids from 1; padding, id 0, is new both times.
    foreign = (ids == 0) | (ids % 2 == parity)
    noise = rng.integers(0, 256, batch["patches"].shape, np.uint8)
    batch["patches"] = np.where(foreign[..., None], noise, batch["patches"])
    places = case.packed.places
    rest = [i for i, (_, slot) in places.items() if (slot + 1) % 2 != parity]
    after, _ = program(Rows(batch, places))
    for key in before if rest else ():
      old, new = ({i: x[key][i] for i in rest} for x in (before, after))
      moved = difference(new, old) / spread(before[key])
      error = float(np.maximum(error, moved))  # keeps NaN
      same &= all(old[i].tobytes() == new[i].tobytes() for i in rest)
  return error, same
