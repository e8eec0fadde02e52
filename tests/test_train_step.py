"""The step: micro-batches equal the large batch, the audit names the dead."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from big_vision_like import api, audit, flops, train_step, trees
from big_vision_like.tasks import classification


class Packed(nn.Module):
  """Logits for each slot from the mean of its tokens, with dead weights."""

  dead: bool = False

  @nn.compact
  def __call__(
    self, *, train, patches, segment_ids, positions, grid_hw, example_mask
  ):
    del train, positions, grid_hw
    slots = jnp.arange(1, example_mask.shape[1] + 1)
    member = segment_ids[:, None, :] == slots[:, None]
    pooled = jnp.einsum("bml,bld->bmd", member.astype(jnp.float32), patches)
    pooled = pooled / jnp.maximum(member.sum(-1, keepdims=True), 1)
    pooled = nn.gelu(nn.Dense(7, name="hidden")(pooled))
    if self.dead:
      self.param("unused", nn.initializers.ones, (3,))
    return {"logits": nn.Dense(5, name="head")(pooled), "pooled": pooled}


def packed_batch(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
  """Rows of 11 tokens with a different number of images each."""
  rng = np.random.default_rng(seed)
  length, slots = 11, 3
  counts = rng.integers(1, slots + 1, rows)
  segments = np.zeros((rows, length), np.int32)
  for r, n in enumerate(counts):
    segments[r, :9] = np.sort(rng.integers(1, n + 1, 9))
    segments[r, :n] = np.arange(1, n + 1)
    segments[r, :9].sort()
  mask = np.arange(slots) < counts[:, None]
  return {
    "patches": rng.integers(0, 256, (rows, length, 12)).astype(np.uint8),
    "segment_ids": segments,
    "positions": np.zeros((rows, length, 2), np.int32),
    "grid_hw": np.ones((rows, slots, 2), np.int32),
    "example_mask": mask,
    "label": np.where(mask, rng.integers(0, 5, mask.shape), -1),
    "_mask": np.ones(rows, bool),
  }


def one_step(accum_steps: int, batch, dead: bool = False, frozen=()):
  task = classification.Task(num_classes=5)
  tx = optax.sgd(0.1)
  model = Packed(dead=dead)
  state = train_step.init_state(
    model, task, tx, jax.random.key(0), batch, frozen=frozen
  )
  step = train_step.make_train_step(
    model, task, tx, accum_steps=accum_steps, frozen=frozen
  )
  return jax.jit(step)(state, batch)


@pytest.mark.parametrize("accum_steps", [2, 3, 6])
def test_micro_batches_equal_the_large_batch(accum_steps):
  batch = packed_batch(rows=6)
  assert len(set(batch["example_mask"].sum(1))) > 1  # unequal micro-batches
  whole, whole_metrics = one_step(1, batch)
  cut, cut_metrics = one_step(accum_steps, batch)
  # Only the order of float32 sums differs.
  chex.assert_trees_all_close(whole.params, cut.params, rtol=1e-5, atol=1e-7)
  for key in ("loss", "accuracy", "grad_norm"):
    np.testing.assert_allclose(
      whole_metrics[key].compute(), cut_metrics[key].compute(), rtol=1e-5
    )


@pytest.mark.parametrize("accum_steps", [1, 2])
def test_frozen_parameters_are_constants_of_the_step(accum_steps):
  """They stay, bit by bit, have no gradient, norm or state, and cost none."""
  batch, frozen = packed_batch(rows=2), ("hidden/.*",)
  task, tx, model = (
    classification.Task(num_classes=5),
    optax.adam(0.1),
    Packed(),
  )
  state = train_step.init_state(
    model, task, tx, jax.random.key(0), batch, frozen=frozen, ema=True
  )
  assert not [k for k in trees.flatten(state.opt_state) if "hidden" in k]
  kw = dict(accum_steps=accum_steps, ema_decay=0.5)
  step = train_step.make_train_step(model, task, tx, frozen=frozen, **kw)
  after, metrics = jax.jit(step)(state, batch)
  for name, x in trees.flatten(state.params).items():
    for moved in (after.params, after.ema["params"]):
      same = np.array_equal(trees.flatten(moved)[name], x)
      assert same == ("hidden" in name), name
  assert set(metrics["grad_sq"]) == {"head/bias", "head/kernel"}
  total = sum(float(x) for x in metrics["grad_sq"].values())
  assert np.isclose(metrics["grad_norm"].compute(), total**0.5, rtol=1e-5)
  # Of both layers, forward, the gradients of activations are not needed below
  # the frozen one, nor that of its kernel: two products less.
  full_state = train_step.init_state(
    model, task, tx, jax.random.key(0), batch, ema=True
  )
  full = train_step.make_train_step(model, task, tx, **kw)
  saved = flops.count_flops(full, full_state, batch) - flops.count_flops(
    step, state, batch
  )
  images = batch["example_mask"].size
  kernel, head = (x["kernel"].size for x in state.params.values())
  assert saved == 2 * images * (kernel + head)


def test_frozen_regexes_are_checked():
  params = {"body": {"kernel": np.ones(3)}, "head": {"bias": np.ones(2)}}
  with pytest.raises(
    ValueError,
    match=r"config\.optim\.frozen: 'haed/\.\*' matches no parameter\. It has "
    r"to match a whole path; the paths are body/\.\.\., head/\.\.\.",
  ):
    trees.split(params, ("haed/.*",))
  with pytest.raises(
    ValueError, match=r"\['head/\.\*', '\.\*'\] leaves no parameter to train"
  ):
    trees.split(params, ("head/.*", ".*"))
  parts = trees.split(params, ("head/.*",))
  assert [list(trees.flatten(x)) for x in parts] == [
    ["body/kernel"],
    ["head/bias"],
  ]
  chex.assert_trees_all_equal(trees.merge(*parts), params)


def test_micro_batches_need_a_separable_task():
  class Whole:
    separable = False

  with pytest.raises(ValueError, match=r"accum_steps = 2.*not a mean"):
    train_step.make_train_step(Packed(), Whole(), optax.sgd(0.1), accum_steps=2)


def test_state_counts_steps_and_keeps_its_key():
  batch = packed_batch(rows=2)
  state, _ = one_step(1, batch)
  assert int(state.step) == 1
  assert jnp.array_equal(
    jax.random.key_data(state.rng), jax.random.key_data(jax.random.key(0))
  )


class Normalised(nn.Module):
  """Logits with running statistics, and a constant that is no statistic."""

  @nn.compact
  def __call__(self, image, *, train):
    x = image.mean((1, 2))
    self.variable("teacher", "scale", lambda: jnp.full(3, 0.1))
    x = nn.Dense(7, name="hidden")(x)
    x = nn.BatchNorm(not train, momentum=0.5, name="bn")(x)
    return {"logits": nn.Dense(5, name="head")(x), "pooled": x}


def test_ema_follows_its_recursion_and_serves_prediction():
  """Of parameters and running statistics, which prediction takes from it."""
  rng = np.random.default_rng(0)
  batch = {
    "image": rng.integers(0, 256, (11, 2, 3, 3)).astype(np.uint8),
    "label": rng.integers(0, 5, 11),
    "_mask": np.ones(11, bool),
  }
  model, task = Normalised(), classification.Task(num_classes=5)
  tx = optax.sgd(0.5)
  state = train_step.init_state(
    model, task, tx, jax.random.key(0), batch, ema=True
  )
  assert set(state.ema) == {"params", "batch_stats"}
  step = train_step.make_train_step(model, task, tx, ema_decay=0.75)
  after, _ = jax.jit(step)(state, batch)
  for before, now, average in (
    (state.params, after.params, after.ema["params"]),
    (
      state.model_state["batch_stats"],
      after.model_state["batch_stats"],
      after.ema["batch_stats"],
    ),
  ):
    expected = jax.tree.map(lambda x, y: 0.75 * x + 0.25 * y, before, now)
    chex.assert_trees_all_close(average, expected, rtol=1e-6)
  predict = jax.jit(train_step.make_predict(model, task))
  alone = after.replace(
    params=after.ema["params"],
    model_state=after.model_state | {"batch_stats": after.ema["batch_stats"]},
    ema=None,
  )
  chex.assert_trees_all_equal(predict(after, batch), predict(alone, batch))
  raw = predict(after.replace(ema=None), batch)
  assert not np.allclose(predict(after, batch)["logits"], raw["logits"])

  # What training leaves alone, the average leaves alone, bit by bit.
  still = jax.jit(
    train_step.make_train_step(
      model, task, optax.set_to_zero(), ema_decay=0.9995
    )
  )
  for _ in range(3):
    state, _ = still(state, batch)
  chex.assert_trees_all_equal(state.ema["params"], state.params)


def test_the_average_restarts_where_the_state_stands():
  state = api.TrainState(
    step=jnp.int32(0),
    params={"w": jnp.ones(3)},
    model_state={"batch_stats": {"mean": jnp.ones(5)}, "teacher": jnp.ones(7)},
    opt_state=(),
    rng=jax.random.key(0),
  )
  assert train_step.restart_average(state).ema is None
  state = state.replace(ema={"params": {"w": jnp.zeros(3)}})
  chex.assert_trees_all_equal(
    train_step.restart_average(state).ema,
    {"params": {"w": jnp.ones(3)}, "batch_stats": {"mean": jnp.ones(5)}},
  )


def run_audit(dead: bool, frozen=()) -> list[str]:
  batch = packed_batch(rows=2)
  _, metrics = one_step(1, batch, dead=dead, frozen=frozen)
  watch, findings = audit.GradientAudit(), []
  for _ in range(audit.STEPS):
    findings += watch.update(jax.device_get(metrics["grad_sq"]))
  assert watch.done
  return findings


def test_audit_names_parameters_without_gradient():
  assert run_audit(dead=False) == []
  assert run_audit(dead=True) == ["unused: zero gradient"]
  assert run_audit(dead=True, frozen=("unused",)) == []


def test_audit_waits_for_a_zero_initialised_head_and_names_layers():
  watch = audit.GradientAudit()
  one, zero = np.float32(1.0), np.float32(0.0)
  assert watch.update({"body": zero, "blocks/w": np.array([1.0, 0.0])}) == []
  assert watch.update({"body": zero, "blocks/w": np.array([1.0, 0.0])}) == []
  last = watch.update({"body": one, "blocks/w": np.array([np.nan, 0.0])})
  assert last == [
    "blocks/w (layer 0): non-finite gradient",
    "blocks/w (layer 1): zero gradient",
  ]
