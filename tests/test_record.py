"""The record that a run leaves of itself."""

import json
import subprocess

import jax
import numpy as np
import pytest

from big_vision_like import record


def test_run_json_holds_config_versions_devices_and_data(tmp_path):
  config = {"optim": {"lr": 0.001}, "rules": [[".*", 1.0]]}
  run = record.record_run(
    tmp_path / "run",
    json.dumps(config),
    {"data": "abc123"},
    overview="head/kernel (7, 11)",
  )
  assert json.loads((tmp_path / "run" / "run.json").read_text()) == run
  assert run["config"] == config
  assert run["data"] == "abc123"
  (start,) = run["starts"]
  assert start["versions"]["jax"] == jax.__version__
  assert start["versions"]["numpy"] == np.__version__
  assert start["devices"] == {"cpu": len(jax.devices())}
  params = (tmp_path / "run" / "params.txt").read_text()
  assert params == "head/kernel (7, 11)\n"


def test_each_start_is_remembered(tmp_path):
  record.record_run(tmp_path, "{}")
  run = record.record_run(tmp_path, "{}")
  assert len(run["starts"]) == 2
  assert not (tmp_path / "params.txt").exists()


def test_other_processes_write_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  record.record_run(tmp_path / "run", "{}")
  assert not (tmp_path / "run").exists()


@pytest.fixture
def checkout(tmp_path):
  def git(*words):
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    done = subprocess.run(
      ["git", "-C", str(tmp_path), *who, *words],
      check=True,
      capture_output=True,
      text=True,
    )
    return done.stdout.strip()

  git("init", "-q")
  (tmp_path / "code.py").write_text("x = 1\n")
  (tmp_path / "inner").mkdir()
  git("add", "code.py")
  git("commit", "-q", "-m", "first")
  return tmp_path, git("rev-parse", "HEAD")


def test_git_commit_and_whether_it_is_all(checkout):
  folder, commit = checkout
  assert record.git_state(folder) == {"commit": commit, "dirty": False}
  (folder / "code.py").write_text("x = 2\n")
  assert record.git_state(folder) == {"commit": commit, "dirty": True}


def test_a_checkout_of_something_else_is_not_ours(checkout):
  assert record.git_state(checkout[0] / "inner") is None


def test_no_checkout_or_no_git_is_no_error(tmp_path, monkeypatch):
  assert record.git_state(tmp_path) is None
  monkeypatch.setenv("PATH", str(tmp_path))
  assert record.git_state(tmp_path) is None
