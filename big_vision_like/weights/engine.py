"""Published weights into our parameters and back: the engine of all mappings.

`weights/<model>.py` says what a model's parameters are called elsewhere:

  LAYOUTS: name of a layout -> function of the model -> list of Rule
  OTHER_PARTS: name of a layout -> regex of what its files may hold besides, of
    another model, such as a text tower; or function of the model -> that regex

A rule ties some of our arrays to some of theirs, by an invertible change of
shape. Ours are named by their path behind the collection, and as if no layers
were scanned: "params/encoder/blocks_0/mlp/fc1/kernel". Everything is matched
strictly: no other array may be left over on either side.
"""

import dataclasses
import difflib
import importlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import ml_dtypes
import numpy as np

from big_vision_like import resolve, trees
from big_vision_like.api import SCANNED, PyTree
from big_vision_like.models.layers.encoder import stack_blocks, unstack_blocks

Tensors = dict[str, np.ndarray]
# Where models have a number for each class -> numbers that are for no class;
# CLASS_HEADS of weights/<model>.py has more of them.
_CLASS_HEADS = {"params/head/bias": 0, "params/head/linear/bias": 0}
# The parameters in the checkpoints of big_vision's trainers, new and old.
_NPZ_WRAPPERS = ("params/", "opt/target/")
SUFFIXES = (".safetensors", ".npz", ".pth", ".pt", ".bin")


@dataclasses.dataclass(frozen=True)
class Rule:
  """Ties our arrays to theirs.

  Attributes:
    ours: paths; none for what only they store.
    theirs: names; none for what only we store.
    load: their arrays -> ours, as a tuple.
    save: our arrays -> theirs, as a tuple.
  """

  ours: tuple[str, ...]
  theirs: tuple[str, ...]
  load: Callable[..., tuple[np.ndarray, ...]]
  save: Callable[..., tuple[np.ndarray, ...]]


def same(ours: str, theirs: str) -> Rule:
  """Equal arrays."""
  return Rule((ours,), (theirs,), lambda x: (x,), lambda x: (x,))


def reshaped(
  ours: str, theirs: str, shape: Sequence[int], their_shape: Sequence[int]
) -> Rule:
  """The same numbers in the same order, in two shapes."""
  return Rule(
    (ours,),
    (theirs,),
    lambda x: (x.reshape(shape),),
    lambda x: (x.reshape(their_shape),),
  )


def constant(theirs: str, value: np.ndarray) -> Rule:
  """What they store and we know: dropped at import, written at export."""
  return Rule((), (theirs,), lambda x: (), lambda: (value,))


def norm(ours: str, theirs: str, *, bias: bool = True) -> list[Rule]:
  """LayerNorm or GroupNorm: scale and bias as torch's weight and bias."""
  rules = [same(f"{ours}/scale", f"{theirs}.weight")]
  return rules + ([same(f"{ours}/bias", f"{theirs}.bias")] if bias else [])


def dense(ours: str, theirs: str, *, bias: bool = True) -> list[Rule]:
  """Our [in,out] is torch's [out,in]."""
  turn = lambda x: (np.transpose(x),)
  rules = [Rule((f"{ours}/kernel",), (f"{theirs}.weight",), turn, turn)]
  return rules + ([same(f"{ours}/bias", f"{theirs}.bias")] if bias else [])


def conv(ours: str, theirs: str, *, bias: bool = True) -> list[Rule]:
  """Our [kh,kw,in,out] is torch's [out,in,kh,kw]; depthwise ones as well."""
  rule = Rule(
    (f"{ours}/kernel",),
    (f"{theirs}.weight",),
    lambda x: (x.transpose(2, 3, 1, 0),),
    lambda x: (x.transpose(3, 2, 0, 1),),
  )
  return [rule, *([same(f"{ours}/bias", f"{theirs}.bias")] if bias else [])]


def batch_norm(
  ours: str, theirs: str, *, counter: bool = True, frozen: bool = False
) -> list[Rule]:
  """layers/convolution.py's BatchNorm; `ours` without the collection.

  Args:
    ours: path of the module, without "params/".
    theirs: prefix of torch's BatchNorm.
    counter: whether they have num_batches_tracked, which we do not keep.
    frozen: scale and bias lie in "batch_stats".
  """
  at = "batch_stats" if frozen else "params"
  rules = [
    same(f"{at}/{ours}/scale", f"{theirs}.weight"),
    same(f"{at}/{ours}/bias", f"{theirs}.bias"),
    same(f"batch_stats/{ours}/mean", f"{theirs}.running_mean"),
    same(f"batch_stats/{ours}/var", f"{theirs}.running_var"),
  ]
  if counter:
    zero = np.zeros((), np.int64)
    rules.append(constant(f"{theirs}.num_batches_tracked", zero))
  return rules


def heads(ours: str, theirs: str, count: int, *, bias: bool = True):
  """A projection to heads: our [D,K,Dh] is torch's [K Dh, D]."""
  rules = [
    Rule(
      (f"{ours}/kernel",),
      (f"{theirs}.weight",),
      lambda x: (_to_heads(x, count),),
      lambda x: (_from_heads(x),),
    )
  ]
  if bias:
    rules.append(
      Rule(
        (f"{ours}/bias",),
        (f"{theirs}.bias",),
        lambda x: (x.reshape(count, -1),),
        lambda x: (x.reshape(-1),),
      )
    )
  return rules


def fused_heads(
  ours: Sequence[str], theirs: str, count: int, *, bias: bool = True
) -> list[Rule]:
  """Query, key and value, which torch keeps in one [3 K Dh, D]."""
  n = len(ours)
  rules = [
    Rule(
      tuple(f"{x}/kernel" for x in ours),
      (f"{theirs}.weight",),
      lambda x: tuple(_to_heads(part, count) for part in np.split(x, n)),
      lambda *parts: (np.concatenate([_from_heads(x) for x in parts]),),
    )
  ]
  if bias:
    rules.append(
      Rule(
        tuple(f"{x}/bias" for x in ours),
        (f"{theirs}.bias",),
        lambda x: tuple(p.reshape(count, -1) for p in np.split(x, n)),
        lambda *parts: (np.concatenate([p.reshape(-1) for p in parts]),),
      )
    )
  return rules


def heads_out(ours: str, theirs: str, count: int, *, bias: bool = True):
  """The projection from heads: our [K,Dh,D] is torch's [D, K Dh]."""
  rule = Rule(
    (f"{ours}/kernel",),
    (f"{theirs}.weight",),
    lambda x: (np.transpose(x).reshape(count, -1, x.shape[0]),),
    lambda x: (x.reshape(-1, x.shape[-1]).T,),
  )
  return [rule, *([same(f"{ours}/bias", f"{theirs}.bias")] if bias else [])]


def _to_heads(x, count):
  return x.T.reshape(x.shape[1], count, -1)


def _from_heads(x):
  return x.reshape(x.shape[0], -1).T


# Reading and writing -------------------------------------------------------


def read(path: str | Path) -> Tensors:
  """All arrays of a .safetensors, .npz, .pth, .pt or .bin file, by name.

  Torch files are loaded with weights_only, so that nothing in them runs.
  Wrappers such as {"model": ...} and {"state_dict": ...} are taken off, and of
  .npz files the "params/" and "opt/target/" of big_vision's trainers.

  Raises:
    ValueError: for another kind of file, one that holds more than arrays, or
      a broken one; the sentence names the file.
  """
  path = Path(path)
  if not path.is_file():
    raise ValueError(f"There is no file of weights {path}.")
  readers = dict.fromkeys(SUFFIXES, _read_torch)
  readers |= {".safetensors": _read_safetensors, ".npz": _read_npz}
  if path.suffix not in readers:
    raise ValueError(
      f"{path}: weights come as one of {', '.join(readers)}, and this is "
      f"{path.suffix or 'a file without suffix'}. Pickles are never loaded."
    )
  try:
    return readers[path.suffix](path)
  except ImportError:
    raise
  except Exception as e:
    raise ValueError(f"{path} cannot be read as {path.suffix}: {e}") from e


def _read_safetensors(path):
  from safetensors import flax  # Reads bfloat16, which numpy's reader cannot.

  return {k: np.asarray(x) for k, x in flax.load_file(path).items()}


def _read_npz(path):
  with np.load(path, allow_pickle=False) as file:
    for prefix in _NPZ_WRAPPERS:
      names = [k for k in file.files if k.startswith(prefix)]
      if names:
        return {k.removeprefix(prefix): _recovered(file[k]) for k in names}
    return {k: _recovered(file[k]) for k in file.files}


def _recovered(x):
  """.npz files forget what the two bytes of a bfloat16 were."""
  return x.view(ml_dtypes.bfloat16) if x.dtype == np.dtype("V2") else x


def _read_torch(path):
  try:
    import torch
  except ImportError as e:
    raise ImportError(
      f"Reading {path} needs torch: install the extra `parity`, or save the "
      "weights as .safetensors."
    ) from e
  state = torch.load(path, map_location="cpu", weights_only=True)
  for key in ("model", "state_dict"):
    if isinstance(state, dict) and isinstance(state.get(key), dict):
      state = state[key]
  wrong = [k for k, x in state.items() if not isinstance(x, torch.Tensor)]
  if wrong:
    raise ValueError(f"it holds more than arrays: {wrong[:5]}")
  return {k: _to_numpy(x) for k, x in state.items()}


def _to_numpy(tensor):
  import torch

  tensor = tensor.detach().contiguous()
  if tensor.dtype == torch.bfloat16:
    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
  return tensor.numpy()


def _to_torch(x):
  import torch

  if x.dtype == ml_dtypes.bfloat16:
    return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
  return torch.from_numpy(x)


def write(
  path: str | Path, tensors: Tensors, metadata: Mapping[str, Any] | None = None
) -> None:
  """Writes a .safetensors, .npz or .pth file.

  `metadata`, as JSON, is kept by .safetensors only.
  """
  path = Path(path)
  tensors = {k: np.asarray(x, order="C") for k, x in tensors.items()}
  if path.suffix == ".safetensors":
    from safetensors import numpy

    text = {k: json.dumps(v) for k, v in (metadata or {}).items()}
    numpy.save_file(tensors, path, metadata=text)
  elif path.suffix == ".npz":
    np.savez(path, **tensors)
  elif path.suffix == ".pth":
    import torch

    torch.save({k: _to_torch(x) for k, x in tensors.items()}, path)
  else:
    raise ValueError(f"{path}: write .safetensors, .npz or .pth.")


# Mapping ---------------------------------------------------------------------


def layouts(name: str) -> Mapping[str, Callable[[nn.Module], list[Rule]]]:
  """The layouts of models/<name>.py, by name."""
  return resolve.resolve("weights", name, "LAYOUTS")


def import_weights(
  tensors: Tensors,
  *,
  name: str,
  model: nn.Module,
  shapes: PyTree,
  layout: str | None = None,
  resize: Sequence[str] = (),
) -> tuple[PyTree, str]:
  """Their arrays as the variables of a model, of its shapes and dtypes.

  Args:
    tensors: arrays by their names.
    name: of the file in models/ and weights/.
    model: the model that shall hold them.
    shapes: of all its variables: "params" and, if it has any, "batch_stats".
    layout: whose names they are; None: recognised from the names.
    resize: what may be resized to fit, see `resize_ours`.

  Returns:
    The variables, and the layout.

  Raises:
    ValueError: if anything is missing, left over or of another shape; it lists
      the names on both sides.
  """
  variables, layout = to_ours(
    tensors,
    name=name,
    model=model,
    shapes=shapes,
    layout=layout,
    resize=resize,
  )
  return _checked(variables, shapes, layout), layout


def to_ours(
  tensors: Tensors,
  *,
  name: str,
  model: nn.Module,
  shapes: PyTree,
  layout: str | None = None,
  resize: Sequence[str] = (),
) -> tuple[PyTree, str]:
  """As `import_weights`, but shapes may still differ from the model's.

  Args:
    tensors, name, model, shapes, layout: see `import_weights`.
    resize: see `resize_ours`.

  Raises:
    ValueError: if a name is missing or left over, or there is no such resize.
  """
  known = layouts(name)
  if layout is None:
    layout = recognise(tensors, name, model)
  elif layout not in known:
    raise ValueError(
      f"Model {name!r} has no layout {layout!r}; it has {', '.join(known)}."
    )
  others = table(name, "OTHER_PARTS").get(layout)
  if callable(others):
    others = others(model)
  if others:
    tensors = {k: x for k, x in tensors.items() if not re.fullmatch(others, k)}
  rules = known[layout](model)
  expected = {k for rule in rules for k in rule.theirs}
  problems = _two_sides(
    f"of the {layout} layout that are missing from the file",
    expected - set(tensors),
    "in the file that the model has no place for",
    set(tensors) - expected,
  )
  if problems:
    same_count = len(expected & set(tensors))
    raise ValueError(
      f"{same_count} of the {len(expected)} arrays that {name} expects in the "
      f"{layout} layout are in the file; nothing was loaded.{problems}"
    )
  flat = {}
  for rule in rules:
    arrays = rule.load(*(tensors[k] for k in rule.theirs))
    flat |= dict(zip(rule.ours, arrays, strict=True))
  variables = resize_ours(
    trees.unflatten(flat), name=name, model=model, shapes=shapes, resize=resize
  )
  if _is_scanned(shapes):
    variables = stack_blocks(variables)
  return variables, layout


def resize_ours(
  variables: PyTree,
  *,
  name: str,
  model: nn.Module,
  shapes: PyTree,
  resize: Sequence[str],
) -> PyTree:
  """Fits what the model has in another shape, as the table of positions.

  Args:
    variables: ours, of a file or of a run.
    name: of the file in models/ and weights/.
    model: the model that shall hold them.
    shapes: of its variables.
    resize: names in RESIZE of weights/<name>.py: functions of the model, our
      arrays by path and the shapes by path, which return the arrays resized.

  Raises:
    ValueError: if there is no such resize.
  """
  if not resize:
    return variables
  flat = trees.flatten(variables)
  for kind in resize:
    flat = _resizes(name, kind)(model, flat, _flat_shapes(shapes))
  return trees.unflatten(flat)


def table(name: str, symbol: str) -> Mapping[str, Any]:
  """A table of weights/<name>.py such as PREPROCESS; empty if it has none."""
  layouts(name)  # Refuses an unknown name.
  module = importlib.import_module(f"{resolve.PACKAGE}.weights.{name}")
  return getattr(module, symbol, {})


def _resizes(name, kind):
  known = table(name, "RESIZE")
  if kind not in known:
    raise ValueError(
      f"{kind!r} of {name} cannot be resized. What can: "
      f"{', '.join(known) or 'nothing'}."
    )
  return known[kind]


def count_classes(
  tensors: Tensors, name: str, model: nn.Module, layout: str
) -> int | None:
  """Outputs of the head that a file holds; None if it holds none.

  `model` is any of the right variant that has a head.
  """
  heads = {**_CLASS_HEADS, **table(name, "CLASS_HEADS")}
  for rule in layouts(name)[layout](model):
    for path in heads.keys() & set(rule.ours):
      if set(rule.theirs) <= set(tensors):
        arrays = rule.load(*(tensors[k] for k in rule.theirs))
        return arrays[rule.ours.index(path)].shape[0] - heads[path]
  return None


def _flat_shapes(shapes):
  return {k: tuple(x.shape) for k, x in trees.flatten(shapes).items()}


def recognise(tensors: Tensors, name: str, model: nn.Module) -> str:
  """The layout whose names the tensors have.

  Raises:
    ValueError: if no layout shares a name with the file.
  """
  names = set(tensors)
  scores = {}
  for layout, rules_of in layouts(name).items():
    expected = {k for rule in rules_of(model) for k in rule.theirs}
    scores[layout] = len(expected & names) / len(expected | names)
  best = max(scores, key=scores.get)
  if not scores[best]:
    raise ValueError(
      f"None of the layouts of {name} ({', '.join(scores)}) has names as in "
      f"this file, such as {', '.join(sorted(names)[:5])}."
    )
  return best


def export_weights(
  variables: PyTree, *, name: str, model: nn.Module, layout: str
) -> Tensors:
  """Our variables as their arrays; the inverse of `import_weights`."""
  known = layouts(name)
  if layout not in known:
    raise ValueError(
      f"Model {name!r} has no layout {layout!r}; it has {', '.join(known)}."
    )
  flat = trees.flatten(jax.device_get(unstack_blocks(dict(variables))))
  rules = known[layout](model)
  expected = {k for rule in rules for k in rule.ours}
  problems = _two_sides(
    f"that the {layout} layout needs and the model lacks",
    expected - set(flat),
    f"of the model that the {layout} layout has no place for",
    set(flat) - expected,
  )
  if problems:
    raise ValueError(f"{name} cannot be written as {layout}.{problems}")
  tensors = {}
  for rule in rules:
    arrays = rule.save(*(np.asarray(flat[k]) for k in rule.ours))
    tensors |= dict(zip(rule.theirs, arrays, strict=True))
  return tensors


def _is_scanned(shapes):
  return any(SCANNED in k.split("/") for k in trees.flatten(shapes))


def _checked(variables, shapes, layout):
  """The variables as float32, if their names and shapes are the model's."""
  have, want = trees.flatten(variables), trees.flatten(shapes)
  wrong = [
    f"  {k}: the model has {tuple(want[k].shape)}, the file {have[k].shape}"
    for k in want
    if k in have and tuple(want[k].shape) != have[k].shape
  ]
  problems = _two_sides(
    "of the model that the file does not give",
    set(want) - set(have),
    "that the file gives and the model lacks",
    set(have) - set(want),
  )
  if wrong:
    problems += "\nOf another shape:\n" + "\n".join(wrong)
  if problems:
    raise ValueError(
      f"The weights, read as {layout}, do not fit the model; nothing was "
      f"loaded.{problems}"
    )
  return trees.unflatten(
    {k: np.asarray(have[k]).astype(want[k].dtype) for k in want}
  )


def _two_sides(first, missing, second, left):
  text = ""
  for title, names in ((first, missing), (second, left)):
    if names:
      lines = "\n".join(f"  {k}" for k in sorted(names))
      text += f"\n{len(names)} {title}:\n{lines}"
  near = {
    k: difflib.get_close_matches(k, left, 1, 0.9)
    for k in sorted(missing)[:20]
    if left
  }
  pairs = [f"  {k} for {v[0]}" for k, v in near.items() if v]
  return text + ("\nPerhaps:\n" + "\n".join(pairs) if pairs else "")
