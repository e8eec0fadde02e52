"""Checkpoints: exact, on any mesh, kept by rule; and parameters from them."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from big_vision_like import api, checkpoint, optim, sharding, trees

SHAPES = {
  "blocks/attn/query/kernel": (3, 8, 4, 5),
  "blocks/mlp/fc1/kernel": (3, 8, 16),
  "head/kernel": (8, 11),
  "head/bias": (11,),
}


def random_params(seed=0):
  rng = np.random.default_rng(seed)
  params = {k: rng.normal(size=s).astype("float32") for k, s in SHAPES.items()}
  params["head/bias"] = jnp.asarray(params["head/bias"], jnp.bfloat16)
  return trees.unflatten(params)


def make_state(seed=0, *, rng=None, optimizer="adafactor", frozen=("head/.*",)):
  params = random_params(seed)
  trained, _ = trees.split(params, frozen)
  tx, _ = optim.make(
    name=optimizer,
    lr=0.1,
    wd=0.1,
    clip=1.0,
    schedule=dict(name="constant"),
    total_steps=10,
    params=trained,
  )
  _, opt_state = jax.jit(
    lambda grads, params: tx.update(grads, tx.init(params), params)
  )(trees.split(random_params(1), frozen)[0], trained)
  return api.TrainState(
    step=jnp.int32(7),
    params=params,
    model_state={"batch_stats": {"mean": jnp.arange(13.0)}},
    opt_state=opt_state,
    rng=jax.random.key(3) if rng is None else rng,
    ema={
      "params": random_params(2),
      "batch_stats": {"mean": jnp.arange(13.0) / 2},
    },
  )


def abstract(state, mesh, rules="tensor"):
  shapes = jax.eval_shape(lambda: state)
  places = sharding.state_shardings(shapes, mesh, sharding.RULES[rules])
  return sharding.with_shardings(shapes, places)


def place(state, mesh, rules="tensor"):
  places = jax.tree.map(lambda x: x.sharding, abstract(state, mesh, rules))
  return jax.device_put(state, places)


def assert_same(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for name, x in trees.flatten(got).items():
    y = trees.flatten(want)[name]
    assert x.dtype == y.dtype, name
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      x, y = jax.random.key_data(x), jax.random.key_data(y)
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=name)


def small(value=0.0):
  """A state of a few numbers on one device, quick to save."""
  return api.TrainState(
    step=jnp.int32(0),
    params={"w": jnp.full((5,), float(value))},
    model_state={},
    opt_state=(),
    rng=jax.random.key(0),
  )


def save_small(folder, steps, scores=None, **rules):
  with checkpoint.Checkpointer(folder, **rules) as checkpoints:
    for step in steps:
      metrics = (scores or {}).get(step)
      checkpoints.save(step, small(step), {"step": step}, metrics)
    return checkpoints.steps(), checkpoints.best()


ONE = {}
FULL = {"fsdp": 4, "tensor": 2}
OTHER = {"data": 4, "fsdp": 2}


def mesh_of(shape):
  return sharding.make_mesh(shape, None if shape else jax.devices()[:1])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A run folder with the state of step 7, written by eight devices."""
  run = tmp_path_factory.mktemp("run")
  state = make_state()
  with checkpoint.Checkpointer(run / "checkpoints") as checkpoints:
    checkpoints.save(
      7, place(state, mesh_of(FULL)), {"step": 7, "position": 91}
    )
  return run, state


@pytest.mark.parametrize("shape", [ONE, FULL, OTHER])
def test_restores_exactly_onto_another_mesh(saved, shape):
  run, state = saved
  target = abstract(state, mesh_of(shape))
  with checkpoint.Checkpointer(run / "checkpoints") as checkpoints:
    got, meta = checkpoints.restore(target)
  assert meta == {"step": 7, "position": 91}
  assert_same(got, state)
  for x, want in zip(jax.tree.leaves(got), jax.tree.leaves(target)):
    assert x.sharding == want.sharding


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", None])
def test_any_kind_of_key_comes_back(tmp_path, impl):
  raw = impl is None
  key = jax.random.PRNGKey(5) if raw else jax.random.key(5, impl=impl)
  state = small().replace(rng=key)
  with checkpoint.Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(1, state, {})
    got, _ = checkpoints.restore(abstract(state, mesh_of(ONE)))
  assert_same(got, state)
  np.testing.assert_array_equal(
    jax.random.uniform(got.rng, (3,)), jax.random.uniform(key, (3,))
  )


def test_the_state_may_be_donated_as_soon_as_save_returns(tmp_path):
  mesh = mesh_of({"data": 8})
  state = place(make_state(optimizer="sgd"), mesh)
  target = abstract(state, mesh)
  overwrite = jax.jit(
    lambda params: jax.tree.map(lambda x: 1 - x, params),
    donate_argnums=0,
    out_shardings=sharding.replicated(mesh),
  )
  with checkpoint.Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(1, state, {})
    jax.block_until_ready(overwrite(state.params))
    assert all(x.is_deleted() for x in jax.tree.leaves(state.params))
    got, _ = checkpoints.restore(target)
  assert_same(got.params, make_state(optimizer="sgd").params)


def test_meta_may_change_as_soon_as_save_returns(tmp_path):
  meta = {"position": [1, 2]}
  with checkpoint.Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(1, small(), meta)
    meta["position"].append(3)
    _, got = checkpoints.restore(abstract(small(), mesh_of(ONE)))
  assert got == {"position": [1, 2]}


def test_the_last_and_every_nth_are_kept(tmp_path):
  steps, best = save_small(tmp_path, range(2, 14, 2), keep_last=2, keep_every=4)
  assert steps == [4, 8, 10, 12]
  assert best is None
  assert sorted(int(p.name) for p in tmp_path.iterdir()) == steps


@pytest.mark.parametrize(("mode", "want"), [("max", 2), ("min", 3)])
def test_the_best_is_kept_besides(tmp_path, mode, want):
  scores = {
    1: {"val/loss": 0.5},
    2: {"val/loss": 0.9, "other": 1.0},
    3: {"val/loss": 0.1},
    4: {"other": 7.0},  # Not scored by this metric.
    5: {"val/loss": float("nan")},
    6: None,
    7: {"val/loss": 0.4},
  }
  rules = dict(keep_last=1, best=("val/loss", mode))
  steps, best = save_small(tmp_path, scores, scores, **rules)
  assert (steps, best) == ([want, 7], want)
  # A continued run knows the scores of the checkpoints it finds.
  steps, best = save_small(tmp_path, [8], {8: {"val/loss": 0.3}}, **rules)
  assert (steps, best) == ([want, 8], want)
  loaded = checkpoint.load_params(tmp_path, step="best")
  np.testing.assert_array_equal(loaded["w"], np.full(5, want))


def test_a_continued_run_may_be_scored_by_another_metric(tmp_path):
  save_small(
    tmp_path, [1, 2], {1: {"a": 9.0}, 2: {"a": 5.0}}, best=("a", "max")
  )
  rules = dict(best=("b", "min"), keep_last=1)
  assert save_small(tmp_path, [3], **rules)[1] is None
  scores = {4: {"b": 2.0}, 5: {"b": 3.0}}
  assert save_small(tmp_path, [4, 5], scores, **rules) == ([4, 5], 4)


def test_a_metric_that_is_not_there_is_reported(tmp_path, caplog):
  rules = dict(best=("val/acuracy", "max"))
  _, best = save_small(tmp_path, [1], {1: {"val/accuracy": 1.0}}, **rules)
  assert best is None
  assert (
    "config.checkpoint.best names 'val/acuracy', but this checkpoint has the "
    "scores val/accuracy." in caplog.text
  )


def test_an_existing_step_is_refused_not_ignored(tmp_path):
  with checkpoint.Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(5, small(1.0), {})
    with pytest.raises(
      ValueError, match=r"There is a checkpoint of step 5 in .* not overwritten"
    ):
      checkpoints.save(5, small(2.0), {})
    # An older step than the newest is written all the same.
    checkpoints.save(4, small(3.0), {})
    assert checkpoints.steps() == [4, 5]
  loaded = checkpoint.load_params(tmp_path / "5")
  np.testing.assert_array_equal(loaded["w"], np.ones(5))


def test_what_an_interrupted_save_left_is_ignored_and_cleared(tmp_path):
  save_small(tmp_path, [3])
  torn = tmp_path / "9.orbax-checkpoint-tmp"
  (torn / "params.orbax-checkpoint-tmp").mkdir(parents=True)
  (torn / "meta").mkdir()
  np.testing.assert_array_equal(
    checkpoint.load_params(tmp_path)["w"], np.full(5, 3.0)
  )
  assert torn.exists()  # A reader leaves alone what a run may be writing.
  with checkpoint.Checkpointer(tmp_path) as checkpoints:
    assert checkpoints.latest() == 3
    got, _ = checkpoints.restore(abstract(small(), mesh_of(ONE)))
    checkpoints.save(9, small(9.0), {})
  assert not torn.exists()
  np.testing.assert_array_equal(got.params["w"], np.full(5, 3.0))
  np.testing.assert_array_equal(
    checkpoint.load_params(tmp_path)["w"], np.full(5, 9.0)
  )


def test_a_failed_save_is_raised_and_hides_nothing(tmp_path, monkeypatch):
  with checkpoint.Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(1, small(1.0), {})
    checkpoints.wait()
    with monkeypatch.context() as patch:

      async def fail(*args):
        raise OSError("No space left on device")

      handler = checkpoint.ocp.JsonCheckpointHandler
      patch.setattr(handler, "_save_fn", fail)
      checkpoints.save(2, small(2.0), {})
      with pytest.raises(OSError, match="No space left"):
        checkpoints.latest()
    assert checkpoints.latest() == 1
    got, _ = checkpoints.restore(abstract(small(), mesh_of(ONE)))
  np.testing.assert_array_equal(got.params["w"], np.ones(5))


def test_other_states_are_refused_by_name(saved):
  run, state = saved
  other = make_state(frozen=())
  other = other.replace(
    params=other.params | {"extra": jnp.ones(3)}, model_state={}
  )
  other.params["head"] = {"kernel": jnp.ones((8, 12))}
  other = other.replace(ema={"params": other.params})
  with checkpoint.Checkpointer(run / "checkpoints") as checkpoints:
    with pytest.raises(ValueError, match="does not hold the train state") as e:
      checkpoints.restore(abstract(other, mesh_of(ONE)))
    here, there, different = re.split(
      "Only in the checkpoint|Different", str(e.value)
    )
    assert "params/extra" in here
    assert "inner_state/v/head/bias" in here
    assert "params/head/bias" in there
    assert "model_state/batch_stats/mean" in there
    assert re.search(
      r"params/head/kernel +\(\(8, 12\), 'float32'\), "
      r"\(\(8, 11\), 'float32'\)",
      different,
    )
    with pytest.raises(ValueError, match=r"no checkpoint of step 6 .*: \[7\]"):
      checkpoints.restore(abstract(state, mesh_of(ONE)), step=6)


def test_an_empty_folder_has_nothing_to_restore(tmp_path):
  with checkpoint.Checkpointer(tmp_path / "new") as checkpoints:
    assert checkpoints.latest() is None
    assert checkpoints.best() is None
    assert not checkpoints.reached_preemption(0)
    with pytest.raises(ValueError, match=r"no checkpoint of step None"):
      checkpoints.restore(abstract(small(), mesh_of(ONE)))


@pytest.mark.parametrize(
  ("rules", "sentence"),
  [
    (dict(keep_last=0), r"config\.checkpoint\.keep_last = 0: .* at least 1"),
    (
      dict(best=("loss", "down")),
      r"config\.checkpoint\.best = \('loss', 'down'\) is not a metric and its",
    ),
    (dict(best="loss"), r"config\.checkpoint\.best = loss is not a metric"),
  ],
)
def test_rules_are_checked(tmp_path, rules, sentence):
  with pytest.raises(ValueError, match=sentence):
    checkpoint.Checkpointer(tmp_path, **rules)


@pytest.mark.parametrize("where", ["", "checkpoints", "checkpoints/7"])
def test_variables_are_read_as_numpy_from_any_of_the_folders(saved, where):
  run, state = saved
  got = checkpoint.load_variables(run / where)
  assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(got))
  assert_same(got, jax.device_get(state.ema))
  assert_same(
    checkpoint.load_params(run / where, ema=False), jax.device_get(state.params)
  )


def test_loading_refuses_what_is_not_there(saved, tmp_path):
  run, _ = saved
  with pytest.raises(ValueError, match=r"No checkpoint at .*has to be a run"):
    checkpoint.load_params(tmp_path)
  with pytest.raises(ValueError, match=r"no checkpoint 6 in .*: \[7\]"):
    checkpoint.load_params(run, step=6)
  with pytest.raises(ValueError, match=r"scored by config\.checkpoint\.best"):
    checkpoint.load_params(run, step="best")


CONFIG = {
  "total_steps": 100,
  "log_every": 50,
  "model": {"name": "vit", "sizes": [1, 2]},
  "data": {"workers": 0, "ops": "decode"},
  "evals": {"val": {"every": 3}},
  "optim": {"settings": {}},
}


def write_run(folder, config):
  run = {"config": config, "starts": []}
  (folder / "run.json").write_text(json.dumps(run))


def test_a_run_continues_with_its_config_and_free_keys_changed(tmp_path):
  checkpoint.check_same_config(tmp_path / "new", json.dumps(CONFIG))
  write_run(tmp_path, CONFIG)
  changed = CONFIG | {
    "log_every": 7,
    "data": {"workers": 4, "ops": "decode"},
    "evals": {"test": {"every": 1}},
  }
  checkpoint.check_same_config(tmp_path, json.dumps(changed))


def test_the_folder_of_another_config_is_refused_with_its_differences(tmp_path):
  write_run(tmp_path, CONFIG)
  changed = CONFIG | {
    "total_steps": 200,
    "log_every": 7,
    "model": {"name": "vit", "sizes": [1, 3]},
    "optim": {"settings": {"b1": 0.8}},
  }
  with pytest.raises(ValueError, match="has another config") as e:
    checkpoint.check_same_config(tmp_path, json.dumps(changed))
  assert str(e.value).splitlines()[1:] == [
    "  total_steps: 100 -> 200",
    "  model/sizes: [1, 2] -> [1, 3]",
    "  optim/settings: {} -> (absent)",
    "  optim/settings/b1: (absent) -> 0.8",
  ]


PROCESS = """
import sys, time
import jax
jax.distributed.initialize(f"localhost:{sys.argv[2]}", 2, int(sys.argv[3]))
import jax.numpy as jnp
from big_vision_like import api, checkpoint, sharding
mesh = sharding.make_mesh({"data": 2, "fsdp": 2})
init = lambda: api.TrainState(
  step=jnp.int32(0), params={"kernel": jnp.arange(60.0).reshape(12, 5)},
  model_state={}, opt_state=(), rng=jax.random.key(4))
shapes = jax.eval_shape(init)
rules = ((".*", ("fsdp", None)),)
places = sharding.state_shardings(shapes, mesh, rules)
state = jax.jit(init, out_shardings=places)()
with checkpoint.Checkpointer(sys.argv[1]) as checkpoints:
  if checkpoints.latest() is not None:
    state, _ = checkpoints.restore(sharding.with_shardings(shapes, places))
  add = jax.jit(lambda x: x + 1, out_shardings=places.params["kernel"])
  for step in range(int(state.step), 10_000):
    if checkpoints.reached_preemption(step):
      break
    state = state.replace(
      params={"kernel": add(state.params["kernel"])},
      step=jax.device_put(jnp.int32(step + 1), places.step))
    print("running", flush=True)
    time.sleep(0.02)
  checkpoints.save(step, state, {"step": step})
print("saved", step, flush=True)
"""


def start_two_processes(folder):
  with socket.socket() as s:
    s.bind(("localhost", 0))
    port = s.getsockname()[1]
  flags = "--xla_force_host_platform_device_count=2"
  return [
    subprocess.Popen(
      [sys.executable, "-c", PROCESS, str(folder), str(port), str(rank)],
      env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
      stdout=subprocess.PIPE,
      text=True,
    )
    for rank in range(2)
  ]


@pytest.mark.slow
def test_two_processes_save_the_same_step_and_one_continues(tmp_path):
  last = 0
  for _ in range(2):  # The second time from the checkpoint of the first.
    processes = start_two_processes(tmp_path)
    while "running" not in processes[1].stdout.readline():
      assert processes[1].poll() is None
    processes[1].send_signal(signal.SIGTERM)
    ends = [p.communicate(timeout=60)[0].split()[-1] for p in processes]
    assert [p.returncode for p in processes] == [0, 0]
    assert ends[0] == ends[1]
    assert int(ends[0]) > last
    last = int(ends[0])
  state = small().replace(params={"kernel": jnp.zeros((12, 5))})
  for shape in (ONE, FULL):
    with checkpoint.Checkpointer(tmp_path) as checkpoints:
      got, meta = checkpoints.restore(abstract(state, mesh_of(shape)))
    assert meta == {"step": last}
    assert int(got.step) == last
    np.testing.assert_array_equal(
      got.params["kernel"], np.arange(60.0).reshape(12, 5) + last
    )


WRITER = """
import sys
import jax, jax.numpy as jnp
from big_vision_like import api, checkpoint
def state(step):
  key = jax.random.key(step)
  params = {str(i): jax.random.normal(key, (1 << 20,)) for i in range(8)}
  return api.TrainState(step=jnp.int32(step), params=params, model_state={},
                        opt_state=(), rng=key)
with checkpoint.Checkpointer(sys.argv[1], keep_last=1) as checkpoints:
  checkpoints.save(1, state(1), {"step": 1})
  checkpoints.wait()
  checkpoints.save(2, state(2), {"step": 2})
  print("under way", flush=True)
  checkpoints.wait()
  print("done", flush=True)
  sys.stdin.read()
"""


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.0, 0.03, 0.1, 0.2, 0.25, 0.3, 0.35])
def test_sigkill_in_a_save_leaves_complete_checkpoints(tmp_path, seconds):
  writer = subprocess.Popen(
    [sys.executable, "-c", textwrap.dedent(WRITER), str(tmp_path)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert writer.stdout.readline() == "under way\n"
  time.sleep(seconds)  # Step 2 is being written, or step 1 being deleted.
  writer.send_signal(signal.SIGKILL)
  assert writer.wait() == -signal.SIGKILL
  with checkpoint.Checkpointer(tmp_path, keep_last=9) as checkpoints:
    steps = checkpoints.steps()
    assert steps in ([1], [1, 2], [2])
    for step in steps:
      got = checkpoint.load_params(tmp_path, step=step)
      for i in range(8):
        want = jax.random.normal(jax.random.key(step), (1 << 20,))
        np.testing.assert_array_equal(got[str(i)], want)
    checkpoints.save(3, small(), {})
    assert checkpoints.steps() == [*steps, 3]
  assert all(p.name.isdigit() for p in tmp_path.iterdir())


def test_half_deleted_checkpoints_are_gone(tmp_path):
  save_small(tmp_path, [1, 2])
  (tmp_path / "deleted").mkdir()
  (tmp_path / "1").rename(tmp_path / "deleted" / "1")
  shutil.rmtree(tmp_path / "deleted" / "1" / "params")
  steps, _ = save_small(tmp_path, [3], keep_last=1)
  assert steps == [3]
  assert [p.name for p in tmp_path.iterdir()] == ["3"]


def test_a_run_goes_on_with_its_own_tokenizer_only(tmp_path):
  checkpoint.check_same_tokenizer(tmp_path, "bytes")  # There is no run yet.
  file = tmp_path / "run.json"
  file.write_text(json.dumps({"config": {}, "tokenizer": "0123abc"}))
  checkpoint.check_same_tokenizer(tmp_path, "0123abc")
  with pytest.raises(ValueError, match=r"\(fingerprint 0123abc\).*\(bytes\)"):
    checkpoint.check_same_tokenizer(tmp_path, "bytes")
