"""The command line: which verbs there are, how errors look, how it exits."""

import importlib
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from big_vision_like import __main__ as command_line
from big_vision_like import resolve
from big_vision_like.commands import inspect

README = pathlib.Path(__file__).parents[2] / "README.md"


def test_list_of_verbs_comes_without_jax():
  code = (
    "import sys; from big_vision_like import __main__ as m; m.main([]); "
    "assert 'jax' not in sys.modules"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  for verb in resolve.available("commands"):
    assert f"\n  {verb} " in done.stdout


def test_every_verb_has_a_line_and_arguments(capsys):
  assert command_line.main(["--help"]) == 0
  lines = capsys.readouterr().out.splitlines()
  for verb in resolve.available("commands"):
    (line,) = [x for x in lines if x.split()[:1] == [verb]]
    assert len(line.split()) > 3
    with pytest.raises(SystemExit) as stop:
      command_line.main([verb, "--help"])
    assert stop.value.code == 0
    assert "--debug" in capsys.readouterr().out


def test_what_the_readme_prints_can_be_typed(monkeypatch):
  blocks = re.findall(r"^```sh\n(.*?)^```", README.read_text(), re.M | re.S)
  text = "".join(blocks).replace("\\\n", "")
  commands = re.findall(r"^python -m big_vision_like (.*)", text, re.M)
  assert len(commands) > 10
  for line in commands:
    verb, *argv = shlex.split(line, comments=True)
    command = importlib.import_module(f"big_vision_like.commands.{verb}")
    monkeypatch.setattr(command, "main", lambda args: 0)
    assert command_line.main([verb, *argv]) == 0, line


def test_unknown_verb_is_one_line_with_the_nearest(capsys):
  assert command_line.main(["inspekt"]) == 2
  error = capsys.readouterr().err
  assert error.startswith("error: There is no verb 'inspekt'.")
  assert "Did you mean 'inspect'? There are: " in error
  assert error.count("\n") == 1


@pytest.mark.parametrize("kind", [ValueError, FileNotFoundError])
def test_user_error_is_one_line_unless_debug(monkeypatch, capsys, kind):
  def fail(args):
    error = kind("The moon is full.")
    error.add_note("In config.evals.moon.")
    raise error

  monkeypatch.setattr(inspect, "main", fail)
  argv = ["inspect", "--data", "digit_scenes"]
  assert command_line.main(argv) == 2
  captured = capsys.readouterr()
  assert captured.err == "error: The moon is full. In config.evals.moon.\n"
  assert captured.out == ""
  with pytest.raises(kind, match="The moon is full"):
    command_line.main([*argv, "--debug"])


def test_other_errors_keep_their_traceback(monkeypatch):
  def fail(args):
    raise KeyError("a fault of ours")

  monkeypatch.setattr(inspect, "main", fail)
  with pytest.raises(KeyError):
    command_line.main(["inspect", "--data", "digit_scenes"])


def test_exit_code_is_what_the_verb_returns(monkeypatch):
  for code, expected in ((None, 0), (0, 0), (1, 1)):
    monkeypatch.setattr(inspect, "main", lambda args, code=code: code)
    argv = ["inspect", "--data", "digit_scenes"]
    assert command_line.main(argv) == expected
