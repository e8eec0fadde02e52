"""MobileViT v1 and v2 against timm's and transformers'.

Weights are drawn so that the logits depend on the image: with those that torch
starts from, signals die before the head, and any body agrees.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vision_like import trees
from big_vision_like.models import mobilevit, mobilevit_v2
from big_vision_like.models.layers.convolution import fuse
from big_vision_like.weights import engine

pytestmark = pytest.mark.parity
CLASSES = 11
# Every level has odd sides here: 31 x 49, 16 x 25, 8 x 13, 4 x 7.
ODD = (61, 97)
V1 = ("XXS", "XS", "S")
V2 = ("0.5", "0.75", "1.0", "1.25", "1.5", "1.75", "2.0")
MODELS = {"mobilevit": mobilevit, "mobilevit_v2": mobilevit_v2}
ALL = [("mobilevit", v) for v in V1] + [("mobilevit_v2", v) for v in V2]


def of_timm(name, variant):
  timm = pytest.importorskip("timm")
  if name == "mobilevit":
    theirs = f"mobilevit_{variant.lower()}"
  else:
    theirs = f"mobilevitv2_{round(float(variant) * 100):03d}"
  return timm.create_model(theirs, num_classes=CLASSES)


def of_transformers(name, variant):
  transformers = pytest.importorskip("transformers")
  if name == "mobilevit_v2":
    config = transformers.MobileViTV2Config(
      num_labels=CLASSES, width_multiplier=float(variant)
    )
    return transformers.MobileViTV2ForImageClassification(config)
  size = mobilevit.VARIANTS[variant]
  config = transformers.MobileViTConfig(
    num_labels=CLASSES,
    hidden_sizes=list(size["widths"]),
    neck_hidden_sizes=[*size["channels"], size["out"]],
    expand_ratio=float(size["expand"]),
  )
  return transformers.MobileViTForImageClassification(config)


def images(height, width, count=2):
  rng = np.random.default_rng(1)
  return rng.uniform(size=(count, height, width, 3)).astype(np.float32)


def to_torch(image):
  import torch

  return torch.from_numpy(np.ascontiguousarray(image.transpose(0, 3, 1, 2)))


def randomise(module):
  """Random parameters; running statistics as random images leave them."""
  import torch

  torch.manual_seed(0)
  norms = [m for m in module.modules() if isinstance(m, torch.nn.BatchNorm2d)]
  with torch.no_grad():
    for name, p in module.named_parameters():
      if p.ndim > 1:
        p.normal_(0.0, 1.3 * p[0].numel() ** -0.5)
      else:
        p.normal_(1.0 if name.endswith("weight") else 0.0, 0.2)
    for m in norms:
      m.momentum = 1.0
    module.train()(to_torch(images(64, 64, 8)))
    for m in norms:
      m.momentum = 0.1
  return module.eval()


def tensors(module):
  return {k: p.detach().numpy().copy() for k, p in module.state_dict().items()}


def load(arrays, name, model, layout):
  shapes = jax.eval_shape(
    lambda: model.init(
      jax.random.key(0), jnp.zeros((1, 64, 64, 3)), train=False
    )
  )
  variables, _ = engine.import_weights(
    arrays, name=name, model=model, shapes=shapes, layout=layout
  )
  return variables


@functools.partial(jax.jit, static_argnums=0)
def apply(model, variables, image):
  return model.apply(variables, image, train=False)


def assert_close(got, want):
  """Relative to the spread over images: float32 through some 50 layers.

  Measured against float64, timm's logits and ours are both off by up to 7e-5
  of the spread (v2's, of which the Transformers normalise whole images).
  """
  spread = np.asarray(want).std(0).mean()
  error = np.abs(got - want).max() / spread
  assert spread > 0.01, f"the logits hardly depend on the image: {spread:.1e}"
  assert error < 3e-4, f"off by {error:.1e} of the spread"


@pytest.mark.parametrize(("name", "variant"), ALL)
def test_forward_and_layouts(name, variant):
  """Logits of both libraries; export loads there, and import undoes it."""
  import torch

  theirs = randomise(of_timm(name, variant))
  model = MODELS[name].Model(variant=variant, num_classes=CLASSES)
  variables = load(tensors(theirs), name, model, "timm")
  # transformers' v2 drops odd rows and columns, which is an error of its own.
  image = images(*ODD)
  with torch.no_grad():
    want = theirs(to_torch(image)).numpy()
  assert_close(apply(model, variables, image)["logits"], want)

  exported = engine.export_weights(
    variables, name=name, model=model, layout="hf"
  )
  hf = of_transformers(name, variant).eval()
  hf.load_state_dict({k: torch.tensor(x) for k, x in exported.items()})
  # Ours and timm's read RGB, transformers' v1 reads BGR.
  flip = slice(None, None, -1 if name == "mobilevit" else 1)
  even = images(64, 128)
  with torch.no_grad():
    want = theirs(to_torch(even)).numpy()
    assert_close(hf(to_torch(even[..., flip])).logits.numpy(), want)

  for layout in ("timm", "hf"):
    exported = engine.export_weights(
      variables, name=name, model=model, layout=layout
    )
    again = trees.flatten(load(exported, name, model, layout))
    assert all(
      np.array_equal(again[k], x) for k, x in trees.flatten(variables).items()
    )
    if layout == "timm":
      theirs.load_state_dict({k: torch.tensor(x) for k, x in exported.items()})


@pytest.mark.parametrize(
  ("name", "variant"), [("mobilevit", "XXS"), ("mobilevit_v2", "0.5")]
)
def test_training(name, variant):
  """Logits, gradients and running statistics in training, odd sizes."""
  import torch

  theirs = randomise(of_timm(name, variant)).train()
  model = MODELS[name].Model(variant=variant, num_classes=CLASSES)
  variables = load(tensors(theirs), name, model, "timm")
  image = images(*ODD, count=4)
  weights = np.random.default_rng(2).normal(size=(4, CLASSES))
  weights = weights.astype(np.float32)

  logits = theirs(to_torch(image))
  (logits * torch.from_numpy(weights)).sum().backward()
  after = tensors(theirs)
  grads = {k: p.grad.numpy() for k, p in theirs.named_parameters()}
  want = load({**after, **grads}, name, model, "timm")

  @jax.jit
  def ours(params, stats):
    def loss(params):
      out, new = model.apply(
        {"params": params, "batch_stats": stats},
        jnp.asarray(image),
        train=True,
        mutable=["batch_stats"],
      )
      return (out["logits"] * weights).sum(), (out["logits"], new)

    return jax.grad(loss, has_aux=True)(params)

  got, (our_logits, new) = ours(variables["params"], variables["batch_stats"])
  assert_close(our_logits, logits.detach().numpy())
  for k, x in trees.flatten(want["batch_stats"]).items():
    y = trees.flatten(new["batch_stats"])[k]
    np.testing.assert_allclose(y, x, rtol=1e-4, atol=1e-5, err_msg=k)
  errors = relative_errors(trees.flatten(got), trees.flatten(want["params"]))
  # Float32 sums over images and pixels in another order, through BatchNorms.
  # Measured against float64, torch's gradients are off by as much as ours.
  worst = max(errors, key=errors.get)
  assert errors[worst] < 1e-3, (worst, errors[worst])


def relative_errors(got, want):
  """Of each array, by norm.

  A shift that a BatchNorm takes off again has the gradient 0, up to rounding:
  what is smaller than a hundredth of the usual norm counts as that hundredth.
  """
  norms = {k: np.linalg.norm(x) for k, x in want.items()}
  floor = 1e-2 * np.median(list(norms.values()))
  return {
    k: np.linalg.norm(got[k] - x) / max(norms[k], floor)
    for k, x in want.items()
  }


@pytest.mark.parametrize(
  ("name", "variant"), [("mobilevit", "XXS"), ("mobilevit_v2", "0.5")]
)
def test_fused(name, variant):
  """Folding the BatchNorms, with statistics as training leaves them."""
  model = MODELS[name].Model(variant=variant, num_classes=CLASSES)
  theirs = randomise(of_timm(name, variant))
  variables = load(tensors(theirs), name, model, "timm")
  image = images(*ODD)
  fused = apply(model.clone(fused=True), fuse(variables), image)
  assert_close(fused["logits"], apply(model, variables, image)["logits"])
