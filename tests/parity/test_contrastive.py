"""The contrastive losses against open_clip's, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vision_like.losses import contrastive

pytestmark = pytest.mark.parity

losses = pytest.importorskip("open_clip.loss")
torch = pytest.importorskip("torch")


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_equals_open_clip(name):
  rng = np.random.default_rng(0)
  z = rng.normal(size=(2, 23, 7))
  z /= np.linalg.norm(z, axis=-1, keepdims=True)
  args = (*z, np.float64(7.0), np.float64(-2.0))
  args = args[: 3 if name == "softmax" else 4]
  theirs = [torch.tensor(x, requires_grad=True) for x in args]
  loss_fn = losses.ClipLoss() if name == "softmax" else losses.SigLipLoss()
  want = loss_fn(*theirs)
  want.backward()
  ours = getattr(contrastive, f"{name}_loss")
  mask = jnp.ones(23, bool)
  with jax.enable_x64(True):
    grad = jax.value_and_grad(
      lambda *args: ours(*args, mask, chunk=5)[0], tuple(range(len(args)))
    )
    got, grads = jax.device_get(jax.jit(grad)(*args))
  np.testing.assert_allclose(got, want.item(), rtol=1e-12)
  for ours, x in zip(grads, theirs):
    np.testing.assert_allclose(ours, x.grad.numpy(), rtol=1e-11, atol=1e-15)
