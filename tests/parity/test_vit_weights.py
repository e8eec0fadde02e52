"""ViT's published names: timm and transformers load what we write, and back.

timm's own reader of Google's .npz files is the judge of ours.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vision_like import trees
from big_vision_like.models import vit
from big_vision_like.models.layers import encoder, position_table
from big_vision_like.weights import engine

pytestmark = pytest.mark.parity
CLASSES = 7
# Our variant, timm's name, layers kept (of 12 to 48), the image's sides.
PLAIN = [
  ("Ti/16", "tiny_patch16_224", 2, (32, 48)),
  ("S/32", "small_patch32_224", 2, (64, 96)),
  ("S/16", "small_patch16_224", 2, (32, 48)),
  ("B/32", "base_patch32_224", 2, (64, 96)),
  ("B/16", "base_patch16_224", 2, (32, 48)),
  ("B/8", "base_patch8_224", 2, (16, 24)),
  ("L/32", "large_patch32_384", 1, (64, 96)),
  ("L/16", "large_patch16_224", 1, (32, 48)),
  ("H/14", "huge_patch14_224", 1, (28, 42)),
  ("g/14", "giant_patch14_224", 1, (28, 42)),
  ("G/14", "gigantic_patch14_224", 1, (28, 42)),
  ("So400m/14", "so400m_patch14_siglip_224", 1, (28, 42)),
]
# Of these, two layers take turns: gigabytes of weights otherwise.
IN_TURN = ("H/14", "g/14", "G/14")
# Odd sides where the patches on the map allow them: SAME pads unevenly.
HYBRIDS = [
  ("R+Ti/16", "tiny_r_s16_p8_224", 2, (64, 96)),
  ("R26+S/32", "small_r26_s32_224", 2, (61, 97)),
  ("R50+B/16", "base_r50_s16_224", 1, (47, 33)),
  ("R50+L/32", "large_r50_s32_224", 1, (61, 97)),
]


def images(size, count=2):
  rng = np.random.default_rng(1)
  return rng.normal(size=(count, *size, 3)).astype(np.float32)


def to_torch(image):
  import torch

  return torch.from_numpy(np.ascontiguousarray(image.transpose(0, 3, 1, 2)))


def randomise(module):
  """Replaces all parameters: initialisations hide errors."""
  import torch

  torch.manual_seed(0)
  with torch.no_grad():
    for name, p in module.named_parameters():
      if "pos" in name or "cls" in name or "latent" in name:
        p.normal_(0.0, 0.3)
      elif p.ndim > 1:
        p.normal_(0.0, p[0].numel() ** -0.5)
      else:
        p.normal_(float("norm" in name and name.endswith("weight")), 0.2)
  return module.eval()


def of_timm(name, depth, size):
  """timm's model with Google's arithmetic."""
  import torch

  timm = pytest.importorskip("timm")
  from timm.layers import GroupNormAct, StdConv2dSame

  model = timm.create_model(
    f"vit_{name}", num_classes=CLASSES, depth=depth, img_size=size
  )
  blocks = [*model.blocks, *([model.attn_pool] if model.attn_pool else [])]
  for block in blocks:
    block.mlp.act = torch.nn.GELU(approximate="tanh")
  for m in model.modules():
    if isinstance(m, GroupNormAct):
      m.eps = 1e-6
    if isinstance(m, StdConv2dSame):
      m.forward = functools.partial(google_std_conv, m)
  return model


def google_std_conv(module, x):
  """vit_jax's standardisation: the constant is added to the deviation."""
  import torch
  from timm.layers import pad_same

  if module.same_pad:
    x = pad_same(x, module.kernel_size, module.stride, module.dilation)
  w = module.weight - module.weight.mean((1, 2, 3), keepdim=True)
  w = w / (w.std((1, 2, 3), keepdim=True, unbiased=False) + 1e-5)
  padding = module.padding
  return torch.nn.functional.conv2d(x, w, None, module.stride, padding)


def ours_of(variant, depth, **kw):
  if variant.startswith("So400m"):
    kw = dict(pool="map", **kw)
  return vit.Model(
    variant=variant, sizes=dict(depth=depth), num_classes=CLASSES, **kw
  )


def shapes_of(model, size):
  image = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
  return jax.eval_shape(
    lambda x: model.init(jax.random.key(0), x, train=False), image
  )


def tensors(module):
  return {k: p.detach().numpy().copy() for k, p in module.state_dict().items()}


@functools.partial(jax.jit, static_argnums=0)
def apply(model, variables, image):
  return model.apply(variables, image, train=False)["logits"]


def assert_close(got, want, tolerance=2e-5):
  """Relative to the logits' size: float32 through a few layers."""
  error = np.abs(got - want).max() / np.abs(want).std()
  assert error < tolerance, f"off by {error:.1e} of the logits' deviation"


def assert_equal(left, right):
  left, right = trees.flatten(left), trees.flatten(right)
  assert set(left) == set(right)
  for k in left:
    np.testing.assert_array_equal(left[k], right[k], err_msg=k)


def load(arrays, model, shapes, layout, **kw):
  variables, found = engine.import_weights(
    arrays, name="vit", model=model, shapes=shapes, **kw
  )
  assert found == layout
  return variables


def export(variables, model, layout):
  return engine.export_weights(
    variables, name="vit", model=model, layout=layout
  )


@pytest.mark.parametrize(("variant", "name", "depth", "size"), PLAIN + HYBRIDS)
def test_timm_and_google(variant, name, depth, size, tmp_path):
  """Logits are timm's, and timm reads our .npz as the same model."""
  import torch

  theirs = randomise(of_timm(name, depth, size))
  model = ours_of(variant, depth)
  shapes = shapes_of(model, size)
  variables = load(tensors(theirs), model, shapes, "timm")
  image = images(size)
  with torch.no_grad():
    want = theirs(to_torch(image)).numpy()
  # Standardisation and GroupNorm of 16 blocks add theirs to the rounding.
  tolerance = 1e-4 if "+" in variant else 2e-5
  assert_close(apply(model, variables, jnp.asarray(image)), want, tolerance)
  assert_equal(export(variables, model, "timm"), tensors(theirs))

  layout = "big_vision" if model.pool == "map" else "google"
  arrays = export(variables, model, layout)
  assert_equal(load(arrays, model, shapes, layout), variables)
  engine.write(tmp_path / "weights.npz", arrays)
  other = of_timm(name, depth, size).eval()
  other.load_pretrained(str(tmp_path / "weights.npz"))
  assert_equal(tensors(other), tensors(theirs))


@pytest.mark.slow
@pytest.mark.parametrize(
  ("variant", "name", "size"),
  [
    (variant, name, size)
    for variant, name, _, size in PLAIN + HYBRIDS
    if variant in (*vit.PUBLISHED, *IN_TURN)
  ],
)
def test_all_layers(variant, name, size):
  """Of the published models, and of the largest that the papers describe."""
  import torch

  depth = vit.row(variant)["depth"]
  distinct = 2 if variant in IN_TURN else depth
  theirs = randomise(of_timm(name, distinct, size))
  model = ours_of(variant, distinct)
  variables = load(tensors(theirs), model, shapes_of(model, size), "timm")
  theirs.blocks.extend([theirs.blocks[i % 2] for i in range(distinct, depth)])
  if variant in IN_TURN:
    model = ours_of(variant, depth, scan=False)
    params = jax.tree.map(jnp.asarray, variables["params"])
    params = encoder.unstack_blocks(params)
    blocks = params["encoder"]
    for i in range(distinct, depth):
      blocks[f"blocks_{i}"] = blocks[f"blocks_{i % 2}"]
    variables = {"params": params}
  image = images(size)
  with torch.no_grad():
    want = theirs(to_torch(image)).numpy()
  assert_close(apply(model, variables, jnp.asarray(image)), want, 1e-4)


def test_transformers():
  import torch

  transformers = pytest.importorskip("transformers")
  config = transformers.ViTConfig(
    hidden_size=192,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=768,
    image_size=80,
    num_labels=CLASSES,
    layer_norm_eps=1e-6,  # Theirs is 1e-12 by default.
  )
  theirs = randomise(transformers.ViTForImageClassification(config))
  model = ours_of("Ti/16", 2, gelu="exact")
  variables = load(
    tensors(theirs), model, shapes_of(model, (80, 80)), "hf_modules"
  )
  image = images((80, 80))
  with torch.no_grad():
    want = theirs(to_torch(image)).logits.numpy()
  assert_close(apply(model, variables, jnp.asarray(image)), want)
  assert_equal(export(variables, model, "hf_modules"), tensors(theirs))


def random_variables(shapes):
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(np.float32), shapes
  )


@pytest.mark.parametrize(
  ("variant", "classes", "rep_size"),
  [("Ti/16", CLASSES, True), ("R26+S/32", None, False), ("S/32", 5, 13)],
)
def test_flax_renumbers_one_google_layout_to_the_other(
  variant, classes, rep_size
):
  """flax's own converter leads from the old files to today's names."""
  from flax import traverse_util
  from flax.training import checkpoints

  model = ours_of(variant, 2, rep_size=rep_size).clone(num_classes=classes)
  shapes = shapes_of(model, (64, 64))
  variables = random_variables(shapes)
  old = export(variables, model, "google")
  new = export(variables, model, "linen")
  assert ("pre_logits/kernel" in old) == bool(rep_size)
  tree = checkpoints.convert_pre_linen(trees.unflatten(old))
  flat = traverse_util.flatten_dict(dict(tree), sep="/")
  # vit_jax squeezes GroupNorm's vectors after that (checkpoint.py).
  flat = {k: v.squeeze() if "/gn" in f"/{k}" else v for k, v in flat.items()}
  assert_equal(flat, new)
  for layout, arrays in (("google", old), ("linen", new)):
    assert_equal(load(arrays, model, shapes, layout), variables)


def test_big_vision_has_no_position_for_the_class_token():
  """timm adds nothing for it either: the sum stays the same."""
  model = ours_of("Ti/16", 2)
  shapes = shapes_of(model, (48, 48))
  variables = random_variables(shapes)
  arrays = export(variables, model, "big_vision")
  assert arrays["pos_embedding"].shape == (1, 9, 192)
  again = load(arrays, model, shapes, "big_vision")
  assert not again["params"]["pos_embed"][:, 0].any()
  image = jnp.asarray(images((48, 48)))
  np.testing.assert_allclose(
    apply(model, again, image), apply(model, variables, image), rtol=1e-5
  )
  assert_equal(export(again, model, "big_vision"), arrays)


@pytest.mark.parametrize("wrapper", ["", "params/", "opt/target/"])
def test_big_vision_may_have_stacked_its_layers(wrapper, tmp_path):
  """As its trainers save models with scan=True, with or without a wrapper."""
  depth = 3
  model = ours_of("Ti/16", depth)
  shapes = shapes_of(model, (48, 48))
  variables = random_variables(shapes)
  variables["params"]["pos_embed"][:, 0] = 0  # They have none.
  arrays = trees.unflatten(export(variables, model, "big_vision"))
  layers = [arrays["Transformer"].pop(f"encoderblock_{i}") for i in range(3)]
  arrays["Transformer"]["encoderblock"] = jax.tree.map(
    lambda *x: np.stack(x), *layers
  )
  stacked = trees.flatten(arrays)
  saved = {f"{wrapper}{k}": x for k, x in stacked.items()}
  if wrapper:
    saved["chrono/seconds"] = np.float32(7)
  np.savez(tmp_path / "scanned.npz", **saved)
  read = engine.read(tmp_path / "scanned.npz")
  assert_equal(load(read, model, shapes, "big_vision_stacked"), variables)
  assert_equal(export(variables, model, "big_vision_stacked"), stacked)

  deeper = ours_of("Ti/16", depth + 1)
  with pytest.raises(ValueError, match="holds 3 layers, and the model has 4"):
    load(read, deeper, shapes_of(deeper, (48, 48)), "big_vision_stacked")


@pytest.mark.parametrize(
  ("variant", "name", "size"),
  [
    ("Ti/16", "tiny_patch16_224", (32, 48)),
    ("R26+S/32", "small_r26_s32_224", (61, 97)),
  ],
)
def test_gradients(variant, name, size):
  """Of all parameters, with torch's mapped by the same rules."""
  import torch

  theirs = randomise(of_timm(name, 2, size)).train()
  model = ours_of(variant, 2)
  shapes = shapes_of(model, size)
  variables = load(tensors(theirs), model, shapes, "timm")
  image = images(size)
  cotangent = np.random.default_rng(2).normal(size=(2, CLASSES))
  cotangent = cotangent.astype(np.float32)
  theirs(to_torch(image)).backward(torch.from_numpy(cotangent))
  wanted = {k: p.grad.numpy() for k, p in theirs.named_parameters()}
  wanted = trees.flatten(load(wanted, model, shapes, "timm"))

  @jax.jit
  def gradient(variables):
    def loss(variables):
      out = model.apply(variables, jnp.asarray(image), train=True)
      return (out["logits"] * cotangent).sum()

    return jax.grad(loss)(variables)

  got = trees.flatten(gradient(variables))
  assert set(got) == set(wanted)
  for path, want in wanted.items():
    # The softmax takes no notice of a key's bias: its gradient is rounding.
    scale = 1.0 if path.endswith("key/bias") else np.linalg.norm(want)
    error = np.linalg.norm(got[path] - want) / scale
    # Standardisation and GroupNorm of 8 blocks add theirs to the rounding.
    assert error < (1e-4 if "+" in variant else 2e-5), f"{path}: {error:.1e}"


def test_tables_are_resized_as_torch_does():
  import torch

  table = np.random.default_rng(0).normal(size=(1, 1 + 35, 3))
  table = table.astype(np.float32)
  grid = torch.from_numpy(table[:, 1:].reshape(1, 5, 7, 3)).permute(0, 3, 1, 2)
  for size in ((11, 13), (3, 2), (5, 9)):
    for kind, kw in (
      ("corners", dict(align_corners=True)),
      ("antialias", dict(antialias=True)),
    ):
      got = position_table.resize_positions(
        table, size, kind=kind, prefix=1, old_size=(5, 7)
      )
      want = torch.nn.functional.interpolate(grid, size, mode="bilinear", **kw)
      want = want.permute(0, 2, 3, 1).reshape(1, -1, 3).numpy()
      np.testing.assert_array_equal(got[:, :1], table[:, :1])
      # One float32 rounding of each weight in torch.
      np.testing.assert_allclose(got[:, 1:], want, atol=2e-6)


@pytest.mark.parametrize(
  ("kind", "settings"),
  [
    ("positions", dict(align_corners=True, antialias=False)),
    ("positions_antialias", dict(antialias=True)),
  ],
)
def test_fine_tuning_at_a_higher_resolution(kind, settings):
  """A file of 4 x 4 patches in a model of 6 x 6, as timm would be filled."""
  import torch
  from timm.layers import resample_abs_pos_embed

  low = randomise(of_timm("tiny_patch16_224", 2, 64))
  high = of_timm("tiny_patch16_224", 2, 96).eval()
  state = low.state_dict()
  state["pos_embed"] = resample_abs_pos_embed(
    state["pos_embed"], [6, 6], interpolation="bilinear", **settings
  )
  high.load_state_dict(state)
  model = ours_of("Ti/16", 2)
  shapes = shapes_of(model, (96, 96))
  with pytest.raises(ValueError, match="pos_embed: the model has"):
    load(tensors(low), model, shapes, "timm")
  variables = load(tensors(low), model, shapes, "timm", resize=(kind,))
  image = images((96, 96))
  with torch.no_grad():
    want = high(to_torch(image)).numpy()
  assert_close(apply(model, variables, jnp.asarray(image)), want)
