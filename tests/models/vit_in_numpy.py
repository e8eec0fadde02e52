"""The Transformer's equations in float64 NumPy, one image at a time.

Parameters are the nested dicts of an unrolled encoder ("blocks_0", ...).
"""

import jax
import jax.numpy as jnp
import numpy as np

from big_vision_like import trees


def random_params(shapes):
  """Parameters in which no entry is what initialisation made it.

  Scales lie around 1 and kernels keep the size of what they multiply, so that
  float32 loses no digits to the depth.
  """
  rng = np.random.default_rng(1)

  def draw(path, x):
    name = trees.path_name(path)
    mean = 1.0 if name.endswith("scale") else 0.0
    spread = 0.2 if name.endswith("kernel") else 0.3
    return jnp.asarray(rng.normal(mean, spread, x.shape), x.dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes)


def float64(tree):
  return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def layer_norm(x, p, eps=1e-6):
  mean = x.mean(-1, keepdims=True)
  var = ((x - mean) ** 2).mean(-1, keepdims=True)
  return (x - mean) / np.sqrt(var + eps) * p["scale"] + p.get("bias", 0)


def dense(x, p):
  """The last axes of x, as many as make the kernel fit, times the kernel."""
  kernel = p["kernel"]
  axes = 2 if x.shape[-2:] == kernel.shape[:2] and kernel.ndim == 3 else 1
  return np.tensordot(x, kernel, axes) + p.get("bias", 0)


def gelu_tanh(x):
  return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def attention(x, kv, p):
  """softmax(q kᵀ / sqrt(Dh)) v for each head; x [N,D], kv [S,D]."""
  q, k, v = (
    np.tensordot(y, p[name]["kernel"], 1) + p[name].get("bias", 0)
    for name, y in (("query", x), ("key", kv), ("value", kv))
  )
  if "query_ln" in p:
    q, k = layer_norm(q, p["query_ln"]), layer_norm(k, p["key_ln"])
  heads = [
    softmax(q[:, h] @ k[:, h].T / np.sqrt(q.shape[-1])) @ v[:, h]
    for h in range(q.shape[1])
  ]
  out = np.tensordot(np.stack(heads, 1), p["out"]["kernel"], 2)
  return out + p["out"].get("bias", 0)


def mlp(x, p):
  return dense(gelu_tanh(dense(x, p["fc1"])), p["fc2"])


def block(x, p):
  x = x + attention(y := layer_norm(x, p["ln1"]), y, p["attn"])
  return x + mlp(layer_norm(x, p["ln2"]), p["mlp"])


def encoder(x, p):
  for i in range(sum(key.startswith("blocks_") for key in p)):
    x = block(x, p[f"blocks_{i}"])
  return layer_norm(x, p["norm"]) if "norm" in p else x


def attention_pool(tokens, p):
  y = attention(p["probe"][0], tokens, p["attn"])
  return (y + mlp(layer_norm(y, p["ln"]), p["mlp"]))[0]
