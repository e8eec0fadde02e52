"""XLA is told before JAX starts, and only where it listens."""

import os
import subprocess
import sys

import pytest

from big_vision_like import host

CONVOLUTION = """
import sys
from big_vision_like import host

told = sys.argv[1] == "told" and host.prefer_own_convolutions()
import jax, jax.numpy as jnp

def convolve(x, kernel):
  axes = ("NHWC", "HWIO", "NHWC")
  return jax.lax.conv_general_dilated(
    x, kernel, (1, 1), "SAME", dimension_numbers=axes
  )

shapes = jnp.ones((8, 16, 16, 32)), jnp.ones((3, 3, 32, 32))
text = jax.jit(convolve).lower(*shapes).compile().as_text()
print(told, "ynn" in text)
"""


@pytest.fixture
def flags(monkeypatch):
  """A machine without accelerators, a jaxlib that knows, no XLA_FLAGS."""
  monkeypatch.setattr(host, "is_cpu_only", lambda: True)
  monkeypatch.setattr(host.importlib.metadata, "version", lambda _: "0.10.9")
  monkeypatch.setenv("XLA_FLAGS", "")
  return monkeypatch


def test_convolutions_are_not_handed_on():
  env = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
  out = {}
  for mode in ("usual", "told"):
    command = [sys.executable, "-c", CONVOLUTION, mode]
    done = subprocess.run(
      command, env=env, capture_output=True, text=True, check=True
    )
    out[mode] = done.stdout.split()
  if out["told"][0] == "False":
    pytest.skip("an accelerator is present, or another jaxlib")
  assert out == {"usual": ["False", "True"], "told": ["True", "False"]}


def test_other_flags_stay(flags):
  flags.setenv("XLA_FLAGS", "--xla_dump_to=/tmp")
  assert host.prefer_own_convolutions()
  first, second = os.environ["XLA_FLAGS"].split()
  assert first == "--xla_dump_to=/tmp"
  assert second.startswith(f"--{host._FLAG}=")


def test_what_the_user_has_set_stays(flags):
  own = f"--{host._FLAG}=LIBRARY_FUSION_TYPE_DOT"
  flags.setenv("XLA_FLAGS", own)
  assert not host.prefer_own_convolutions()
  assert os.environ["XLA_FLAGS"] == own


def test_another_jaxlib_is_left_alone(flags):
  flags.setattr(host.importlib.metadata, "version", lambda _: "0.11.0")
  assert not host.prefer_own_convolutions()
  assert os.environ["XLA_FLAGS"] == ""


def test_accelerators_are_left_alone(flags):
  flags.setattr(host, "is_cpu_only", lambda: False)
  assert not host.prefer_own_convolutions()
  assert os.environ["XLA_FLAGS"] == ""
