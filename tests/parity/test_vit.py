"""ViT against timm's and transformers', with every parameter randomised."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vision_like import trees
from big_vision_like.models import vit
from big_vision_like.models.layers.encoder import stack_blocks

pytestmark = pytest.mark.parity
HEADS, CLASSES, DEPTH = 3, 11, 5
SIZES = dict(depth=DEPTH)  # Of Ti/16, to save time; the width stays.


def randomise(module):
  """Replaces all parameters by random ones and returns them as arrays.

  Initialisations hide errors: biases of 0, scales of 1, symmetric tables.
  """
  import torch

  torch.manual_seed(0)
  with torch.no_grad():
    for name, p in module.named_parameters():
      fan_in = p[0].numel() if p.ndim > 1 else 10
      scale = 0.3 if "pos" in name or "cls" in name else fan_in**-0.5
      p.normal_(0.0, scale)
      if "norm" in name and name.endswith("weight"):
        p.add_(1.0)
  return {k: p.detach().numpy() for k, p in module.named_parameters()}


def heads_of(weight, bias):
  """A torch linear layer [K Dh, D] as our projection to heads."""
  kernel = weight.T.reshape(weight.shape[1], HEADS, -1)
  return {"kernel": kernel, "bias": bias.reshape(HEADS, -1)}


def dense_of(p, name):
  return {"kernel": p[f"{name}.weight"].T, "bias": p[f"{name}.bias"]}


def norm_of(p, name):
  return {"scale": p[f"{name}.weight"], "bias": p[f"{name}.bias"]}


def from_heads(dense):
  """The projection that reads all heads: kernel [K,Dh,D]."""
  width = dense["kernel"].shape[1]
  return {**dense, "kernel": dense["kernel"].reshape(HEADS, -1, width)}


def split_rows(p, name, parts):
  """Heads' projections that torch keeps stacked in one linear layer."""
  weights = np.split(p[f"{name}.weight"], len(parts))
  biases = np.split(p[f"{name}.bias"], len(parts))
  return {part: heads_of(w, b) for part, w, b in zip(parts, weights, biases)}


def patch_conv(p, name):
  kernel = p[f"{name}.weight"].transpose(2, 3, 1, 0)
  return {"kernel": kernel, "bias": p[f"{name}.bias"]}


def mlp_of(p, name):
  return {fc: dense_of(p, f"{name}.{fc}") for fc in ("fc1", "fc2")}


def from_timm(p):
  def block(i):
    return {
      "ln1": norm_of(p, f"blocks.{i}.norm1"),
      "ln2": norm_of(p, f"blocks.{i}.norm2"),
      "attn": {
        **split_rows(p, f"blocks.{i}.attn.qkv", ("query", "key", "value")),
        "out": from_heads(dense_of(p, f"blocks.{i}.attn.proj")),
      },
      "mlp": mlp_of(p, f"blocks.{i}.mlp"),
    }

  blocks = {f"blocks_{i}": block(i) for i in range(DEPTH)}
  params = {
    "embed": patch_conv(p, "patch_embed.proj"),
    "pos_embed": p["pos_embed"],
    "encoder": {**blocks, "norm": norm_of(p, "norm")},
    "head": dense_of(p, "head"),
  }
  if "cls_token" in p:
    params["cls"] = p["cls_token"]
  if "attn_pool.latent" in p:
    q = heads_of(p["attn_pool.q.weight"], p["attn_pool.q.bias"])
    params["pool"] = {
      "probe": p["attn_pool.latent"],
      "attn": {
        "query": q,
        **split_rows(p, "attn_pool.kv", ("key", "value")),
        "out": from_heads(dense_of(p, "attn_pool.proj")),
      },
      "ln": norm_of(p, "attn_pool.norm"),
      "mlp": mlp_of(p, "attn_pool.mlp"),
    }
  return params


def from_transformers(p):
  def block(i):
    layer = f"vit.layers.{i}"
    names = {"query": "q", "key": "k", "value": "v"}
    return {
      "ln1": norm_of(p, f"{layer}.layernorm_before"),
      "ln2": norm_of(p, f"{layer}.layernorm_after"),
      "attn": {
        **{
          ours: heads_of(
            p[f"{layer}.attention.{theirs}_proj.weight"],
            p[f"{layer}.attention.{theirs}_proj.bias"],
          )
          for ours, theirs in names.items()
        },
        "out": from_heads(dense_of(p, f"{layer}.attention.o_proj")),
      },
      "mlp": mlp_of(p, f"{layer}.mlp"),
    }

  blocks = {f"blocks_{i}": block(i) for i in range(DEPTH)}
  return {
    "cls": p["vit.embeddings.cls_token"],
    "embed": patch_conv(p, "vit.embeddings.patch_embeddings.projection"),
    "pos_embed": p["vit.embeddings.position_embeddings"],
    "encoder": {**blocks, "norm": norm_of(p, "vit.layernorm")},
    "head": dense_of(p, "classifier"),
  }


def images(height, width):
  rng = np.random.default_rng(1)
  return rng.normal(size=(2, height, width, 3)).astype(np.float32)


def our_logits(params, image, **kw):
  """Checks that the copy fills all parameters, then runs our model on it."""
  model = vit.Model(variant="Ti/16", sizes=SIZES, num_classes=CLASSES, **kw)
  params = stack_blocks(jax.tree.map(jnp.asarray, params))
  wanted = jax.eval_shape(
    lambda: model.init(jax.random.key(0), jnp.asarray(image), train=False)
  )["params"]
  assert {k: x.shape for k, x in trees.flatten(params).items()} == {
    k: x.shape for k, x in trees.flatten(wanted).items()
  }
  run = jax.jit(lambda p, x: model.apply({"params": p}, x, train=False))
  return run(params, image)["logits"]


def assert_close(got, want):
  """Relative to the logits' size: float32 through a few layers."""
  error = np.abs(got - want).max() / np.abs(want).std()
  assert error < 2e-5, f"off by {error:.1e} of the logits' deviation"


@pytest.mark.parametrize(
  ("pool", "gelu"),
  [("tok", "tanh"), ("tok", "exact"), ("gap", "tanh"), ("map", "exact")],
)
def test_timm(pool, gelu):
  import torch

  timm = pytest.importorskip("timm")
  kw = {} if pool == "tok" else dict(class_token=False, fc_norm=False)
  theirs = timm.create_model(
    "vit_tiny_patch16_224",
    num_classes=CLASSES,
    depth=DEPTH,
    img_size=(64, 112),
    global_pool={"tok": "token", "gap": "avg", "map": "map"}[pool],
    **kw,
  ).eval()
  if gelu == "tanh":
    for block in theirs.blocks:
      block.mlp.act = torch.nn.GELU(approximate="tanh")
  params = from_timm(randomise(theirs))
  image = images(64, 112)
  with torch.no_grad():
    want = theirs(torch.from_numpy(image.transpose(0, 3, 1, 2))).numpy()
  assert_close(our_logits(params, image, pool=pool, gelu=gelu), want)


def test_transformers():
  import torch

  transformers = pytest.importorskip("transformers")
  config = transformers.ViTConfig(
    hidden_size=192,
    num_hidden_layers=DEPTH,
    num_attention_heads=HEADS,
    intermediate_size=768,
    image_size=80,
    num_labels=CLASSES,
    layer_norm_eps=1e-6,  # Theirs is 1e-12 by default.
    hidden_act="gelu_pytorch_tanh",
  )
  theirs = transformers.ViTForImageClassification(config).eval()
  params = from_transformers(randomise(theirs))
  image = images(80, 80)
  with torch.no_grad():
    want = theirs(torch.from_numpy(image.transpose(0, 3, 1, 2))).logits.numpy()
  assert_close(our_logits(params, image), want)
