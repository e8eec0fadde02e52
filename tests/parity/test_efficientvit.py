"""EfficientViT against timm's, with every parameter randomised.

Running statistics are those of some images, as after training: without that,
signals grow until each softmax is a step, and rounding decides it.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vision_like import trees
from big_vision_like.models import efficientvit
from big_vision_like.weights import engine

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("compile_quickly")]
CLASSES = 11


def images(height, width, batch=2, seed=1):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(batch, height, width, 3)).astype(np.float32)


def to_torch(image):
  import torch

  return torch.from_numpy(image.transpose(0, 3, 1, 2).copy())


def randomise(theirs, size=224):
  """Draws parameters, and takes the running statistics of eight images.

  Ends in evaluation with an empty cache of biases: timm keeps those that it
  gathered before the weights changed.
  """
  import torch

  torch.manual_seed(0)
  norms = [m for m in theirs.modules() if "BatchNorm" in type(m).__name__]
  with torch.no_grad():
    for name, p in theirs.named_parameters():
      if p.ndim > 1 and not name.endswith("biases"):
        p.normal_(0.0, p[0].numel() ** -0.5)
      else:
        p.normal_(0.0, 0.2)
        if re.search(r"bn\.weight$", name):
          p.add_(1.0)
    for norm in norms:
      norm.momentum = 1.0
    theirs.train()
    theirs(to_torch(images(size, size, batch=8, seed=0)))
    for norm in norms:
      norm.momentum = 0.1
  return theirs.eval()


def tensors_of(theirs):
  return {k: x.detach().numpy().copy() for k, x in theirs.state_dict().items()}


def shapes(model, size=224):
  image = jnp.zeros((1, size, size, 3))
  init = lambda: model.init(jax.random.key(0), image, train=False)
  return jax.eval_shape(init)


def load(tensors, model, size=224, layout=None, resize=()):
  return engine.import_weights(
    tensors,
    name="efficientvit",
    model=model,
    shapes=shapes(model, size),
    layout=layout,
    resize=resize,
  )


def run(model, variables, image):
  apply = lambda v, x: model.apply(v, x, train=False)
  return jax.jit(apply)(variables, image)


def assert_close(got, want):
  """Relative to the deviation: float32 through up to 90 normalised layers."""
  error = np.abs(got - want).max() / np.std(want)
  assert error < 1e-4, f"off by {error:.1e} of the deviation"


@pytest.mark.parametrize("variant", [f"M{i}" for i in range(6)])
def test_timm(variant):
  """At 224 pixels, and where windows are padded: maps 14 x 15, 7 x 8, 4 x 4."""
  import torch

  timm = pytest.importorskip("timm")
  name = f"efficientvit_{variant.lower()}"
  theirs = randomise(timm.create_model(name, num_classes=CLASSES))
  model = efficientvit.Model(variant, CLASSES)
  tensors = tensors_of(theirs)
  variables, layout = load(tensors, model)
  assert layout == "timm"
  for size in ((224, 224), (209, 239)):
    image = images(*size)
    with torch.no_grad():
      features = theirs.forward_features(to_torch(image))
      logits = theirs.forward_head(features).numpy()
    assert logits.std(0).mean() > 0.3  # They depend on the image.
    out = run(model, variables, image)
    assert_close(out["logits"], logits)
    assert_close(out["map"], features.numpy().transpose(0, 2, 3, 1))
  exported = engine.export_weights(
    variables, name="efficientvit", model=model, layout="timm"
  )
  theirs.load_state_dict(
    {k: torch.from_numpy(x.copy()) for k, x in exported.items()}, strict=True
  )
  again, _ = load(exported, model)
  jax.tree.map(np.testing.assert_array_equal, again, variables)


def errors(got, wanted):
  """Norms of the differences by path, as shares of the wanted norms.

  Moving all keys of a query moves no attention, and the next batch's mean takes
  away what some biases add: those receive rounding, which the floor covers.
  """
  got, wanted = trees.flatten(got), trees.flatten(wanted)
  norms = {k: np.linalg.norm(x) for k, x in wanted.items()}
  floor = 1e-2 * np.median(list(norms.values()))
  return {
    k: np.linalg.norm(x - wanted[k]) / (norms[k] + floor)
    for k, x in got.items()
  }


def test_training():
  """Logits, statistics and gradients of a step, with padded windows.

  Both in float64: statistics of batches amplify rounding, and in float32 single
  ReLUs turn on or off, by which timm's own gradients are off by 1e-2.
  """
  import torch

  models = pytest.importorskip("timm.models.efficientvit_msra")
  kernels = (7, 5, 3, 3)
  sizes = dict(widths=(64, 96, 128), depths=(1, 2, 1), heads=(4, 3, 2))
  theirs = models.EfficientVitMsra(
    img_size=120,  # Maps of 8, 4 and 2 pixels, windows of 7, 4 and 2.
    num_classes=CLASSES,
    embed_dim=sizes["widths"],
    depth=sizes["depths"],
    num_heads=sizes["heads"],
    kernels=kernels,
  )
  start = tensors_of(randomise(theirs, 120).train())
  sizes["kernels"] = kernels
  model = efficientvit.Model("M0", CLASSES, sizes=sizes)
  variables, _ = load(start, model, 120)
  image = images(120, 120, batch=8)
  weights = images(1, CLASSES, batch=8)[:, 0, :, 0]

  def their_step():
    theirs.double().zero_grad()
    logits = theirs(to_torch(image).double())
    (logits * torch.from_numpy(weights)).sum().backward()
    gradients = {k: p.grad.numpy() for k, p in theirs.named_parameters()}
    step, _ = load(tensors_of(theirs) | gradients, model, 120)
    return step | {"logits": logits.detach().numpy()}

  def loss(params, x):
    out, updated = model.clone(dtype="float64").apply(
      {**variables, "params": params}, x, train=True, mutable="batch_stats"
    )
    return (out["logits"] * weights).sum(), updated | {"logits": out["logits"]}

  with jax.enable_x64(True):
    to_double = functools.partial(np.asarray, dtype=np.float64)
    variables = jax.tree.map(to_double, variables)
    grad = jax.jit(jax.grad(loss, has_aux=True))
    grads, ours = jax.device_get(grad(variables["params"], to_double(image)))
  ours = ours | {"params": grads}
  for kind, wanted in their_step().items():
    for k, error in errors({kind: ours[kind]}, {kind: wanted}).items():
      # The engine rounds what it loads to float32.
      assert error < 1e-6, f"{k}: off by {error:.1e} of its norm"


def resized_by_cream(tensors, wanted):
  """What its `load_model` does before fine-tuning on another resolution."""
  import torch

  resized = {}
  for name in [k for k in tensors if k.endswith("attention_biases")]:
    heads, entries = tensors[name].shape
    old, new = (int(n**0.5) for n in (entries, wanted[name].shape[1]))
    table = torch.from_numpy(tensors[name]).view(1, heads, old, old)
    table = torch.nn.functional.interpolate(table, (new, new), mode="bicubic")
    resized[name] = table.view(heads, -1).numpy()
  return tensors | resized


# Windows of 7, 7 and 4 pixels become 7, 7, 7, as for detection, or 6, 3, 2.
@pytest.mark.parametrize("size", [512, 96])
def test_weights_for_images_of_another_size(size):
  import torch

  timm = pytest.importorskip("timm")
  make = lambda **kw: timm.create_model(
    "efficientvit_m0", num_classes=CLASSES, **kw
  )
  tensors = tensors_of(randomise(make()))
  theirs = make(img_size=size).eval()
  fitted = resized_by_cream(tensors, theirs.state_dict())
  theirs.load_state_dict({k: torch.from_numpy(x) for k, x in fitted.items()})
  model = efficientvit.Model("M0", CLASSES)
  with pytest.raises(ValueError, match="attention_biases: the model has"):
    load(tensors, model, size)
  kw = dict(size=size, resize=("attention_biases",))
  variables, _ = load(tensors, model, **kw)
  image = images(size, size)
  with torch.no_grad():
    wanted = theirs(to_torch(image)).numpy()
  assert_close(run(model, variables, image)["logits"], wanted)
  # In Cream's own names, with the indices of the new windows.
  again, _ = load(official_names(tensors), model, layout="official", **kw)
  jax.tree.map(np.testing.assert_array_equal, again, variables)
  exported = engine.export_weights(
    variables, name="efficientvit", model=model, layout="official"
  )
  for name, x in official_names(fitted).items():
    if "attention_bias" in name:
      # One float32 rounding of each weight in torch.
      np.testing.assert_allclose(exported[name], x, atol=2e-6, err_msg=name)


def official_names(tensors):
  """timm's names as microsoft/Cream's, by its own modules' structure."""
  renamed = {}
  for name, x in tensors.items():
    name = re.sub(
      r"patch_embed\.conv(\d)",
      lambda m: f"patch_embed.{2 * int(m[1]) - 2}",
      name,
    )
    name = name.replace("stages.0.blocks", "blocks1")
    name = re.sub(
      r"stages\.(\d)\.blocks\.(\d)",
      lambda m: f"blocks{int(m[1]) + 1}.{int(m[2]) + 3}",
      name,
    )
    for i, part in enumerate(("res1", "patchmerge", "res2")):
      name = re.sub(
        rf"stages\.(\d)\.downsample\.{part}",
        lambda m, i=i: f"blocks{int(m[1]) + 1}.{i}",
        name,
      )
    name = name.replace(".conv.", ".c.").replace("head.linear", "head.l")
    renamed[name] = x
  for name in [k for k in renamed if k.endswith("attention_biases")]:
    side = int(renamed[name].shape[1] ** 0.5)
    pixels = list(np.ndindex(side, side))
    seen, index = {}, []
    for a in pixels:
      for b in pixels:
        distance = (abs(a[0] - b[0]), abs(a[1] - b[1]))
        index.append(seen.setdefault(distance, len(seen)))
    index = np.reshape(index, (side**2, side**2))
    renamed[name.replace("biases", "bias_idxs")] = index
  return renamed


@pytest.mark.parametrize("variant", ["M2", "M5"])
def test_official_layout(variant):
  timm = pytest.importorskip("timm")
  name = f"efficientvit_{variant.lower()}"
  tensors = tensors_of(timm.create_model(name, num_classes=CLASSES))
  model = efficientvit.Model(variant, CLASSES)
  wanted, _ = load(tensors, model)
  theirs = official_names(tensors)
  variables, layout = load(theirs, model)
  assert layout == "official"
  jax.tree.map(np.testing.assert_array_equal, variables, wanted)
  exported = engine.export_weights(
    variables, name="efficientvit", model=model, layout="official"
  )
  assert set(exported) == set(theirs)
  for k, x in exported.items():
    np.testing.assert_array_equal(x, theirs[k], err_msg=k)

  second = {
    k.replace("head.", "head_dist."): x + 1
    for k, x in theirs.items()
    if k.startswith("head.")
  }
  model = model.clone(distillation=True)
  variables, _ = load(theirs | second, model, layout="official")
  params = variables["params"]
  np.testing.assert_array_equal(
    params["head_dist"]["linear"]["kernel"],
    params["head"]["linear"]["kernel"] + 1,
  )
