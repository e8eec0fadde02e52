"""The mesh, and the rules that lay a train state out on it.

One rule list over parameter paths places the parameters, their moving average
and everything of the optimizer that has their shape. A spec names mesh axes
and is counted from the right, so that it fits a layer alone and a scanned
stack of layers (leading axis) alike.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from big_vision_like import api, trees

# Presets that `config.sharding` refers to. Kernels are (in, out); those of
# attention are (D, K, head) for query, key and value, and (K, head, D) for out.
#   data    every device holds everything; gradients are summed
#   fsdp    every kernel and every table of tokens is cut along its width (the
#           number of tokens or classes may be a prime) and gathered when used;
#           small convolutions of masks, of 264 channels down to 1, stay whole
#   tensor  fsdp, and heads and hidden units of the MLP are split besides
# An axis of the mesh that has size 1 changes nothing.
RULES: dict[str, trees.Rules] = {
  "data": ((".*", ()),),
  "fsdp": (
    (".*mask_head/.*", ()),
    (".*attn/(query|key|value)/kernel", ("fsdp", None, None)),
    (".*(mlp/fc1|head)/kernel", ("fsdp", None)),
    (".*/kernel", ("fsdp",)),
    (".*/embedding", ("fsdp",)),
    (".*", ()),
  ),
  "tensor": (
    (".*mask_head/.*", ()),
    (".*attn/(query|key|value)/kernel", ("fsdp", "tensor", None)),
    (".*attn/(query|key|value)/bias", ("tensor", None)),
    (".*attn/out/kernel", ("tensor", None, "fsdp")),
    (".*mlp/fc1/kernel", ("fsdp", "tensor")),
    (".*mlp/fc1/bias", ("tensor",)),
    (".*mlp/fc2/kernel", ("tensor", "fsdp")),
    (".*head/kernel", ("fsdp", None)),
    (".*/kernel", ("fsdp",)),
    (".*/embedding", ("fsdp",)),
    (".*", ()),
  ),
}


# Of the parameters in a refusal.
_SHOWN = 5


def make_mesh(
  shape: dict[str, int], devices: Sequence[Any] | None = None
) -> Mesh:
  """The mesh of a run; its axes are always those of `api.MESH_AXES`.

  Args:
    shape: devices along each axis; a missing axis has 1, and one of them may
      be -1: what is left.
    devices: all devices of all processes, unless given.

  Raises:
    ValueError: for an unknown axis, or if the devices do not fill the mesh.
  """
  devices = jax.devices() if devices is None else list(devices)
  unknown = sorted(set(shape) - set(api.MESH_AXES))
  sizes = [shape.get(axis, 1) for axis in api.MESH_AXES]
  open_axes = [i for i, n in enumerate(sizes) if n == -1]
  if unknown or len(open_axes) > 1 or any(n < 1 and n != -1 for n in sizes):
    raise ValueError(
      f"config.mesh = {shape} has to give the axes {', '.join(api.MESH_AXES)} "
      "a number of devices each; one may be -1, which takes what is left."
    )
  fixed = abs(math.prod(sizes))
  if len(devices) % fixed or (not open_axes and len(devices) != fixed):
    needs = f"a multiple of {fixed}" if open_axes else f"{fixed}"
    raise ValueError(
      f"config.mesh = {shape} needs {needs} devices, but there are "
      f"{len(devices)}. An axis of -1 takes what is left."
    )
  for axis in open_axes:
    sizes[axis] = len(devices) // fixed
  # The default of jax.make_mesh are Explicit axes, under which sharding
  # constraints are assertions.
  return jax.make_mesh(
    tuple(sizes),
    api.MESH_AXES,
    axis_types=(AxisType.Auto,) * len(sizes),
    devices=devices,
  )


def check_batch_size(
  batch_size: int, mesh: Mesh, *, key: str = "config.batch_size"
):
  """Refuses a batch that the devices cannot share evenly."""
  parts = math.prod(mesh.shape[axis] for axis in api.BATCH_AXES)
  if batch_size % parts:
    sizes = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in api.BATCH_AXES)
    low = batch_size - batch_size % parts
    near = f"{low} or {low + parts}" if low else f"{parts}"
    raise ValueError(
      f"{key} = {batch_size} cannot be shared evenly by the {parts} devices "
      f"of the mesh axes {sizes}; use a multiple of {parts}, such as {near}."
    )


def held_parts(mesh: Mesh) -> tuple[tuple[int, ...], int]:
  """Which parts of a batch this process's devices hold, and how many there are.

  `batch_sharding` cuts a batch into equal parts, numbered from its first row.
  Processes that the `tensor` axis joins hold the same parts.
  """
  places = mesh.devices.reshape(-1, mesh.shape["tensor"])
  here = jax.process_index()
  held = [
    part
    for part, devices in enumerate(places)
    if any(device.process_index == here for device in devices)
  ]
  return tuple(held), len(places)


def replicated(mesh: Mesh) -> NamedSharding:
  """Every device holds the whole array."""
  return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The leading axis is split over the axes that share the batch."""
  return NamedSharding(mesh, P(api.BATCH_AXES))


def tree_shardings(
  tree: api.PyTree,
  mesh: Mesh,
  rules: trees.Rules,
  *,
  section: str = "config.sharding",
) -> api.PyTree:
  """A tree like `tree` of shardings.

  Args:
    tree: parameters or their shapes.
    mesh: from `make_mesh`.
    rules: (regex over whole paths, spec). A spec is a tuple with one entry for
      each of the last dimensions: a mesh axis, a tuple of axes or None.
      Dimensions left of it stay whole.
    section: the config section of the rules, for messages.

  Raises:
    ValueError: for a parameter without a rule, a spec that is longer than the
      parameter has dimensions, names a mesh axis that does not exist, or
      names one twice; and for dimensions, such as heads or the width, that the
      mesh does not divide.
  """
  uneven: list[str] = []

  def one(path, leaf):
    name = trees.path_name(path)
    spec = trees.match(name, rules, section)
    _check_spec(name, spec, leaf.shape, mesh, section)
    return NamedSharding(mesh, _fit(name, spec, leaf.shape, mesh, uneven))

  shardings = jax.tree_util.tree_map_with_path(one, tree)
  if uneven:
    shown = uneven[:_SHOWN] + ["..."] * (len(uneven) > _SHOWN)
    raise ValueError(
      f"config.mesh does not divide what {section} cuts:\n  "
      + "\n  ".join(shown)
      + "\nChoose other sizes of these axes, or put a rule (name, ()), which "
      "keeps a parameter whole, before the others."
    )
  return shardings


def state_shardings(
  state: api.TrainState, mesh: Mesh, rules: trees.Rules
) -> api.TrainState:
  """A train state of shardings, from a state or its shapes.

  The average of a parameter and what the optimizer keeps for it follow the
  parameter; step, key, counts and `model_state` are replicated.
  """
  params = tree_shardings(state.params, mesh, rules)
  everywhere = replicated(mesh)
  ema = jax.tree.map(lambda _: everywhere, state.ema)
  return api.TrainState(
    step=everywhere,
    params=params,
    model_state=jax.tree.map(lambda _: everywhere, state.model_state),
    opt_state=_follow(state.opt_state, state.params, params),
    rng=everywhere,
    ema=None if ema is None else ema | {"params": params},
  )


def with_shardings(shapes: api.PyTree, shardings: api.PyTree) -> api.PyTree:
  """The abstract arrays that a checkpoint is restored onto."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    shardings,
  )


def spec_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
  """The mesh axes of an entry of a spec."""
  if entry is None:
    return ()
  return (entry,) if isinstance(entry, str) else tuple(entry)


def _check_spec(name, spec, shape, mesh, section):
  axes = [axis for entry in spec for axis in spec_axes(entry)]
  known = set(axes) <= set(mesh.axis_names)
  if not known or len(set(axes)) < len(axes) or len(spec) > len(shape):
    raise ValueError(
      f"{section}: the spec {tuple(spec)} does not fit the parameter {name!r} "
      f"of shape {tuple(shape)}. It has one entry for each of the last "
      f"dimensions, each None or of the axes {', '.join(mesh.axis_names)}, no "
      "axis twice."
    )


def _fit(name, spec, shape, mesh, uneven):
  """The spec over all dimensions; what does not divide goes into `uneven`."""
  entries: list[Any] = [None] * (len(shape) - len(spec))
  for dim, entry in enumerate(spec, start=len(entries)):
    axes = tuple(a for a in spec_axes(entry) if mesh.shape[a] > 1)
    parts = math.prod(mesh.shape[a] for a in axes)
    if shape[dim] % parts:
      over = " x ".join(f"{a} {mesh.shape[a]}" for a in axes)
      uneven.append(f"{name} {tuple(shape)}: {shape[dim]} over {over}")
    entries.append(axes[0] if len(axes) == 1 else axes or None)
  return P(*entries) if any(entries) else P()


def _follow(opt_state, params, shardings):
  """Shardings for an optimizer state, whose paths end in parameter paths."""
  shapes = {k: tuple(x.shape) for k, x in trees.flatten(params).items()}
  placed = trees.flatten(shardings)
  mesh = next(iter(placed.values())).mesh

  def one(path, leaf):
    parts = trees.path_name(path).split("/")
    suffixes = ("/".join(parts[i:]) for i in range(len(parts)))
    name = next((s for s in suffixes if s in shapes), None)
    if name is None:
      return replicated(mesh)
    spec = _reduced(placed[name].spec, shapes[name], tuple(leaf.shape))
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(one, opt_state)


def _reduced(spec, shape, reduced):
  """The spec of an array that keeps all, or all but one, of the dimensions.

  The latter are adafactor's row and column statistics. Where equal sizes leave
  open which dimension is gone, any choice is a correct layout.
  """
  if reduced == shape:
    return spec
  gone = [i for i in range(len(shape)) if tuple(np.delete(shape, i)) == reduced]
  if not gone:
    return P()
  entries = list(spec) + [None] * (len(shape) - len(spec))
  del entries[gone[-1]]
  return P(*entries)
