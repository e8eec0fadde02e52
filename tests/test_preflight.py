"""Plans for chips that are not here."""

import importlib.util
import math
import re
import types

import pytest

from big_vision_like import build, chips, preflight, sharding, trees
from big_vision_like.commands import check
from big_vision_like.commands import preflight as command


@pytest.mark.parametrize(
  ("name", "sentence"),
  [
    (
      "v5e-256",
      "there is no chip 'v5e-256'. There are: v4, v5e, v5p, v6e, a100",
    ),
    ("v5e:256", "the chips of v5e are given as in v5e:16x16"),
    ("v4:4x4", "the chips of v4 are given as in v4:4x4x4"),
    ("h100:2x2x2", "the chips of h100 are given as in h100:8 or 4x8, hosts x"),
    ("h100:", "the chips of h100"),
    ("v6e:0x4", "the chips of v6e"),
  ],
)
def test_topology_refusals(name, sentence):
  with pytest.raises(ValueError, match=re.escape(sentence)):
    chips.parse(name)


def test_every_chip_has_a_peak():
  for name, chip in chips.CHIPS.items():
    assert chip.peak > 1e14, name
  assert chips.parse("v5p:4x4x8").size == 128
  assert chips.parse("h200:4x8").size == 32


def test_a_missing_libtpu_is_a_sentence(monkeypatch):
  monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=re.escape('pip install -e ".[tpu]"')):
    chips.parse("v5e:2x2").devices()


def test_links_are_counted_by_the_axes_that_a_group_spans():
  torus = {
    (x, y): types.SimpleNamespace(coords=(x, y, 0))
    for x in range(4)
    for y in range(2)
  }
  assert chips.links(list(torus.values())) == 3
  assert chips.links([torus[x, 1] for x in range(4)]) == 2
  assert chips.links([torus[1, 0], torus[1, 1]]) == 1


@pytest.mark.parametrize(
  ("fixed", "limit", "want"),
  [(100, 1000, 896), (100, 140, 32), (1, 1e6, None), (2000, 1000, 0)],
)
def test_the_largest_batch_is_found(fixed, limit, want):
  """With a compiler that needs a byte a row, and sometimes only refuses."""
  calls = []

  def used(rows):
    calls.append(rows)
    assert rows > 0
    assert rows % 8 == 0
    need = fixed + rows
    return math.inf if need > 1.5 * limit else need

  known = preflight.largest_batch(
    used, 256, used(256), empty=fixed / 2, limit=limit, unit=8, tries=12
  )
  assert len(calls) == len(set(calls)) <= 13
  best = max((b for b, u in known.items() if u <= limit), default=0)
  if want is None:  # Out of reach in so few tries, but not far.
    assert best > 0.9 * limit
  else:
    assert best <= limit - fixed or best == 0
    assert best >= want - max(8, 0.03 * limit)


def test_of_a_line_the_largest_batch_is_the_first_guess():
  calls = []

  def used(rows):
    calls.append(rows)
    return 300.0 + rows

  settings = dict(empty=300.0, limit=1000.0, unit=8, tries=6)
  preflight.largest_batch(used, 64, used(64), **settings)
  assert calls == [64, 680]  # 985 bytes: 3 % less than the limit is near.


def test_the_compiler_s_refusal_says_what_it_needed():
  message = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in "
    "memory space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by"
  )
  assert preflight.needed_bytes(message) == 20.5 * 2**30
  assert (
    preflight.needed_bytes("RESOURCE_EXHAUSTED: something else") == math.inf
  )


def tiny(**changes):
  config = check.load_config("configs/navit_jft.py:size=B/16")
  with config.unlocked():
    config.model.sizes = dict(width=24, depth=3, mlp=32, heads=2)
    config.batch_size = 64
    config.data.pack.length = 96
    config.update_from_flattened_dict(changes)
  return config


def plan(target, **changes):
  config = tiny(**changes)
  mesh = sharding.make_mesh(dict(config.mesh))
  return preflight.Plan(build.build(config, mesh=mesh), chips.parse(target))


def test_an_estimate_counts_parameters_state_and_what_is_kept():
  one = plan("h100:8", **{"optim.name": "adamw"})
  count = trees.count(one.state.params)
  step = one.step(64)
  assert step.memory["parameters"] == step.memory["gradients"] == 4 * count
  # Two moments, and a few counts.
  assert 8 * count <= step.memory["optimizer state"] < 8 * count + 100
  # A row keeps at least its blocks' inputs, queries, keys, values, attention's
  # outputs and hidden layers, in bfloat16; and not ten times as much.
  least = 2 * 3 * 96 * (24 * 5 + 32) * 64 / 8
  assert least < step.memory["activations"] < 10 * least
  assert one.step(128).memory["activations"] == pytest.approx(
    2 * step.memory["activations"]
  )
  (gradients,) = step.traffic
  assert (gradients.op, gradients.dtype) == ("all-reduce", "bfloat16")
  assert gradients.bytes == 2 * count
  assert step.model_flops == pytest.approx(
    build.count_step_flops(one.parts, build.make_optimizer(one.parts)[0])
  )
  assert 0 < step.bound < 1


def test_fully_sharded_state_is_an_eighth_and_is_gathered_twice():
  whole, cut = (
    plan("h100:8", **{"mesh.data": d, "mesh.fsdp": f, "sharding": s})
    for d, f, s in ((8, 1, "data"), (1, 8, "fsdp"))
  )
  flat = trees.flatten(whole.state.params)
  kernels = sum(x.size for k, x in flat.items() if k.endswith("kernel"))
  rest = trees.count(whole.state.params) - kernels
  memory = cut.step(64).memory
  assert memory["parameters"] == 4 * (kernels // 8 + rest)
  traffic = {t.op: t for t in cut.step(64).traffic}
  assert traffic["all-gather"].bytes == 2 * 2 * kernels
  assert traffic["reduce-scatter"].bytes == 2 * kernels // 8


def test_tables_say_what_they_are(capsys):
  one = plan("h100:8")
  step = one.step(64)
  text = "\n".join(command.tables(step, one, " (estimate)"))
  assert "### Memory of one chip (estimate)" in text
  assert "It fits: a program may use 74.51 GiB." in text
  assert "traffic with main memory" not in text
  assert "Hand-written kernels: none." in text
  refused = preflight.Step(64, used=math.inf)
  (text,) = command.tables(refused, one, "")
  assert "It does not fit" in text


@pytest.mark.parametrize(
  ("change", "sentence"),
  [
    ("batch_size", "--set batch_size: give a key and a value, as in a.b=1."),
    ("optim.lrr=1", "--set optim.lrr=1: "),
  ],
)
def test_changes_of_the_config_are_checked(change, sentence):
  config = tiny()
  command.override(config, ["optim.lr=0.5", "sharding=fsdp", "mesh.fsdp=4"])
  assert (config.optim.lr, config.sharding, config.mesh.fsdp) == (
    0.5,
    "fsdp",
    4,
  )
  with pytest.raises(ValueError, match=re.escape(sentence)):
    command.override(config, [change])


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="needs the extra tpu"
)
@pytest.mark.parametrize(
  ("topology", "changes"),
  [
    ("v5e:4x4", {"mesh.fsdp": 4, "sharding": "fsdp"}),
    ("v4:2x2x1", {"data.pack.length": 1024, "data.pack.max_images": 64}),
    ("v5p:2x2x1", {}),
    ("v6e:2x2", {}),
  ],
)
def test_tpu_slices_compile(topology, changes):
  """The real compiler, the step as it is trained."""
  config = tiny(**changes)
  config.model.sizes = dict(width=256, depth=3, mlp=512, heads=2)
  target = chips.parse(topology)
  mesh = sharding.make_mesh(dict(config.mesh), target.devices())
  one = preflight.Plan(build.build(config, mesh=mesh), target)
  assert mesh.devices.flat[0].device_kind == target.chip.kind
  step = one.step(64)
  assert 0 < step.used < 0.1 * one.limit
  # A chip's arguments are ours, up to the padding of small arrays to tiles.
  assert 0 <= step.memory["padding of these"] < 2e6
  assert 0 < step.bound < 1
  assert step.memory_seconds > 0
  ops = {t.op for t in step.traffic}
  if "mesh.fsdp" in changes:
    # The weights are gathered, and not the batch.
    assert "all-gather" in ops
    assert step.memory["activations, temporaries"] < 100e6
  else:
    (reduced,) = {t.chips for t in step.traffic}
    assert reduced == target.size
    total = sum(t.bytes for t in step.traffic)
    # Gradients travel in bfloat16, as the products give them.
    assert total == pytest.approx(2 * trees.count(one.state.params), rel=0.05)
  # Long packed rows take the kernel that skips foreign blocks.
  kernels = set(step.kernels)
  assert any("splash" in k for k in kernels) == ("data.pack.length" in changes)
