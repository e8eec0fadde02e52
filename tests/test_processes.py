"""Several processes on this machine, joined by jax.distributed and gloo."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from big_vision_like import checkpoint, processes

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent
TIMEOUT = 300
HEARTBEAT = 10

CONFIG = """
from configs import navit_jft

def get_config():
  c = navit_jft.get_config()
  with c.unlocked():
    c.total_steps = 8
    c.log_every = 1
    c.model.sizes = dict(width=24, depth=2, mlp=32, heads=2)
    c.data.pack.length = 64
    c.evals = dict(val=c.evals.val)
    c.evals.val.data.limit = 16
    c.checkpoint.every = 2
    c.checkpoint.best = None
  return c
"""


def free_port() -> int:
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


class Processes:
  """The processes of one job, with what each has written."""

  def __init__(self, started, logs):
    self.started, self.logs = started, logs

  def text(self, index: int) -> str:
    return self.logs[index].read_text()

  def wait(self) -> list[int]:
    """Exit codes."""
    deadline = time.monotonic() + TIMEOUT
    return [p.wait(max(0.0, deadline - time.monotonic())) for p in self.started]

  def wait_until(self, condition):
    deadline = time.monotonic() + TIMEOUT
    while not condition():
      alive = all(p.poll() is None for p in self.started)
      assert alive, "a process ended early"
      assert time.monotonic() < deadline
      time.sleep(0.05)


@contextlib.contextmanager
def start(commands, folder, *, devices=1, env=None):
  """Runs commands side by side; none of them outlives the block."""
  flags = f"--xla_force_host_platform_device_count={devices}"
  env = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": flags,
    # Each process compiles for itself, and all for a few steps.
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    **(env or {}),
  }
  folder.mkdir(exist_ok=True)
  logs = [folder / f"log{i}.txt" for i in range(len(commands))]
  started = []
  try:
    for i, (command, log) in enumerate(zip(commands, logs)):
      with log.open("w") as out:
        started.append(
          subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env={k: v.format(i=i) for k, v in env.items()},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
          )
        )
    yield Processes(started, logs)
  finally:
    for process in started:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
      process.wait()


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  path = tmp_path_factory.mktemp("config") / "tiny.py"
  path.write_text(CONFIG)
  return path


def cluster(count, *, heartbeat=HEARTBEAT, join=200) -> list[list[str]]:
  """The flags of each process, as for plain ssh."""
  port = free_port()
  return [
    [
      "--distributed",
      f"--coordinator_address=127.0.0.1:{port}",
      f"--num_processes={count}",
      f"--process_id={i}",
      f"--heartbeat_timeout={heartbeat}",
      f"--join_timeout={join}",
    ]
    for i in range(count)
  ]


def launch(config, workdir, *changes, count, devices):
  """`launch.py` as `count` processes of so many devices each."""
  command = ["launch.py", f"--config={config}", f"--workdir={workdir}"]
  command += [f"--config.{change}" for change in changes]
  flags = cluster(count) if count > 1 else [[]]
  logs = workdir.parent / f"{workdir.name}_logs"
  return start([[*command, *f] for f in flags], logs, devices=devices)


def run(*args, **kw):
  with launch(*args, **kw) as job:
    assert set(job.wait()) == {0}, job.text(0)


def records(workdir, prefix) -> dict[int, dict[str, float]]:
  """Metrics by step; of a step that was done twice, the later ones."""
  found = {}
  for line in (workdir / "metrics.jsonl").read_text().splitlines():
    record = json.loads(line)
    chosen = {k: v for k, v in record.items() if k.startswith(prefix)}
    if chosen:
      found[record["step"]] = chosen
  return found


def steps(workdir) -> int:
  path = workdir / "metrics.jsonl"
  return len(path.read_text().splitlines()) if path.exists() else 0


def assert_close(one, other):
  """Only the order of float32 sums differs, over eight steps."""
  for prefix in ("train/loss", "train/grad_norm", "val/"):
    reference, found = records(one, prefix), records(other, prefix)
    assert reference.keys() == found.keys()
    for step, values in reference.items():
      assert values.keys() == found[step].keys()
      for key, value in values.items():
        np.testing.assert_allclose(
          found[step][key], value, rtol=5e-5, err_msg=f"{key} of step {step}"
        )


def assert_same(one, other):
  """Bitwise: losses of all steps, and the final parameters."""
  assert records(one, "train/loss") == records(other, "train/loss")
  jax.tree.map(
    np.testing.assert_array_equal, *map(checkpoint.load_params, (one, other))
  )


def cut(workdir, target, step):
  """A copy of a run as it was after `step`."""
  shutil.copytree(workdir, target)
  for folder in (target / "checkpoints").iterdir():
    if folder.name.isdigit() and int(folder.name) > step:
      shutil.rmtree(folder)
  lines = (target / "metrics.jsonl").read_text().splitlines()
  kept = [x for x in lines if json.loads(x)["step"] <= step]
  (target / "metrics.jsonl").write_text("\n".join([*kept, ""]))


MESH = ("mesh.data=1", "mesh.fsdp=2", "mesh.tensor=2", "sharding=tensor")


def test_four_processes_agree_with_one_and_checkpoints_go_both_ways(
  config, tmp_path
):
  """On the mesh of the four, two share each half of a batch."""
  one, four = tmp_path / "one", tmp_path / "four"
  run(config, one, count=1, devices=4)
  run(config, four, *MESH, count=4, devices=1)
  assert_close(one, four)
  cut(four, tmp_path / "from_four", 4)
  run(config, tmp_path / "from_four", count=1, devices=4)
  assert_close(one, tmp_path / "from_four")
  cut(one, tmp_path / "from_one", 4)
  run(config, tmp_path / "from_one", *MESH, count=4, devices=1)
  assert_close(one, tmp_path / "from_one")


def test_a_killed_process_ends_the_others_and_the_job_resumes_bitwise(
  config, tmp_path
):
  """Then a SIGTERM to one process stops both at the same step."""
  long = ("total_steps=80", "checkpoint.every=10")
  whole, torn = tmp_path / "whole", tmp_path / "torn"
  run(config, whole, *long, count=2, devices=2)
  with launch(config, torn, *long, count=2, devices=2) as job:
    job.wait_until(lambda: steps(torn) >= 25)
    job.started[1].kill()
    killed = time.monotonic()
    assert job.wait()[0] not in (0, None)
    # The heartbeat's time-out, and what a busy machine adds.
    assert time.monotonic() - killed < 6 * HEARTBEAT
    assert re.search("another task died|has failed|Process 1", job.text(0))
  with launch(config, torn, *long, count=2, devices=2) as job:
    job.wait_until(lambda: steps(torn) >= 40)
    job.started[1].terminate()
    assert job.wait() == [0, 0]
    assert "Continuing from step" in job.text(0)
    assert "To continue:" in job.text(0)
    # Said once, for both.
    assert "To continue:" not in job.text(1)
  assert max(records(torn, "train/loss")) < 80
  run(config, torn, *long, count=2, devices=2)
  assert_same(whole, torn)


def test_a_host_with_another_config_is_named(config, tmp_path):
  command = ["launch.py", f"--config={config}", f"--workdir={tmp_path / 'run'}"]
  commands = [[*command, *flags] for flags in cluster(2)]
  commands[1] += ["--config.optim.lr=0.5", "--config.seed=3"]
  with start(commands, tmp_path / "logs") as job:
    assert job.wait() == [1, 1]
    for i in range(2):
      text = job.text(i)
      assert f"Process 1 ({socket.gethostname()}) differs from" in text
      assert "in its config:" in text
      assert "optim/lr: 0.5, and on process 0 0.002" in text
      assert "seed: 3, and on process 0 0" in text
  assert not (tmp_path / "run" / "checkpoints").exists()


WORKER = """
import sys, time
from big_vision_like import processes

case, index, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
flags = dict(x[2:].split("=") for x in sys.argv[4:] if "=" in x)
cluster = {k: int(v) if v.isdigit() else v for k, v in flags.items()}
processes.join(
  folder,
  timeout=cluster.pop("join_timeout", 100),
  heartbeat_timeout=cluster.pop("heartbeat_timeout", 100),
  **cluster,
)
with processes.end_together():
  processes.agree({"versions": {"jax": "1"}})
  if case == "late" and index == 1:
    time.sleep(60)
  if case == "failing" and index == 1:
    raise FileNotFoundError("no such shard: 7.tar")
  if case == "stuck" and index == 1:
    time.sleep(3)
    raise FileNotFoundError("no such shard: 8.tar")
  if case == "stuck":
    time.sleep(60)
  data = "b" if case == "data" and index == 2 else "a"
  processes.agree({"data": {"fingerprint": data}}, timeout=5)
print("agreed")
"""


def work(case, tmp_path, flags, **kw):
  """Runs WORKER in `len(flags)` processes, of which some flags may be None."""
  script = tmp_path / "worker.py"
  script.write_text(WORKER)
  env = {"PYTHONPATH": str(ROOT), **kw}
  commands = [
    [str(script), case, str(i), str(tmp_path / "run"), *f]
    for i, f in enumerate(flags)
    if f is not None
  ]
  return start(commands, tmp_path / "logs", env=env)


HOST = socket.gethostname()


def test_without_a_cluster_the_flags_are_named(tmp_path):
  with work("fine", tmp_path, [[]]) as job:
    assert job.wait() == [1]
    assert "detects no cluster here" in job.text(0)
    assert "Give --coordinator_address, --num_processes" in job.text(0)


@pytest.mark.parametrize(
  ("case", "count", "sentence"),
  [
    (
      "data",
      3,
      f"Process 2 ({HOST}) differs from Process 0 ({HOST}) in its data:\n"
      "  fingerprint: b, and on process 0 a",
    ),
    ("late", 2, f"Process 1 ({HOST}) did not come to the handshake within 5 s"),
    ("failing", 2, "FileNotFoundError: no such shard: 7.tar"),
    (
      "stuck",
      2,
      f"error: Process 1 ({HOST}) has failed, so this one ends too.",
    ),
  ],
)
def test_the_handshake_names_the_host(case, count, sentence, tmp_path):
  with work(case, tmp_path, cluster(count)) as job:
    assert job.started[0].wait(TIMEOUT) == 1
    assert sentence in job.text(0)


def test_a_process_that_does_not_come_is_named(tmp_path):
  flags = cluster(3, join=8)
  flags[1] = None
  # What is left of an earlier start does not count.
  (tmp_path / "run" / processes.ROLL_CALL).mkdir(parents=True)
  old = tmp_path / "run" / processes.ROLL_CALL / "1"
  old.write_text("an-old-host")
  os.utime(old, (0, 0))
  with work("missing", tmp_path, flags) as job:
    assert job.wait() == [1, 1]
    for i in range(2):
      assert (
        f"of 3 processes, 1 did not come within 8 s; waiting: 0 ({HOST}), "
        f"2 ({HOST})."
      ) in job.text(i)


def test_a_name_is_never_read_by_half(tmp_path):
  """Others read the roll call while a process renews its name there."""
  processes._sign(tmp_path)
  ended = threading.Event()

  def renew():
    for _ in range(2000):
      processes._sign(tmp_path)
    ended.set()

  writer = threading.Thread(target=renew)
  writer.start()
  seen = set()
  while not ended.is_set():
    seen.add((tmp_path / "0").read_text())
  writer.join()
  assert seen == {HOST}


def test_slurm_is_detected(tmp_path):
  """By JAX, from the variables that srun sets."""
  env = dict(
    SLURM_JOB_ID=str(free_port()),
    SLURM_STEP_NODELIST="localhost",
    SLURM_NTASKS="2",
    SLURM_PROCID="{i}",
    SLURM_LOCALID="{i}",
    JAX_COORDINATOR_PORT=str(free_port()),
  )
  with work("fine", tmp_path, [[], []], **env) as job:
    assert job.wait() == [0, 0], job.text(0)
    assert "agreed" in job.text(1)
  assert not list((tmp_path / "run" / processes.ROLL_CALL).iterdir())


ROWS = """
import sys
import jax
import numpy as np
from jax.sharding import Mesh
from big_vision_like import api, processes, sharding
from big_vision_like.data import batches, pipeline
from big_vision_like.evaluators import classification

index, folder, address = int(sys.argv[1]), sys.argv[2], sys.argv[3]
processes.join(
  folder, timeout=100, heartbeat_timeout=100, coordinator_address=address,
  num_processes=2, process_id=index,
)
devices = sorted(jax.devices(), key=lambda d: (d.id % 2, d.process_index))
mesh = Mesh(np.array(devices).reshape(4, 1, 1), api.MESH_AXES)
parts, count = sharding.held_parts(mesh)
assert (parts, count) == (((0, 2), (1, 3))[index], 4)
whole = np.arange(24, dtype=np.int64) + 2**33
shard = batches.Shard(24, parts, count)
rows = shard.rows(0)
device, host = pipeline.to_device(
  {"x": np.array(rows, np.int32), "example_id": whole[rows]},
  sharding.batch_sharding(mesh),
)
for s in device["x"].addressable_shards:
  np.testing.assert_array_equal(s.data, np.arange(24)[s.index])
got = list(classification.gather(
  lambda b: {"mask": np.ones(24, bool)}, [(device, host)]
).values())
np.testing.assert_array_equal(got, [whole])
print("in order")
"""


def test_rows_keep_the_global_order_where_a_mesh_interleaves_processes(
  tmp_path,
):
  script = tmp_path / "rows.py"
  script.write_text(ROWS)
  address = f"127.0.0.1:{free_port()}"
  commands = [
    [str(script), str(i), str(tmp_path / "run"), address] for i in range(2)
  ]
  env = {"PYTHONPATH": str(ROOT)}
  with start(commands, tmp_path / "logs", devices=2, env=env) as job:
    assert job.wait() == [0, 0], job.text(0)
    assert "in order" in job.text(1)


LATE = """
import sys, time
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from big_vision_like import processes

index, folder, address = int(sys.argv[1]), sys.argv[2], sys.argv[3]
processes.join(
  folder, timeout=100, heartbeat_timeout=100, coordinator_address=address,
  num_processes=2, process_id=index,
)
mesh = Mesh(jax.devices(), "data")
processes.connect(mesh)
time.sleep(35 * index)  # As if it had more to compile.
split, whole = (NamedSharding(mesh, spec) for spec in (P("data"), P()))
ones = jax.jit(lambda: jnp.ones(2), out_shardings=split)
total = jax.jit(lambda x: x.sum(), out_shardings=whole)
print("the sum is", float(total(ones())))
"""


def test_a_process_may_come_late_to_its_first_program(tmp_path):
  """Later than gloo waits for a peer that it does not know yet."""
  script = tmp_path / "late.py"
  script.write_text(LATE)
  address = f"127.0.0.1:{free_port()}"
  commands = [
    [str(script), str(i), str(tmp_path / "run"), address] for i in range(2)
  ]
  env = {"PYTHONPATH": str(ROOT)}
  with start(commands, tmp_path / "logs", env=env) as job:
    assert job.wait() == [0, 0], job.text(0)
    assert "the sum is 2.0" in job.text(0)
