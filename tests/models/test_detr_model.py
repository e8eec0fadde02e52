"""DETR's positions, sizes and outputs, and that padding changes nothing."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vision_like import sharding, trees
from big_vision_like.models import detr, resnet
from big_vision_like.models.layers import encoder_decoder, mask_head
from big_vision_like.models.layers.resize import nearest

pytestmark = pytest.mark.usefixtures("compile_quickly")

CLASSES, QUERIES = 5, 6
SMALL = dict(
  variant="local",
  num_classes=CLASSES,
  num_queries=QUERIES,
  masks=True,
  sizes=dict(width=16, heads=2, mlp=24, encoder_depth=1),
  backbone=dict(name="resnet", variant="tiny", frozen=True),
)


@pytest.fixture(scope="module", autouse=True)
def tiny():
  """A ResNet that compiles fast; its map is 1/8 of the image's sides."""
  with pytest.MonkeyPatch.context() as patch:
    row = dict(stages=(1, 1), width=8)
    patch.setitem(resnet.VARIANTS, "tiny", row)
    yield


def test_sines_are_the_references():
  """What its code gives for 2 x 3 cells, the second image one column less."""
  mask = jnp.ones((2, 2, 3), bool).at[1, :, 2].set(False)
  got = detr.sine_positions(mask, 8)
  first = (0, -1, 0.03141, 0.99951, 0.86603, -0.5, 0.02094, 0.99978)
  end = (0, 1, 0.06279, 0.99803)
  np.testing.assert_allclose(got[0, 0, 0], first, atol=1e-5)
  np.testing.assert_allclose(got[0, 1, 2], end + end, atol=1e-5)
  np.testing.assert_allclose(got[1, 1, 1], end + end, atol=1e-5)
  np.testing.assert_allclose(got[1, 1, 2], (0, 1, 0, 1, *end), atol=1e-5)
  other = detr.sine_positions(mask, 8, temperature=100.0, scale=math.pi)
  phase = np.pi / 3 / 10  # The first of three columns, the slower phase.
  np.testing.assert_allclose(
    other[0, 0, 0, 6:], (np.sin(phase), np.cos(phase)), atol=1e-5
  )
  with pytest.raises(ValueError, match="divisible by 4, not 6"):
    detr.sine_positions(mask, 6)


def test_learned_positions_are_columns_and_rows():
  module = detr.LearnedPositions(6)
  got, variables = module.init_with_output(jax.random.key(0), 2, 3)
  rows, columns = (variables["params"][k] for k in ("rows", "columns"))
  assert rows.shape == columns.shape == (50, 3)
  assert 0 <= rows.min() < rows.max() <= 1
  want = np.concatenate([columns[2], rows[1]])
  np.testing.assert_array_equal(got[0, 1, 2], want)
  with pytest.raises(ValueError, match=r"50 rows and columns, .* 2 x 51 cells"):
    module.init(jax.random.key(0), 2, 51)


def test_nearest_takes_the_pixel_at_the_corner():
  for old, new, want in (
    (100, 4, [0, 25, 50, 75]),
    (13, 25, np.arange(25) // 2),
    (13, 26, np.arange(26) // 2),
    (7, 3, [0, 2, 4]),
  ):
    x = jnp.arange(old, dtype=jnp.float32)
    np.testing.assert_array_equal(
      nearest(x[None, :, None, None], (new, 1))[0, :, 0, 0], want
    )
    mask = x[None, None, :, None] > old / 2
    got = nearest(mask, (1, new))[0, 0, :, 0]
    np.testing.assert_array_equal(got, np.array(want) > old / 2)


def shapes_of(model, height, width):
  image = jax.ShapeDtypeStruct((2, height, width, 3), jnp.float32)
  mask = jax.ShapeDtypeStruct((2, height, width), bool)
  init = functools.partial(model.init_with_output, train=False)
  out, variables = jax.eval_shape(init, jax.random.key(0), image, mask)
  return {k: x.shape for k, x in out.items()}, variables


@pytest.mark.parametrize("scan", [True, False])
def test_shapes(scan):
  model = detr.Model(**SMALL, scan=scan)
  shapes, variables = shapes_of(model, 64, 96)
  assert shapes == {
    "logits": (2, 2, QUERIES, CLASSES + 1),
    "boxes": (2, 2, QUERIES, 4),
    "masks": (2, QUERIES, 16, 24),
  }
  decoder = variables["params"]["decoder"]
  assert ("blocks" in decoder) == scan
  small = dict(encoder_depth=0, decoder_depth=3, heads=2, width=32, mlp=7)
  model = detr.Model(**SMALL | dict(masks=False, sizes=small, stage=0))
  shapes, variables = shapes_of(model, 64, 96)
  assert shapes["boxes"] == (3, 2, QUERIES, 4)
  assert "masks" not in shapes
  assert "encoder" not in variables["params"]
  assert variables["params"]["input_proj"]["kernel"].shape == (32, 32)


def test_dc5_has_a_map_twice_as_large():
  """Same parameters; a pixel of the map is 16 of the image."""
  found = {}
  for variant in ("R50-panoptic", "R50-DC5-panoptic"):
    model = detr.Model(variant=variant, num_classes=250)
    shapes, variables = shapes_of(model, 101, 67)
    assert shapes["masks"] == (2, 100, 26, 17)
    found[variant] = jax.tree.map(lambda x: x.shape, variables)
  one, other = found.values()
  assert one == other
  assert trees.count(variables["params"]) == 42_899_288
  assert trees.count(variables["batch_stats"]) == 106_240
  model = detr.Model(variant="R50-DC5", num_classes=91)
  lent = jax.eval_shape(
    lambda x: model.init_with_output(
      jax.random.key(0), x, train=False, capture_intermediates=True
    )[1]["intermediates"]["input_proj"]["__call__"][0],
    jax.ShapeDtypeStruct((1, 101, 67, 3), jnp.float32),
  )
  assert lent.shape == (1, 7, 5, 256)


def canvas(sizes, height, width):
  """The same images on any canvas; 0 x 0 is a filler row."""
  image = np.zeros((len(sizes), height, width, 3), np.float32)
  mask = np.zeros(image.shape[:3], bool)
  for i, (h, w) in enumerate(sizes):
    pixels = np.random.default_rng(i).normal(size=(h, w, 3))
    image[i, :h, :w], mask[i, :h, :w] = pixels, True
  return jnp.asarray(image), jnp.asarray(mask)


SIZES = ((29, 21), (16, 32), (0, 0))


@pytest.fixture(scope="module")
def trained():
  """A small model with random parameters and constants."""
  model = detr.Model(**SMALL, dropout=0.0, attention_dropout=0.0)
  _, shapes = shapes_of(model, 32, 32)
  rng = np.random.default_rng(0)

  def draw(path, s):
    deviation = 0.2
    if len(s.shape) > 1:
      deviation = 1.4 * np.prod(s.shape[:-1]) ** -0.5
    if path.startswith("params/query_embed"):
      deviation = 1.0
    x = deviation * rng.normal(size=s.shape) + path.endswith("scale")
    return (np.exp(x) if path.endswith("/var") else x).astype(np.float32)

  flat = trees.flatten(shapes)
  return model, trees.unflatten({k: draw(k, x) for k, x in flat.items()})


@functools.partial(jax.jit, static_argnums=0)
def outputs_of(model, variables, image, mask):
  return model.apply(variables, image, mask, train=False)


@functools.partial(jax.jit, static_argnums=0)
def gradients(model, variables, image, mask):
  """Of logits, boxes and the first image's masks."""

  def loss(params):
    out = model.apply({**variables, "params": params}, image, mask, train=True)
    seen = (out["boxes"] ** 2).sum() + jnp.tanh(out["logits"]).sum()
    return seen + jnp.tanh(out["masks"][0, :, :8, :6]).sum()

  return jax.grad(loss)(variables["params"])


def test_padding_changes_nothing(trained):
  """Boxes and masks are those of other canvases; filler rows stay finite."""
  model, variables = trained
  want = outputs_of(model, variables, *canvas(SIZES, 32, 32))
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(want))
  between = want["boxes"][:, 0] - want["boxes"][:, 1]
  assert float(jnp.abs(between).max()) > 1e-3
  out = outputs_of(model, variables, *canvas(SIZES, 64, 96))
  for k in ("logits", "boxes"):
    np.testing.assert_allclose(out[k], want[k], rtol=1e-5, atol=1e-5)
  for i, (h, w) in enumerate(SIZES[:2]):
    rows, columns = -(-h // 4), -(-w // 4)
    inside = [x["masks"][i, :, :rows, :columns] for x in (out, want)]
    np.testing.assert_allclose(*inside, rtol=1e-4, atol=1e-4)
    # Beside the image, its border.
    at = np.minimum(np.arange(16), rows - 1)[:, None]
    at = (at, np.minimum(np.arange(24), columns - 1))
    masks = np.asarray(out["masks"][i])
    np.testing.assert_array_equal(masks, masks[:, *at])


@pytest.mark.slow
def test_padding_changes_no_gradient(trained):
  """Those with a filler row are finite, and the same on any canvas."""
  want = gradients(*trained, *canvas(SIZES, 32, 32))
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(want))
  got = gradients(*trained, *canvas(SIZES, 64, 96))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
    size = float(jnp.linalg.norm(b))
    assert float(jnp.linalg.norm(a - b)) < 1e-4 * size + 1e-5
  # The published arithmetic sees what biases leave in the padding.
  model, variables = trained
  published = model.clone(mask_padding=False)
  out = outputs_of(published, variables, *canvas(SIZES, 64, 96))
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(out))
  want = outputs_of(model, variables, *canvas(SIZES, 64, 96))
  change = out["boxes"] - want["boxes"]
  assert float(jnp.abs(change[:, :2]).max()) > 1e-4


def test_a_chunk_of_queries_at_a_time_gives_the_same_masks(trained):
  model, variables = trained
  batch = canvas(SIZES, 32, 32)
  want = outputs_of(model, variables, *batch)["masks"]
  got = outputs_of(model.clone(mask_chunk=2), variables, *batch)["masks"]
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
  with pytest.raises(ValueError, match="mask_chunk = 4 is no divisor of the 6"):
    shapes_of(model.clone(mask_chunk=4), 32, 32)


def test_group_norm_is_flaxs_over_what_is_seen():
  x = jax.random.normal(jax.random.key(0), (1, 2, 5, 7, 16)) + 3.0
  scale, bias = jnp.linspace(0.5, 2, 16), jnp.linspace(-1, 1, 16)
  mask = jnp.zeros((1, 5, 7), bool).at[:, :3, :4].set(True)

  def flaxs(x, groups):
    params = {"scale": scale[: x.shape[-1]], "bias": bias[: x.shape[-1]]}
    return nn.GroupNorm(groups, epsilon=1e-5).apply({"params": params}, x)

  got = mask_head.group_norm(x, scale, bias, mask)[0, :, :3, :4]
  want = flaxs(x[0, :, :3, :4], 8)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
  got = mask_head.group_norm(x[..., :12], scale[:12], bias[:12])
  want = flaxs(x[0, ..., :12], 4)
  np.testing.assert_allclose(got[0], want, rtol=1e-5, atol=1e-5)


def test_what_drops():
  """Nothing in evaluation; in training, weights or branches."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(2, 5, 8)), jnp.float32)
  mask = jnp.ones((2, 5), bool)

  def layer(train, **settings):
    config = encoder_decoder.LayerConfig(heads=2, mlp=7, **settings)
    return encoder_decoder.EncoderLayer(config, train)

  shapes = jax.eval_shape(layer(False).init, jax.random.key(0), x, x, mask)
  variables = jax.tree.map(
    lambda s: jnp.asarray(rng.normal(size=s.shape), jnp.float32), shapes
  )

  def run(train, **settings):
    rngs = {"dropout": jax.random.key(2)}
    apply = jax.jit(
      functools.partial(layer(train, **settings).apply, rngs=rngs)
    )
    return apply(variables, x, 0 * x, mask)[0]

  still = run(False, dropout=0.5, attention_dropout=0.5)
  none = dict(dropout=0.0, attention_dropout=0.0)
  np.testing.assert_array_equal(run(True, **none), still)
  for rate in none:
    assert float(jnp.abs(run(True, **none | {rate: 0.5}) - still).max()) > 0.1


def test_pre_norm_and_bfloat16():
  model = detr.Model(**SMALL)
  names = [
    set(trees.flatten(shapes_of(m, 32, 32)[1]))
    for m in (model, model.clone(pre_norm=True))
  ]
  assert names[1] - names[0] == {
    "params/encoder/norm/scale",
    "params/encoder/norm/bias",
  }
  half = model.clone(dtype="bfloat16")
  init = functools.partial(half.init_with_output, train=False)
  out, variables = jax.eval_shape(
    init, jax.random.key(0), *canvas(SIZES, 32, 32)
  )
  for x in jax.tree.leaves((out, variables)):
    assert x.dtype == jnp.float32
  assert half.backbone_settings["dtype"] == "bfloat16"


def test_layers_are_their_equations():
  """Pre- and post-norm layers of the encoder, one head, in NumPy."""
  rng = np.random.default_rng(0)
  x, position = rng.normal(size=(2, 5, 8)), rng.normal(size=(1, 5, 8))
  mask = np.array([[True] * 5, [True, True, True, False, False]])
  for pre_norm in (False, True):
    config = encoder_decoder.LayerConfig(heads=1, mlp=7, pre_norm=pre_norm)
    layer = encoder_decoder.EncoderLayer(config, train=False)
    arrays = [jnp.asarray(y, jnp.float32) for y in (x, position)]
    variables = layer.init(jax.random.key(0), *arrays, jnp.asarray(mask))
    p = jax.tree.map(
      lambda s: rng.normal(size=s.shape) * 0.5, variables["params"]
    )
    single = jax.tree.map(lambda y: jnp.asarray(y, jnp.float32), p)
    got, _ = layer.apply({"params": single}, *arrays, jnp.asarray(mask))
    want = encoder_layer(x, position, mask, p, pre_norm)
    seen = np.broadcast_to(mask[..., None], want.shape)
    np.testing.assert_allclose(got[seen], want[seen], rtol=1e-4, atol=1e-4)


def encoder_layer(x, position, mask, p, pre_norm):
  def norm(y, p):
    y = y - y.mean(-1, keepdims=True)
    y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-5)
    return y * p["scale"] + p["bias"]

  def attention(y):
    def project(name, y):
      q = p["attn"][name]
      return y @ q["kernel"].reshape(8, 8) + q["bias"].reshape(8)

    q, k = (project(n, y + position) for n in ("query", "key"))
    s = np.where(mask[:, None], q @ k.swapaxes(1, 2) / np.sqrt(8), -np.inf)
    s = np.exp(s - s.max(-1, keepdims=True))
    s = s / s.sum(-1, keepdims=True)
    out = p["attn"]["out"]
    return s @ project("value", y) @ out["kernel"][0] + out["bias"]

  def ffn(y):
    fc1, fc2 = p["mlp"]["fc1"], p["mlp"]["fc2"]
    h = np.maximum(y @ fc1["kernel"] + fc1["bias"], 0)
    return h @ fc2["kernel"] + fc2["bias"]

  for name, branch in (("ln1", attention), ("ln2", ffn)):
    if pre_norm:
      x = x + branch(norm(x, p[name]))
    else:
      x = norm(x + branch(x), p[name])
  return x


def test_fresh_parameters_are_drawn_as_the_references():
  config = encoder_decoder.LayerConfig(heads=4, mlp=192)
  layer = encoder_decoder.EncoderLayer(config, train=False)
  x = jnp.zeros((1, 2, 96))
  params = jax.jit(layer.init)(jax.random.key(0), x, x, None)["params"]

  def bound(x, want):
    # The largest of n uniform numbers is 1 / n short of the bound.
    assert want * 0.9 < float(jnp.abs(x).max()) <= want * (1 + 1e-6)

  attn, mlp = params["attn"], params["mlp"]
  bound(attn["query"]["kernel"], (6 / (96 + 3 * 96)) ** 0.5)
  bound(attn["out"]["kernel"], (6 / (96 + 96)) ** 0.5)
  bound(mlp["fc1"]["kernel"], (6 / (96 + 192)) ** 0.5)
  bound(mlp["fc1"]["bias"], 96**-0.5)
  bound(mlp["fc2"]["bias"], 192**-0.5)
  assert not any(np.any(attn[k]["bias"]) for k in attn)


def test_attention_of_the_queries_is_lent():
  config = encoder_decoder.LayerConfig(heads=2, mlp=7)
  decoder = encoder_decoder.Decoder(3, config)
  rng = jax.random.key(0)
  queries = jax.random.normal(rng, (QUERIES, 8))
  memory = jax.random.normal(rng, (2, 5, 8))
  mask = jnp.array([[True, True, False, True, False], [False] * 5])
  run = functools.partial(
    decoder.init_with_output, train=False, mutable=["params", "intermediates"]
  )
  _, variables = jax.jit(run)(rng, queries, memory, memory, mask)
  lent = variables["intermediates"]["blocks"]
  (maps,) = lent["cross_attn"]["maps"]
  assert maps.shape == (3, 2, 2, QUERIES, 5)
  np.testing.assert_allclose(maps[:, 0].sum(-1), 1.0, rtol=1e-5)
  np.testing.assert_array_equal(maps[..., ~mask[0]], 0.0)
  np.testing.assert_array_equal(maps[:, 1], 0.0)
  (maps,) = lent["self_attn"]["maps"]
  assert maps.shape == (3, 2, 2, QUERIES, QUERIES)


@pytest.mark.parametrize("rules", ["fsdp", "tensor"])
def test_presets_cut_it_on_eight_devices(rules):
  """With all its parts, whatever 91 classes and 33 x 8 channels divide by."""
  model = detr.Model(variant="R50-panoptic", num_classes=91)
  _, variables = shapes_of(model, 64, 64)
  mesh = dict(fsdp=8) if rules == "fsdp" else dict(fsdp=4, tensor=2)
  placed = sharding.tree_shardings(
    variables["params"], sharding.make_mesh(mesh), sharding.RULES[rules]
  )
  flat = trees.flatten(placed)
  whole = [
    k
    for k, x in flat.items()
    if k.endswith("kernel") and not any(x.spec) and "mask_head" not in k
  ]
  assert not whole


def test_refusals():
  with pytest.raises(ValueError, match=r"Unknown variant 'R18'\. .*R50-DC5"):
    detr.Model(variant="R18")
  with pytest.raises(ValueError, match=r"sizes has no \['depth'\]"):
    detr.Model(sizes=dict(depth=3))
  with pytest.raises(ValueError, match="position is 'cosine'; it is one of"):
    detr.Model(position="cosine")
  vit = dict(variant="local", backbone=dict(name="vit", variant="Ti/16"))
  with pytest.raises(ValueError, match="'vit' takes no pixel_mask"):
    shapes_of(detr.Model(**vit), 32, 32)
  with pytest.raises(ValueError, match="'vit' returns no maps, `stages`"):
    shapes_of(detr.Model(**vit, mask_padding=False), 32, 32)
