"""What the tests of whole runs share."""

import jax
import pytest

from big_vision_like import sharding


@pytest.fixture(scope="module", autouse=True)
def devices():
  """One device, which compiles sooner; a test may ask for all eight."""
  make_mesh, used = sharding.make_mesh, {"count": 1}
  with pytest.MonkeyPatch.context() as patched:
    patched.setattr(
      sharding,
      "make_mesh",
      lambda shape: make_mesh(shape, devices=jax.devices()[: used["count"]]),
    )
    yield used


@pytest.fixture(scope="module", autouse=True)
def quick(compile_quickly):
  """A run is of a few steps."""
