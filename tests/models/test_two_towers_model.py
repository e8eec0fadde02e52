"""Text tower and two towers: packing's law for captions, projections, names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vision_like.data import text as text_lib
from big_vision_like.data.tokenizers import bytes as bytes_lib
from big_vision_like.models import text as text_model
from big_vision_like.models import two_towers

SIZES = dict(width=24, depth=2, mlp=40, heads=2)
VOCAB, MOST = 23, 11
# Lengths of the captions of two packed rows; slots without one in between.
LENGTHS = ({0: 5, 1: 1, 3: 11}, {2: 11, 4: 1})
SLOTS, ROW = 5, 19


def randomised(model, *args, **kwargs):
  """Variables that are all random: initialisations hide errors."""
  shapes = jax.eval_shape(
    lambda: model.init(jax.random.key(0), *args, train=False, **kwargs)
  )
  leaves, tree = jax.tree.flatten(shapes)
  rng = np.random.default_rng(1)
  arrays = [jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype) for x in leaves]
  return jax.tree.unflatten(tree, arrays)


def captions():
  rng = np.random.default_rng(0)
  return [
    {
      slot: rng.integers(1, VOCAB, n).astype(np.int32)
      for slot, n in row.items()
    }
    for row in LENGTHS
  ]


def packed_captions():
  spec = text_lib.TextSpec(bytes_lib.Tokenizer(), length=MOST, row=ROW)
  batch = spec.blank(len(LENGTHS), SLOTS)
  for row, texts in enumerate(captions()):
    ends = {s: [*t[:-1], bytes_lib.Tokenizer.eos] for s, t in texts.items()}
    spec.write_row(
      batch,
      row,
      {s: text_lib.Text(np.array(t, np.int32), 0, 0) for s, t in ends.items()},
    )
  keys = ("text", "text_segment_ids", "text_positions")
  return {key: jnp.asarray(batch[key]) for key in keys}


def make_text(**kwargs):
  return text_model.Model(vocab_size=VOCAB, length=MOST, sizes=SIZES, **kwargs)


@pytest.mark.parametrize(
  "kwargs",
  [dict(pool="last"), dict(pool="map", bias=False, qk_norm="layer")],
  ids=lambda k: k["pool"],
)
def test_captions_in_company_are_captions_alone(kwargs):
  """Values, and the gradient of the tokens' table."""
  model, batch = make_text(**kwargs), packed_captions()
  variables = randomised(model, batch["text"][:, :MOST])
  weights = np.random.default_rng(2).normal(size=(len(LENGTHS), SLOTS, 24))
  ids, rows = (np.asarray(batch[k]) for k in ("text_segment_ids", "text"))

  def together(variables):
    pooled = model.apply(
      variables,
      batch["text"],
      segment_ids=batch["text_segment_ids"],
      positions=batch["text_positions"],
      slots=SLOTS,
      train=False,
    )["pooled"]
    return (pooled * weights).sum(), pooled

  def alone(variables):
    """A program for each length: captions of one are a batch, unpacked."""
    total, found = 0.0, {}
    places = {}
    for row, of_row in enumerate(LENGTHS):
      for slot, length in of_row.items():
        places.setdefault(length, []).append((row, slot))
    for of_length in places.values():
      tokens = [rows[r][ids[r] == s + 1] for r, s in of_length]
      pooled = model.apply(variables, jnp.stack(tokens), train=False)["pooled"]
      for (row, slot), one in zip(of_length, pooled):
        found[f"{row} {slot}"] = one
        total += (one * weights[row, slot]).sum()
    return total, found

  gradients = lambda f: jax.jit(jax.value_and_grad(f, has_aux=True))(variables)
  (_, pooled), grads = gradients(together)
  (_, expected), alone_grads = gradients(alone)
  for row in range(len(LENGTHS)):
    for slot in range(SLOTS):
      want = expected.get(f"{row} {slot}", np.zeros(24))
      # float32 sums of a few dozen terms of size 1, in another order.
      np.testing.assert_allclose(pooled[row, slot], want, rtol=2e-5, atol=2e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
    grads,
    alone_grads,
  )


def test_one_text_a_row_reads_what_fills_it_up():
  model = make_text()
  tokens = jnp.array([[3, 5, 1, 0, 0], [3, 5, 1, 1, 1]])
  variables = randomised(model, tokens)
  read = jax.jit(lambda x: model.apply(variables, x, train=False)["pooled"])
  pooled = read(tokens)
  assert pooled.shape == (2, 24)
  assert np.abs(pooled[0] - pooled[1]).max() > 1e-2
  assert np.isnan(read(tokens + VOCAB)).all()  # There are no such tokens.


def image_inputs():
  ids = jnp.array([[1, 1, 1, 2, 2, 0, 0], [3, 3, 3, 3, 3, 3, 0]])
  mask = jnp.array([[1, 1, 0, 0, 0], [0, 0, 1, 0, 0]], bool)
  rng = np.random.default_rng(5)
  return dict(
    patches=jnp.asarray(rng.normal(size=(2, 7, 48)), jnp.float32),
    segment_ids=ids,
    positions=jnp.zeros((2, 7, 2), jnp.int32),
    grid_hw=jnp.ones((2, 5, 2), jnp.int32),
    example_mask=mask,
  )


def make_towers(**kwargs):
  settings = dict(
    image=dict(name="navit", variant="Ti/4", sizes=SIZES),
    text=dict(variant="Ti", sizes=SIZES, length=MOST),
    vocab_size=VOCAB,
    features=13,
  )
  return two_towers.Model(**settings | kwargs)


def test_packed_embeddings_lie_on_the_sphere_where_there_is_something():
  model = make_towers(bias=-10.0)
  inputs = image_inputs() | packed_captions()
  variables = randomised(model, **inputs)
  apply = jax.jit(lambda variables, x: model.apply(variables, train=False, **x))
  out = apply(variables, inputs)
  assert out["zimg"].shape == out["ztxt"].shape == (2, SLOTS, 13)
  lengths = {k: np.linalg.norm(out[k], axis=-1) for k in ("zimg", "ztxt")}
  texts = [[s in row for s in range(SLOTS)] for row in LENGTHS]
  np.testing.assert_allclose(lengths["zimg"], inputs["example_mask"], atol=1e-6)
  np.testing.assert_allclose(lengths["ztxt"], texts, atol=1e-6)
  np.testing.assert_allclose(out["t"], np.exp(variables["params"]["t"]), 1e-6)
  assert out["b"] == variables["params"]["b"]
  # One kind alone, as for prompts and for features.
  image = apply(variables, image_inputs())
  assert set(image) == {"zimg", "t", "b"}
  text = apply(
    variables, packed_captions() | {"example_mask": inputs["example_mask"]}
  )
  assert set(text) == {"ztxt", "t", "b"}
  for key, alone in (("zimg", image), ("ztxt", text)):
    # Two programs may add in another order.
    np.testing.assert_allclose(alone[key], out[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  ("name", "variant"),
  [
    ("deepvit", "16B"),
    ("efficientvit", "M0"),
    ("flexivit", "Ti"),
    ("mobilevit", "XXS"),
    ("mobilevit_v2", "0.5"),
    ("resnet", "R50"),
    ("vit", "R26+Ti/32"),
  ],
)
def test_any_image_model_is_a_tower(name, variant):
  model = make_towers(image=dict(name=name, variant=variant), temperature=7.0)
  side = 240 if name == "flexivit" else 224
  inputs = dict(
    image=jnp.ones((3, side, side, 3)), text=jnp.ones((3, 5), jnp.int32)
  )

  def run():
    variables = model.init(jax.random.key(0), train=False, **inputs)
    return model.apply(variables, train=False, **inputs), variables

  out, variables = jax.eval_shape(run)
  assert out["zimg"].shape == out["ztxt"].shape == (3, 13)
  assert out["zimg"].dtype == out["ztxt"].dtype == jnp.float32
  assert set(variables["params"]) == {"img", "txt", "img_head", "txt_head", "t"}


def test_temperature_starts_where_it_is_set():
  model = make_towers(temperature=7.0)
  inputs = dict(text=jnp.ones((1, 2), jnp.int32))
  out, variables = jax.jit(
    lambda: model.init_with_output(jax.random.key(0), train=False, **inputs)
  )()
  np.testing.assert_allclose(out["t"], 7, 1e-6)
  assert out["b"] == 0
  assert "b" not in variables["params"]


def test_the_settings_of_both_towers():
  model = make_towers(dtype="bfloat16", attention="blockwise", remat="full")
  for kind in ("image", "text"):
    tower = model.make(kind, parent=None)
    assert (tower.dtype, tower.attention) == ("bfloat16", "blockwise")
    assert tower.remat == "full"
  # A model that lacks one of them keeps to those that it has.
  other = make_towers(
    image=dict(name="efficientvit", variant="M0"), remat="full"
  )
  assert not hasattr(other.make("image", parent=None), "remat")


@pytest.mark.parametrize(
  ("kwargs", "sentence"),
  [
    (
      dict(text=dict(variant="Ti", vocab_size=29)),
      r"vocab_size = 29, but the tokenizer of config.data.text has 23 tokens",
    ),
    (dict(text=dict(variant="Ti/16")), r"'Ti/16' of a text tower.*So400m"),
    (dict(text=dict(variant="Ti", sizes=dict(patch=4))), r"\['patch'\]"),
    (dict(text=dict(variant="Ti", pool="gap")), r"pool is 'gap'"),
    (dict(text=dict(variant="Ti", length=3)), r"Texts of 5 tokens.*for 3"),
    (dict(image=dict(name="vti")), r"Did you mean 'vit'"),
    (
      dict(image=dict(name="vit", varaint="Ti/4")),
      r"config.model.image.*varia",
    ),
  ],
)
def test_refusals(kwargs, sentence):
  model = make_towers(**dict(image=dict(name="vit", variant="Ti/4")) | kwargs)
  inputs = dict(image=jnp.ones((1, 8, 8, 3)), text=jnp.ones((1, 5), jnp.int32))
  with pytest.raises(ValueError, match=sentence):
    jax.eval_shape(lambda: model.init(jax.random.key(0), train=False, **inputs))
