"""FlexiViT: resized patches under resized kernels are the same tokens."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vision_like import trees
from big_vision_like.models import flexivit, vit
from big_vision_like.models.layers import resize

TINY = dict(width=24, depth=2, mlp=29, heads=3, patch=4)
SIDES = (4, 5, 6, 8, 10, 15, 16, 32, 48)


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape)


def resized_by_jax(x, size, antialias=False):
  """[P,Q,...] under jax's own bilinear resizing, in float64."""
  shape = (*size, *x.shape[2:])
  with jax.enable_x64(True):
    x = jnp.asarray(x, jnp.float64)
    return np.asarray(jax.image.resize(x, shape, "linear", antialias=antialias))


@pytest.mark.parametrize(
  ("old", "new"),
  [((s, s), (t, t)) for s, t in itertools.pairwise(SIDES)]
  + [((8, 10), (10, 12)), ((8, 6), (9, 15)), ((8, 6), (15, 9))],
)
def test_resized_kernel_on_resized_by_jax_gives_the_same_token(old, new):
  x, w = normal(*old, 3), normal(*old, 3, 2, seed=1)
  token = np.tensordot(x, w, 3)
  got = np.tensordot(resized_by_jax(x, new), resize.pi_resize(w, new), 3)
  # Float64; the condition of the matrices is below 5 a side.
  np.testing.assert_allclose(got, token, atol=1e-10)


def test_shrinking_is_the_least_squares_optimum():
  """The pseudo-inverse of the whole matrix, which is that of its factors."""
  old, new = (7, 5), (3, 4)
  basis = np.eye(35).reshape(7, 5, 35)
  b = resized_by_jax(basis, new).reshape(12, 35)
  w = normal(*old)
  wanted = np.linalg.pinv(b.T) @ w.ravel()
  got = resize.pi_resize(w, new)
  np.testing.assert_allclose(got.ravel(), wanted, atol=1e-10)
  # No other kernel is better: what remains is orthogonal to all of them.
  remains = b @ (b.T @ got.ravel() - w.ravel())
  np.testing.assert_allclose(remains, 0, atol=1e-10)
  assert np.abs(b.T @ got.ravel() - w.ravel()).max() > 0.1


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("size", [(5, 7), (6, 6), (7, 11), (14, 3), (1, 2)])
def test_tables_resize_as_in_jax(size, antialias):
  table = normal(7, 7, 5).astype(np.float32)
  got = resize.resize_table(table, size, antialias=antialias)
  wanted = resized_by_jax(table, size, antialias)
  np.testing.assert_allclose(got, wanted, atol=1e-6)
  traced = resize.resize_table(jnp.asarray(table), size, antialias=antialias)
  np.testing.assert_allclose(traced, wanted, atol=1e-6)


def test_the_same_size_is_the_buffer_itself():
  for kernel in (normal(4, 4, 3, 2), jnp.asarray(normal(4, 4, 3, 2))):
    assert resize.pi_resize(kernel, (4, 4)) is kernel
    assert resize.resize_table(kernel, (4, 4)) is kernel
  assert resize.pi_resize(normal(4, 4).astype(np.float16), (6, 5)).dtype == (
    np.float16
  )
  with pytest.raises(ValueError, match="Cannot resize 4 entries to 0"):
    resize.pi_resize(normal(4, 4), (0, 4))
  with pytest.raises(ValueError, match="read-only"):
    resize.pi_matrix(4, 8)[0] = 0


def test_bfloat16_kernels_are_resized_in_float32():
  kernel = jnp.asarray(normal(8, 8, 3, 2), jnp.bfloat16)
  got = resize.pi_resize(kernel, (15, 15))
  wanted = resize.pi_resize(np.asarray(kernel, np.float64), (15, 15))
  # One rounding to 8 bits at the end.
  np.testing.assert_allclose(got.astype(np.float32), wanted, rtol=2**-8)


def tiny(**kw):
  return flexivit.Model(variant="S", sizes=TINY, num_classes=7, **kw)


@functools.cache
def variables():
  """Random ones; nothing stays as initialisation made it."""
  image = jnp.zeros((1, 12, 12, 3))
  shapes = jax.eval_shape(
    lambda: tiny(grid=3).init(jax.random.key(0), image, train=False)
  )
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: jnp.asarray(rng.normal(0.0, 0.3, x.shape), jnp.float32), shapes
  )


@functools.partial(jax.jit, static_argnames=("model", "grid"))
def run(model, variables, image, grid=None):
  return model.apply(variables, image, train=False, grid=grid)


def images(height, width, seed=0):
  return jnp.asarray(normal(2, height, width, 3, seed=seed), jnp.float32)


def test_the_model_is_a_vit_with_resized_kernel_and_positions():
  """ViT of each grid, with the class token's position 0."""
  params = variables()["params"]
  table = params["pos_embed"].reshape(7, 7, 24)
  for grid, (height, width) in (
    ((3, 3), (12, 12)),
    ((3, 3), (15, 21)),
    ((5, 2), (15, 14)),
    ((8, 8), (24, 16)),
  ):
    image = images(height, width)
    out = run(tiny(), variables(), image, grid)
    p, q = height // grid[0], width // grid[1]
    positions = jax.image.resize(table, (*grid, 24), "linear").reshape(-1, 24)
    if p != q:  # ViT's patches are square: resize by hand what it embeds.
      assert out["tokens"].shape == (2, grid[0] * grid[1], 24)
      continue
    kernel = params["embed"]["kernel"]
    embed = dict(params["embed"], kernel=resize.pi_resize(kernel, (p, q)))
    pos_embed = jnp.pad(positions, ((1, 0), (0, 0)))[None]
    plain = vit.Model(
      variant=f"S/{p}", sizes=TINY | {"patch": p}, num_classes=7
    )
    wanted = plain.apply(
      {"params": params | {"embed": embed, "pos_embed": pos_embed}},
      image,
      train=False,
    )
    for key in ("logits", "pooled", "tokens"):
      np.testing.assert_allclose(out[key], wanted[key], atol=1e-5)


def test_patches_of_twice_the_size_give_the_same_answer():
  """Of the whole model: each patch is resized by itself."""
  image = np.asarray(images(12, 12))
  patches = image.reshape(2, 3, 4, 3, 4, 3).transpose(2, 4, 0, 1, 3, 5)
  for side in (5, 8, 13):
    large = resized_by_jax(patches, (side, side)).transpose(2, 3, 0, 4, 1, 5)
    large = large.reshape(2, 3 * side, 3 * side, 3).astype(np.float32)
    np.testing.assert_allclose(
      run(tiny(), variables(), large, 3)["logits"],
      run(tiny(), variables(), image, 3)["logits"],
      atol=1e-5,
    )


def test_gradients_reach_kernel_and_positions_at_every_grid():
  for grid in (2, 3, 6):
    image = images(12, 12)
    grads = jax.grad(
      lambda v, grid=grid, image=image: run(tiny(), v, image, grid)[
        "logits"
      ].sum()
    )(variables())["params"]
    for name in ("kernel", "bias"):
      assert np.abs(grads["embed"][name]).max() > 1e-6
    assert np.abs(grads["pos_embed"]).max() > 1e-6


def test_one_program_for_each_grid():
  traces = []

  @functools.partial(jax.jit, static_argnames="grid")
  def forward(variables, image, grid):
    traces.append(grid)
    return tiny().apply(variables, image, train=False, grid=grid)["logits"]

  for grid in (2, 3, 2, 6, 3):
    forward(variables(), images(12, 12), grid)
  assert traces == [2, 3, 6]


def test_the_attribute_is_the_default_grid():
  image = images(12, 12)
  np.testing.assert_array_equal(
    run(tiny(grid=6), variables(), image)["logits"],
    run(tiny(grid=3), variables(), image, 6)["logits"],
  )


@pytest.mark.parametrize(
  ("variant", "table", "classes", "total"),
  [
    ("S/16", 15, 1000, 22_061_416),
    ("S/16", 15, None, 21_676_416),
    ("B/16", 15, 1000, 86_589_160),
    ("B/16", 15, 0, 85_820_160),
    ("L/16", 15, 1000, 304_355_304),
    ("L/16", 15, None, 303_330_304),
    ("S", 7, None, 22_493_568),
    ("B", 7, None, 87_454_464),
    ("L", 7, None, 305_509_376),
  ],
)
def test_parameter_counts(variant, table, classes, total):
  model = flexivit.Model(variant=variant, num_classes=classes, table=table)
  image = jax.ShapeDtypeStruct((1, 240, 240, 3), jnp.float32)
  init = lambda x: model.init(jax.random.key(0), x, train=False)
  assert trees.count(jax.eval_shape(init, image)) == total
  # They do not depend on the grid that is initialised on.
  init = lambda x: model.init(jax.random.key(0), x, train=False, grid=30)
  assert trees.count(jax.eval_shape(init, image)) == total


def test_the_papers_grids_divide_its_images():
  sides = [flexivit.IMAGE_SIZE // g for g in flexivit.GRIDS]
  assert sides == [48, 40, 30, 24, 20, 16, 15, 12, 10, 8]
  assert [s * g for s, g in zip(sides, flexivit.GRIDS)] == [240] * 10


def test_refusals():
  for grid, (height, width) in ((5, (12, 15)), (5, (15, 12)), (0, (12, 12))):
    with pytest.raises(ValueError, match="does not divide into a grid of"):
      run(tiny(), variables(), images(height, width), grid)
  model = flexivit.Model(variant="H")
  with pytest.raises(ValueError, match=r"Unknown variant 'H'\. The sizes are"):
    model.init(jax.random.key(0), images(240, 240), train=False)
  assert hash(tiny()) == hash(tiny())
