"""The whole plug-in mechanism: a name in a config is the name of a file."""

import difflib
import importlib
import inspect
import pkgutil
from typing import Any

PACKAGE = "big_vision_like"


def available(folder: str) -> list[str]:
  """The names that `resolve` knows in a folder such as "models"."""
  package = importlib.import_module(f"{PACKAGE}.{folder.replace('/', '.')}")
  return sorted(
    m.name for m in pkgutil.iter_modules(package.__path__) if not m.ispkg
  )


def resolve(folder: str, name: str, symbol: str) -> Any:
  """The object `symbol` of `big_vision_like/<folder>/<name>.py`.

  A dotted name is imported as it stands, from outside the package:
  "my_lab.models.foo" gives the `symbol` of that module.

  Raises:
    ValueError: if there is no such file (lists those there are) or the module
      does not have the symbol.
  """
  if "." in name:
    try:
      module = importlib.import_module(name)
    except ModuleNotFoundError as e:
      raise ValueError(f"Cannot import {name!r} for {folder}: {e}.") from e
  else:
    names = available(folder)
    if name not in names:
      near = difflib.get_close_matches(name, names, 1)
      hint = f" Did you mean {near[0]!r}?" if near else ""
      raise ValueError(
        f"Unknown name {name!r} in {folder}.{hint} There are: "
        f"{', '.join(names)}. A dotted name imports a module of your own."
      )
    module = importlib.import_module(
      f"{PACKAGE}.{folder.replace('/', '.')}.{name}"
    )
  if not hasattr(module, symbol):
    raise ValueError(f"Module {module.__name__} has no {symbol!r}.")
  return getattr(module, symbol)


def takes(folder: str, name: str, symbol: str, keyword: str) -> bool:
  """Whether the object that a name in a config stands for has a keyword."""
  target = resolve(folder, name, symbol)
  return keyword in inspect.signature(target).parameters


def make(
  folder: str, symbol: str, section: str, settings: dict[str, Any], **extra: Any
) -> Any:
  """Calls the object that `settings["name"]` names with the other settings.

  Args:
    folder: where plug-ins of this kind live, such as "models".
    symbol: what their files expose, such as "Model".
    section: the config section, for messages ("config.model").
    settings: `name` and the keyword arguments from the config.
    **extra: keyword arguments that do not come from the config.

  Raises:
    ValueError: naming the section, if a keyword is unknown or missing.
  """
  settings = dict(settings)
  if "name" not in settings:
    raise ValueError(f"{section} needs a `name`: one of {available(folder)}.")
  name = settings.pop("name")
  target = resolve(folder, name, symbol)
  try:
    bound = inspect.signature(target).bind(**settings, **extra)
  except TypeError as e:
    known = [p for p in inspect.signature(target).parameters]
    wrong = [k for k in settings if k not in known]
    near = difflib.get_close_matches(wrong[0], known, 1) if wrong else []
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(
      f"{section}: {name!r} does not take these settings: {e}.{hint} "
      f"It takes: {', '.join(known)}."
    ) from e
  return target(*bound.args, **bound.kwargs)
