"""DeepViT against its authors' code.

That code is no package, so its answers stand here: the logits of
zhoudaquan/dvit_repo @ 1ccb152, in torch 2.x on a CPU, for weights and images
that `random_weights` and `images` make from names and seeds. For what a list
of numbers cannot hold, training and gradients, there is a second
implementation in torch below, which has to give the same answers first.
"""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vision_like import trees
from big_vision_like.models import deepvit
from big_vision_like.weights import engine

pytestmark = pytest.mark.parity
CLASSES = 3
SMALL = dict(depth=3, mixing=2)
# Variant, sizes, and the reference's logits.
ANSWERS = [
  pytest.param(variant, sizes, np.reshape(answer, (2, CLASSES)), marks=marks)
  for variant, sizes, answer, marks in (
    (
      "16B",
      SMALL,
      (-0.9175548, 0.9501078, -0.7532361, -1.5369499, 0.4612779, -0.6269814),
      (),
    ),
    (
      "S",
      SMALL,
      (0.1034872, -0.8371109, 1.1122997, 0.0706087, -0.6818848, 1.5081539),
      (),
    ),
    (
      "L",
      SMALL,
      (-1.6096933, 0.7252451, -2.4238205, -1.432924, 0.831059, -2.761981),
      (),
    ),
    (
      "16B",
      {},
      (-0.199844, -0.1337921, -1.2748762, 0.9546189, -0.477487, -2.349514),
      (),
    ),
    (
      "S",
      {},
      (0.1845912, -1.956107, 0.2142597, 0.2052831, -2.4795899, -0.1911244),
      (),
    ),
    (
      "24B",
      {},
      (0.1763472, 0.1442751, -1.4367683, 1.3279195, 0.5126759, -2.9206347),
      pytest.mark.slow,
    ),
    (
      "32B",
      {},
      (0.098809, 0.3528131, -0.2804579, 0.562947, 0.9575059, -1.8879778),
      pytest.mark.slow,
    ),
    (
      "L",
      {},
      (0.6438004, -1.5184723, 0.1868463, 0.7505904, -1.6015826, -0.2375237),
      pytest.mark.slow,
    ),
  )
]


def random_weights(names_and_shapes):
  """Arrays by the reference's names; nothing is what initialisation made it.

  The running variance of mixed maps lies below BatchNorm's eps, as it does in
  a real network.
  """
  weights = {}
  for name, shape in names_and_shapes.items():
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    x = rng.standard_normal(shape)
    if name.endswith("num_batches_tracked"):
      weights[name] = np.zeros(shape, np.int64)
      continue
    if name.endswith("running_var"):
      x = rng.uniform(0.5, 1.5, shape)
      x = x * 1e-6 if "var_norm" in name else x
    elif name in ("cls_token", "pos_embed"):
      x = 0.3 * x
    elif len(shape) > 1:
      x = x * np.prod(shape[1:]) ** -0.5
    else:
      norm = "norm" in name or ".bn" in name
      mean = 1.0 if norm and name.endswith("weight") else 0.0
      x = mean + 0.2 * x
    weights[name] = x.astype(np.float32)
  return weights


def images(height=64, width=96):
  rng = np.random.default_rng(1)
  return rng.standard_normal((2, height, width, 3)).astype(np.float32)


@functools.cache
def ours(variant, sizes):
  """Model and shapes of its variables, for images of 64 x 96."""
  model = deepvit.Model(variant=variant, sizes=dict(sizes), num_classes=CLASSES)
  image = jnp.asarray(images())
  shapes = jax.eval_shape(
    lambda: model.init(jax.random.key(0), image, train=False)
  )
  return model, shapes


def their_shapes(variant, sizes):
  model, shapes = ours(variant, sizes)
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
  tensors = engine.export_weights(
    zeros, name="deepvit", model=model, layout="official"
  )
  return {k: x.shape for k, x in tensors.items()}


def imported(weights, variant, sizes):
  model, shapes = ours(variant, sizes)
  return engine.import_weights(
    weights, name="deepvit", model=model, shapes=shapes, layout="official"
  )[0]


@pytest.mark.parametrize(("variant", "sizes", "answer"), ANSWERS)
def test_logits_are_those_of_the_authors_code(variant, sizes, answer):
  sizes = tuple(sorted(sizes.items()))
  weights = random_weights(their_shapes(variant, sizes))
  variables = imported(weights, variant, sizes)
  model, _ = ours(variant, sizes)
  got = jax.jit(lambda v, x: model.apply(v, x, train=False))(
    variables, images()
  )["logits"]
  # Both compute in float32; against float64 the reference is off by 1e-6.
  np.testing.assert_allclose(got, answer, atol=5e-6)


def twin(variant, sizes):
  """The model in torch, under the reference's names."""
  import torch
  from torch import nn

  row = {**deepvit.VARIANTS[variant], **dict(sizes)}
  width, heads, a = row["width"], row["heads"], row["branch"]

  class Attention(nn.Module):
    def __init__(self, mixing):
      super().__init__()
      self.mixing = mixing
      self.qkv = nn.Linear(width, 3 * width)
      self.proj = nn.Linear(width, width)
      if mixing:
        self.reatten_matrix = nn.Conv2d(heads, heads, 1)
        self.var_norm = nn.BatchNorm2d(heads)

    def forward(self, x):
      q, k, v = (
        y.unflatten(-1, (heads, -1)).transpose(1, 2)
        for y in self.qkv(x).chunk(3, -1)
      )
      root = q.shape[-1] ** 0.5
      maps = (q @ k.mT / root).softmax(-1)
      if self.mixing:
        maps = self.var_norm(self.reatten_matrix(maps))
        maps = maps / root if row["scale_maps"] else maps
      return self.proj((maps @ v).transpose(1, 2).flatten(2))

  class Block(nn.Module):
    def __init__(self, mixing):
      super().__init__()
      self.norm1 = nn.LayerNorm(width, eps=1e-6)
      self.attn = Attention(mixing)
      self.norm2 = nn.LayerNorm(width, eps=1e-6)
      self.mlp = nn.Sequential()
      self.mlp.add_module("fc1", nn.Linear(width, row["mlp"]))
      self.mlp.add_module("act", nn.GELU())
      self.mlp.add_module("fc2", nn.Linear(row["mlp"], width))

    def forward(self, x):
      x = x + a * self.attn(self.norm1(x / a))
      return x + a * self.mlp(self.norm2(x / a))

  class DeepViT(nn.Module):
    def __init__(self):
      super().__init__()
      self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
      tokens = their_shapes(variant, sizes)["pos_embed"][1]
      self.pos_embed = nn.Parameter(torch.zeros(1, tokens, width))
      self.patch_embed = nn.Sequential()
      add, p = self.patch_embed.add_module, row["patch"]
      if row["stem"]:
        add("conv1", nn.Conv2d(3, 64, 7, 2, 3, bias=False))
        add("bn1", nn.BatchNorm2d(64))
        add("relu1", nn.ReLU())
        add("conv2", nn.Conv2d(64, 64, 3, 1, 1, bias=False))
        add("bn2", nn.BatchNorm2d(64))
        add("relu2", nn.ReLU())
        p //= 2
      add("proj", nn.Conv2d(64 if row["stem"] else 3, width, p, p))
      plain = row["depth"] - row["mixing"]
      self.blocks = nn.Sequential(
        *(Block(i >= plain) for i in range(row["depth"]))
      )
      self.norm = nn.LayerNorm(width, eps=1e-6)
      self.head = nn.Linear(width, CLASSES)

    def forward(self, image):
      x = self.patch_embed(image).flatten(2).mT
      x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
      return self.head(self.norm(self.blocks(x + self.pos_embed))[:, 0])

  return DeepViT()


def loaded_twin(variant, sizes, weights):
  import torch

  model = twin(variant, sizes)
  tensors = {k: torch.from_numpy(x.copy()) for k, x in weights.items()}
  model.load_state_dict(tensors, strict=True)
  return model


def for_torch(image):
  import torch

  return torch.from_numpy(image.transpose(0, 3, 1, 2))


def test_the_twin_gives_the_same_answers():
  pytest.importorskip("torch")
  for variant, sizes, answer in (p.values for p in ANSWERS[:3]):
    sizes = tuple(sorted(sizes.items()))
    weights = random_weights(their_shapes(variant, sizes))
    model = loaded_twin(variant, sizes, weights).eval()
    got = model(for_torch(images())).detach().numpy()
    np.testing.assert_allclose(got, answer, atol=5e-6)


def test_export_is_the_inverse_of_import():
  pytest.importorskip("torch")
  sizes = tuple(sorted(SMALL.items()))
  weights = random_weights(their_shapes("S", sizes))
  variables = imported(weights, "S", sizes)
  model, _ = ours("S", sizes)
  exported = engine.export_weights(
    variables, name="deepvit", model=model, layout="official"
  )
  loaded_twin("S", sizes, exported)
  assert exported.keys() == weights.keys()
  for name, x in weights.items():
    np.testing.assert_array_equal(exported[name], x, err_msg=name)


def test_training_statistics_and_gradients():
  """Of S, which has all the parts, with batch statistics of the maps."""
  pytest.importorskip("torch")
  sizes = tuple(sorted(SMALL.items()))
  weights = random_weights(their_shapes("S", sizes))
  direction = np.random.default_rng(2).standard_normal((2, CLASSES))
  direction = direction.astype(np.float32)

  # In float64, so that all differences are ours.
  theirs = loaded_twin("S", sizes, weights).double().train()
  want = theirs(for_torch(images()).double())
  (want * for_torch_like(direction)).sum().backward()

  model, _ = ours("S", sizes)
  variables = imported(weights, "S", sizes)

  @jax.jit
  def run(params, stats):
    out, new = model.apply(
      {"params": params, "batch_stats": stats},
      jnp.asarray(images()),
      train=True,
      mutable=["batch_stats"],
    )
    return (out["logits"] * direction).sum(), (out["logits"], new)

  grads, (got, new) = jax.grad(run, has_aux=True)(
    variables["params"], variables["batch_stats"]
  )
  np.testing.assert_allclose(got, want.detach().numpy(), atol=2e-5)

  state = {k: x.numpy() for k, x in theirs.state_dict().items()}
  wanted = imported(state, "S", sizes)["batch_stats"]
  got, wanted = trees.flatten(new["batch_stats"]), trees.flatten(wanted)
  for name, x in wanted.items():
    # A mean is rounded as the values are whose mean it is.
    var = wanted[name.removesuffix("mean") + "var"] if "mean" in name else 0
    error = np.abs(got[name] - x)
    assert (error <= 1e-5 * (np.abs(x) + np.sqrt(var))).all(), name

  their_grads = dict(state) | {
    k: p.grad.numpy() for k, p in theirs.named_parameters()
  }
  wanted = trees.flatten(imported(their_grads, "S", sizes)["params"])
  for name, got in trees.flatten(grads).items():
    want = wanted[name]
    if name.endswith(("attn/mix/bias", "attn/key/bias")):
      # BatchNorm takes the one out again, the softmax the other.
      assert np.abs(want).max() < 1e-10
      assert np.abs(got).max() < 1e-4
      continue
    # The reference in float32 is off by as much: BatchNorm multiplies the
    # rounding errors of the maps by about 300.
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert error < 1e-4, f"{name}: {error:.1e}"


def for_torch_like(x):
  import torch

  return torch.from_numpy(x).double()


def test_re_attention_of_vit_pytorch_with_batch_norm():
  """Its normalisation is a LayerNorm over heads, which the paper's is not.

  With a BatchNorm in that place all else has to agree: softmax, the matrix
  that contracts its first index, values, output.
  """
  torch = pytest.importorskip("torch")
  module = pytest.importorskip("vit_pytorch.deepvit")
  width, heads, tokens = 21, 3, 11
  theirs = module.Attention(width, heads=heads, dim_head=width // heads)
  norm = torch.nn.BatchNorm2d(heads)
  theirs.reattn_norm = norm
  rng = np.random.default_rng(0)
  with torch.no_grad():
    for p in theirs.parameters():
      p.copy_(torch.from_numpy(rng.normal(0.3, 0.5, p.shape)))
    norm.running_mean.copy_(torch.from_numpy(rng.normal(0.0, 0.1, heads)))
    norm.running_var.copy_(torch.from_numpy(rng.uniform(0.5, 1.5, heads)))
  x = rng.standard_normal((2, tokens, width)).astype(np.float32)

  p = {k: v.detach().numpy() for k, v in theirs.named_parameters()}
  qkv = p["to_qkv.weight"].T.reshape(width, 3, heads, -1)
  by_head = lambda kernel: {
    "kernel": kernel,
    "bias": np.zeros((heads, width // heads), np.float32),
  }
  normed = theirs.norm(torch.from_numpy(x)).detach().numpy()  # Of the block.
  variables = {
    "params": {
      **{
        name: by_head(qkv[:, i])
        for i, name in enumerate(("query", "key", "value"))
      },
      "mix": {
        "kernel": p["reattn_weights"],
        "bias": np.zeros(heads, np.float32),
      },
      "norm": {"scale": p["reattn_norm.weight"], "bias": p["reattn_norm.bias"]},
      "out": {
        "kernel": p["to_out.0.weight"].T.reshape(heads, -1, width),
        "bias": p["to_out.0.bias"],
      },
    },
    "batch_stats": {
      "norm": {
        "mean": norm.running_mean.numpy().copy(),
        "var": norm.running_var.numpy().copy(),
      }
    },
  }
  want = theirs.eval()(torch.from_numpy(x)).detach().numpy()
  got = deepvit.ReAttention(heads).apply(
    variables, jnp.asarray(normed), train=False
  )
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
