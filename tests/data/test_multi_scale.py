"""The multi-scale sampler: a closed set of shapes, one stream of images."""

import dataclasses
import json
import os
import pickle
import re
import signal
from typing import ClassVar

import flax.linen as nn
import jax
import numpy as np
import pytest
from scipy import stats

from big_vision_like import build, checkpoint, pictures, sharding, train
from big_vision_like.data import batches, multi_scale, pipeline
from configs import vit_jft

SCALES = ((16, 16, 12), (23, 16, 8), (32, 32, 4))


@dataclasses.dataclass(frozen=True)
class Noise:
  """Images that hold their index."""

  size: int = 101
  label_names: ClassVar[tuple[str, ...]] = tuple("abcdefg")

  def __len__(self):
    return self.size

  def hw(self, index):
    return 40, 37

  def __getitem__(self, index):
    rng = np.random.default_rng(index)
    image = rng.integers(0, 256, (40, 37, 3), dtype=np.uint8)
    return {"id": index, "label": index % 7, "image": image}

  def name(self, index):
    return f"noise/{index}"


def data(**kwargs):
  settings = dict(
    ops="decode|random_resized_crop(({h}, {w}))|flip_lr",
    scales=SCALES,
    batch_size=8,
    total_steps=14,
    seed=3,
    num_classes=7,
  )
  return pipeline.train_data(Noise(), **settings | kwargs)


def assert_same(left, right):
  assert left.keys() == right.keys()
  for key in left:
    np.testing.assert_array_equal(left[key], right[key], err_msg=key)


@pytest.mark.parametrize(
  ("at_least", "multiple", "expected"),
  [
    # ml-cvnets' main branch and its version 0.1, for 128 images of 256 px on
    # each of 8 devices; measured by running both.
    (1, 1, (327, 227, 128, 101, 81)),
    (128, 8, (328, 224, 128, 128, 128)),
  ],
)
def test_batch_sizes_are_those_of_ml_cvnets(at_least, multiple, expected):
  sides = (160, 192, 256, 288, 320)
  found = multi_scale.scales(
    sides, base=256, batch_size=128, multiple=multiple, at_least=at_least
  )
  assert found == tuple((s, s, b) for s, b in zip(sides, expected, strict=True))
  # The global batch of the paper is eight times that.
  if at_least > 1:
    found = multi_scale.scales(
      sides, base=256, batch_size=1024, multiple=64, at_least=1024
    )
    assert [b for *_, b in found] == [8 * b for b in expected]


def test_rounding_takes_away_no_more_than_a_tenth():
  # 11 of 8 would be 8, which is 27 % less; 15 is 16.
  sizes = multi_scale.scales((1,), base=1, batch_size=11, multiple=8)
  assert sizes == ((1, 1, 16),)
  assert multi_scale.scales((64,), base=8, batch_size=8) == ((64, 64, 1),)


def test_every_batch_has_a_shape_of_the_closed_set():
  dataset = data(total_steps=60)
  seen = set()
  for step in range(60):
    batch = dataset[step]
    n, h, w, _ = batch["image"].shape
    seen.add((h, w, n))
    assert all(len(x) == n for x in batch.values())
    assert batch["_mask"].all()
  assert seen == set(SCALES)
  shapes = [tuple(s["image"].shape) for s in pipeline.specs(dataset)]
  assert shapes == [(b, h, w, 3) for h, w, b in SCALES]
  # What the run is initialised with is the most that a step can need.
  assert pipeline.spec(dataset)["image"].shape == (4, 32, 32, 3)


def test_scales_are_drawn_uniformly_by_seed_and_step():
  plan = multi_scale.Plan((12, 8, 4), seed=3, steps=6000)
  counts = np.bincount(plan.choices, minlength=3)
  assert stats.chisquare(counts).pvalue > 1e-3
  pairs = np.bincount(plan.choices[:-1] * 3 + plan.choices[1:], minlength=9)
  assert stats.chisquare(pairs).pvalue > 1e-3
  longer = dataclasses.replace(plan, steps=7001)
  np.testing.assert_array_equal(longer.choices[:6000], plan.choices)
  np.testing.assert_array_equal(longer.starts[:6001], plan.starts)
  other = dataclasses.replace(plan, seed=4)
  assert (other.choices != plan.choices).mean() > 0.5


def test_the_stream_of_images_is_the_one_without_scales():
  """No image is skipped or comes twice in an epoch, whatever the shapes."""
  dataset = data(total_steps=40)
  ids = np.concatenate([dataset[s]["example_id"] for s in range(40)])
  assert len(ids) == dataset.plan.starts[-1] > 2 * 101
  order = batches.Shuffle(101, 3)
  np.testing.assert_array_equal(ids, [order(p) for p in range(len(ids))])
  for epoch in (ids[:101], ids[101:202]):
    assert len(set(epoch)) == 101


def test_hosts_share_each_batch_and_agree_on_its_shape():
  whole = data()
  halves = [data(parts=(i,), part_count=2) for i in range(2)]
  for step in (0, 5, 13):
    parts = [half[step] for half in halves]
    together = {k: np.concatenate([p[k] for p in parts]) for k in whole[step]}
    assert_same(together, whole[step])
  assert pipeline.spec(halves[0]) == pipeline.spec(whole)
  with pytest.raises(ValueError, match="batch size 12 is not divisible by"):
    data(part_count=8)


@pytest.mark.parametrize(
  ("workers", "threads", "start"), [(0, 0, 0), (0, 3, 6), (2, 1, 5)]
)
def test_any_number_of_workers_and_any_start_agree(workers, threads, start):
  wanted = [data()[s] for s in range(14)]
  iterator = pipeline.open_iterator(
    pickle.loads(pickle.dumps(data())),
    start=start,
    workers=workers,
    threads=threads,
  )
  for step, batch in enumerate(iterator, start):
    assert_same(batch, wanted[step])
    assert iterator.get_state() == step + 1
  assert step == 13
  iterator.close()


def test_a_longer_run_begins_with_the_same_batches():
  for step in (0, 13):
    assert_same(data(total_steps=20)[step], data()[step])
  with pytest.raises(IndexError, match="no step 14"):
    data()[14]


def test_repeats_are_those_of_deits_sampler():
  """Positions 0..n of an epoch: the first third of it, three times each."""
  plain, order = batches.Shuffle(101, 3), batches.Shuffle(101, 3, repeats=3)
  for epoch in range(2):
    start = epoch * 101
    expected = np.repeat([plain(start + i) for i in range(34)], 3)[:101]
    found = [order(start + i) for i in range(101)]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parity
def test_repeats_are_timms(monkeypatch):
  """All ranks of timm's sampler together, on our permutation."""
  import torch
  from timm.data.distributed_sampler import RepeatAugSampler

  n = 768  # a multiple of 256, to which timm rounds an epoch down
  plain, order = batches.Shuffle(n, 5), batches.Shuffle(n, 5, repeats=3)
  permutation = torch.tensor([plain(i) for i in range(n)])
  monkeypatch.setattr(torch, "randperm", lambda *_, **__: permutation)
  ranks = [
    list(RepeatAugSampler(range(n), num_replicas=4, rank=r)) for r in range(4)
  ]
  theirs = np.array(ranks).T.ravel()
  np.testing.assert_array_equal([order(p) for p in range(n)], theirs)


def test_repeats_of_an_image_are_augmented_anew():
  dataset = data(scales=None, ops="decode|random_crop(16)", repeats=3)
  batch = dataset[0]
  assert len(set(batch["example_id"][:3])) == 1
  assert len({image.tobytes() for image in batch["image"][:3]}) == 3


@pytest.mark.parametrize(
  ("changes", "sentence"),
  [
    (dict(scales=()), r"data\.scales = \[\]; it is a list"),
    (dict(scales=(16, 16, 8)), "list of different triples"),
    (dict(scales=((16, 16, 8), (16, 16, 8))), "list of different triples"),
    (dict(scales=((16, 16, 0),)), "list of different triples"),
    (dict(scales=((16, 16),)), "list of different triples"),
    (
      dict(ops="decode|random_resized_crop(16)"),
      "size 23 x 16, for which data.ops makes images of 16 x 16. Write {h}",
    ),
    (dict(repeats=0), "data.repeats is 1 or more, not 0"),
  ],
)
def test_refusals(changes, sentence):
  with pytest.raises(ValueError, match=sentence):
    data(**changes)


@pytest.mark.parametrize("changes", [dict(scales=SCALES), dict(repeats=3)])
def test_packed_rows_are_refused(changes):
  from big_vision_like.data.packing import PackSpec

  settings = dict(scales=None, ops="decode", pack=PackSpec(61, 5, 13))
  with pytest.raises(ValueError, match=r"need data\.pack = None"):
    data(**settings | changes)


class Linear(nn.Module):
  """Logits of the mean colour, for images of any size."""

  num_classes: int

  @nn.compact
  def __call__(self, image, *, train):
    pooled = image.mean((1, 2))
    return {"pooled": pooled, "logits": nn.Dense(self.num_classes)(pooled)}


@pytest.fixture
def quick(monkeypatch):
  """One device and a linear model, which compile sooner."""
  monkeypatch.setattr(build, "make_model", lambda config, n, text: Linear(n))
  monkeypatch.setattr(build, "count_step_flops", lambda *args: 1.0)
  make_mesh = sharding.make_mesh
  monkeypatch.setattr(
    sharding, "make_mesh", lambda shape: make_mesh(shape, jax.devices()[:1])
  )


def tiny(**changes):
  """A run of six steps with two sizes."""
  c = vit_jft.get_config("")
  with c.unlocked():
    c.total_steps = 6
    c.batch_size = 8
    c.log_every = 1
    c.data.ops = "decode|random_resized_crop(({h}, {w}))|flip_lr"
    c.data.scales = ((32, 32, 8), (16, 16, 24))
    c.evals = dict()
    c.checkpoint.every = 100
    c.checkpoint.best = None
    c.optim.name = "sgd"
    c.optim.schedule = dict(name="constant")
    for key, value in changes.items():
      c.update_from_flattened_dict({key: value})
  return c


def run(workdir, config, monkeypatch, *, stop_after=None):
  """Trains, and gives the losses by step and the final parameters."""
  advance = train._Run._advance

  def advance_and_stop(run):
    advance(run)
    if run.step == stop_after:
      os.kill(os.getpid(), signal.SIGTERM)

  with monkeypatch.context() as patched:
    patched.setattr(train._Run, "_advance", advance_and_stop)
    for name in ("training_batch", "learning_curves"):
      patched.setattr(pictures, name, lambda *args: None)
    train.train(config, workdir)
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  records = [r for r in map(json.loads, lines) if "train/loss" in r]
  losses = {r["step"]: r["train/loss"] for r in records}
  return losses, checkpoint.load_params(workdir)


def test_a_run_resumes_bitwise_between_shapes(tmp_path, monkeypatch, quick):
  losses, params = run(tmp_path / "whole", tiny(), monkeypatch)
  plan = build.build(tiny()).train_data.plan
  assert set(plan.choices[:3]) == set(plan.choices[3:]) == {0, 1}
  cut = tmp_path / "cut"
  run(cut, tiny(), monkeypatch, stop_after=3)
  # The number of threads that read must not matter either.
  again, same = run(cut, tiny(**{"data.threads": 1}), monkeypatch)
  assert sorted(losses) == list(range(1, 7))
  assert again == losses
  jax.tree.map(np.testing.assert_array_equal, params, same)
  # Images are those of the steps, not steps times one batch size.
  summary = (tmp_path / "whole" / "summary.txt").read_text()
  (images,) = re.findall(r"images seen\D*([\d,]+)", summary)
  assert int(images.replace(",", "")) == plan.starts[-1]
  assert plan.starts[-1] not in (6 * 8, 6 * 24)


def test_batches_that_the_devices_cannot_share_are_refused():
  config = tiny()
  with config.unlocked():
    config.data.scales = ((32, 32, 8), (16, 16, 20))
  with pytest.raises(
    ValueError, match=r"batch of 16 x 16 in config\.data\.sca"
  ):
    build.build(config)
  with config.unlocked():
    config.data.scales = ((32, 32, 16), (16, 16, 24))
    config.batch_size = 16
    config.accum_steps = 2
  with pytest.raises(ValueError, match=r"batch of 16 x 16 .* 12 cannot be"):
    build.build(config)
