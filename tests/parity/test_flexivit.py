"""FlexiViT against timm's, whose own resampling makes it other patch sizes.

timm's default is bicubic with antialiasing; here it is told to do as the
authors do: bilinear without for the kernel, bilinear with for positions.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vision_like import trees
from big_vision_like.models import flexivit
from big_vision_like.models.layers.resize import pi_resize
from big_vision_like.weights import engine

pytestmark = pytest.mark.parity
CLASSES = 5
DEPTH = 2  # To save time; the widths stay.
# timm has no Ti: its small one in the width of Ti.
NAMES = {
  "Ti": ("flexivit_small", dict(embed_dim=192, num_heads=3)),
  "S": ("flexivit_small", {}),
  "B": ("flexivit_base", {}),
  "L": ("flexivit_large", {}),
}


def theirs(variant, depth=DEPTH, **kw):
  timm = pytest.importorskip("timm")
  name, sizes = NAMES[variant]
  return timm.create_model(
    name, num_classes=CLASSES, depth=depth, **sizes, **kw
  ).eval()


@functools.cache
def randomised(variant, depth=DEPTH):
  """timm's model at 240 pixels, all of it random, and its arrays."""
  import torch

  torch.manual_seed(0)
  module = theirs(variant, depth)
  with torch.no_grad():
    for name, p in module.named_parameters():
      fan_in = p[0].numel() if p.ndim > 1 else 10
      token = name in ("pos_embed", "cls_token")
      p.normal_(0.0, 0.3 if token else fan_in**-0.5)
      if "norm" in name and name.endswith("weight"):
        p.add_(1.0)
  return module, {k: x.numpy() for k, x in module.state_dict().items()}


def ours(variant, **kw):
  """The model that stores what timm's does."""
  settings = dict(table=15, gelu="exact", sizes=dict(depth=DEPTH)) | kw
  return flexivit.Model(
    variant=f"{variant}/16", num_classes=CLASSES, **settings
  )


def shapes_of(model):
  image = jax.ShapeDtypeStruct((1, 240, 240, 3), jnp.float32)
  init = lambda x: model.init(jax.random.key(0), x, train=False)
  return jax.eval_shape(init, image)


def imported(weights, model, layout="timm"):
  return engine.import_weights(
    weights,
    name="flexivit",
    model=model,
    shapes=shapes_of(model),
    layout=layout,
  )[0]


def images(height, width):
  rng = np.random.default_rng(1)
  return rng.standard_normal((2, height, width, 3)).astype(np.float32)


def answers(module, image):
  import torch

  with torch.no_grad():
    return module(torch.from_numpy(image.transpose(0, 3, 1, 2))).numpy()


def run(model, variables, image, grid):
  return jax.jit(
    lambda v, x: model.apply(v, x, train=False, grid=grid)["logits"]
  )(variables, jnp.asarray(image))


def assert_close(got, want, tolerance=2e-5):
  """Relative to the logits' size: float32 through a few layers."""
  error = np.abs(got - want).max() / np.abs(want).std()
  assert error < tolerance, f"off by {error:.1e} of the logits' deviation"


@pytest.mark.parametrize(
  "layers", ["few", pytest.param("all", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("variant", NAMES)
def test_the_size_that_timm_has(variant, layers):
  few = layers == "few"
  depth = DEPTH if few else flexivit.VARIANTS[variant]["depth"]
  module, weights = randomised(variant, depth)
  model = ours(variant, sizes=dict(depth=depth))
  image = images(240, 240)
  got = run(model, imported(weights, model), image, 15)
  # Rounding adds up over the layers.
  assert_close(got, answers(module, image), 2e-5 if few else 1e-4)


@pytest.mark.parametrize(
  ("height", "width", "patch"),
  [(144, 144, 48), (96, 144, 24), (60, 45, 15), (56, 64, 8), (247, 247, 19)],
)
def test_other_patches_and_grids(height, width, patch):
  import torch
  from timm.layers import resample_abs_pos_embed, resample_patch_embed

  _, weights = randomised("S")
  grid = (height // patch, width // patch)
  module = theirs("S", img_size=(height, width), patch_size=patch)
  tensors = {k: torch.from_numpy(x) for k, x in weights.items()}
  tensors["patch_embed.proj.weight"] = resample_patch_embed(
    tensors["patch_embed.proj.weight"],
    [patch, patch],
    interpolation="bilinear",
    antialias=False,
  )
  tensors["pos_embed"] = resample_abs_pos_embed(
    tensors["pos_embed"],
    list(grid),
    num_prefix_tokens=0,
    interpolation="bilinear",
    antialias=True,
  )
  module.load_state_dict(tensors)
  model = ours("S")
  image = images(height, width)
  got = run(model, imported(weights, model), image, grid)
  assert_close(got, answers(module, image))


@pytest.mark.parametrize(
  ("old", "new"), [(16, 48), (32, 8), (32, 48), (8, 15), (10, 7)]
)
def test_pi_resize(old, new):
  import torch
  from timm.layers import resample_patch_embed

  rng = np.random.default_rng(0)
  kernel = rng.standard_normal((old, old, 3, 2))
  want = resample_patch_embed(
    torch.from_numpy(kernel.transpose(3, 2, 0, 1)).float(),
    [new, new],
    interpolation="bilinear",
    antialias=False,
  ).numpy()
  got = pi_resize(kernel, (new, new)).transpose(3, 2, 0, 1)
  # Theirs inverts the whole matrix in float32.
  np.testing.assert_allclose(got, want, atol=3e-5)


def test_export_is_the_inverse_of_import():
  import torch

  _, weights = randomised("S")
  model = ours("S")
  exported = engine.export_weights(
    imported(weights, model), name="flexivit", model=model, layout="timm"
  )
  assert exported.keys() == weights.keys()
  for name, x in weights.items():
    np.testing.assert_array_equal(exported[name], x, err_msg=name)
  tensors = {k: torch.from_numpy(x.copy()) for k, x in exported.items()}
  theirs("S").load_state_dict(tensors, strict=True)


def test_timm_reads_our_big_vision_file(tmp_path):
  """Its loader resizes a kernel of 32 x 32 and 7 x 7 positions, once."""
  model = ours("S", table=7, sizes=dict(depth=DEPTH, patch=32))
  rng = np.random.default_rng(0)
  variables = jax.tree.map(
    lambda x: rng.normal(0.0, 0.05, x.shape).astype(np.float32),
    shapes_of(model),
  )
  tensors = engine.export_weights(
    variables, name="flexivit", model=model, layout="big_vision"
  )
  engine.write(tmp_path / "flexivit_s.npz", tensors)
  again = imported(
    engine.read(tmp_path / "flexivit_s.npz"), model, "big_vision"
  )
  for name, x in trees.flatten(variables).items():
    np.testing.assert_array_equal(trees.flatten(again)[name], x)
  module = theirs("S")
  module.load_pretrained(str(tmp_path / "flexivit_s.npz"))
  image = images(240, 240)
  # Positions grow from 7 to 15 a side, where antialiasing changes nothing.
  assert_close(run(model, variables, image, 15), answers(module, image))


def test_gradients():
  """In float64 on their side, so that all differences are ours."""
  import torch

  _, weights = randomised("S")
  module = theirs("S").double().train()
  tensors = {k: torch.from_numpy(x).double() for k, x in weights.items()}
  module.load_state_dict(tensors)
  image = images(240, 240)
  direction = np.random.default_rng(2).standard_normal((2, CLASSES))
  x = torch.from_numpy(image.transpose(0, 3, 1, 2)).double()
  (module(x) * torch.from_numpy(direction)).sum().backward()
  model = ours("S")
  their_grads = {k: p.grad.numpy() for k, p in module.named_parameters()}
  wanted = trees.flatten(imported(their_grads, model))

  @jax.jit
  def grads(variables):
    loss = lambda v: (
      model.apply(v, jnp.asarray(image), train=True)["logits"]
      * jnp.asarray(direction, jnp.float32)
    ).sum()
    return jax.grad(loss)(variables)

  for name, got in trees.flatten(grads(imported(weights, model))).items():
    want = wanted[name]
    if name.endswith("attn/key/bias"):  # The softmax takes it out again.
      assert np.abs(want).max() < 1e-10
      assert np.abs(got).max() < 1e-4
      continue
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert error < 1e-4, f"{name}: {error:.1e}"
