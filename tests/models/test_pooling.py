"""Attention pooling against its equations, one image at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import vit_in_numpy

from big_vision_like.models.layers.blocks import BlockConfig
from big_vision_like.models.layers.pooling import AttentionPool

CONFIG = BlockConfig(heads=3, mlp=17, qk_norm="layer")
# Row 0 holds images 1 and 2 of four slots, row 1 only padding.
IDS = np.stack([np.repeat([1, 2, 0], [5, 3, 3]), np.zeros(11, int)])


def pooled_and_grads(ids, slots, mlp=True):
  rng = np.random.default_rng(0)
  tokens = jnp.asarray(rng.normal(size=(2, 11, 15)), jnp.float32)
  ids = None if ids is None else jnp.asarray(ids, jnp.int32)
  pool = AttentionPool(CONFIG, mlp)
  kw = dict(train=False, segment_ids=ids, slots=slots)
  shapes = jax.eval_shape(
    lambda: pool.init(jax.random.key(0), tokens, **kw)["params"]
  )
  params = vit_in_numpy.random_params(shapes)

  @jax.jit
  def run(params, tokens):
    out, pull = jax.vjp(
      lambda p, x: pool.apply({"params": p}, x, **kw), params, tokens
    )
    return out, pull(out)

  out, grads = run(params, tokens)
  return out, grads, *vit_in_numpy.float64((params, tokens))


def test_each_slot_pools_its_own_image():
  out, grads, params, tokens = pooled_and_grads(IDS, 4)
  assert out.shape == (2, 4, 15)
  for slot in (1, 2):
    want = vit_in_numpy.attention_pool(tokens[0, IDS[0] == slot], params)
    np.testing.assert_allclose(out[0, slot - 1], want, rtol=1e-5, atol=1e-5)
  # Slots without an image are 0, although the layers have biases.
  assert not out[0, 2:].any()
  assert not out[1].any()
  jax.tree.map(lambda g: np.testing.assert_array_less(np.abs(g), 1e6), grads)
  assert not grads[1][0, IDS[0] == 0].any()
  assert not grads[1][1].any()
  assert np.abs(grads[1][0, IDS[0] > 0]).max(-1).min() > 0


def test_a_whole_image_is_one_slot():
  out, _, params, tokens = pooled_and_grads(None, 1)
  for row, got in zip(tokens, out[:, 0]):
    want = vit_in_numpy.attention_pool(row, params)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_without_mlp_it_is_attention_alone():
  out, _, params, tokens = pooled_and_grads(None, 1, mlp=False)
  assert set(params) == {"attn", "probe"}
  want = vit_in_numpy.attention(params["probe"][0], tokens[0], params["attn"])
  np.testing.assert_allclose(out[0], want, rtol=1e-5, atol=1e-5)
