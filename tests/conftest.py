"""Every test sees eight CPU devices, so that shardings are real."""

import importlib.util
import os
import tempfile

flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
  os.environ["XLA_FLAGS"] = (
    f"{flags} --xla_force_host_platform_device_count=8".strip()
  )
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests share compiled programs with each other, but with no other run.
_CACHE = tempfile.TemporaryDirectory(prefix="big_vision_like_cache")
os.environ["BIG_VISION_LIKE_CACHE"] = _CACHE.name

import jax  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

# Shapes in the signatures of models and losses become checks, only in tests.
install_import_hook(
  ["big_vision_like.models", "big_vision_like.losses"], "beartype.beartype"
)


def pytest_configure():
  # timm and vit-pytorch import torchvision, in whichever test comes first.
  if importlib.util.find_spec("torchvision"):
    from big_vision_like.benchmarks import torchvision_ops

    torchvision_ops.declare()


@pytest.fixture(scope="module", autouse=True)
def programs():
  """Those of a file are forgotten at its end: gigabytes otherwise."""
  yield
  jax.clear_caches()


@pytest.fixture(scope="module")
def compile_quickly():
  """For programs that run a few times: optimising them would take longer.

  Those of other processes too.
  """
  option = "jax_disable_most_optimizations"
  jax.config.update(option, True)
  with pytest.MonkeyPatch.context() as patched:
    patched.setenv(option.upper(), "1")
    yield
  jax.config.update(option, False)
