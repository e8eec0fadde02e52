"""Published weights in and out: what is read, what is refused, and how."""

import functools
import pickle
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from big_vision_like import trees
from big_vision_like.models import vit
from big_vision_like.weights import engine

CLASSES, SIDE = 7, 32
SIZES = dict(width=24, depth=2, mlp=29, heads=3)


def model_of(**kw):
  return vit.Model(
    **dict(variant="Ti/16", sizes=SIZES, num_classes=CLASSES), **kw
  )


def shapes_of(model):
  image = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)
  return jax.eval_shape(
    lambda x: model.init(jax.random.key(0), x, train=False), image
  )


@functools.cache
def random_variables():
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(np.float32), shapes_of(model_of())
  )


def exported(layout="timm"):
  return engine.export_weights(
    random_variables(), name="vit", model=model_of(), layout=layout
  )


def imported(tensors, model=None, **kw):
  model = model or model_of()
  return engine.import_weights(
    tensors, name="vit", model=model, shapes=shapes_of(model), **kw
  )


def assert_equal(got, want):
  got, want = trees.flatten(got), trees.flatten(want)
  assert set(got) == set(want)
  for k, x in want.items():
    assert got[k].dtype == x.dtype, k
    np.testing.assert_array_equal(got[k], x, err_msg=k)


# Of models with a head and a class token.
WITH_HEAD = [k for k in engine.layouts("vit") if k != "siglip"]


@pytest.mark.parametrize("layout", WITH_HEAD)
def test_export_and_import_undo_each_other(layout):
  """Recognised by the names alone, from each layout."""
  variables, found = imported(exported(layout))
  assert found == layout
  wanted = trees.flatten(random_variables())
  if layout.startswith("big_vision"):  # No position for the class token.
    cls, table = wanted["params/cls"], wanted["params/pos_embed"]
    wanted["params/cls"] = cls + table[:, :1]
    wanted["params/pos_embed"] = np.pad(table[:, 1:], ((0, 0), (1, 0), (0, 0)))
  assert_equal(variables, trees.unflatten(wanted))


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pth"])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_files_give_back_their_bits(suffix, dtype, tmp_path):
  """Import, export and import again: also of bfloat16, in all three formats."""
  if suffix == ".pth":
    pytest.importorskip("torch")
  first, second = tmp_path / f"first{suffix}", tmp_path / f"second{suffix}"
  tensors = {k: x.astype(dtype) for k, x in exported().items()}
  # As BatchNorms count their batches; of no bits that matter.
  engine.write(first, tensors | {"counter": np.array(3)})
  read = engine.read(first)
  counter = read.pop("counter")
  assert counter.shape == ()
  assert counter == 3
  assert_equal(read, tensors)
  variables, _ = imported(read)
  out = engine.export_weights(
    variables, name="vit", model=model_of(), layout="timm"
  )
  engine.write(second, {k: x.astype(dtype) for k, x in out.items()})
  assert_equal(engine.read(second), read)
  assert_equal(imported(engine.read(second))[0], variables)


def test_names_on_both_sides_of_a_half_matching_file():
  tensors = exported()
  tensors["blocks.1.mlp.fc3.weight"] = tensors.pop("blocks.1.mlp.fc2.weight")
  del tensors["cls_token"]
  with pytest.raises(ValueError, match="nothing was loaded") as e:
    imported(tensors)
  missing, left = str(e.value).split("in the file that the model has no place")
  total = len(tensors) + 1
  assert f"{total - 2} of the {total} arrays that vit expects" in missing
  assert "2 of the timm layout that are missing from the file:" in missing
  assert "\n  blocks.1.mlp.fc2.weight\n  cls_token\n" in missing
  assert "\n  blocks.1.mlp.fc3.weight\n" in left
  assert "blocks.1.mlp.fc2.weight for blocks.1.mlp.fc3.weight" in left


def test_shapes_are_settled_only_when_asked():
  """Positions, the patches' kernel and the head."""
  tensors = exported()
  rng = np.random.default_rng(1)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  tensors["pos_embed"] = draw(1, 1 + 9, 24)
  tensors["patch_embed.proj.weight"] = draw(24, 3, 8, 8)
  tensors["head.weight"], tensors["head.bias"] = draw(11, 24), draw(11)
  with pytest.raises(ValueError, match="do not fit the model") as e:
    imported(tensors)
  for line in (
    "params/pos_embed: the model has (1, 5, 24), the file (1, 10, 24)",
    "params/embed/kernel: the model has (16, 16, 3, 24), the file (8, 8, 3,",
    "params/head/bias: the model has (7,), the file (11,)",
  ):
    assert line in str(e.value)
  model = model_of()
  kw = dict(name="vit", model=model, shapes=shapes_of(model))
  variables, _ = engine.to_ours(
    tensors, resize=("positions", "patch", "head"), **kw
  )
  got, want = trees.flatten(variables), trees.flatten(random_variables())
  assert {k for k in want if k not in got} == {
    "params/head/kernel",
    "params/head/bias",
  }
  for k, x in got.items():
    assert x.shape == want[k].shape, k
  with pytest.raises(ValueError, match="'windows' of vit cannot be resized"):
    engine.to_ours(tensors, resize=("windows",), **kw)


@pytest.mark.parametrize(
  ("kw", "sentence"),
  [
    (dict(layout="flax"), "no layout 'flax'; it has google, linen"),
    (dict(), "None of the layouts of vit .* has names as in this file, such"),
  ],
)
def test_unknown_layouts_are_refused(kw, sentence):
  with pytest.raises(ValueError, match=sentence):
    imported({"wug.weight": np.zeros(3, np.float32)}, **kw)
  with pytest.raises(ValueError, match="no layout 'flax'"):
    exported("flax")


def test_export_names_what_a_layout_has_no_place_for():
  variables = {"params": {**random_variables()["params"], "memory": np.ones(3)}}
  del variables["params"]["cls"]
  with pytest.raises(ValueError, match="vit cannot be written as timm") as e:
    engine.export_weights(
      variables, name="vit", model=model_of(), layout="timm"
    )
  assert "needs and the model lacks:\n  params/cls\n" in str(e.value)
  assert "no place for:\n  params/memory" in str(e.value)


class Payload:
  """A pickle that would run a program."""

  def __reduce__(self):
    return (sys.exit, ("it ran",))


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
def test_nothing_in_a_torch_file_runs(suffix, tmp_path):
  torch = pytest.importorskip("torch")
  file = tmp_path / f"evil{suffix}"
  torch.save({"w": torch.zeros(3), "x": Payload()}, file)
  with pytest.raises(ValueError, match=f"cannot be read as {suffix}"):
    engine.read(file)
  torch.save({"w": torch.zeros(3), "epoch": 4}, file)
  with pytest.raises(ValueError, match=r"more than arrays: \['epoch'\]"):
    engine.read(file)
  for wrapper in ("model", "state_dict"):
    torch.save({wrapper: {"w": torch.ones(3)}, "epoch": 4}, file)
    assert_equal(engine.read(file), {"w": np.ones(3, np.float32)})


def test_pickles_are_never_loaded(tmp_path):
  for name in ("evil.pkl", "evil"):
    (tmp_path / name).write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ValueError, match="Pickles are never loaded"):
      engine.read(tmp_path / name)
  np.savez(tmp_path / "evil.npz", w=np.array([Payload()], object))
  with pytest.raises(ValueError, match=r"evil\.npz cannot be read as \.npz"):
    engine.read(tmp_path / "evil.npz")


def test_files_that_are_missing_or_broken_are_named(tmp_path):
  with pytest.raises(ValueError, match=r"There is no file of weights .*none"):
    engine.read(tmp_path / "none.npz")
  for name in ("broken.npz", "broken.safetensors"):
    (tmp_path / name).write_bytes(b"not this")
    with pytest.raises(ValueError, match=f"{name} cannot be read as"):
      engine.read(tmp_path / name)
  with pytest.raises(ValueError, match=r"write \.safetensors, \.npz or \.pth"):
    engine.write(tmp_path / "new.h5", {})
