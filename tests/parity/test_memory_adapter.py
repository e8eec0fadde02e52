"""Learnable memory against vit-pytorch's adapter, with copied random weights.

Its deviations from the paper are set up here, on its side: memory joins behind
the first LayerNorm, so it is given what that LayerNorm makes of our cells; its
class token has no position, so it is given ours with it; the LayerNorm of the
adapter's head stands for the last one of the backbone. Its ViT has LayerNorms
around the patch projection and no biases for queries, keys and values, which
our NaViT can have: so these are packed rows as well.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from big_vision_like.models import memory
from big_vision_like.models.layers.encoder import stack_blocks

pytestmark = pytest.mark.parity
WIDTH, DEPTH, MLP, HEADS, PATCH, SIDE = 48, 3, 80, 3, 4, 5
CLASSES, OTHERS, CELLS = 7, 11, 5
# Two images in a row, then one alone.
ROWS = [[0, 1], [2]]
LENGTH, SLOTS = 2 * SIDE**2 + 3, 2


def random_model():
  """Their ViT with an adapter, every tensor random."""
  import torch

  theirs = pytest.importorskip("vit_pytorch.learnable_memory_vit")
  vit = theirs.ViT(
    image_size=SIDE * PATCH,
    patch_size=PATCH,
    num_classes=OTHERS,
    dim=WIDTH,
    depth=DEPTH,
    heads=HEADS,
    mlp_dim=MLP,
    dim_head=WIDTH // HEADS,
  )
  model = theirs.Adapter(
    vit=vit, num_classes=CLASSES, num_memories_per_layer=CELLS
  ).eval()
  torch.manual_seed(0)
  with torch.no_grad():
    for name, p in model.named_parameters():
      scale = 2 * p.shape[1] ** -0.5 if p.ndim == 2 else 0.4
      p.normal_(0.0, 0.5 if "token" in name or "mem" in name else scale)
      if p.ndim == 1 and name.endswith("weight"):
        p.add_(1.0)
    for own, other in zip(
      model.mlp_head[0].parameters(), vit.mlp_head[0].parameters()
    ):
      own.copy_(other)
  return model, {k: p.detach().numpy() for k, p in model.named_parameters()}


def dense_of(p, name):
  return {"kernel": p[f"{name}.weight"].T, "bias": p[f"{name}.bias"]}


def norm_of(p, name):
  return {"scale": p[f"{name}.weight"], "bias": p[f"{name}.bias"]}


def attention_of(p, name):
  def heads(weight):
    kernel = weight.T.reshape(WIDTH, HEADS, -1)
    return {"kernel": kernel, "bias": np.zeros(kernel.shape[1:], np.float32)}

  key, value = np.split(p[f"{name}.to_kv.weight"], 2)
  out = dense_of(p, f"{name}.to_out.0")
  return {
    "query": heads(p[f"{name}.to_q.weight"]),
    "key": heads(key),
    "value": heads(value),
    "out": {**out, "kernel": out["kernel"].reshape(HEADS, -1, WIDTH)},
  }


def backbone_of(p):
  def block(i):
    name = f"vit.transformer.layers.{i}"
    return {
      "ln1": norm_of(p, f"{name}.0.norm"),
      "attn": attention_of(p, f"{name}.0"),
      "ln2": norm_of(p, f"{name}.1.net.0"),
      "mlp": {
        "fc1": dense_of(p, f"{name}.1.net.1"),
        "fc2": dense_of(p, f"{name}.1.net.4"),
      },
    }

  blocks = {f"blocks_{i}": block(i) for i in range(DEPTH)}
  positions = p["vit.pos_embedding"][0]
  embed = "vit.to_patch_embedding"
  return {
    "patch_ln": norm_of(p, f"{embed}.1"),
    "embed": dense_of(p, f"{embed}.2"),
    "embed_ln": norm_of(p, f"{embed}.3"),
    "cls": p["vit.cls_token"] + positions[0],
    "pos_embed": {"table": positions[1:]},
    "encoder": {**blocks, "norm": norm_of(p, "vit.mlp_head.0")},
    "head": dense_of(p, "vit.mlp_head.1"),
  }


def image_of(i):
  """[H,W,3]"""
  rng = np.random.default_rng(i)
  return rng.normal(size=(SIDE * PATCH,) * 2 + (3,)).astype(np.float32)


def pack():
  shape = (len(ROWS), LENGTH)
  batch = dict(
    patches=np.zeros((*shape, 3 * PATCH**2), np.float32),
    segment_ids=np.zeros(shape, np.int32),
    positions=np.zeros((*shape, 2), np.int32),
    grid_hw=np.zeros((len(ROWS), SLOTS, 2), np.int32),
    example_mask=np.zeros((len(ROWS), SLOTS), bool),
  )
  for b, row in enumerate(ROWS):
    for m, i in enumerate(row):
      own = slice(m * SIDE**2, (m + 1) * SIDE**2)
      batch["patches"][b, own] = rearrange(
        image_of(i), "(h p) (w q) c -> (h w) (p q c)", p=PATCH, q=PATCH
      )
      batch["segment_ids"][b, own] = m + 1
      batch["positions"][b, own] = np.argwhere(np.ones((SIDE, SIDE)))
      batch["grid_hw"][b, m] = SIDE, SIDE
      batch["example_mask"][b, m] = True
  return jax.tree.map(jnp.asarray, batch)


def test_vit_pytorch():
  import torch

  theirs, tensors = random_model()
  rng = np.random.default_rng(0)
  cells = rng.normal(size=(DEPTH, CELLS, WIDTH)).astype(np.float32)
  backbone = backbone_of(tensors)
  token = tensors["memory_cls_token"]
  params = {
    "backbone": backbone,
    "tasks": {
      "task": {
        "cls": token - backbone["cls"][0, 0],
        "memory": cells,
        "head": dense_of(tensors, "mlp_head.1"),
      }
    },
  }
  images = torch.from_numpy(
    np.stack([image_of(i).transpose(2, 0, 1) for row in ROWS for i in row])
  )
  with torch.no_grad():
    for layer, (attend, _) in enumerate(theirs.vit.transformer.layers):
      normed = attend.norm(torch.from_numpy(cells[layer]))
      theirs.memories_per_layer[layer].copy_(normed)
    want = theirs(images).numpy()
    plain = theirs.vit(images).numpy()
  ours = memory.Model(
    backbone=dict(
      name="navit",
      variant="Ti",
      num_classes=OTHERS,
      sizes=dict(width=WIDTH, depth=DEPTH, mlp=MLP, heads=HEADS, patch=PATCH),
      position="learned1d",
      max_grid=SIDE,
      patch_norm=True,
      bias=True,
      qk_norm=None,
      pool="tok",
      gelu="exact",
      ln_eps=1e-5,
    ),
    tasks=dict(task=dict(cells=CELLS)),
    num_classes=CLASSES,
  )
  params = stack_blocks(jax.tree.map(jnp.asarray, params))
  batch = pack()
  out = jax.jit(lambda p, b: ours.apply({"params": p}, **b, train=False))(
    params, batch
  )
  for key, theirs_too in (("logits/task", want), ("logits/backbone", plain)):
    got = np.asarray(out[key])[batch["example_mask"]]
    error = np.abs(got - theirs_too).max() / theirs_too.std()
    # Float32 through three layers.
    assert error < 1e-4, f"{key}: off by {error:.1e} of their deviation"


@pytest.mark.parametrize(
  ("cells", "total"), [(1, 88_420), (5, 125_284), (10, 171_364), (20, 263_524)]
)
def test_parameters_of_the_adapter(cells, total):
  """Theirs are ours and the LayerNorm of their head."""
  theirs = pytest.importorskip("vit_pytorch.learnable_memory_vit")
  vit = theirs.ViT(
    image_size=224,
    patch_size=32,
    num_classes=1000,
    dim=768,
    depth=12,
    heads=12,
    mlp_dim=3072,
  )
  model = theirs.Adapter(vit=vit, num_classes=100, num_memories_per_layer=cells)
  count = sum(p.numel() for p in model.parameters() if p.requires_grad)
  assert count == total == 12 * cells * 768 + 768 + 769 * 100 + 2 * 768
