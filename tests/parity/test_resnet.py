"""ResNet against torchvision's and timm's, with every parameter randomised."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vision_like import trees
from big_vision_like.models import resnet
from big_vision_like.weights import engine

pytestmark = pytest.mark.parity
CLASSES = 11
# Every level has odd sides here: 31 x 49, 16 x 25, 8 x 13, 4 x 7, 2 x 4.
ODD = (61, 97)


def images(height=ODD[0], width=ODD[1], count=3):
  rng = np.random.default_rng(1)
  return rng.normal(size=(count, height, width, 3)).astype(np.float32)


def to_torch(image):
  import torch

  return torch.from_numpy(np.ascontiguousarray(image.transpose(0, 3, 1, 2)))


def to_numpy(tensor):
  return tensor.detach().numpy().transpose(0, 2, 3, 1)


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
      if name.endswith("bn3.weight"):
        # Full branches on random kernels are chaotic: over 100 layers they
        # blow float32's rounding up to 3e-3 in torch's own logits.
        p.mul_(0.2)
    for m in norms:
      m.momentum = 1.0
    module.train()(to_torch(images(64, 64, 8)))
    for m in norms:
      m.momentum = 0.1
      # The imported counter is dropped, and exported as 0.
      m.num_batches_tracked.zero_()
  return module.eval()


def of_torchvision(variant, **kw):
  from torchvision.models import resnet as theirs

  depths = resnet.VARIANTS[variant]["stages"]
  return theirs.ResNet(
    theirs.Bottleneck, list(depths), num_classes=CLASSES, **kw
  )


def tensors(module):
  return {k: p.detach().numpy().copy() for k, p in module.state_dict().items()}


def load(arrays, model, layout=None):
  shapes = jax.eval_shape(
    lambda: model.init(
      jax.random.key(0), jnp.zeros((1, 64, 64, 3)), train=False
    )
  )
  variables, found = engine.import_weights(
    arrays, name="resnet", model=model, shapes=shapes, layout=layout
  )
  return variables, found


@functools.partial(jax.jit, static_argnums=0)
def apply(model, variables, image):
  return model.apply(variables, image, train=False)


def stages_of(module, x):
  maxpool = module.maxpool
  act = getattr(module, "relu", None) or module.act1
  x = maxpool(act(module.bn1(module.conv1(x))))
  found = []
  for layer in (module.layer1, module.layer2, module.layer3, module.layer4):
    x = layer(x)
    found.append(to_numpy(x))
  return found


def error_of(got, want):
  """The largest, relative to the spread over images."""
  spread = np.asarray(want).std(0).mean()
  assert spread > 0.01, f"hardly depends on the image: {spread:.1e}"
  return np.abs(got - want).max() / spread


def run_torch(module, image):
  """C2 to C5 and the logits."""
  import torch

  with torch.no_grad():
    return [*stages_of(module, image), module(image).numpy()]


def compare(model, variables, module):
  """As near to torch's float64 as torch's own float32 is.

  That is off by 1e-5 to 1e-4 in the worst pixel; the order of summation may
  cost us up to three times as much.
  """
  image = images()
  single = run_torch(module, to_torch(image))
  double = run_torch(copy.deepcopy(module).double(), to_torch(image).double())
  out = apply(model, variables, jnp.asarray(image))
  ours = [*out["stages"], out["logits"]]
  for got, torchs, want in zip(ours, single, double, strict=True):
    assert got.shape == want.shape
    limit = 3 * error_of(torchs, want)
    assert limit < 5e-4
    assert error_of(got, want) < limit
  np.testing.assert_allclose(
    out["pooled"], double[3].mean((1, 2)), rtol=1e-4, atol=1e-4
  )
  return double[-1]


def assert_equal(left, right):
  assert set(left) == set(right)
  for k in left:
    np.testing.assert_array_equal(left[k], right[k], err_msg=k)


@pytest.mark.parametrize("variant", ["R50", "R101"])
def test_forward_and_layouts(variant):
  """All maps and logits; export is what was imported, and loads in timm."""
  import torch

  timm = pytest.importorskip("timm")
  theirs = randomise(of_torchvision(variant))
  model = resnet.Model(variant=variant, num_classes=CLASSES)
  variables, layout = load(tensors(theirs), model)
  assert layout == "torchvision"
  logits = compare(model, variables, theirs)

  out = engine.export_weights(
    variables, name="resnet", model=model, layout="timm"
  )
  assert_equal(out, tensors(theirs))
  other = timm.create_model(f"resnet{variant[1:]}", num_classes=CLASSES)
  other.load_state_dict({k: torch.tensor(v) for k, v in out.items()})
  with torch.no_grad():
    np.testing.assert_allclose(
      other.eval()(to_torch(images())).numpy(), logits, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("variant", ["R50", "R101"])
def test_frozen_and_dilated(variant):
  """The bodies of DETR, whose norms are buffers, from either kind of file."""
  import torch
  from torchvision.ops import FrozenBatchNorm2d

  kw = dict(replace_stride_with_dilation=[False, False, True])
  plain = randomise(of_torchvision(variant, **kw))
  frozen = of_torchvision(variant, norm_layer=FrozenBatchNorm2d, **kw).eval()
  frozen.load_state_dict(plain.state_dict())  # It drops the counters.
  model = resnet.Model(
    variant=variant, num_classes=CLASSES, frozen=True, dilation=True
  )
  variables, layout = load(tensors(frozen), model)
  assert layout == "frozen"
  assert not any("_bn" in k for k in trees.flatten(variables["params"]))
  compare(model, variables, frozen)
  again, layout = load(tensors(plain), model)
  assert layout == "torchvision"
  assert_equal(trees.flatten(again), trees.flatten(variables))
  out = engine.export_weights(
    variables, name="resnet", model=model, layout="frozen"
  )
  frozen.load_state_dict({k: torch.tensor(v) for k, v in out.items()})
  assert_equal(out, tensors(frozen))


def test_training(monkeypatch):
  """Logits, statistics and all gradients, of one block of each kind."""
  import torch

  monkeypatch.setitem(resnet.VARIANTS, "R20", dict(stages=(1, 2, 1, 2)))
  theirs = randomise(of_torchvision("R20")).train()
  model = resnet.Model(variant="R20", num_classes=CLASSES)
  variables, _ = load(tensors(theirs), model)
  image = images(63, 95, 5)
  cotangent = np.random.default_rng(2).normal(size=(5, CLASSES))
  cotangent = cotangent.astype(np.float32)
  double = copy.deepcopy(theirs).double()
  double(to_torch(image).double()).backward(
    torch.from_numpy(cotangent).double()
  )
  want = theirs(to_torch(image))
  want.backward(torch.from_numpy(cotangent))

  @jax.jit
  def run(params, stats):
    def loss(params):
      out, state = model.apply(
        {"params": params, "batch_stats": stats},
        jnp.asarray(image),
        train=True,
        mutable="batch_stats",
      )
      return (out["logits"] * cotangent).sum(), (out["logits"], state)

    return jax.grad(loss, has_aux=True)(params)

  grads, (logits, state) = run(variables["params"], variables["batch_stats"])
  assert error_of(logits, want.detach().numpy()) < 1e-4
  after, _ = load(tensors(theirs), model)
  for path, stat in trees.flatten(after["batch_stats"]).items():
    got = trees.flatten(state["batch_stats"])[path]
    np.testing.assert_allclose(got, stat, rtol=1e-4, atol=1e-5, err_msg=path)
    before = trees.flatten(variables["batch_stats"])[path]
    assert np.abs(before - stat).max() > 1e-3

  def gradients(module):
    named = {k: p.grad.numpy() for k, p in module.named_parameters()}
    filler = {k: v for k, v in tensors(theirs).items() if k not in named}
    return trees.flatten(load(named | filler, model)[0]["params"])

  wanted = gradients(double)

  def worst(grads):
    assert set(grads) == set(wanted)
    errors = {
      k: np.linalg.norm(grads[k] - x) / np.linalg.norm(x)
      for k, x in wanted.items()
    }
    return max(errors.values())

  # Float32 against float64. Torch's own float32 is off by 8e-4 here.
  assert worst(trees.flatten(grads)) < 3e-5
