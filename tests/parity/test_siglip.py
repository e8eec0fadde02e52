"""SigLIP and SigLIP 2: both towers against transformers, open_clip and timm.

Every parameter is random. Weights go in and come out again; big_vision's files
are read by open_clip's own reader of them.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vision_like import __main__ as command_line
from big_vision_like import trees
from big_vision_like.commands import convert
from big_vision_like.models import two_towers
from big_vision_like.weights import engine
from big_vision_like.weights import two_towers as weights

pytestmark = pytest.mark.parity
WIDTH, DEPTH, MLP, HEADS, WORDS, T, E = 48, 3, 96, 3, 61, 13, 48
SIDE, PATCH = 28, 4
SIZES = dict(width=WIDTH, depth=DEPTH, mlp=MLP, heads=HEADS)
TEXT = dict(variant="B", sizes=SIZES, vocab_size=WORDS, length=T)
FIXED = dict(
  image=dict(name="vit", variant=f"B/{PATCH}", sizes=SIZES, pool="map"),
  text=TEXT,
  features=(None, E),
  bias=-10.0,
)
NAFLEX = FIXED | dict(
  image=weights.PUBLISHED["google/siglip2-base-patch16-naflex"]["image"]
  | dict(variant=f"B/{PATCH}", sizes=SIZES, max_grid=7)
)
# float32, of numbers of size 1 after a few layers; measured below 3e-6.
CLOSE = dict(rtol=1e-4, atol=1e-5)


def randomise(module):
  """All parameters random; of a size that keeps activations of order 1."""
  import torch

  torch.manual_seed(0)
  with torch.no_grad():
    for name, p in module.named_parameters():
      fan_in = p.shape[-1] if p.ndim == 2 else 30
      p.normal_(0.0, fan_in**-0.5)
      if p.ndim == 1 and ("norm" in name or "ln_" in name) and "weight" in name:
        p.add_(1.0)
  return module.eval()


def state(module):
  return {k: x.detach().numpy() for k, x in module.state_dict().items()}


def tokens(n):
  rng = np.random.default_rng(0)
  return rng.integers(0, WORDS, (n, T)).astype(np.int32)


def images(n):
  rng = np.random.default_rng(1)
  return rng.normal(size=(n, SIDE, SIDE, 3)).astype(np.float32)


def transformers_model(kind):
  import transformers

  size = dict(
    hidden_size=WIDTH,
    intermediate_size=MLP,
    num_hidden_layers=DEPTH,
    num_attention_heads=HEADS,
  )
  config, model = {
    "fixed": (transformers.SiglipConfig, transformers.SiglipModel),
    "naflex": (transformers.Siglip2Config, transformers.Siglip2Model),
  }[kind]
  patches = dict(num_patches=49) if kind == "naflex" else dict(image_size=SIDE)
  text = dict(vocab_size=WORDS, max_position_embeddings=T, **size)
  vision = dict(patch_size=PATCH, **patches, **size)
  return randomise(model(config(text_config=text, vision_config=vision)))


def load(settings, tensors, layout, inputs):
  """Our outputs with their weights, after a way there and back."""
  model = two_towers.Model(**settings)
  shapes = jax.eval_shape(
    lambda: model.init(jax.random.key(0), train=False, **inputs)
  )
  how = dict(name="two_towers", model=model)
  variables, found = engine.import_weights(tensors, shapes=shapes, **how)
  assert found == layout
  back = engine.export_weights(variables, layout=layout, **how)
  assert set(back) == set(tensors)
  for name, array in tensors.items():
    np.testing.assert_array_equal(back[name], array, err_msg=name)
  outputs = jax.jit(lambda v, x: model.apply(v, train=False, **x))
  return outputs(variables, inputs), variables, model


def compare(out, theirs):
  np.testing.assert_allclose(out["zimg"], theirs["zimg"], **CLOSE)
  np.testing.assert_allclose(out["ztxt"], theirs["ztxt"], **CLOSE)
  logits = out["t"] * out["zimg"] @ out["ztxt"].T + out["b"]
  np.testing.assert_allclose(logits, theirs["logits"], **CLOSE)


def test_fixed_sizes_are_those_of_transformers():
  import torch

  theirs = transformers_model("fixed")
  with torch.no_grad():
    out = theirs(
      input_ids=torch.from_numpy(tokens(5)).long(),
      pixel_values=torch.from_numpy(images(5).transpose(0, 3, 1, 2).copy()),
    )
  inputs = dict(image=jnp.asarray(images(5)), text=jnp.asarray(tokens(5)))
  ours, _, _ = load(FIXED, state(theirs), "hf", inputs)
  compare(
    ours,
    dict(
      zimg=out.image_embeds.numpy(),
      ztxt=out.text_embeds.numpy(),
      logits=out.logits_per_image.numpy(),
    ),
  )


GRIDS = ((3, 5), (7, 7), (9, 2))


def test_naflex_is_that_of_transformers():
  """Their images are padded, ours share a row."""
  import torch

  theirs = transformers_model("naflex")
  rng = np.random.default_rng(2)
  cut = [rng.normal(size=(h * w, 3 * PATCH**2)) for h, w in GRIDS]
  most = max(map(len, cut))
  pixels = np.zeros((3, most, 3 * PATCH**2), np.float32)
  valid = np.zeros((3, most), np.int32)
  for i, patches in enumerate(cut):
    pixels[i, : len(patches)], valid[i, : len(patches)] = patches, 1
  with torch.no_grad():
    out = theirs(
      input_ids=torch.from_numpy(tokens(3)).long(),
      pixel_values=torch.from_numpy(pixels),
      pixel_attention_mask=torch.from_numpy(valid),
      spatial_shapes=torch.tensor(GRIDS),
    )
  ids = np.repeat([1, 2, 3], [h * w for h, w in GRIDS])
  row = dict(
    patches=np.concatenate(cut).astype(np.float32),
    segment_ids=ids.astype(np.int32),
    positions=np.concatenate([np.argwhere(np.ones(g)) for g in GRIDS]),
    grid_hw=np.array(GRIDS),
    example_mask=np.ones(3, bool),
    text=tokens(3).reshape(-1),
    text_segment_ids=np.repeat([1, 2, 3], T),
    text_positions=np.tile(np.arange(T), 3),
  )
  inputs = {
    k: jnp.asarray(x, jnp.int32 if x.dtype == np.int64 else None)[None]
    for k, x in row.items()
  }
  ours, _, _ = load(NAFLEX, state(theirs), "hf", inputs)
  compare(
    ours | {k: ours[k][0] for k in ("zimg", "ztxt")},
    dict(
      zimg=out.image_embeds.numpy(),
      ztxt=out.text_embeds.numpy(),
      logits=out.logits_per_image.numpy(),
    ),
  )


def open_clip_model():
  """timm's image tower and open_clip's text tower, put together as they are."""
  import open_clip.transformer as open_clip
  import timm
  import torch

  gelu = lambda: torch.nn.GELU(approximate="tanh")
  model = torch.nn.Module()
  model.visual = torch.nn.Module()
  model.visual.trunk = timm.models.VisionTransformer(
    img_size=SIDE,
    patch_size=PATCH,
    embed_dim=WIDTH,
    depth=DEPTH,
    num_heads=HEADS,
    mlp_ratio=MLP / WIDTH,
    class_token=False,
    global_pool="map",
    num_classes=0,
    act_layer="gelu_tanh",
  )
  model.text = open_clip.TextTransformer(
    context_length=T,
    vocab_size=WORDS,
    width=WIDTH,
    heads=HEADS,
    layers=DEPTH,
    mlp_ratio=MLP / WIDTH,
    output_dim=E,
    no_causal_mask=True,
    pool_type="last",
    proj_bias=True,
    act_layer=gelu,
    norm_layer=lambda width: open_clip.LayerNorm(width, eps=1e-6),
  )
  model.logit_scale = torch.nn.Parameter(torch.tensor(0.3))
  model.logit_bias = torch.nn.Parameter(torch.tensor(-2.0))
  return randomise(model)


def open_clip_outputs(model):
  import torch

  with torch.no_grad():
    pixels = torch.from_numpy(images(5).transpose(0, 3, 1, 2).copy())
    z = (
      model.visual.trunk(pixels),
      model.text(torch.from_numpy(tokens(5)).long()),
    )
    zimg, ztxt = (torch.nn.functional.normalize(x, dim=-1) for x in z)
    logits = model.logit_scale.exp() * zimg @ ztxt.T + model.logit_bias
  return {
    k: x.numpy() for k, x in dict(zimg=zimg, ztxt=ztxt, logits=logits).items()
  }


def test_open_clip_s_files_and_big_vision_s_through_open_clip_s_reader(
  tmp_path,
):
  from open_clip.convert import load_big_vision_weights

  theirs = open_clip_model()
  inputs = dict(image=jnp.asarray(images(5)), text=jnp.asarray(tokens(5)))
  ours, variables, model = load(FIXED, state(theirs), "open_clip", inputs)
  expected = open_clip_outputs(theirs)
  compare(ours, expected)
  how = dict(name="two_towers", model=model)
  for layout in ("big_vision", "big_vision_stacked"):
    arrays = engine.export_weights(variables, layout=layout, **how)
    file = tmp_path / f"{layout}.npz"
    # As their trainers wrap what they save.
    engine.write(file, {f"params/{k}": x for k, x in arrays.items()})
    # Into another model of other numbers, so that nothing is left over.
    fresh = randomise(open_clip_model())
    for p in fresh.parameters():
      p.data.mul_(0.5)
    load_big_vision_weights(fresh, str(file))
    for name, array in state(fresh).items():
      np.testing.assert_allclose(
        array, state(theirs)[name], atol=1e-7, err_msg=f"{layout} {name}"
      )
    again, found = engine.import_weights(
      engine.read(file), shapes=variables, **how
    )
    assert found == layout
    jax.tree.map(np.testing.assert_array_equal, again, variables)


def test_naflex_in_big_vision_s_names():
  """Both ways, and the shapes that transformers' conversion script expects."""
  theirs = transformers_model("naflex")
  model = two_towers.Model(**NAFLEX)
  how = dict(name="two_towers", model=model)
  inputs = convert.example_inputs(model, dict(size=SIDE))
  shapes = jax.eval_shape(
    lambda: model.init(jax.random.key(0), train=False, **inputs)
  )
  variables, _ = engine.import_weights(state(theirs), shapes=shapes, **how)
  for layout in ("big_vision", "big_vision_stacked"):
    arrays = engine.export_weights(variables, layout=layout, **how)
    kernel = arrays["img/embedding/kernel"]
    np.testing.assert_array_equal(
      kernel.T, state(theirs)["vision_model.embeddings.patch_embedding.weight"]
    )
    assert arrays["img/pos_embedding"].shape == (7, 7, WIDTH)
    again, found = engine.import_weights(arrays, shapes=shapes, **how)
    assert found == layout
    jax.tree.map(np.testing.assert_array_equal, again, variables)


# transformers 5.23, by its configs of these names.
COUNTS = {
  "google/siglip-base-patch16-224": 203_155_970,
  "google/siglip-so400m-patch14-384": 877_960_498,
  "google/siglip2-base-patch16-naflex": 375_234_050,
  "google/siglip2-giant-opt-patch16-256": 1_871_393_906,
}


@pytest.mark.parametrize("name", COUNTS)
def test_published_sizes(name):
  model = two_towers.Model(**weights.PUBLISHED[name])
  inputs = convert.example_inputs(model, weights.PREPARED[name])
  shapes = jax.eval_shape(
    lambda: model.init(jax.random.key(0), train=False, **inputs)
  )
  assert trees.count(shapes["params"]) == COUNTS[name]


def test_other_towers_are_refused():
  sentence = r"one of vit, navit without a projection.*'resnet'"
  tower = dict(image=dict(name="resnet", variant="R50"))
  with pytest.raises(ValueError, match=sentence):
    weights.LAYOUTS["hf"](two_towers.Model(**FIXED | tower))
  with pytest.raises(ValueError, match=r"features=7"):
    weights.LAYOUTS["hf"](two_towers.Model(**FIXED | dict(features=7)))


def test_convert_makes_a_run_of_a_published_model(tmp_path, monkeypatch):
  """Of its name, with its preparation of images and texts; and back."""
  name = "google/siglip2-base-patch16-naflex"
  monkeypatch.setitem(weights.PUBLISHED, name, NAFLEX)
  tensors = state(transformers_model("naflex"))
  engine.write(tmp_path / "model.safetensors", tensors)
  words = [str(tmp_path / "model.safetensors"), str(tmp_path / "run")]
  words += ["--model", "two_towers", "--variant", name]
  assert command_line.main(["convert", *words, "--tokenizer", "t.model"]) == 0
  stored = json.loads((tmp_path / "run" / "run.json").read_text())["config"]
  assert stored["task"]["loss_name"] == "sigmoid"
  assert stored["data"]["pack"] == dict(
    length=16_384,
    patch=4,
    max_images=16,
    interpolation="bilinear",
    eval_tokens=4096,
  )
  path = str(pathlib.Path("t.model").absolute())
  expected = dict(name="sentencepiece", path=path, length=64, row=1024)
  assert stored["data"]["text"] == expected | dict(pad=0, clean="lower")
  # A run without a tokenizer can be written back.
  words[1] = str(tmp_path / "again")
  command_line.main(["convert", *words])
  back = str(tmp_path / "back.safetensors")
  command_line.main(["convert", words[1], back, "--layout", "hf"])
  for key, array in engine.read(back).items():
    np.testing.assert_array_equal(array, tensors[key])
