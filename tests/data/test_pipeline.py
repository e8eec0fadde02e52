import dataclasses
import functools
import inspect
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import ClassVar

import cv2
import einops
import grain
import jax
import numpy as np
import pytest
import scipy.stats

from big_vision_like import api, sharding
from big_vision_like.data import batches, ops, packing, pipeline, streams
from big_vision_like.data.budgets import Drop, Sizes
from big_vision_like.data.packing import PackSpec

CLASSES = 7
SPEC = PackSpec(length=61, patch=5, max_images=13)
SIZES = Sizes("side", "uniform", 9, 41)
BETA = Drop("beta", max=0.8, mean=0.4)
ODD = ((1, 113), (131, 1), (2, 500), (1, 1), (211, 223))


@functools.cache
def shape(index):
  if index < len(ODD):
    return ODD[index]
  return tuple(np.random.default_rng(index).integers(7, 47, 2).tolist())


@dataclasses.dataclass(frozen=True)
class Pictures:
  """Noise of all shapes: odd indices as PNG, even ones as arrays."""

  size: int = 101
  broken: tuple[int, ...] = ()
  labels: tuple[tuple[int, int], ...] = ()  # wrong ones, by index
  width: int | None = CLASSES  # of multi_label

  label_names: ClassVar[tuple[str, ...]] = tuple("abcdefg")

  def __len__(self):
    return self.size

  def hw(self, index):
    if index in self.broken:
      raise ops.BrokenImage("no header")
    return shape(index)

  def pixels(self, index):
    rng = np.random.default_rng([index, 1])
    return rng.integers(1, 256, (*self.hw(index), 3)).astype(np.uint8)

  def __getitem__(self, index):
    example = {"id": index, "label": dict(self.labels).get(index, index % 7)}
    if self.width is not None:
      example["multi_label"] = np.arange(self.width) == index % 7
    if index in self.broken:
      return example | {"image": b"no image"}
    image = self.pixels(index)
    if index % 2:
      image = cv2.imencode(".png", image[..., ::-1])[1].tobytes()
    return example | {"image": image}

  def name(self, index):
    return f"pictures/{index}.png"


PICTURES = Pictures()


def train(source=PICTURES, **kwargs):
  settings = dict(
    ops="decode|flip_lr",
    pack=SPEC,
    sizes=SIZES,
    drop=BETA,
    batch_size=8,
    total_steps=9,
    seed=3,
    num_classes=CLASSES,
  )
  return pipeline.train_data(source, **settings | kwargs)


def stacked(source=PICTURES, **kwargs):
  settings = dict(
    ops="decode|random_resized_crop(23)|flip_lr",
    pack=None,
    sizes=None,
    drop=None,
  )
  return train(source, **settings | kwargs)


def evaluation(source=PICTURES, **kwargs):
  settings = dict(ops="decode", pack=SPEC, batch_size=8, num_classes=CLASSES)
  return pipeline.eval_data(source, **settings | kwargs)


def assert_same(left, right):
  assert left.keys() == right.keys()
  for key in left:
    assert left[key].dtype == right[key].dtype, key
    np.testing.assert_array_equal(left[key], right[key], err_msg=key)


def as_copies(iterator):
  """Batches that outlive the worker's shared memory."""
  return [{k: np.array(v) for k, v in batch.items()} for batch in iterator]


def ids(dataset):
  batch_ids = [dataset[s]["example_id"] for s in range(len(dataset))]
  return np.concatenate([x[x >= 0] for x in batch_ids])


def check_row(batch, row, source, spec, *, mirrored):
  """Every token of a row against the image that it should come from."""
  grids, segments = batch["grid_hw"][row], batch["segment_ids"][row]
  used = int((segments > 0).sum())
  assert (segments[used:] == 0).all()
  assert (np.diff(segments[:used]) >= 0).all()
  assert not batch["patches"][row, used:].any()
  assert not batch["positions"][row, used:].any()
  assert batch["num_tokens"][row] == used
  assert batch["_mask"][row] == batch["example_mask"][row].any() == (used > 0)
  for slot in range(spec.max_images):
    tokens = segments == slot + 1
    index = int(batch["example_id"][row, slot])
    assert batch["example_mask"][row, slot] == tokens.any() == (index >= 0)
    if index < 0:
      assert batch["label"][row, slot] == -1
      continue
    assert batch["label"][row, slot] == index % 7
    np.testing.assert_array_equal(
      batch["multi_label"][row, slot], np.arange(CLASSES) == index % 7
    )
    assert tuple(batch["image_hw"][row, slot]) == source.hw(index)
    gh, gw = grids[slot]
    positions = batch["positions"][row, tokens]
    order = positions[:, 0] * gw + positions[:, 1]
    assert (np.diff(order) > 0).all()
    assert (positions < [gh, gw]).all()
    pixels = source.pixels(index)
    possible = [
      einops.rearrange(
        ops.resize(np.ascontiguousarray(p), gh * spec.patch, gw * spec.patch),
        "(h p) (w q) c -> (h w) (p q c)",
        p=spec.patch,
        q=spec.patch,
      )[order]
      for p in ([pixels, pixels[:, ::-1]] if mirrored else [pixels])
    ]
    got = batch["patches"][row, tokens]
    assert any(np.array_equal(got, p) for p in possible)


@pytest.mark.parametrize("drop", [BETA, Drop()], ids=lambda d: d.law)
@pytest.mark.parametrize("sizes", [SIZES, None], ids=["drawn", "native"])
def test_packed_pixels_are_those_of_each_image_alone(drop, sizes):
  source, dataset = Pictures(), train(drop=drop, sizes=sizes)
  seen, dropped, tokens = set(), 0, 0
  for step in range(len(dataset)):
    batch = dataset[step]
    for row in range(step % 2, 8, 2):
      check_row(batch, row, source, SPEC, mirrored=True)
    grids = batch["grid_hw"].prod(axis=-1).sum()
    tokens += batch["num_tokens"].sum()
    dropped += grids - batch["num_tokens"].sum()
    seen |= set(batch["example_id"].ravel().tolist())
  assert set(range(len(ODD))) <= seen
  if drop.law == "none":
    assert dropped == 0
    # Grids of twenty tokens round coarsely; MEASURED in rows of 256: 3 %.
    assert tokens >= 0.9 * 9 * 8 * 61
  else:
    assert dropped > 0.3 * tokens
    assert tokens == 9 * 8 * 61


@pytest.mark.parametrize("make", [train, stacked], ids=["packed", "stacked"])
def test_random_access_threads_and_iteration_agree(make):
  dataset, again = make(), make()
  wanted = [dataset[s] for s in range(9)]
  for s in (8, 2, 5):
    assert_same(again[s], wanted[s])
  for threads in (0, 3):
    iterator = pipeline.open_iterator(make(), threads=threads)
    for got, batch in zip(iterator, wanted, strict=True):
      assert_same(got, batch)
    assert iterator.get_state() == 9
    iterator.close()


def test_workers_make_the_same_batches_from_any_position():
  wanted = [train()[s] for s in range(9)]
  first = pipeline.open_iterator(train(), threads=2)
  for s in range(4):
    assert_same(next(first), wanted[s])
  state = json.loads(json.dumps(first.get_state()))
  first.close()
  assert state == 4
  iterator = pipeline.open_iterator(train(), start=state, workers=2)
  for got, batch in zip(as_copies(iterator), wanted[4:], strict=True):
    assert_same(got, batch)
  iterator.close()


@pytest.mark.parametrize("make", [train, stacked], ids=["packed", "stacked"])
@pytest.mark.parametrize("count", [2, 4])
def test_hosts_make_parts_of_the_same_global_batch(make, count):
  whole = make()
  parts = [make(parts=(h,), part_count=count) for h in range(count)]
  for step in (0, 5):
    local = [part[step] for part in parts]
    joined = {k: np.concatenate([b[k] for b in local]) for k in local[0]}
    assert_same(joined, whole[step])


def test_parts_that_are_no_neighbours_keep_their_rows():
  part = train(parts=(0, 3), part_count=4)
  for key, x in part[5].items():
    np.testing.assert_array_equal(x, train()[5][key][[0, 1, 6, 7]])


@pytest.mark.parametrize("make", [train, stacked], ids=["packed", "stacked"])
def test_batches_change_with_the_seed_but_not_with_the_length(make):
  assert_same(make()[3], make(total_steps=700)[3])
  image = "patches" if make is train else "image"
  assert not np.array_equal(make()[3][image], make(seed=4)[3][image])


@pytest.mark.parametrize("n", [1, 2, 3, 12, 101, 4_099])
def test_an_epoch_is_a_permutation(n):
  order = batches.Shuffle(n, 5)
  for epoch in (0, 1, 1_000_003):
    visited = [order(epoch * n + i) for i in range(n)]
    assert sorted(visited) == list(range(n))


def test_epochs_and_seeds_are_shuffled_apart():
  epochs = [
    tuple(batches.Shuffle(101, seed)(epoch * 101 + i) for i in range(101))
    for seed in range(3)
    for epoch in range(3)
  ]
  assert len(set(epochs)) == 9


def test_the_shuffle_is_uniform():
  """Each index comes at each place, and after each other, equally often."""
  n, epochs = 7, 3_000
  order = batches.Shuffle(n, 11)
  stream = np.array([order(i) for i in range(n * epochs)]).reshape(epochs, n)
  steps = (stream[:, 1:] - stream[:, :-1]) % n
  for columns, classes in ((stream, n), (steps - 1, n - 1)):
    for column in columns.T:
      counts = np.bincount(column, minlength=classes)
      assert scipy.stats.chisquare(counts).pvalue > 1e-4


def test_the_largest_source_is_shuffled():
  order = batches.Shuffle(4_000_000_007, 0)
  drawn = {order(i) for i in range(1_000)}
  assert len(drawn) == 1_000
  assert 0 <= min(drawn) < 2e8
  assert 3.8e9 < max(drawn) < 4_000_000_007


def test_training_visits_every_example_once_an_epoch():
  dataset = stacked(total_steps=51)
  visited = ids(dataset)
  assert len(visited) == 51 * 8
  for epoch in range(4):
    part = visited[epoch * 101 : (epoch + 1) * 101]
    assert sorted(part.tolist()) == list(range(101))


def test_an_example_is_augmented_anew_each_epoch():
  dataset = stacked(Pictures(size=11), total_steps=11)
  images = [
    image.tobytes()
    for batch in map(dataset.__getitem__, range(11))
    for image in batch["image"][batch["example_id"] == 9]
  ]
  assert len(images) == len(set(images)) == 8


def test_stacked_batches():
  dataset = stacked(ops="decode|resize(23, 29)")
  batch = dataset[4]
  assert batch["image"].shape == (8, 23, 29, 3)
  source = Pictures()
  for j, index in enumerate(batch["example_id"].tolist()):
    np.testing.assert_array_equal(
      batch["image"][j], ops.resize(source.pixels(index), 23, 29)
    )
    assert batch["label"][j] == index % 7
    assert tuple(batch["image_hw"][j]) == source.hw(index)
  assert batch["_mask"].all()


@pytest.mark.parametrize("tokens", [None, 23])
def test_evaluation_holds_every_example_once(tokens):
  source, dataset = Pictures(), evaluation(tokens=tokens)
  assert sorted(ids(dataset).tolist()) == list(range(101))
  for step in range(len(dataset)):
    batch = dataset[step]
    for row in range(8):
      check_row(batch, row, source, SPEC, mirrored=False)
    assert (batch["grid_hw"].prod(axis=-1) <= (tokens or 61)).all()
    # None is dropped: the whole grid of each image is there.
    np.testing.assert_array_equal(
      batch["grid_hw"].prod(axis=-1).sum(axis=1), batch["num_tokens"]
    )
  # Rows that fill up the last batch are empty.
  empty = ~dataset[len(dataset) - 1]["_mask"]
  blank = dataset.blank()
  for key, value in dataset[len(dataset) - 1].items():
    np.testing.assert_array_equal(value[empty], blank[key][empty])


def test_the_packing_says_how_images_are_resized_where_no_one_else_does():
  spec = dataclasses.replace(SPEC, interpolation="bicubic", eval_tokens=23)
  dataset, asked = evaluation(pack=spec), evaluation(pack=SPEC, tokens=23)
  source, batch, other = Pictures(), dataset[0], asked[0]
  np.testing.assert_array_equal(batch["grid_hw"], other["grid_hw"])
  assert (batch["patches"] != other["patches"]).any()
  index, (h, w) = batch["example_id"][0, 0], batch["grid_hw"][0, 0]
  image = ops.resize(
    source.pixels(index), h * 5, w * 5, interpolation="bicubic"
  )
  patches = einops.rearrange(image, "(h p) (w q) c -> (h w) (p q c)", p=5, q=5)
  np.testing.assert_array_equal(batch["patches"][0, : h * w], patches)
  # What is asked goes first.
  fewer = evaluation(pack=spec, tokens=9)
  assert fewer[0]["grid_hw"].prod(axis=-1).max() <= 9


def test_evaluation_of_stacked_images_is_in_order_and_filled_up():
  dataset = evaluation(pack=None, ops="decode|resize(11)")
  assert len(dataset) == 13
  assert ids(dataset).tolist() == list(range(101))
  last = dataset[12]
  assert last["_mask"].tolist() == [True] * 5 + [False] * 3
  assert last["example_id"][5:].tolist() == [-1] * 3
  assert not last["image"][5:].any()


@pytest.mark.parametrize(
  "kwargs", [dict(), dict(pack=None, ops="decode|resize(11)")]
)
@pytest.mark.parametrize("count", [2, 8])
def test_hosts_evaluate_equal_steps_and_disjoint_examples(kwargs, count):
  whole = evaluation(**kwargs)
  parts = [
    evaluation(parts=(h,), part_count=count, **kwargs) for h in range(count)
  ]
  assert {len(part) for part in parts} == {len(whole)}
  for step in range(len(whole)):
    local = [part[step] for part in parts]
    joined = {k: np.concatenate([b[k] for b in local]) for k in local[0]}
    assert_same(joined, whole[step])


@pytest.mark.slow
def test_workers_keep_the_order_of_an_evaluation():
  dataset = evaluation(pack=None, ops="decode|resize(11)")
  iterator = pipeline.open_iterator(dataset, workers=2, prefetch=1)
  for step, batch in enumerate(as_copies(iterator)):
    assert_same(batch, dataset[step])
  assert step == 12
  iterator.close()


def test_a_limit_is_spread_over_the_source():
  dataset = evaluation(limit=5)
  assert sorted(ids(dataset).tolist()) == [0, 20, 40, 60, 80]
  assert len(ids(evaluation(limit=1_000))) == 101
  with pytest.raises(ValueError, match="1 or more examples, not 0"):
    evaluation(limit=0)


def test_ops_that_change_the_shape_stay_within_the_planned_tokens():
  dataset = evaluation(ops="decode|center_crop(31, 7)")
  assert sorted(ids(dataset).tolist()) == list(range(101))
  batch = dataset[0]
  gh, gw = batch["grid_hw"][batch["example_mask"]].T
  large = gh * gw >= 16
  assert (gh[large] > 2 * gw[large]).all()


def test_evaluation_cannot_drop_tokens():
  assert "drop" not in inspect.signature(pipeline.eval_data).parameters
  assert "drop" not in inspect.signature(pipeline.planning.ExactRows).parameters


@pytest.mark.parametrize("sizes", [SIZES, None], ids=["drawn", "native"])
def test_broken_images_leave_empty_slots(sizes):
  broken = tuple(range(0, 101, 3))
  source = Pictures(broken=broken)
  dataset = train(source, sizes=sizes)
  whole = train(sizes=sizes) if sizes else None
  seen = set()
  for step in range(len(dataset)):
    batch = dataset[step]
    check_row(batch, step % 8, source, SPEC, mirrored=True)
    bad = batch["broken_id"] >= 0
    assert not (bad & batch["example_mask"]).any()
    seen |= set(batch["broken_id"][bad].tolist())
    if whole is not None:
      # The plan reads no pixels, so nobody else's slot or tokens move.
      other = whole[step]
      kept = batch["example_mask"]
      np.testing.assert_array_equal(other["example_mask"], kept | bad)
      np.testing.assert_array_equal(
        other["grid_hw"][kept], batch["grid_hw"][kept]
      )
  assert seen == set(broken)


def test_broken_images_in_evaluation():
  source = Pictures(broken=(0, 7, 8))
  dataset = evaluation(source)
  assert sorted(ids(dataset)) == sorted(set(range(101)) - {0, 7, 8})
  broken = [dataset[s]["broken_id"] for s in range(len(dataset))]
  assert sorted(x for b in broken for x in b[b >= 0]) == [0, 7, 8]
  flat = evaluation(source, pack=None, ops="decode|resize(11)")[0]
  assert flat["broken_id"].tolist() == [0, -1, -1, -1, -1, -1, -1, 7]
  assert flat["_mask"].tolist() == [False] + [True] * 6 + [False]
  with pytest.raises(ValueError, match=r"None of .* from pictures/0.png on"):
    evaluation(Pictures(broken=tuple(range(101))))


def test_broken_images_are_named_once_and_end_a_run(caplog):
  guard = batches.BrokenImages(Pictures().name, max_broken=0.25, patience=17)
  host = {"example_id": np.arange(8), "broken_id": np.full(8, -1)}
  host["example_id"][:3] = -1
  host["broken_id"][:3] = (40, 41, 40)
  with caplog.at_level("WARNING", logger="absl"):
    guard.update(host)
    guard.update(host)
  assert (guard.images, guard.broken) == (16, 6)
  names = [record.getMessage() for record in caplog.records]
  assert names == [f"Cannot read the image pictures/{i}.png." for i in (40, 41)]
  with pytest.raises(ValueError, match=r"9 of 24 images .*max_broken=0.25"):
    guard.update(host)


@pytest.mark.parametrize("make", [train, stacked, evaluation])
@pytest.mark.parametrize("label", [7, -2])
def test_labels_outside_the_class_count_are_refused(make, label):
  longer = dict() if make is evaluation else dict(total_steps=13)
  dataset = make(Pictures(labels=((50, label),)), **longer)
  message = (
    f"The label {label} of pictures/50.png is outside the class count: "
    "there are 7 classes"
  )
  with pytest.raises(ValueError, match=message):
    list(pipeline.open_iterator(dataset, threads=0))


def test_a_multi_label_of_another_width_is_refused():
  message = "multi_label of pictures/.* outside the class count: it has 11"
  with pytest.raises(ValueError, match=message):
    train(Pictures(width=11))[0]


def test_no_label_at_all():
  source = Pictures(width=None, labels=tuple((i, -1) for i in range(101)))
  batch = train(source)[0]
  assert "multi_label" not in batch
  assert (batch["label"] == -1).all()


@pytest.mark.parametrize(
  ("make", "kwargs", "message"),
  [
    (train, dict(part_count=3), "8 is not divisible by the 3 parts"),
    (evaluation, dict(part_count=3), "8 is not divisible by the 3 parts"),
    (train, dict(pack=None), "laws of packed rows: they need data.pack"),
    (evaluation, dict(pack=None, tokens=9), "needs packed rows"),
    (evaluation, dict(tokens=62), "62 tokens do not fit rows of 61"),
    (train, dict(seed=-1), "A seed is a whole number"),
    (train, dict(source=Pictures(size=0)), "1 to 2.*; this one has 0"),
    (
      train,
      dict(pack=PackSpec(61, 5, 2)),
      r"only 2 slots: raise data.pack.max_images",
    ),
  ],
)
def test_refusals(make, kwargs, message):
  with pytest.raises(ValueError, match=message):
    make(**kwargs)


def test_images_of_different_sizes_are_not_stacked():
  dataset = stacked(ops="decode")
  with pytest.raises(ValueError, match=r"cannot be stacked: pictures/\d+.png"):
    dataset[0]


def test_positions_that_do_not_exist():
  with pytest.raises(IndexError, match="no step 9: the data has 9 steps"):
    train()[9]
  for start in (10, -1, {"stream": 3}):
    with pytest.raises(ValueError, match="a batch from 0 to 9"):
      pipeline.open_iterator(train(), start=start)
  end = pipeline.open_iterator(train(), start=9)
  assert list(end) == []


def test_fingerprint_sees_the_data_and_not_its_place():
  same = pipeline.fingerprint(Pictures())
  assert same == pipeline.fingerprint(Pictures())
  assert len(same) == 12
  for other in (
    Pictures(size=102),
    Pictures(labels=((50, 3),)),
    Pictures(width=None),
    Pictures(broken=(0,)),
  ):
    assert pipeline.fingerprint(other) != same


@pytest.fixture
def placed():
  return sharding.batch_sharding(sharding.make_mesh({"data": -1, "fsdp": 2}))


def test_to_device_shards_the_batch_and_keeps_the_rest(placed):
  dataset = train()
  batch = dataset[0]
  device, host = pipeline.to_device(batch, placed)
  others = ("text_", "object_", "box_", "original_")
  expected = {k for k in api.HOST_KEYS if not k.startswith(others)}
  assert set(host) == expected
  assert set(device) == set(batch) - set(host)
  for key, x in device.items():
    assert x.sharding.is_equivalent_to(placed, x.ndim)
    np.testing.assert_array_equal(x, batch[key])
  spec = pipeline.spec(dataset)
  assert spec == jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), device
  )
  parts = train(parts=(1, 3), part_count=4)
  assert pipeline.spec(parts) == spec


def test_a_feed_hands_out_batches_and_their_position(placed):
  dataset = train()
  feed = pipeline.prefetch_to_device(
    pipeline.open_iterator(dataset, start=2), placed
  )
  assert feed.get_state() == 2
  for step in range(2, 6):
    device, host = next(feed)
    np.testing.assert_array_equal(device["patches"], dataset[step]["patches"])
    np.testing.assert_array_equal(
      host["example_id"], dataset[step]["example_id"]
    )
    # What is made ahead does not count.
    assert feed.get_state() == step + 1
  assert feed.waited > 0
  feed.close()
  feed.close()
  assert not feed._thread.is_alive()
  with pytest.raises(ValueError, match="The feed is closed"):
    next(feed)


def test_a_feed_ends_with_the_data(placed):
  feed = pipeline.prefetch_to_device(pipeline.open_iterator(train()), placed)
  assert len(list(feed)) == 9
  assert not feed._thread.is_alive()


def test_a_feed_hands_errors_over(placed):
  bad = Pictures(labels=tuple((i, 9) for i in range(1, 101)))
  feed = pipeline.prefetch_to_device(pipeline.open_iterator(train(bad)), placed)
  with pytest.raises(ValueError, match="outside the class count"):
    next(feed)
  assert not feed._thread.is_alive()


def test_batches_of_workers_reach_the_devices_unharmed(placed):
  """Shared memory must not be freed under the arrays made from it."""
  wanted = [train()[s] for s in range(4)]
  feed = pipeline.prefetch_to_device(
    pipeline.open_iterator(train(total_steps=4), workers=1), placed
  )
  held = list(feed)
  for (device, host), batch in zip(held, wanted, strict=True):
    assert_same({**jax.device_get(device), **host}, batch)


def stream(source=PICTURES, **kwargs):
  parent = grain.MapDataset.source(source).to_iter_dataset(
    grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  )
  settings = dict(
    ops="decode|flip_lr",
    pack=SPEC,
    batch_size=3,
    seed=3,
    num_classes=CLASSES,
    multi_label=True,
    open_rows=5,
  )
  return streams.packed_stream(parent, **settings | kwargs)


@pytest.mark.parametrize(
  "kwargs", [dict(), dict(sizes=SIZES, drop=BETA)], ids=["native", "drawn"]
)
def test_a_stream_holds_every_example_once(kwargs):
  source = Pictures(broken=(6, 44))
  got = list(pipeline.open_iterator(stream(source, **kwargs)))
  seen = np.concatenate([b["example_id"].ravel() for b in got])
  assert sorted(seen[seen >= 0]) == sorted(set(range(101)) - {6, 44})
  broken = np.concatenate([b["broken_id"].ravel() for b in got])
  assert sorted(broken[broken >= 0]) == [6, 44]
  for batch in got:
    for row in range(3):
      check_row(batch, row, source, SPEC, mirrored=True)
  tokens = sum(b["num_tokens"].sum() for b in got[:-2])
  assert tokens > 0.85 * 61 * 3 * (len(got) - 2)


def test_a_stream_goes_on_from_any_position():
  kwargs = dict(sizes=SIZES, drop=BETA, source=Pictures(broken=(6, 44)))
  iterator = pipeline.open_iterator(stream(**kwargs))
  states, wanted = [iterator.get_state()], []
  for batch in iterator:
    wanted.append(batch)
    states.append(json.loads(json.dumps(iterator.get_state())))
  assert len(wanted) > 5
  for at in (0, 1, 3, len(wanted) - 1, len(wanted)):
    rest = pipeline.open_iterator(stream(**kwargs), start=states[at])
    for got, batch in zip(rest, wanted[at:], strict=True):
      assert_same(got, batch)


def test_stream_refusals():
  with pytest.raises(ValueError, match="the same number of workers: there are"):
    pipeline.open_iterator(stream(), start={"workers": 2, "stream": {}})
  with pytest.raises(ValueError, match="goes on only from its own state"):
    pipeline.open_iterator(stream(), start=7)
  schedule = Drop("schedule", min=0.2, max=0.8, mu=0.5, tau=0.1)
  with pytest.raises(ValueError, match="which a stream does not say"):
    stream(drop=schedule)


@pytest.mark.slow
def test_a_stream_in_workers_goes_on_with_as_many():
  def open_at(state):
    return pipeline.open_iterator(stream(), start=state, workers=2)

  iterator = open_at(0)
  wanted = []
  for i, batch in enumerate(iterator):
    wanted.append({k: np.array(v) for k, v in batch.items()})
    if i == 3:
      state = json.loads(json.dumps(iterator.get_state()))
  iterator.close()
  seen = np.concatenate([b["example_id"].ravel() for b in wanted])
  assert sorted(seen[seen >= 0]) == list(range(101))
  rest = open_at(state)
  for got, batch in zip(as_copies(rest), wanted[4:], strict=True):
    assert_same(got, batch)
  rest.close()


ENDLESS = """
from big_vision_like.data import budgets, packing, pipeline
from big_vision_like.data.sources import digit_scenes
if __name__ == "__main__":
  data = pipeline.train_data(
    digit_scenes.Source("train"), ops="decode", num_classes=10, seed=0,
    pack=packing.PackSpec(256, 16, 64), batch_size=16, total_steps=10**6,
  )
  iterator = pipeline.open_iterator(data, workers=2)
  for _ in range(4):
    next(iterator)
  print("ready", flush=True)
  while True:
    next(iterator)
"""


def children(parent):
  found = []
  for status in pathlib.Path("/proc").glob("[0-9]*/stat"):
    try:
      fields = status.read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
      continue
    if int(fields[1]) == parent and fields[0] != "Z":
      found.append(int(status.parent.name))
  return found


def until(condition, seconds):
  end = time.monotonic() + seconds
  while time.monotonic() < end:
    if condition():
      return True
    time.sleep(0.2)
  return False


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and /dev/shm")
def test_a_killed_trainer_leaves_no_worker_and_no_shared_memory(tmp_path):
  script = tmp_path / "endless.py"
  script.write_text(ENDLESS)
  shm = pathlib.Path("/dev/shm")
  before = set(os.listdir(shm))
  root = pathlib.Path(pipeline.__file__).parents[2]
  process = subprocess.Popen(
    [sys.executable, str(script)],
    stdout=subprocess.PIPE,
    env=os.environ | {"PYTHONPATH": str(root)},
  )
  try:
    assert process.stdout.readline() == b"ready\n"
    workers = children(process.pid)
    assert len(workers) >= 2
    assert until(lambda: set(os.listdir(shm)) - before, 10)
  finally:
    process.send_signal(signal.SIGKILL)
    process.wait()
  left = set(os.listdir(shm)) - before
  assert until(
    lambda: not any(pathlib.Path(f"/proc/{w}").exists() for w in workers), 15
  )
  assert until(lambda: not left & set(os.listdir(shm)), 15)


def test_blank_batches_have_the_layout_of_the_contract():
  batch = train().blank()
  shapes = {k: (v.shape, v.dtype.name) for k, v in batch.items()}
  assert shapes == {
    "patches": ((8, 61, 75), "uint8"),
    "segment_ids": ((8, 61), "int32"),
    "positions": ((8, 61, 2), "int32"),
    "grid_hw": ((8, 13, 2), "int32"),
    "example_mask": ((8, 13), "bool"),
    "_mask": ((8,), "bool"),
    "label": ((8, 13), "int32"),
    "multi_label": ((8, 13, 7), "uint8"),
    "example_id": ((8, 13), "int64"),
    "image_hw": ((8, 13, 2), "int32"),
    "broken_id": ((8, 13), "int64"),
    "num_tokens": ((8,), "int32"),
  }
  assert set(batch) >= set(packing.blank(SPEC, 8))
