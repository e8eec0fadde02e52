"""The command line: python -m big_vision_like <verb> [arguments].

A verb is a file in `commands/` with `add_arguments(parser)` and `main(args)`,
which returns the exit code (None: 0). The first line of its docstring is its
help text. We read that line without importing the file, so that the list of
verbs comes at once; only the verb that runs imports jax.
"""

import argparse
import ast
import difflib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from big_vision_like import resolve

PROGRAM = "python -m big_vision_like"
USER_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
  """Runs a verb; what the user got wrong is one line and exit code 2."""
  argv = list(sys.argv[1:] if argv is None else argv)
  if not argv or argv[0] in ("-h", "--help"):
    print(usage())
    return 0
  # Known before the arguments are parsed: importing the verb may fail too.
  debug = "--debug" in argv
  try:
    return _run(*argv) or 0
  except KeyboardInterrupt:
    return 130
  except (ValueError, FileNotFoundError) as e:
    if debug:
      raise
    notes = getattr(e, "__notes__", [])
    print(" ".join([f"error: {e}", *notes]), file=sys.stderr)
    return USER_ERROR


def usage() -> str:
  """The list of verbs, each with its line."""
  verbs = resolve.available("commands")
  width = max(map(len, verbs))
  lines = [f"  {verb:{width}}  {_help(verb)}" for verb in verbs]
  return (
    f"usage: {PROGRAM} <verb> [arguments]\n\n"
    + "\n".join(lines)
    + f"\n\n{PROGRAM} <verb> --help lists the arguments of a verb."
  )


def _help(verb: str) -> str:
  spec = importlib.util.find_spec(f"{resolve.PACKAGE}.commands.{verb}")
  text = Path(spec.origin).read_text(encoding="utf-8")
  return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]


def _run(verb: str, *argv: str) -> int | None:
  verbs = resolve.available("commands")
  if verb not in verbs:
    near = difflib.get_close_matches(verb, verbs, 1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(
      f"There is no verb {verb!r}.{hint} There are: {', '.join(verbs)}."
    )
  command = importlib.import_module(f"{resolve.PACKAGE}.commands.{verb}")
  parser = argparse.ArgumentParser(
    prog=f"{PROGRAM} {verb}",
    description=command.__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  command.add_arguments(parser)
  parser.add_argument(
    "--debug", action="store_true", help="show the traceback of an error"
  )
  return command.main(parser.parse_args(argv))


if __name__ == "__main__":
  sys.exit(main())
