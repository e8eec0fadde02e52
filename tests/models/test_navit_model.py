"""The law of packing: packed equals alone, for every attention backend."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import vit_in_numpy
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from big_vision_like import trees
from big_vision_like.models import navit
from big_vision_like.models.layers import position
from big_vision_like.models.layers.encoder import unstack_blocks

TINY = dict(width=24, depth=2, mlp=29, heads=3, patch=2)
ROWS, LENGTH, SLOTS, CLASSES = 8, 137, 4, 5
# One row and one column of patches, and one grid above the tables' 16.
GRIDS = [(1, 13), (7, 5), (3, 11), (19, 2), (6, 9), (1, 1)]
PACKED = [[0, 1, 2, 5], [4, 3]]  # Images of the first rows; the rest is empty.
SIGLIP2 = dict(
  position="resized_bilinear", max_grid=16, bias=True, qk_norm=None
)
GAP = dict(SIGLIP2, registers=4, pool="gap", fc_norm=True)
REGISTERS = dict(SIGLIP2, registers=2)  # They make rows longer.
ALONE = [[i] for i in range(len(GRIDS))]


@functools.cache
def patches_of(image):
  """The patches of an image, of which some were dropped, and their cells."""
  rng = np.random.default_rng(image)
  h, w = GRIDS[image]
  cells = np.argwhere(np.ones((h, w)))
  kept = np.sort(rng.permutation(h * w)[: h * w - h * w // 5])
  return rng.normal(size=(len(kept), 12)).astype(np.float32), cells[kept]


def pack(rows):
  """Rows of image numbers as a packed batch."""
  batch = dict(
    patches=np.zeros((ROWS, LENGTH, 12), np.float32),
    segment_ids=np.zeros((ROWS, LENGTH), np.int32),
    positions=np.zeros((ROWS, LENGTH, 2), np.int32),
    grid_hw=np.zeros((ROWS, SLOTS, 2), np.int32),
    example_mask=np.zeros((ROWS, SLOTS), bool),
  )
  for b, row in enumerate(rows):
    start = 0
    for m, image in enumerate(row):
      values, cells = patches_of(image)
      own = slice(start, start + len(values))
      batch["patches"][b, own] = values
      batch["segment_ids"][b, own] = m + 1
      batch["positions"][b, own] = cells
      batch["grid_hw"][b, m] = GRIDS[image]
      batch["example_mask"][b, m] = True
      start += len(values)
  return {key: jnp.asarray(x) for key, x in batch.items()}


def by_image(rows, x):
  """[B,M,...] to {image: [...]}."""
  return {
    image: np.asarray(x[b, m])
    for b, row in enumerate(rows)
    for m, image in enumerate(row)
  }


def tiny(**kw):
  kw = {"max_grid": 16, "num_classes": CLASSES, **kw}
  return navit.Model(variant="Ti", sizes=TINY, **kw)


@functools.cache
def random_params(**kw):
  shapes = jax.eval_shape(
    lambda: tiny(**kw).init(jax.random.key(0), **pack([]), train=False)
  )
  return vit_in_numpy.random_params(shapes["params"])


def pool_in_numpy(pool, added, patches, params):
  if pool == "map":
    return vit_in_numpy.attention_pool(patches, params["pool"])
  if pool == "tok":
    return added[0]
  mean = patches.mean(0)
  if "fc_norm" in params:
    return vit_in_numpy.layer_norm(mean, params["fc_norm"])
  return mean


@functools.partial(jax.jit, static_argnames="model")
def run(model, params, batch, weights):
  """Outputs, and the gradients of a weighted sum of all logits."""

  def loss(params, patches):
    out = model.apply(
      {"params": params}, **{**batch, "patches": patches}, train=True
    )
    return (out["logits"] * weights).sum(), out

  grad = jax.grad(loss, argnums=(0, 1), has_aux=True)
  grads, out = grad(params, batch["patches"])
  return out, *grads


def weights(rows):
  """Logit weights that belong to the image, wherever it is packed."""
  out = np.zeros((ROWS, SLOTS, CLASSES), np.float32)
  for b, row in enumerate(rows):
    for m, image in enumerate(row):
      out[b, m] = np.random.default_rng(image).normal(size=CLASSES)
  return jnp.asarray(out)


@pytest.mark.parametrize(
  ("backend", "kw"),
  [
    ("xla", {}),
    ("blockwise", {}),
    ("splash", {}),
    ("xla", dict(REGISTERS, pool="tok")),
    ("blockwise", dict(REGISTERS, pool="gap")),
  ],
)
def test_packed_equals_alone(backend, kw):
  """Forward and gradient. splash runs interpreted, as on a TPU otherwise.

  The second half: perturbing one image changes no bit of another's output,
  with all three backends, nor of its patches' gradient.
  """
  model, params = tiny(attention=backend, **kw), random_params(**kw)
  packed = run(model, params, pack(PACKED), weights(PACKED))
  alone = run(model, params, pack(ALONE), weights(ALONE))
  for key in ("logits", "pooled"):
    got, want = by_image(PACKED, packed[0][key]), by_image(ALONE, alone[0][key])
    for image in range(len(GRIDS)):
      # Float32 sums over other blocks of keys.
      np.testing.assert_allclose(got[image], want[image], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(packed[0][key][len(PACKED) :], 0)
  got, want = trees.flatten(packed[1]), trees.flatten(alone[1])
  for name in want:
    # The bias of the keys has none: it shifts all scores of a query alike.
    scale = np.abs(want[name.replace("key/bias", "query/bias")]).max()
    # Float32 sums over tokens, in another order.
    np.testing.assert_allclose(
      got[name], want[name], rtol=0, atol=1e-4 * scale, err_msg=name
    )

  batch = pack(PACKED)
  perturbed = np.asarray(batch["segment_ids"]) == 2
  batch["patches"] = jnp.where(
    perturbed[..., None], 10 - batch["patches"], batch["patches"]
  )
  after = run(model, params, batch, weights(PACKED))
  for image, value in by_image(PACKED, after[0]["logits"]).items():
    same = value == by_image(PACKED, packed[0]["logits"])[image]
    assert same.all() if image not in (1, 3) else not same.any()
  for got, want in (
    (after[0]["tokens"], packed[0]["tokens"]),
    (after[2], packed[2]),
  ):
    np.testing.assert_array_equal(got[~perturbed], want[~perturbed])
    assert (got[perturbed] != want[perturbed]).mean() > 0.99


@pytest.mark.parametrize(
  ("pool", "kw"),
  [
    ("map", {}),
    ("map", dict(bias=True, registers=3)),
    ("gap", dict(registers=1)),
    ("gap", dict(fc_norm=True, bias=True)),
    ("tok", dict(qk_norm=None, registers=2)),
  ],
)
def test_forward_is_the_equations(pool, kw):
  """One image at a time through the paper's model in NumPy."""
  kw = dict(kw, pool=pool, position="sinusoidal")
  model, params = tiny(**kw), random_params(**kw)
  forward = jax.jit(lambda p, b: model.apply({"params": p}, **b, train=False))
  out = forward(params, pack(PACKED))
  logits, pooled = (by_image(PACKED, out[k]) for k in ("logits", "pooled"))
  params = vit_in_numpy.float64(unstack_blocks(params))
  for image in range(len(GRIDS)):
    values, cells = patches_of(image)
    x = vit_in_numpy.dense(values.astype(np.float64), params["embed"])
    x = x + np.asarray(position.sincos2d(jnp.asarray(cells, jnp.float32), 24))
    added = [params[k][0] for k in ("cls", "registers") if k in params]
    x = np.concatenate([*added, x])
    x = vit_in_numpy.encoder(x, params["encoder"])
    added, x = np.split(x, [sum(map(len, added))])
    y = pool_in_numpy(pool, added, x, params)
    np.testing.assert_allclose(pooled[image], y, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
      logits[image],
      vit_in_numpy.dense(y, params["head"]),
      rtol=1e-4,
      atol=1e-4,
    )


def test_eight_devices_agree_with_one():
  mesh = jax.make_mesh(
    (4, 2, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3
  )
  args = random_params(), pack(PACKED), weights(PACKED)
  want = run(tiny(attention="blockwise"), *args)
  model = tiny(attention="blockwise", remat="names")
  with jax.set_mesh(mesh):
    split = NamedSharding(mesh, P(("data", "fsdp")))
    whole = NamedSharding(mesh, P())
    got = run(model, *jax.device_put(args, (whole, split, split)))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=0, atol=1e-4 * max(1, np.abs(b).max())
    ),
    got,
    want,
  )


@pytest.mark.parametrize(
  ("variant", "total", "kw"),
  [
    ("B/32", 94_543_232, {}),
    ("B/16", 92_773_760, {}),
    ("L/16", 315_674_752, {}),
    ("B/16", 92_930_304, SIGLIP2),
    ("So400m/16", 427_888_064, SIGLIP2),
    ("B/16", 85_846_272, GAP),
  ],
)
def test_parameter_counts(variant, total, kw):
  """Derived for these layers, apart from this code, in the paper's sizes.

  Those of SigLIP 2 and of timm's gap model are timm's counts; the latter has
  LayerScale besides, 24 vectors.
  """
  model = navit.Model(variant=variant, **kw)
  values = 3 * int(variant.split("/")[1]) ** 2
  batch = dict(pack([]), patches=jnp.zeros((ROWS, LENGTH, values)))
  shapes = jax.eval_shape(
    lambda: model.init(jax.random.key(0), **batch, train=False)
  )
  assert trees.count(shapes) == total


def test_patches_of_another_size_are_refused():
  model = navit.Model(variant="B/16")
  with pytest.raises(ValueError, match="Patches of 12 values do not fit"):
    jax.eval_shape(
      lambda: model.init(jax.random.key(0), **pack([]), train=False)
    )


@pytest.mark.parametrize(
  ("kw", "sentence"),
  [
    (dict(pool="cls"), "pool is 'cls'; it is one of"),
    (dict(pool="tok", fc_norm=True), "fc_norm is for pool='gap'.*not 'tok'"),
  ],
)
def test_unknown_pooling_is_refused(kw, sentence):
  with pytest.raises(ValueError, match=sentence):
    jax.eval_shape(
      lambda: tiny(**kw).init(jax.random.key(0), **pack([]), train=False)
    )
