"""`check packing`: passes what keeps the law and finds what breaks it."""

import pathlib

import jax
import numpy as np
import pytest

from big_vision_like import __main__ as command_line
from big_vision_like.commands import check
from big_vision_like.data import packing

SPEC = packing.PackSpec(length=29, patch=2, max_images=5)
# A model of one attention layer, with a leak of each kind to find.
MODEL = """
import flax.linen as nn
import jax
import jax.numpy as jnp
from big_vision_like.models.layers import attention


class Model(nn.Module):
  num_classes: int
  attention: str
  dtype: str
  leak: str

  @nn.compact
  def __call__(self, *, patches, segment_ids, example_mask, train, **unused):
    x = nn.Dense(6, dtype=self.dtype)(patches)
    ids = segment_ids
    if self.leak == "attention":
      ids = jnp.zeros_like(ids)
    q = x.reshape(*x.shape[:2], 2, 3)
    y = attention.attention(q, q, q, segment_ids=ids, backend=self.attention)
    x = x + y.reshape(x.shape)
    row = x.mean(1, keepdims=True)
    if self.leak == "gradient":
      x = x + (row - jax.lax.stop_gradient(row))
    if self.leak == "bits":
      x = x + 3e-6 * row
    if self.leak == "nan":
      x = x * jnp.nan
    slots = jnp.arange(1, example_mask.shape[1] + 1)
    own = segment_ids[:, None] == slots[:, None]
    pooled = jnp.einsum("bml,bld->bmd", own.astype(x.dtype), x)
    pooled = pooled / jnp.maximum(own.sum(-1, keepdims=True), 1)
    return {"pooled": pooled, "logits": nn.Dense(self.num_classes)(pooled)}
"""
CONFIG = """
from ml_collections import ConfigDict


def get_config(arg="none"):
  return ConfigDict(dict(
    model=dict(name="leaks.model", leak=arg, dtype="float32"),
    task=dict(name="classification", labels="multi_label"),
    data=dict(pack=dict(length=29, patch=2, max_images=5)),
    mesh=dict(data=-1),
    sharding="data",
  ))
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
  (tmp_path / "leaks").mkdir()
  (tmp_path / "leaks" / "model.py").write_text(MODEL)
  (tmp_path / "config.py").write_text(CONFIG)
  monkeypatch.syspath_prepend(tmp_path)
  return str(tmp_path / "config.py")


def run(capsys, *argv):
  """The exit code and the lines that were printed."""
  code = command_line.main(["check", "packing", "--config", *argv])
  return code, capsys.readouterr().out.splitlines()


def failed(lines):
  """The checks that failed, by their first word."""
  return {line.split()[2] for line in lines if line.endswith("FAIL")}


def test_a_model_that_keeps_the_law_passes(config, capsys):
  code, lines = run(capsys, config, "--images", "13")
  assert code == 0
  assert lines[-1] == "The law of packing holds."
  assert "13 images in " in lines[0]
  assert f"{jax.device_count()} x cpu" in lines[0]
  passed = [line for line in lines if line.endswith("PASS")]
  assert len(passed) == 2 * 4
  for backend in ("xla", "blockwise"):
    (bits,) = [x for x in passed if x.split()[0] == backend and "new" in x]
    assert "bit-equal" in bits
  for backend, platform in (("splash", "TPUs"), ("cudnn", "GPUs")):
    (line,) = [x for x in lines if x.startswith(backend)]
    assert f"not run it is for {platform}" in " ".join(line.split())


@pytest.mark.parametrize(
  ("leak", "checks"),
  [
    ("attention", {"logits:", "pooled:", "gradient:", "new"}),
    ("gradient", {"gradient:"}),
    ("bits", {"new"}),
    ("nan", {"logits:", "pooled:", "gradient:", "new"}),
  ],
)
def test_leaks_are_found(config, capsys, leak, checks):
  code, lines = run(capsys, f"{config}:{leak}", "--backend", "xla")
  assert code == 1
  assert failed(lines) == checks
  assert lines[-1] == f"{len(checks)} checks failed."


def test_the_dtype_of_the_config_is_checked_beside_float32(config, capsys):
  text = pathlib.Path(config).read_text()
  pathlib.Path(config).write_text(text.replace("float32", "bfloat16"))
  code, lines = run(capsys, config, "--backend", "xla", "cudnn")
  assert code == 0
  checked = [line.split()[:2] for line in lines if line.endswith("PASS")]
  assert checked == [["xla", "float32"]] * 4 + [["xla", "bfloat16"]] * 4
  reasons = [line for line in lines if line.startswith("cudnn")]
  assert len(reasons) == 2
  for line in reasons:
    assert "not run" in line
    assert "Attention backend 'cudnn'" in line


def test_grids_have_the_extremes_and_fit_half_a_row():
  for max_side in (None, 7):
    spec = packing.PackSpec(29, 2, 5, max_side)
    grids = check.draw_grids(spec, 199, np.random.default_rng(0))
    side = max_side or 14
    assert grids[:3] == [(1, side), (side, 1), (1, 1)]
    assert len(grids) == 199
    for h, w in grids:
      assert 1 <= h <= side
      assert 1 <= w <= side
      assert h * w <= 14
    # The shapes differ, or the positions would not be put to the test.
    assert len(set(grids)) > 20


def test_the_same_images_are_packed_and_alone():
  packed, alone = check.pack_images(
    SPEC, 17, np.random.default_rng(0), parts=4, classes=3
  )
  assert {len(rows.batch["patches"]) % 4 for rows in [packed, *alone]} == {0}
  assert len({rows.batch["patches"].shape for rows in [packed, *alone]}) == 1
  assert sorted(packed.places) == list(range(17))
  assert sorted(i for rows in alone for i in rows.places) == list(range(17))

  def tokens(rows, i):
    row, slot = rows.places[i]
    mine = rows.batch["segment_ids"][row] == slot + 1
    return rows.batch["patches"][row, mine], rows.batch["positions"][row, mine]

  for rows in alone:
    for i, (row, slot) in rows.places.items():
      assert slot == 0
      assert rows.batch["segment_ids"][row].max() == 1
      for a, b in zip(tokens(rows, i), tokens(packed, i)):
        np.testing.assert_array_equal(a, b)
  # Otherwise nothing would be tested.
  assert packed.batch["segment_ids"].max() > 1


def test_errors_are_relative_to_what_varies():
  rng = np.random.default_rng(0)
  a = {i: rng.normal(size=5) - 1000 for i in range(7)}
  b = {i: x.copy() for i, x in a.items()}
  b[3][2] += 0.5
  assert check.difference(a, b) == pytest.approx(0.5)
  values = np.stack(list(a.values()))
  assert check.spread(a) == np.abs(values - values.mean(0)).max()
  b[3][2] = np.nan
  assert np.isnan(check.difference(a, b))


def test_gradients_name_the_worst_parameter():
  b = {"large": np.array([100.0, 1]), "small": np.array([1e-9, 0])}
  a = {"large": np.array([101.0, 1]), "small": np.array([3e-9, 0])}
  # Next to nothing in "small": it counts as 0.1, a thousandth of the largest.
  assert check.gradient_error(a, b) == ("large", pytest.approx(0.01))
  a["small"] = np.array([0.02, 0])
  assert check.gradient_error(a, b) == ("small", pytest.approx(0.2))
  a["large"] = np.array([np.nan, 1])
  worst, error = check.gradient_error(a, b)
  assert worst == "large"
  assert np.isnan(error)


def test_refusals(config, capsys, tmp_path):
  (tmp_path / "stacked.py").write_text(
    pathlib.Path(config)
    .read_text()
    .replace("pack=dict(length=29, patch=2, max_images=5)", "pack=None")
  )
  for argv, sentence in (
    ((f"{tmp_path}/none.py",), "There is no config file"),
    ((config, "--images", "1"), "packing takes at least 2"),
    ((f"{tmp_path}/stacked.py",), "does not pack images"),
  ):
    assert command_line.main(["check", "packing", "--config", *argv]) == 2
    assert sentence in capsys.readouterr().err
  for argv in ([], ["--config", "a", "--run", "b"]):
    with pytest.raises(SystemExit):
      command_line.main(["check", "packing", *argv])


def test_config_files_take_their_argument(config):
  assert check.load_config(config).model.leak == "none"
  assert check.load_config(f"{config}:a=b:c").model.leak == "a=b:c"
