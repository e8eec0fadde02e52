"""The tables of speed: their structure, and that all do the same work."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vision_like import __main__ as command_line
from big_vision_like import sharding, train_step, trees
from big_vision_like.benchmarks import (
  contrastive,
  detr,
  loader,
  measure,
  models,
  padding,
  step,
  utilisation,
  wait,
  workload,
)

pytestmark = pytest.mark.usefixtures("compile_quickly")

TINY = workload.Size(width=12, depth=1, heads=3, mlp=13)


def cells(table: str) -> list[list[str]]:
  """The header and the rows of a markdown table."""
  lines = [line for line in table.splitlines() if line.startswith("|")]
  assert set(lines.pop(1)) == {"|", "-"}
  return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]


def test_ratio_is_the_median_within_rounds():
  times = measure.Times({"a": [1.0, 2.0, 9.0], "b": [2.0, 6.0, 9.0]})
  assert times.median("a") == 2.0
  assert times.ratio("b", "a") == 2.0  # of 2, 3 and 1


def test_rounds_interleave_after_the_warmup():
  seen = []
  calls = {k: lambda k=k: seen.append(k) for k in "ab"}
  times = measure.interleaved(calls, repeats=3, warmup=2)
  assert "".join(seen) == "aabb" + "ab" * 3
  assert [len(x) for x in times.seconds.values()] == [3, 3]


def test_table_fills_gaps_and_keeps_the_order():
  rows = [{"x": 1, "y": 0.123456}, {"x": 22222.0, "z": "n"}]
  table = measure.table("T", rows, "A note.")
  assert cells(table) == [
    ["x", "y", "z"],
    ["1", "0.123", ""],
    ["22,222", "", "n"],
  ]
  assert table.startswith("### T\n")
  assert table.endswith("A note.")


def test_images_are_whole_patches_of_the_promised_sizes():
  work = workload.make_workload()
  sides = np.array([image.shape[:2] for image in work.images])
  assert not (sides % workload.PATCH).any()
  root = np.sqrt(sides.prod(1))
  assert root.min() >= 48
  assert root.max() <= 256
  assert 100 <= work.lengths.mean() <= 130


@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_packed_batch_holds_every_image_once(drop):
  work = workload.Workload(
    workload.make_workload(7).images, np.arange(7), drop=drop
  )
  pack = workload.Packer(work, 512)
  batch = pack()
  assert batch["patches"].shape[:2] == (pack.rows, 512)
  assert (batch["segment_ids"] > 0).sum() == work.lengths.sum()
  assert sorted(batch["label"][batch["label"] >= 0]) == list(range(7))
  for row, members in enumerate(pack.members):
    for slot, i in enumerate(members):
      ours = batch["patches"][row][batch["segment_ids"][row] == slot + 1]
      h, w = (n // workload.PATCH for n in work.images[i].shape[:2])
      theirs = work.images[i].reshape(h, 16, w, 16, 3).swapaxes(1, 2)
      known = {x.tobytes() for x in theirs.reshape(h * w, -1)}
      assert len(ours) == work.lengths[i]
      assert all(x.tobytes() in known for x in ours)
      assert batch["label"][row, slot] == i


def test_our_step_trains():
  work = workload.make_workload(5)
  _, run = workload.our_step(work, 256, size=TINY, dtype="float32")
  losses = [run() for _ in range(12)]
  assert np.isfinite(losses).all()
  assert losses[-1] < losses[0]


def test_step_table_says_what_is_not_installed(monkeypatch):
  monkeypatch.setattr(step, "installed", lambda peer: False)
  header, *rows = cells(
    step.run(images=3, lengths=(256,), drops=(0.0,), repeats=1, size=TINY)
  )
  assert header[3:6] == ["tokens", "slots", "ours"]
  assert len(rows) == 1
  assert rows[0][6:] == ["not installed"] * 2


@pytest.mark.parametrize(("length", "drop"), [(1024, 0.5), (4096, 0.0)])
def test_longer_rows_are_full(length, drop):
  few = workload.make_workload(32, drop=drop)
  work = workload.fill_rows(few, length)
  assert len(work.images) > 32
  assert work.lengths.sum() / workload.Packer(work, length).slots > 0.93


def test_step_needs_neither_loader_nor_sources():
  code = (
    "import sys; from big_vision_like.benchmarks import step; "
    "print({'grain', 'tensorflow_datasets', 'ml_collections', 'torch'} "
    "& set(sys.modules))"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert done.stdout.strip() == "set()"


def test_loader_table_times_the_same_images():
  data = loader.dataset(256, 256, rows=2, drop=0.5)
  ids = data[0]["example_id"]
  slots = loader.slots_of(data)
  assert sorted(ids[ids >= 0]) == sorted(slot.index for slot in slots)
  assert len(loader.resize_all(data)) == len(slots)
  header, *rows = cells(loader.run(rows=4, repeats=1))
  assert header[1:4] == [
    "decode",
    "decode, resize",
    "decode, resize, drop, pack",
  ]
  assert [row[0] for row in rows] == ["256", "1024"]
  # Packing cannot be faster than what it contains; the slack is noise.
  assert all(0 < float(row[4].rstrip("%")) < 120 for row in rows)


def test_padding_keeps_its_promises():
  header, *rows = cells(padding.run(rows=256))
  assert header == ["packing", "rows of 256", "rows of 1,024", "at most"]
  share = {row[0]: [float(x.rstrip("%")) for x in row[1:3]] for row in rows}
  assert max(share["planned, with dropping"]) <= 1
  assert max(share["exact, native sizes, evaluation"]) <= 2
  assert len(rows) == 7


def test_padding_counts_what_the_loader_packs():
  data = loader.dataset(256, 256, rows=32, drop=0.5)
  fill = data[0]["num_tokens"].sum() / (32 * 256)
  assert 1 - fill <= 0.01


@pytest.mark.slow
def test_wait_table_reads_a_real_run():
  table = wait.run(
    config=f"{wait.CONFIG}:steps=4", steps=4, every=2, batch_size=8
  )
  (header, row) = cells(table)
  assert header == [
    "config",
    "steps",
    "steps/s",
    "images/s",
    "waiting",
    "worst",
  ]
  assert row[1] == "4"
  assert float(row[3]) > 0
  assert 0 <= float(row[4].rstrip("%")) <= 100


def test_contrastive_table_has_all_forms(monkeypatch):
  monkeypatch.setattr(contrastive, "installed", lambda: False)
  small = dict(names=contrastive.LOSSES, batches=[64, 128], width=8, repeats=1)
  rows = contrastive.rows(**small)
  assert [(row["loss"], row["batch"]) for row in rows] == [
    ("softmax", 64),
    ("softmax", 128),
    ("sigmoid", 64),
    ("sigmoid", 128),
  ]
  for row in rows:
    assert row["devices"] == 8
    for form in ("ring", "gather", "dense"):
      assert row[f"{form}, s"] > 0
      assert row[f"{form}, MB"] > 0
    assert row["ring / dense"] > 0


def test_contrastive_losses_leave_room_in_memory():
  total = 24 * 10**9  # of which both together took more, at 32,768 pairs
  assert contrastive.fit(270 * 10**6, 4096, total) == (True, True)
  assert contrastive.fit(9_400 * 10**6, 32_768, total) == (True, False)
  assert contrastive.fit(140 * 10**9, 131_072, total) == (False, False)


def test_contrastive_forms_compute_the_same():
  args = (*contrastive.embeddings(40, 8), np.float32(10), np.float32(-10))
  for name in contrastive.LOSSES:
    some = args[: 3 if name == "softmax" else 4]
    forms = [contrastive.chunked(name, form) for form in ("ring", "gather")]
    with jax.set_mesh(sharding.make_mesh({"data": 8})):
      losses = [jax.jit(f)(*some) for f in (contrastive.dense(name), *forms)]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)


def test_contrastive_devices_are_those_asked_for():
  table = contrastive.run(batches=[64], devices=2, pairs=16, width=8, repeats=0)
  rows = [line.split("|") for line in table.splitlines() if "| softmax" in line]
  assert [row[3].strip() for row in rows] == ["2", "4"]


def test_matching_table_is_of_equal_matches():
  header, *rows = cells(
    detr.matching_table(images=2, queries=11, slots=7, repeats=1)
  )
  assert header[:2] == ["costs", "targets"]
  assert [row[1] for row in rows[1::2]] == ["14"] * 2
  for row in rows:
    assert float(row[header.index("ours / scipy")]) > 0
    # A few roundings of float32.
    assert abs(float(row[header.index("excess")])) < 1e-4


def test_verb_prints_one_table(capsys):
  assert command_line.main(["bench", "padding"]) == 0
  assert capsys.readouterr().out.startswith("### Padding")


@pytest.mark.parity
@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_vit_pytorch_gets_the_same_tokens(drop):
  pytest.importorskip("vit_pytorch")
  from big_vision_like.benchmarks import peers

  work = workload.Workload(
    workload.make_workload(7).images, np.arange(7), drop=drop
  )
  model, images = peers.vit_pytorch_model(work, size=TINY)
  seen = []
  model.transformer.register_forward_pre_hook(
    lambda module, args, kwargs: seen.append(kwargs["attn_mask"]),
    with_kwargs=True,
  )
  logits = model.train()(images, group_images=True, group_max_seq_len=512)
  assert logits.shape == (7, workload.CLASSES)
  # A token that is not padding sees itself.
  (mask,) = seen
  assert mask.diagonal(dim1=-2, dim2=-1).sum() == work.lengths.sum()
  for ours, theirs in zip(work.images, images):
    pixels = (theirs.permute(1, 2, 0).numpy() + 1) * 127.5
    np.testing.assert_array_equal(np.rint(pixels).astype(np.uint8), ours)


@pytest.mark.parity
def test_naflex_gets_the_same_patches():
  pytest.importorskip("timm")
  from big_vision_like.benchmarks import peers

  work = workload.make_workload(5)
  model, inputs = peers.naflex_model(work, size=TINY)
  assert model(inputs).shape == (5, workload.CLASSES)
  valid = inputs["patch_valid"].numpy()
  np.testing.assert_array_equal(valid.sum(1), work.lengths)
  batch = workload.Packer(work, 4096)()
  ours = batch["patches"][batch["segment_ids"] > 0]
  theirs = np.rint((inputs["patches"].numpy()[valid] + 1) * 127.5)
  # Both in the order of their images: compare them as sets.
  assert sorted(x.tobytes() for x in ours) == sorted(
    x.tobytes() for x in theirs.astype(np.uint8)
  )


@pytest.mark.parity
@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_step_table_has_a_ratio_for_each_peer(drop):
  pytest.importorskip("vit_pytorch")
  pytest.importorskip("timm")
  header, row = cells(
    step.run(images=3, lengths=(256,), drops=(drop,), repeats=1, size=TINY)
  )
  for peer in step.PEERS:
    assert float(row[header.index(f"ours / {peer}")]) > 0


@pytest.mark.parity
def test_models_are_measured_against_timms(monkeypatch):
  pytest.importorskip("timm")
  # The backward pass of a convolutional network takes minutes to compile.
  monkeypatch.setattr(models, "TRAINED", ("vit",))
  pairs = [
    models.Pair("efficientvit", "M0", "efficientvit_m0", 64),
    models.Pair("vit", "Ti/16", "vit_tiny_patch16_224", 224),
  ]
  header, *rows = cells(
    models.run(pairs=pairs, batches=(2,), repeats=1, modes=("eager",))
  )
  assert [row[1] for row in rows] == ["forward", "forward", "training"]
  for row in rows:
    assert float(row[header.index("ours / timm")]) > 0


@pytest.mark.slow
@pytest.mark.parity
def test_detr_is_measured_against_transformers():
  pytest.importorskip("transformers")
  pytest.importorskip("timm")
  sizes = dict(encoder_depth=1, decoder_depth=1)
  header, *rows = cells(
    detr.steps_table([1], (64, 96), sizes, repeats=1, modes=("eager",))
  )
  assert [row[0] for row in rows] == ["inference", "training"]
  for row in rows:
    assert float(row[header.index("ours / transformers")]) > 0
  for objects in (detr.OBJECTS, detr.MOST):
    share = rows[1][header.index(f"matching, {objects} objects")]
    assert 0 < float(share.rstrip("%")) < 100


@pytest.mark.parity
def test_both_detrs_train_the_same_parameters():
  transformers = pytest.importorskip("transformers")
  pytest.importorskip("timm")
  config = transformers.DetrConfig(backbone="resnet50", num_labels=detr.CLASSES)
  theirs = detr.freeze(transformers.DetrForObjectDetection(config))
  init = functools.partial(
    train_step.init_variables, detr.make_model({}), detr.TASK
  )
  batch = detr.make_batch(1, (64, 96))
  params, _ = jax.eval_shape(init, jax.random.key(0), batch)
  ours, _ = trees.split(params, detr.FROZEN)
  count = sum(map(jnp.size, jax.tree.leaves(ours)))
  # What the paper calls 41.3M.
  assert sum(p.numel() for p in theirs) == count == 41_302_368


@pytest.mark.parity
def test_utilisation_is_model_flops_over_the_peak(monkeypatch):
  """On the CPU, which stands for an accelerator; torch is not compiled."""
  pytest.importorskip("timm")
  pytest.importorskip("vit_pytorch")
  assert "needs a GPU or a TPU" in utilisation.run()
  theirs = models.their_training
  monkeypatch.setattr(
    models,
    "their_training",
    lambda pair, batch, mode, **kw: theirs(pair, batch, "eager", **kw),
  )
  pair = models.Pair("vit", "Ti/16", "vit_tiny_patch16_224", 224)
  work = workload.make_workload(3)
  cases = {
    "ViT": utilisation.vit(pair, 2),
    "NaViT": utilisation.navit(work, 256, TINY),
  }
  header, *rows = cells(utilisation.table(cases, repeats=1, side=256))
  at = {name: header.index(name) for name in header}
  for row, images in zip(rows, (2, 3)):
    assert row[at["images"]] == str(images)
    assert 0 < float(row[at["of the peak"]].rstrip("%"))
    assert float(row[at["ours / torch"]]) > 0
  # Three times the forward pass, but for the input's gradient.
  flops = 1e12 * float(rows[0][at["TFLOP/s"]]) / float(rows[0][at["ours"]])
  assert flops == pytest.approx(3 * 2 * 1.254e9, rel=0.03)
