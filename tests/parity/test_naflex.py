"""NaViT as SigLIP 2 NaFlex and as timm's NaFlexViT: packed against padded.

Their code pads every image to a common length; ours packs the same images into
shared rows, with the loader's own packer. Every parameter is random.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vision_like import trees
from big_vision_like.data import packing, planning
from big_vision_like.models import navit
from big_vision_like.models.layers import variants
from big_vision_like.weights import engine
from big_vision_like.weights import navit as weights

pytestmark = pytest.mark.parity
CLASSES = 11
# What all of these models set.
NAFLEX = dict(bias=True, qk_norm=None)
# Small, to save time, tables and patches too; test_published has the sizes.
SIZES = dict(width=48, depth=3, mlp=96, heads=3, patch=4)
SIDE = 7
# Smaller and larger than the tables, on one side or both, and of their size; a
# row, a column, a single patch.
GRIDS = (
  *((3, 5), (1, 6), (7, 2), (7, 7), (9, 2)),
  *((1, 1), (10, 8), (4, 1), (2, 13)),
)
# torch 2.13 on CPUs resizes a contiguous table wrongly, with antialias, to one
# column of another height; transformers does that, timm has channels last.
HF_RIGHT = [i for i, (h, w) in enumerate(GRIDS) if w > 1 or h == 1]
# timm's model and settings -> ours: all kinds of position embedding, pooling
# and registers, the last LayerNorm before the mean and, as its gap models have
# it, after.
BILINEAR = dict(position="resized_bilinear")
BICUBIC = dict(position="resized_bicubic", gelu="exact")
FACTORISED = dict(position="resized_factorised", gelu="exact")
GAP = dict(registers=4, pool="gap")
FC_NORM = dict(fc_norm=True)
ASPECT = dict(keep_aspect=True)
TIMM = {
  "siglip": ({}, BILINEAR),
  "map": ({}, dict(registers=1, **BICUBIC)),
  "gap": ({}, BICUBIC | GAP | FC_NORM),
  "par_gap": ({}, BICUBIC | GAP | FC_NORM | ASPECT),
  "parfac_gap": ({}, FACTORISED | GAP | FC_NORM | ASPECT),
  "norm_before_mean": (dict(fc_norm=False), BICUBIC | GAP),
  "token": (
    dict(class_token=True, global_pool="token", reg_tokens=2),
    dict(registers=2, pool="tok", **BILINEAR),
  ),
}


def randomise(module):
  """Replaces all parameters by random ones and returns them as arrays.

  Initialisations hide errors: biases of 0, scales of 1, symmetric tables.
  """
  import torch

  torch.manual_seed(0)
  with torch.no_grad():
    for name, p in module.named_parameters():
      fan_in = p.shape[1] if p.ndim == 2 else 10
      p.normal_(0.0, fan_in**-0.5)
      if p.ndim == 1 and name.endswith(("weight", "gamma")):
        p.add_(1.0)
      elif "pos" in name:
        p.normal_()
  named = module.named_parameters(remove_duplicate=False)
  return {k: p.detach().numpy() for k, p in named}


def images(patch):
  rng = np.random.default_rng(1)
  return [
    rng.integers(0, 256, (h * patch, w * patch, 3), dtype=np.uint8)
    for h, w in GRIDS
  ]


def packed(patch):
  """All images in shared rows, and where each went."""
  spec = packing.PackSpec(length=83, patch=patch, max_images=5)
  lengths = np.array([h * w for h, w in GRIDS])
  members = planning.best_fit_decreasing(
    lengths, length=spec.length, max_images=spec.max_images
  )
  assert max(map(len, members)) > 2
  batch, places = packing.blank(spec, len(members)), {}
  pixels = images(patch)
  for row, of_row in enumerate(members):
    start = 0
    for slot, i in enumerate(of_row):
      places[i] = row, slot
      start += packing.put(
        batch, row, slot, start, image=pixels[i], keep=None, spec=spec
      )
  keys = "patches segment_ids positions grid_hw example_mask".split()
  batch = {k: jnp.asarray(batch[k]) for k in keys}
  batch["patches"] = batch["patches"] / 127.5 - 1
  return batch, places


def padded(patch):
  """patches [E,N,3P²], coordinates [E,N,2] and what is no padding [E,N]."""
  most = max(h * w for h, w in GRIDS)
  patches = np.zeros((len(GRIDS), most, 3 * patch**2), np.float32)
  coords = np.zeros((len(GRIDS), most, 2), np.int64)
  valid = np.zeros((len(GRIDS), most), bool)
  for i, ((h, w), image) in enumerate(zip(GRIDS, images(patch))):
    cut = image.reshape(h, patch, w, patch, 3).swapaxes(1, 2).reshape(h * w, -1)
    patches[i, : h * w] = cut / 127.5 - 1
    coords[i, : h * w] = np.argwhere(np.ones((h, w)))
    valid[i, : h * w] = True
  return patches, coords, valid


def our_model(tensors, layout, **kw):
  """The model with their tensors: itself, and its variables."""
  small = dict(variant="B", sizes=SIZES, max_grid=SIDE)
  model = navit.Model(**(small | NAFLEX | kw))
  batch, _ = packed(patch_of(model))
  shapes = jax.eval_shape(
    lambda: model.init(jax.random.key(0), **batch, train=False)
  )
  variables, found = engine.import_weights(
    tensors, name="navit", model=model, shapes=shapes
  )
  assert found == layout
  return model, variables


def patch_of(model):
  return variants.sizes(model.variant, navit.VARIANTS, model.sizes)["patch"]


def our_outputs(model, variables):
  """Outputs by image, as theirs are; tokens are a list."""
  batch, places = packed(patch_of(model))
  run = jax.jit(lambda v, b: model.apply(v, **b, train=False))
  out = jax.device_get(run(variables, batch))
  places = [places[i] for i in range(len(GRIDS))]
  result = {
    k: np.stack([x[place] for place in places])
    for k, x in out.items()
    if k != "tokens"
  }
  ids = np.asarray(batch["segment_ids"])
  result["tokens"] = [
    out["tokens"][row, ids[row] == slot + 1] for row, slot in places
  ]
  return result


def assert_close(got, want, tolerance=1e-5):
  """Relative to the deviation: float32 through a few layers."""
  error = np.abs(got - want).max() / np.std(want)
  assert error < tolerance, f"off by {error:.1e} of the deviation"


def patches_of(tokens):
  """Padded tokens as a list, without the padding."""
  return [x[: h * w] for x, (h, w) in zip(tokens, GRIDS)]


def load_what_we_write(theirs, model, variables, layout):
  """Into their model, strictly; reading it back gives equal arrays."""
  import torch

  tensors = engine.export_weights(
    variables, name="navit", model=model, layout=layout
  )
  theirs.load_state_dict(
    {k: torch.tensor(x) for k, x in tensors.items()}, strict=True
  )
  again, _ = engine.import_weights(
    tensors,
    name="navit",
    model=model,
    shapes=jax.eval_shape(lambda: variables),
    layout=layout,
  )
  jax.tree.map(np.testing.assert_array_equal, again, variables)


def timm_model(name, **kw):
  timm = pytest.importorskip("timm")
  return timm.create_model(
    name,
    num_classes=CLASSES,
    embed_dim=SIZES["width"],
    depth=SIZES["depth"],
    num_heads=SIZES["heads"],
    mlp_ratio=SIZES["mlp"] / SIZES["width"],
    patch_size=SIZES["patch"],
    pos_embed_grid_size=(SIDE, SIDE),
    **kw,
  ).eval()


def run_timm(theirs, patch=SIZES["patch"]):
  """Tokens of the patches [E,N,D], and logits [E,C]."""
  import torch

  names = ("patches", "patch_coord", "patch_valid")
  inputs = dict(zip(names, map(torch.tensor, padded(patch))))
  tokens = theirs.forward_features(**inputs)["patches"]
  return tokens[:, theirs.num_prefix_tokens :], theirs(inputs)


@pytest.mark.parametrize("case", TIMM)
def test_timm(case):
  import torch

  their_kw, our_kw = TIMM[case]
  name = {"token": "siglip", "norm_before_mean": "gap"}.get(case, case)
  theirs = timm_model(f"naflexvit_base_patch16_{name}", **their_kw)
  layout = "timm" if name == "siglip" else "timm_layer_scale"
  model, variables = our_model(
    randomise(theirs), layout, num_classes=CLASSES, **our_kw
  )
  got = our_outputs(model, variables)
  with torch.no_grad():
    tokens, logits = run_timm(theirs)
    assert_close(got["logits"], logits.numpy())
    for ours, want in zip(got["tokens"], patches_of(tokens.numpy())):
      assert_close(ours, want)
    load_what_we_write(theirs, model, variables, layout)
    # Also where scales went into the projections before them.
    assert_close(run_timm(theirs)[1].numpy(), logits.numpy())


def hf_model(**kw):
  transformers = pytest.importorskip("transformers")
  config = transformers.Siglip2VisionConfig(
    hidden_size=SIZES["width"],
    intermediate_size=SIZES["mlp"],
    num_hidden_layers=SIZES["depth"],
    num_attention_heads=SIZES["heads"],
    patch_size=SIZES["patch"],
    num_patches=SIDE**2,
    **kw,
  )
  return transformers.Siglip2VisionModel(config).eval()


def run_hf(theirs, patch=SIZES["patch"]):
  import torch

  patches, _, valid = map(torch.tensor, padded(patch))
  return theirs(
    pixel_values=patches,
    pixel_attention_mask=valid.long(),
    spatial_shapes=torch.tensor(GRIDS),
  )


@pytest.mark.parametrize("pool", ["map", "gap"])
def test_siglip2(pool):
  """With and without the head of theirs, whose model has no mean."""
  import torch

  theirs = hf_model(vision_use_head=pool == "map")
  model, variables = our_model(randomise(theirs), "hf", pool=pool, **BILINEAR)
  got = our_outputs(model, variables)
  with torch.no_grad():
    want = run_hf(theirs)
  tokens = patches_of(want.last_hidden_state.numpy())
  pooled = [x.mean(0) for x in tokens]
  if pool == "map":
    pooled = want.pooler_output.numpy()
  for i in HF_RIGHT:
    assert_close(got["tokens"][i], tokens[i])
    assert_close(got["pooled"][i], pooled[i])
  load_what_we_write(theirs, model, variables, "hf")


@pytest.mark.parametrize("layout", ["timm", "hf"])
def test_gradients_of_all_parameters(layout):
  """Of a weighted sum of all images' outputs, in training."""
  import torch

  timm = layout == "timm"
  if timm:
    theirs = timm_model("naflexvit_base_patch16_siglip")
  else:
    theirs = hf_model()
  kw = dict(num_classes=CLASSES if timm else None, **BILINEAR)
  model, variables = our_model(randomise(theirs), layout, **kw)
  theirs.train()
  want = run_timm(theirs)[1] if timm else run_hf(theirs).pooler_output
  weights = np.random.default_rng(2).normal(size=want.shape).astype(np.float32)
  if not timm:
    weights[np.setdiff1d(range(len(GRIDS)), HF_RIGHT)] = 0
  (want * torch.tensor(weights)).sum().backward()
  want = {k: p.grad.numpy() for k, p in theirs.named_parameters()}
  _, want = our_model(want, layout, **kw)

  batch, places = packed(SIZES["patch"])
  rows, slots = np.array([places[i] for i in range(len(GRIDS))]).T

  @jax.jit
  @jax.grad
  def gradient(variables):
    out = model.apply(variables, **batch, train=True)
    out = out["logits" if timm else "pooled"]
    return (out[rows, slots] * weights).sum()

  got, want = map(trees.flatten, (gradient(variables), want))
  for name in want:
    if name.endswith("key/bias"):
      # Zero: a softmax is the same wherever its scores start.
      scale = np.abs(want[name.replace("key", "query")]).max()
    else:
      scale = np.abs(want[name]).max()
    error = np.abs(got[name] - want[name]).max() / scale
    # Float32 sums over all tokens.
    assert error < 1e-4, f"{name}: off by {error:.1e} of the largest"


@pytest.mark.parametrize(
  ("name", "layers"),
  [
    *((name, "one") for name in weights.PUBLISHED),
    *(
      pytest.param(name, "all", marks=pytest.mark.slow)
      for name in weights.PUBLISHED
    ),
  ],
)
def test_published(name, layers):
  """In the published width, from their configuration to ours.

  All layers of so400m are two in turn: it would take a small machine's memory.
  """
  import torch

  torch.manual_seed(0)
  settings = weights.PUBLISHED[name]
  size = navit.VARIANTS[settings["variant"].split("/")[0]]
  depth = 1 if layers == "one" else size["depth"]
  distinct = min(depth, 2) if "so400m" in name else depth
  if name.startswith("google"):
    transformers = pytest.importorskip("transformers")
    config = transformers.Siglip2VisionConfig(
      hidden_size=size["width"],
      intermediate_size=size["mlp"],
      num_attention_heads=size["heads"],
      num_hidden_layers=distinct,
    )
    theirs = transformers.Siglip2VisionModel(config).eval()
    run, layout = lambda: run_hf(theirs, 16).pooler_output, "hf"
    right = HF_RIGHT
  else:
    timm = pytest.importorskip("timm")
    theirs = timm.create_model(name, depth=distinct, num_classes=0).eval()
    run = lambda: run_timm(theirs, 16)[1]
    layout = "timm_layer_scale" if name.endswith("gap") else "timm"
    right = slice(None)
  blocks = theirs.encoder.layers if layout == "hf" else theirs.blocks
  blocks.extend([blocks[i % 2] for i in range(distinct, depth)])
  tensors = randomise(theirs)
  model, variables = our_model(
    tensors, layout, **settings, sizes=dict(depth=depth)
  )
  got = our_outputs(model, variables)["pooled"]
  with torch.no_grad():
    want = run().numpy()
  # Rounding adds up over the layers.
  assert_close(got[right], want[right], 1e-5 if layers == "one" else 1e-4)
