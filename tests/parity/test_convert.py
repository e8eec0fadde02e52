"""The command `convert`: files of real libraries in, the same answers out."""

import json

import numpy as np
import pytest
from PIL import Image

from big_vision_like import __main__ as command_line
from big_vision_like.commands import predict
from big_vision_like.weights import engine

pytestmark = pytest.mark.parity
# Of logits whose deviation is about 1: float32, and pixels that are resized
# in another order of operations (half a level of 255).
TOLERANCE = 0.03
NAMES = ["wug", "zorp", "blick", "dax", "fep"]


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
  skimage = pytest.importorskip("skimage")
  path = tmp_path_factory.mktemp("photos") / "astronaut.png"
  Image.fromarray(skimage.data.astronaut()[:300, :411]).save(path)
  return path


def randomise(module):
  import torch

  torch.manual_seed(0)
  for name, p in module.named_parameters():
    scale = 0.1 if p.ndim < 2 else p[0].numel() ** -0.5
    p.data = scale * torch.randn_like(p) + (p.ndim < 2 and "weight" in name)
  for name, x in module.named_buffers():
    if name.endswith("running_var"):
      x.data = 0.5 + torch.rand_like(x)
  return module.eval()


def convert(*words):
  return command_line.main(["convert", *map(str, words)])


def scores(run, photo):
  files, _ = predict.find_images([str(photo)])
  return predict.predict(predict.load_run(run), files, batch_size=1).scores[""][
    0
  ]


TIMM = {
  "vit": ("vit_tiny_patch16_224", "Ti/16"),
  "efficientvit": ("efficientvit_m0", "M0"),
  "mobilevit": ("mobilevit_xxs", "XXS"),
  "mobilevit_v2": ("mobilevitv2_050", "0.5"),
  "flexivit": ("flexivit_small", "S/16"),
  "resnet": ("resnet50", "R50"),
}


@pytest.mark.parametrize("name", TIMM)
def test_timm_there_and_back(name, photo, tmp_path, capsys):
  timm = pytest.importorskip("timm")
  import torch
  from safetensors.torch import save_file
  from timm.data import create_transform, resolve_model_data_config

  theirs, variant = TIMM[name]
  model = randomise(timm.create_model(theirs, num_classes=len(NAMES)))
  file, run = tmp_path / "theirs.safetensors", tmp_path / "run"
  save_file(model.state_dict(), file)
  (tmp_path / "labels.txt").write_text("\n".join(NAMES))
  words = ("--model", name, "--variant", variant)
  assert not convert(
    file, run, *words, "--labels", tmp_path / "labels.txt", "--layout", "timm"
  )
  assert json.loads((run / "run.json").read_text())["label_names"] == NAMES
  transform = create_transform(**resolve_model_data_config(model))
  with torch.no_grad():
    image = transform(Image.open(photo).convert("RGB"))[None]
    expected = model(image).softmax(-1)[0].numpy()
  np.testing.assert_allclose(scores(run, photo), expected, atol=TOLERANCE)

  back = tmp_path / "back.pth"
  assert not convert(run, back, "--layout", "timm")
  state = torch.load(back, weights_only=True)
  model.load_state_dict(state, strict=True)
  assert_same_arrays(
    {k: x.numpy() for k, x in state.items()}, engine.read(file)
  )
  assert "arrays of" in capsys.readouterr().out


def of_transformers(name):
  """A small model with labels, and our variant."""
  transformers = pytest.importorskip("transformers")
  labels = dict(num_labels=len(NAMES), id2label=dict(enumerate(NAMES)))
  if name == "vit":
    settings = transformers.ViTConfig(
      hidden_size=192,
      num_hidden_layers=12,
      num_attention_heads=3,
      intermediate_size=768,
      **labels,
    )
    return transformers.ViTForImageClassification(settings), "Ti/16"
  if name == "mobilevit_v2":
    settings = transformers.MobileViTV2Config(width_multiplier=0.5, **labels)
    return transformers.MobileViTV2ForImageClassification(settings), "0.5"
  settings = transformers.MobileViTConfig(
    hidden_sizes=[64, 80, 96],
    neck_hidden_sizes=[16, 16, 24, 48, 64, 80, 320],
    expand_ratio=2.0,
    **labels,
  )
  return transformers.MobileViTForImageClassification(settings), "XXS"


def prepared(name, photo):
  """As their processors do, for these models."""
  image = Image.open(photo)
  if name == "vit":
    image = image.resize((224, 224), Image.Resampling.BILINEAR)
    return np.asarray(image, np.float32) / 127.5 - 1
  method = "BILINEAR" if name == "mobilevit" else "BICUBIC"
  width = int(288 * image.width / image.height)  # Of a landscape.
  image = image.resize((width, 288), Image.Resampling[method])
  left = (width - 256) // 2
  image = np.asarray(image.crop((left, 16, left + 256, 272)), np.float32) / 255
  return image[..., ::-1] if name == "mobilevit" else image


@pytest.mark.parametrize("name", ["vit", "mobilevit", "mobilevit_v2"])
def test_transformers_with_its_labels(name, photo, tmp_path):
  """A folder that save_pretrained wrote, there and back."""
  import torch

  model, variant = of_transformers(name)
  model = randomise(model)
  model.save_pretrained(tmp_path / "theirs")
  file, run = tmp_path / "theirs" / "model.safetensors", tmp_path / "run"
  assert not convert(file, run, "--model", name, "--variant", variant)
  assert json.loads((run / "run.json").read_text())["label_names"] == NAMES
  pixels = np.ascontiguousarray(prepared(name, photo))
  with torch.no_grad():
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    expected = model(image).logits.softmax(-1)[0].numpy()
  np.testing.assert_allclose(scores(run, photo), expected, atol=TOLERANCE)

  back = tmp_path / "back.safetensors"
  assert not convert(run, back, "--layout", "hf")
  assert_same_arrays(engine.read(back), engine.read(file))


def assert_same_arrays(got, want):
  assert set(got) == set(want)
  for k, x in want.items():
    np.testing.assert_array_equal(got[k], x, err_msg=k)


# A small NaFlex.
SIZES = dict(width=48, depth=2, mlp=96, heads=3)


def naflex_words(side):
  words = ("--model", "navit", "--variant", "B/16", "--set", f"sizes={SIZES}")
  return (*words, f"max_grid={side}")


def cut(pixels):
  """Normalised patches [1,N,768]."""
  h, w = (n // 16 for n in pixels.shape[:2])
  patches = pixels.reshape(h, 16, w, 16, 3).swapaxes(1, 2)
  return patches.reshape(1, h * w, -1).astype(np.float32) / 127.5 - 1


def test_naflex_of_timm_there_and_back(tmp_path):
  """What a layout says of the model, and the scores of a packed image."""
  timm = pytest.importorskip("timm")
  import torch
  from safetensors.torch import save_file

  model = timm.create_model(
    "naflexvit_base_patch16_gap",
    num_classes=len(NAMES),
    embed_dim=SIZES["width"],
    depth=SIZES["depth"],
    num_heads=SIZES["heads"],
    mlp_ratio=SIZES["mlp"] / SIZES["width"],
    pos_embed_grid_size=(7, 7),
  )
  model = randomise(model)
  file, run = tmp_path / "theirs.safetensors", tmp_path / "run"
  save_file(model.state_dict(), file)
  assert not convert(file, run, *naflex_words(7))
  # Of 18 x 32 patches, which are the 576 that images are resized to.
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (18 * 16, 32 * 16, 3), dtype=np.uint8)
  Image.fromarray(pixels).save(tmp_path / "image.png")
  inputs = {
    "patches": torch.from_numpy(cut(pixels)),
    "patch_coord": torch.from_numpy(np.argwhere(np.ones((18, 32))))[None],
    "patch_valid": torch.ones(1, 576, dtype=torch.bool),
  }
  with torch.no_grad():
    expected = model(inputs).softmax(-1)[0].numpy()
  got = scores(run, tmp_path / "image.png")
  np.testing.assert_allclose(got, expected, atol=1e-5)

  back = tmp_path / "back.pth"
  assert not convert(run, back, "--layout", "timm_layer_scale")
  state = torch.load(back, weights_only=True)
  model.load_state_dict(state, strict=True)
  with torch.no_grad():  # LayerScale has gone into the projections.
    again = model(inputs).softmax(-1)[0].numpy()
  np.testing.assert_allclose(again, expected, atol=1e-5)


@pytest.mark.parametrize("whole", [False, True], ids=["tower", "two_towers"])
def test_siglip2_there_and_back(whole, photo, tmp_path):
  """Files of the vision tower, and of both towers, which lose the text's."""
  transformers = pytest.importorskip("transformers")
  import torch
  from transformers.models.siglip2 import image_processing_pil_siglip2

  vision = dict(
    hidden_size=SIZES["width"],
    intermediate_size=SIZES["mlp"],
    num_hidden_layers=SIZES["depth"],
    num_attention_heads=SIZES["heads"],
    num_patches=49,
  )
  if whole:
    text = dict(
      hidden_size=48,
      intermediate_size=96,
      num_hidden_layers=1,
      num_attention_heads=3,
      vocab_size=17,
      projection_size=48,
    )
    settings = transformers.Siglip2Config(
      text_config=text, vision_config=vision
    )
    model = transformers.Siglip2Model(settings)
  else:
    settings = transformers.Siglip2VisionConfig(**vision)
    model = transformers.Siglip2VisionModel(settings)
  model = randomise(model)
  model.save_pretrained(tmp_path / "theirs")
  file, run = tmp_path / "theirs" / "model.safetensors", tmp_path / "run"
  assert not convert(file, run, *naflex_words(7))
  back, stored = tmp_path / "back.safetensors", engine.read(file)
  assert not convert(run, back, "--layout", "hf_two_towers" if whole else "hf")
  assert any(k.startswith("text_model.") for k in stored) == whole
  if whole:
    stored = {k: x for k, x in stored.items() if k.startswith("vision_model.")}
  assert_same_arrays(engine.read(back), stored)

  # The photograph in the size of their processor.
  module = model.vision_model if whole else model
  image = Image.open(photo)
  h, w = image_processing_pil_siglip2.get_image_size_for_max_num_patches(
    image.height, image.width, patch_size=16, max_num_patches=256
  )
  pixels = np.asarray(image.resize((w, h), Image.Resampling.BILINEAR))
  shape = torch.tensor([[h // 16, w // 16]])
  with torch.no_grad():
    expected = module(
      pixel_values=torch.from_numpy(cut(pixels)),
      pixel_attention_mask=torch.ones(1, int(shape.prod()), dtype=torch.long),
      spatial_shapes=shape,
    ).pooler_output[0]
  files, _ = predict.find_images([str(photo)])
  result = predict.predict(predict.load_run(run), files, batch_size=1)
  np.testing.assert_allclose(result.features[0], expected, atol=TOLERANCE)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pth"])
def test_bfloat16_comes_back_bit_equal(suffix, tmp_path):
  timm = pytest.importorskip("timm")
  import torch
  from safetensors.torch import save_file

  model = timm.create_model("vit_tiny_patch16_224", num_classes=3, depth=2)
  model = randomise(model)
  low = {k: x.to(torch.bfloat16) for k, x in model.state_dict().items()}
  file, run = tmp_path / "low.safetensors", tmp_path / "run"
  save_file(low, file)
  words = (
    "--model",
    "vit",
    "--variant",
    "Ti/16",
    "--set",
    "sizes={'depth': 2}",
  )
  assert not convert(file, run, *words)
  back = tmp_path / f"back{suffix}"
  assert not convert(run, back, "--layout", "timm", "--dtype", "bfloat16")
  again = engine.read(back)
  for key, value in engine.read(file).items():
    assert again[key].dtype == value.dtype
    np.testing.assert_array_equal(
      again[key].view(np.uint16), value.view(np.uint16)
    )
  if suffix == ".pth":
    state = torch.load(back, weights_only=True)
    model.to(torch.bfloat16).load_state_dict(state, strict=True)
    for key, value in low.items():
      assert torch.equal(state[key], value), key
