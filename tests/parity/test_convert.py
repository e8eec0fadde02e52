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
  return predict.predict(predict.load_run(run), files, batch_size=1).scores[0]


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
  for key, value in engine.read(file).items():
    np.testing.assert_array_equal(state[key].numpy(), value, err_msg=key)
  assert "arrays of" in capsys.readouterr().out


def test_transformers_with_its_labels(photo, tmp_path):
  transformers = pytest.importorskip("transformers")
  import torch

  settings = transformers.ViTConfig(
    hidden_size=192,
    num_hidden_layers=12,
    num_attention_heads=3,
    intermediate_size=768,
    num_labels=len(NAMES),
    id2label=dict(enumerate(NAMES)),
  )
  model = randomise(transformers.ViTForImageClassification(settings))
  model.save_pretrained(tmp_path / "theirs")
  file, run = tmp_path / "theirs" / "model.safetensors", tmp_path / "run"
  assert not convert(file, run, "--model", "vit", "--variant", "Ti/16")
  assert json.loads((run / "run.json").read_text())["label_names"] == NAMES
  pixels = Image.open(photo).resize((224, 224), Image.Resampling.BILINEAR)
  pixels = np.asarray(pixels, np.float32) / 127.5 - 1
  with torch.no_grad():
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    expected = model(image).logits.softmax(-1)[0].numpy()
  np.testing.assert_allclose(scores(run, photo), expected, atol=TOLERANCE)


def test_bfloat16_comes_back_bit_equal(tmp_path):
  timm = pytest.importorskip("timm")
  import torch
  from safetensors.torch import save_file

  model = randomise(timm.create_model("vit_tiny_patch16_224", num_classes=3))
  low = {k: x.to(torch.bfloat16) for k, x in model.state_dict().items()}
  file, run = tmp_path / "low.safetensors", tmp_path / "run"
  save_file(low, file)
  assert not convert(file, run, "--model", "vit", "--variant", "Ti/16")
  back = tmp_path / "back.safetensors"
  assert not convert(run, back, "--layout", "timm", "--dtype", "bfloat16")
  again = engine.read(back)
  for key, value in engine.read(file).items():
    assert again[key].dtype == value.dtype
    np.testing.assert_array_equal(
      again[key].view(np.uint16), value.view(np.uint16)
    )
