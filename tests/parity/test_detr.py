"""DETR against transformers', with every parameter and constant random."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vision_like import trees
from big_vision_like.commands import convert
from big_vision_like.models import detr
from big_vision_like.models.layers.resize import nearest
from big_vision_like.weights import engine

pytestmark = pytest.mark.parity
CLASSES, QUERIES = 11, 7
CANVAS = (128, 160)
# In the canvas; the first two have odd maps.
SIZES = ((97, 131), (128, 77), (61, 160))
BACKBONES = {"R50": "resnet50", "R101": "resnet101"}


def padded(sizes=SIZES, canvas=CANVAS):
  """Images [B,H,W,3] in the upper left of a canvas, and where they are."""
  rng = np.random.default_rng(1)
  image = np.zeros((len(sizes), *canvas, 3), np.float32)
  mask = np.zeros(image.shape[:3], bool)
  for i, (h, w) in enumerate(sizes):
    image[i, :h, :w] = rng.normal(size=(h, w, 3))
    mask[i, :h, :w] = True
  return image, mask


def to_torch(image):
  import torch

  return torch.from_numpy(np.ascontiguousarray(image.transpose(0, 3, 1, 2)))


def of_transformers(variant, **settings):
  """The same model, random, in evaluation."""
  transformers = pytest.importorskip("transformers")
  pytest.importorskip("timm")
  row = detr.VARIANTS[variant]
  config = transformers.DetrConfig(
    backbone=BACKBONES[row["backbone"]],
    num_labels=CLASSES,
    num_queries=QUERIES,
    dilation=row.get("dilation", False),
    auxiliary_loss=False,  # It would change the layers' inputs.
    attn_implementation="eager",
    **settings,
  )
  kind = "Segmentation" if row.get("masks") else "ObjectDetection"
  module = getattr(transformers, f"DetrFor{kind}")(config)
  return randomise(module, *padded())


def randomise(module, image, mask):
  """Random parameters; the constants of a norm are near those of its inputs."""
  import torch

  rng = torch.Generator().manual_seed(0)

  def normal(p, mean, deviation):
    p.copy_(mean + deviation * torch.randn(p.shape, generator=rng))

  norms = [
    (k, m) for k, m in module.named_modules() if hasattr(m, "running_var")
  ]
  with torch.no_grad():
    for name, p in module.named_parameters():
      if p.ndim > 1:
        scale = 1.0 if "quer" in name and "embed" in name else None
        normal(p, 0.0, scale or 1.3 * p[0].numel() ** -0.5)
      else:
        normal(p, float("norm" in name and name.endswith("weight")), 0.2)

      if name.endswith(("q_proj.weight", "k_proj.weight")):
        p.mul_(2.0)  # Else tokens, and queries, soon are all alike.
      if name.endswith("self_attn.v_proj.weight"):
        p.mul_(0.2)
      if "bbox_attention" in name:  # Queries look at places of their own.
        p.mul_(3.0)
      if name.endswith("conv1.conv.weight"):  # And weights are small numbers.
        p[:, 256:].mul_(100.0)

    def calibrate(m, inputs):
      values = inputs[0].transpose(0, 1).flatten(1)
      m.running_mean.copy_(values.mean(1))
      normal(m.running_mean, m.running_mean, 0.1)
      m.running_var.copy_(
        values.var(1) * (0.7 + 0.6 * torch.rand(1, generator=rng))
      )

    hooks = []
    for name, m in norms:
      # Full branches on random kernels are chaotic over many layers.
      normal(m.weight, 1.0, 0.2)
      m.weight.mul_(0.2 if name.endswith("bn3") else 1.0)
      normal(m.bias, 0.0, 0.2)
      hooks.append(m.register_forward_pre_hook(calibrate))
    module.eval()(to_torch(image), torch.from_numpy(mask))
    for hook in hooks:
      hook.remove()
  return module


def tensors(module):
  return {k: x.detach().numpy().copy() for k, x in module.state_dict().items()}


def make(variant, **settings):
  return detr.Model(
    variant=variant, num_classes=CLASSES, num_queries=QUERIES, **settings
  )


def load(arrays, model, **kw):
  image, mask = map(jnp.asarray, padded())
  shapes = jax.eval_shape(
    lambda: model.init(jax.random.key(0), image, mask, train=False)
  )
  return engine.import_weights(
    arrays, name="detr", model=model, shapes=shapes, **kw
  )


@functools.partial(jax.jit, static_argnums=0)
def apply(model, variables, image, mask):
  return model.apply(variables, image, mask, train=False)


def run_torch(module, image, mask=None):
  """Outputs of all layers, by their modules for the last one."""
  import torch

  detector = getattr(module, "detr", module)
  layers, hooks = [], []
  for layer in detector.model.decoder.layers:
    hooks.append(
      layer.register_forward_hook(
        lambda m, x, y: layers.append(y[0] if isinstance(y, tuple) else y)
      )
    )
  mask = None if mask is None else torch.from_numpy(mask)
  with torch.no_grad():
    out = module(image, mask)
    hidden = detector.model.decoder.layernorm(torch.stack(layers))
    logits = detector.class_labels_classifier(hidden)
    boxes = detector.bbox_predictor(hidden).sigmoid()
  for hook in hooks:
    hook.remove()
  np.testing.assert_allclose(logits[-1], out.logits, rtol=1e-4, atol=1e-5)
  found = {"logits": logits.numpy(), "boxes": boxes.numpy()}
  if hasattr(out, "pred_masks"):
    found["masks"] = out.pred_masks.numpy()
  return found


def error_of(key, got, want, like=None):
  """The mean, or the largest if no mask, relative to the spread over queries.

  A few pixels of masks are ill-conditioned, where a GroupNorm of two channels
  sees hardly any variance. The spread is that of `like`, or of what we want.
  """
  like = want if like is None else like
  spread = like.std(1 if key == "masks" else 2).mean()
  assert spread > 1e-3, f"{key} hardly depend on the query: {spread:.1e}"
  error = np.abs(got - want)
  return (error.mean() if key == "masks" else error.max()) / spread


@pytest.mark.parametrize(
  "variant",
  [
    "R50",
    pytest.param("R101", marks=pytest.mark.slow),
    "R50-DC5",
    "R50-panoptic",
  ],
)
def test_all_layers_on_a_padded_batch(variant):
  """As near to torch's float64 as torch's own float32 is, up to three times.

  With the published arithmetic on the batch, and with inert padding to each
  image alone.
  """
  module = of_transformers(variant)
  image, mask = padded()
  model = make(variant, mask_padding=False)
  variables, layout = load(tensors(module), model)
  assert layout == "hf_modules"
  double = copy.deepcopy(module).double()
  single = run_torch(module, to_torch(image), mask)
  want = run_torch(double, to_torch(image).double(), mask)
  got = apply(model, variables, jnp.asarray(image), jnp.asarray(mask))
  assert set(got) == set(want)
  limits = {k: 3 * error_of(k, single[k], want[k]) for k in want}
  for k in want:
    assert got[k].shape == want[k].shape
    assert limits[k] < 1e-3
    assert error_of(k, got[k], want[k]) < limits[k], k

  inert = apply(make(variant), variables, jnp.asarray(image), jnp.asarray(mask))
  moved = error_of("logits", inert["logits"], want["logits"])
  assert moved > 20 * limits["logits"]
  for i, (h, w) in enumerate(SIZES):
    alone = run_torch(double, to_torch(image[i : i + 1, :h, :w]).double())
    for k in ("logits", "boxes"):
      error = error_of(k, inert[k][:, i : i + 1], alone[k], want[k])
      assert error < limits[k], k
    if "masks" in alone:
      rows, columns = alone["masks"].shape[2:]
      seen = inert["masks"][i : i + 1, :, :rows, :columns]
      error = error_of("masks", seen, alone["masks"], want["masks"])
      assert error < limits["masks"]


def torch_gradients(module, weights):
  """Of the weighted sum of logits, boxes and masks, by their names."""
  import torch

  image, mask = padded()
  module.train()
  out = module(to_torch(image).double(), torch.from_numpy(mask))
  outputs = (out.logits, out.pred_boxes, out.pred_masks)
  loss = sum((x * torch.from_numpy(w)).sum() for x, w in zip(outputs, weights))
  loss.backward()
  return {k: p.grad.numpy() for k, p in module.named_parameters()}


def test_gradients_of_training():
  """Of logits, boxes and masks by everything, without dropout, in float64.

  In float32 torch's own are off by 2e-2 here: rounding turns some of the ReLUs.
  """
  depths = dict(encoder_layers=1, decoder_layers=2)
  module = of_transformers("R50-panoptic", dropout=0.0, **depths)
  model = make(
    "R50-panoptic",
    sizes=dict(encoder_depth=1, decoder_depth=2),
    mask_padding=False,
    dropout=0.0,
    attention_dropout=0.0,
  )
  variables, _ = load(tensors(module), model)
  rng = np.random.default_rng(2)
  rows = (len(SIZES), QUERIES)
  shapes = ((*rows, CLASSES + 1), (*rows, 4), (*rows, 32, 40))
  weights = [rng.normal(size=s) for s in shapes]
  double = model.clone(dtype="float64")

  def loss(params, stats, image, mask):
    variables = {"params": params, "batch_stats": stats}
    out = double.apply(variables, image, mask, train=True)
    last = (out["logits"][-1], out["boxes"][-1], out["masks"])
    return sum((x * w).sum() for x, w in zip(last, weights))

  with jax.enable_x64(True):
    image, mask = padded()
    doubled = jax.tree.map(lambda x: x.astype(np.float64), variables)
    arguments = (doubled["params"], doubled["batch_stats"])
    got = jax.jit(jax.grad(loss))(*arguments, image.astype(np.float64), mask)
    got = trees.flatten(jax.device_get(got))
  # The rules of the layout lead from their gradients to ours.
  grads = torch_gradients(module.double(), weights)
  rest = {k: x for k, x in tensors(module).items() if k not in grads}
  want = trees.flatten(
    engine.to_ours(grads | rest, name="detr", model=model, shapes=variables)[0][
      "params"
    ]
  )
  assert set(got) == set(want)
  for k, x in want.items():
    # Some are 0 in exact arithmetic, as of the keys' biases.
    limit = 1e-6 * np.linalg.norm(x) + 1e-9
    assert np.linalg.norm(got[k] - x) < limit, k


def same_variables(left, right):
  left, right = trees.flatten(left), trees.flatten(right)
  assert set(left) == set(right)
  for k in left:
    np.testing.assert_array_equal(left[k], right[k], err_msg=k)


@pytest.mark.parametrize("variant", ["R50", "R50-panoptic"])
def test_layouts_there_and_back(variant, tmp_path):
  """transformers' modules and files; it takes both of ours, strictly."""
  import torch

  depths = dict(encoder_layers=1, decoder_layers=2)
  module = of_transformers(variant, **depths)
  model = make(variant, sizes=dict(encoder_depth=1, decoder_depth=2))
  variables, _ = load(tensors(module), model)
  module.save_pretrained(tmp_path)
  file = engine.read(tmp_path / "model.safetensors")
  from_file, layout = load(file, model)
  assert layout == "hf"
  same_variables(from_file, variables)

  export = functools.partial(
    engine.export_weights, variables, name="detr", model=model
  )
  assert_same_arrays(export(layout="hf"), file)
  ours = {k: torch.tensor(x) for k, x in export(layout="hf_modules").items()}
  module.load_state_dict(ours, strict=True)
  official = export(layout="detr")
  again, layout = load(official, model)
  assert layout == "detr"
  same_variables(again, variables)


def test_what_convert_makes_of_a_file(tmp_path):
  """Classes are counted; images are prepared as for COCO."""
  depths = dict(encoder_layers=1, decoder_layers=2)
  arrays = tensors(of_transformers("R50-panoptic", **depths))
  published = engine.table("detr", "PUBLISHED")
  settings = published["facebook/detr-resnet-50-panoptic"]
  sizes = dict(encoder_depth=1, decoder_depth=2)
  config, variables, layout = convert.read_published(
    arrays,
    name="detr",
    settings=dict(settings, num_queries=QUERIES, sizes=sizes),
  )
  assert layout == "hf_modules"
  assert config.task.name == "detection"
  assert config.task.num_classes == CLASSES
  assert config.data.eval_ops == "decode|detr_resize(800, 1333)"
  model = make("R50-panoptic", sizes=sizes)
  same_variables(variables, load(arrays, model)[0])


def assert_same_arrays(left, right):
  assert set(left) == set(right)
  for k in left:
    np.testing.assert_array_equal(left[k], right[k], err_msg=k)


def test_the_official_layout_has_the_names_of_torchs_own_modules(tmp_path):
  """Which the authors' code is made of; a .pth file and its wrapper too."""
  import torch
  from torch import nn
  from torchvision.models import resnet
  from torchvision.ops import FrozenBatchNorm2d

  module = nn.Module()
  body = resnet.resnet50(norm_layer=FrozenBatchNorm2d)
  del body.fc
  module.backbone = nn.ModuleList([nn.Module()])
  module.backbone[0].body = body
  module.input_proj = nn.Conv2d(2048, 256, 1)
  module.query_embed = nn.Embedding(100, 256)
  module.transformer = nn.Module()
  encoder, decoder = (
    getattr(nn, f"Transformer{kind}Layer")(256, 8, 2048)
    for kind in ("Encoder", "Decoder")
  )
  module.transformer.encoder = nn.TransformerEncoder(
    encoder, 6, enable_nested_tensor=False
  )
  norm = nn.LayerNorm(256)
  module.transformer.decoder = nn.TransformerDecoder(decoder, 6, norm)
  module.class_embed = nn.Linear(256, 92)
  module.bbox_embed = nn.Module()
  module.bbox_embed.layers = nn.ModuleList(
    nn.Linear(256, n) for n in (256, 256, 4)
  )
  state = module.state_dict()
  assert len(state) == 458
  torch.save({"model": state, "epoch": 3}, tmp_path / "detr.pth")
  arrays = engine.read(tmp_path / "detr.pth")
  model = detr.Model(num_classes=91)
  assert engine.count_classes(arrays, "detr", model, "detr") == 91
  variables, layout = load(arrays, model)
  assert layout == "detr"
  out = engine.export_weights(
    variables, name="detr", model=model, layout="detr"
  )
  assert_same_arrays(out, {k: x.numpy() for k, x in state.items()})


def test_nearest_is_torchs():
  import torch

  rng = np.random.default_rng(0)
  for old, new in ((100, 4), (800, 25), (13, 25), (13, 26), (97, 4), (7, 7)):
    x = rng.normal(size=(1, old, 3, 2)).astype(np.float32)
    want = torch.nn.functional.interpolate(to_torch(x), (new, 3))
    np.testing.assert_array_equal(
      nearest(jnp.asarray(x), (new, 3)), want.numpy().transpose(0, 2, 3, 1)
    )
