"""NaViT against vit-pytorch's, packed and alone, with copied random weights.

Its model differs from the paper, and what differs is set up here: logits of
attention are too large by sqrt(Dh), which goes into our query scale; the patch
projection stands between LayerNorms; queries and keys get an RMS norm; the
pooling is attention plus its query, without an MLP, the query normalised.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from big_vision_like.models import navit
from big_vision_like.models.layers.encoder import stack_blocks

pytestmark = pytest.mark.parity
SIZES = dict(width=48, depth=3, mlp=80, heads=3, patch=4)
HEADS, HEAD, SIDE, CLASSES = 3, 16, 16, 7
LENGTH, SLOTS = 149, 3
GRIDS = [(5, 7), (1, 13), (16, 3), (11, 12), (2, 2)]
PACKED = [[0, 1, 2], [3, 4]]
ALONE = [[0], [1], [2], [3], [4]]


def random_model():
  """vit-pytorch's model, every tensor randomised, and its tensors."""
  import torch

  na_vit = pytest.importorskip("vit_pytorch.na_vit")
  model = na_vit.NaViT(
    image_size=SIDE * SIZES["patch"],
    patch_size=SIZES["patch"],
    num_classes=CLASSES,
    dim=SIZES["width"],
    depth=SIZES["depth"],
    heads=HEADS,
    mlp_dim=SIZES["mlp"],
    dim_head=HEAD,
  ).eval()
  torch.manual_seed(0)
  with torch.no_grad():
    for name, p in model.named_parameters():
      if name.endswith("gamma"):
        p.normal_(1.0, 0.3)
      elif p.ndim == 2 and "pos" not in name:
        # Large enough for the constants in both RMS norms not to matter.
        p.normal_(0.0, 2 * p.shape[1] ** -0.5)
      else:
        p.normal_(0.0, 0.5)
      if "q_norm" in name or "k_norm" in name:
        # All our heads share one scale, as ViT-22B's do.
        p.copy_(p[:1].expand_as(p))
  tensors = {k: p.detach().numpy() for k, p in model.named_parameters()}
  return model, tensors


def attention_of(p, name):
  def heads(weight):
    return {"kernel": weight.T.reshape(-1, HEADS, HEAD)}

  key, value = np.split(p[f"{name}.to_kv.weight"], 2)
  out = p[f"{name}.to_out.0.weight"]
  return {
    "query": heads(p[f"{name}.to_q.weight"]),
    "key": heads(key),
    "value": heads(value),
    "out": {"kernel": out.T.reshape(HEADS, HEAD, -1)},
    "query_ln": {"scale": p[f"{name}.q_norm.gamma"][0, 0] * HEAD**0.5},
    "key_ln": {"scale": p[f"{name}.k_norm.gamma"][0, 0]},
  }


def dense_of(p, name):
  return {"kernel": p[f"{name}.weight"].T, "bias": p[f"{name}.bias"]}


def our_params(p):
  def block(i):
    name = f"transformer.layers.{i}"
    return {
      "ln1": {"scale": p[f"{name}.0.norm.gamma"]},
      "attn": attention_of(p, f"{name}.0"),
      "ln2": {"scale": p[f"{name}.1.0.gamma"]},
      "mlp": {
        "fc1": dense_of(p, f"{name}.1.1"),
        "fc2": dense_of(p, f"{name}.1.4"),
      },
    }

  def channels_last(x):
    return rearrange(x, "... (c p q) -> ... (p q c)", c=3, p=SIZES["patch"])

  query = layer_norm(p["attn_pool_queries"], p["attn_pool.norm.gamma"])
  blocks = {f"blocks_{i}": block(i) for i in range(SIZES["depth"])}
  return {
    "patch_ln": {"scale": channels_last(p["to_patch_embedding.0.gamma"])},
    "embed": {
      "kernel": channels_last(p["to_patch_embedding.1.weight"]).T,
      "bias": p["to_patch_embedding.1.bias"],
    },
    "embed_ln": {"scale": p["to_patch_embedding.2.gamma"]},
    "pos_embed": {
      "rows": p["pos_embed_height"],
      "columns": p["pos_embed_width"],
    },
    "encoder": {**blocks, "norm": {"scale": p["transformer.norm.gamma"]}},
    "pool": {
      "probe": query[None, None],
      "attn": attention_of(p, "attn_pool"),
    },
  }


def layer_norm(x, scale):
  mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
  return (x - mean) / np.sqrt(var + 1e-5) * scale


def image_of(i):
  """[H,W,3]"""
  h, w = (n * SIZES["patch"] for n in GRIDS[i])
  rng = np.random.default_rng(i)
  return rng.normal(size=(h, w, 3)).astype(np.float32)


def pack(rows):
  shape = (len(rows), LENGTH)
  batch = dict(
    patches=np.zeros((*shape, 48), np.float32),
    segment_ids=np.zeros(shape, np.int32),
    positions=np.zeros((*shape, 2), np.int32),
    grid_hw=np.zeros((len(rows), SLOTS, 2), np.int32),
    example_mask=np.zeros((len(rows), SLOTS), bool),
  )
  for b, row in enumerate(rows):
    start = 0
    for m, i in enumerate(row):
      values = rearrange(
        image_of(i), "(h p) (w q) c -> (h w) (p q c)", p=4, q=4
      )
      own = slice(start, start + len(values))
      batch["patches"][b, own] = values
      batch["segment_ids"][b, own] = m + 1
      batch["positions"][b, own] = np.argwhere(np.ones(GRIDS[i]))
      batch["grid_hw"][b, m] = GRIDS[i]
      batch["example_mask"][b, m] = True
      start += len(values)
  return batch


@pytest.mark.parametrize("backend", ["xla", "blockwise"])
@pytest.mark.parametrize("rows", [PACKED, ALONE], ids=["packed", "alone"])
def test_vit_pytorch(rows, backend):
  import torch

  theirs, tensors = random_model()
  with torch.no_grad():
    want = theirs(
      [
        [torch.from_numpy(image_of(i).transpose(2, 0, 1)) for i in row]
        for row in rows
      ]
    ).numpy()

  ours = navit.Model(
    variant="Ti",
    sizes=SIZES,
    max_grid=SIDE,
    patch_norm=True,
    pool_mlp=False,
    qk_norm="rms",
    gelu="exact",
    ln_eps=1e-5,
    attention=backend,
  )
  params = stack_blocks(jax.tree.map(jnp.asarray, our_params(tensors)))
  batch = jax.tree.map(jnp.asarray, pack(rows))
  shapes = jax.eval_shape(
    lambda: ours.init(jax.random.key(0), **batch, train=False)["params"]
  )
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
  run = jax.jit(lambda p, b: ours.apply({"params": p}, **b, train=False))
  pooled = np.asarray(run(params, batch)["pooled"])[batch["example_mask"]]
  pooled = pooled + tensors["attn_pool_queries"]
  got = layer_norm(pooled, tensors["mlp_head.0.gamma"])
  got = got @ tensors["mlp_head.1.weight"].T
  error = np.abs(got - want).max() / want.std()
  # Float32 through three layers; the RMS norms' constants are part of it.
  assert error < 1e-4, f"off by {error:.1e} of the logits' deviation"
