"""Several processes as one run: joining, the handshake, and a common end.

jax.distributed finds the cluster, connects its processes and watches their
heartbeats. What it leaves open is here: which process has not come, whether all
are about to run the same, and why one has ended. The processes talk through the
key-value store of JAX's coordination service, so that nothing has to compile or
to be equal yet. With a single process, all of this does nothing.
"""

import contextlib
import hashlib
import itertools
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax._src import distributed

# Where the processes say that they are there, before they are connected.
ROLL_CALL = "processes"
_PREFIX = "big_vision_like"
_POLL = 0.2
_WATCH = 2.0
# The coordinator, process 0, stays so long after a failure, or the others would
# only see it vanish.
_LINGER = 3 * _WATCH
# JAX's time limit is so far beyond our own, whose message names the missing.
_GRACE = 30
# Values of a difference that a message shows.
_SHOWN = 5
_numbers = itertools.count()


def join(
  folder: str | os.PathLike[str],
  *,
  timeout: int,
  heartbeat_timeout: int,
  **cluster: Any,
) -> None:
  """Joins the cluster that jax.distributed detects. Call it before all else.

  A process that does not come within `timeout` seconds is named, and the others
  end. JAX's service cannot say who is missing, so the processes leave their
  names in a folder meanwhile.

  Args:
    folder: of the run, which all processes see.
    timeout: seconds to wait for all processes.
    heartbeat_timeout: seconds after which a process that has died is noticed,
      if it could not say so itself. JAX ends the others then.
    **cluster: what `jax.distributed.initialize` cannot detect.

  Raises:
    ValueError: if there is no cluster to detect.
  """
  with _roll_call(Path(folder) / ROLL_CALL, timeout):
    try:
      jax.distributed.initialize(
        initialization_timeout=timeout + _GRACE,
        heartbeat_timeout_seconds=heartbeat_timeout,
        **cluster,
      )
    except ValueError as e:
      raise ValueError(
        f"jax.distributed detects no cluster here ({e}) Give "
        "--coordinator_address, --num_processes and --process_id."
      ) from e
  _set(f"host/{_own()}", socket.gethostname())


def hosts() -> dict[int, str]:
  """The host of each process; {} for a process alone."""
  return _list("host") if jax.distributed.is_initialized() else {}


def agree(
  facts: Mapping[str, Mapping[str, Any]], *, timeout: float = 1800
) -> None:
  """Returns once all processes have come here with the same facts.

  Args:
    facts: by subject; what JSON can hold. All processes call with the same
      subjects, as often as each other.
    timeout: seconds to wait for all processes. It is for those that are alive
      and stuck; some take long to read what their data source holds.

  Raises:
    ValueError: naming the first process that differs from process 0, its host,
      and what differs; naming those that have not come; or with what a process
      said that has failed meanwhile.
  """
  if not jax.distributed.is_initialized():
    return
  call = f"agree/{next(_numbers)}"
  digests = {subject: _digest(values) for subject, values in facts.items()}
  _set(f"{call}/digests/{_own()}", json.dumps(digests))
  found = _wait_for(f"{call}/digests", range(_count()), timeout)
  found = {i: json.loads(text) for i, text in found.items()}
  for subject in facts:
    other = next(
      (i for i in sorted(found) if found[i][subject] != found[0][subject]), None
    )
    if other is None:
      continue
    # Only these two say all that they have: configs are long, and pods large.
    key = f"{call}/{subject}"
    if _own() in (0, other):
      _set(f"{key}/{_own()}", json.dumps(facts[subject]))
    both = _wait_for(key, (0, other), timeout)
    raise ValueError(
      _difference(subject, other, *(json.loads(both[i]) for i in (0, other)))
    )


def connect(mesh: jax.sharding.Mesh) -> None:
  """Connects the groups of CPU devices that the axes of the mesh make.

  gloo connects a group when a program first needs it, and gives up on a peer
  that comes 30 seconds later, as it does where compiling takes longer than
  elsewhere. All processes call this right after `agree`, while they are
  together. Other backends wait for longer.
  """
  if not jax.distributed.is_initialized() or jax.default_backend() != "cpu":
    return
  axes = [axis for axis, size in mesh.shape.items() if size > 1]
  groups = [g for n in range(len(axes)) for g in combinations(axes, n + 1)]
  spec = jax.sharding.PartitionSpec(tuple(axes))

  @jax.shard_map(mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
  def add(x):
    return [jax.lax.psum(x, group) for group in groups]

  zeros = jnp.zeros(mesh.size)
  jax.block_until_ready(jax.jit(add)(zeros))


@contextlib.contextmanager
def end_together() -> Iterator[None]:
  """Inside it, a process that fails takes the others along, and says why.

  Without, they would wait in their next collective operation until the
  heartbeat's time-out, and the failed one for them.
  """
  if not jax.distributed.is_initialized():
    yield
    return
  done = threading.Event()
  thread = threading.Thread(target=_watch, args=(done,), daemon=True)
  thread.start()
  try:
    yield
  except BaseException as e:
    done.set()
    traceback.print_exc()
    _report(f"{type(e).__name__}: {e}")
    if _own() == 0:
      time.sleep(_LINGER)
    # A regular exit would wait for processes that wait for this one.
    _exit()
  done.set()
  thread.join()


@contextlib.contextmanager
def _roll_call(folder: Path, timeout: float) -> Iterator[None]:
  """Writes this process's name to `folder` while it waits for the others."""
  folder.mkdir(parents=True, exist_ok=True)
  done = threading.Event()
  thread = threading.Thread(
    target=_call_out, args=(folder, timeout, done), daemon=True
  )
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join()


def _call_out(folder: Path, timeout: float, done: threading.Event) -> None:
  start = time.monotonic()
  while not done.wait(1.0):
    # JAX fills them in once it has found the cluster.
    if distributed.global_state.client is None:
      continue
    _sign(folder)
    if time.monotonic() - start >= timeout:
      print(_absent(folder, timeout), file=sys.stderr, flush=True)
      _exit()
  if distributed.global_state.client is not None:
    (folder / str(_own())).unlink(missing_ok=True)


def _sign(folder: Path) -> None:
  # Renamed into place: a file being written is empty to those who read it.
  own = folder / str(_own())
  draft = own.with_suffix(".draft")
  draft.write_text(socket.gethostname())
  draft.replace(own)


def _absent(folder: Path, timeout: float) -> str:
  # Files of an earlier start may lie there; those who wait renew theirs. Both
  # times are of the clock that serves the folder.
  now = (folder / str(_own())).stat().st_mtime
  here = {
    int(path.name): path.read_text()
    for path in folder.iterdir()
    if path.name.isdecimal() and now - path.stat().st_mtime < 10
  }
  missing = [str(i) for i in range(_count()) if i not in here]
  waiting = ", ".join(f"{i} ({host})" for i, host in sorted(here.items()))
  return (
    f"error: of {_count()} processes, {', '.join(missing) or 'none'} did not "
    f"come within {timeout:.0f} s; waiting: {waiting}. Look at the logs of the "
    "missing, and whether all see the same --workdir and reach the coordinator "
    f"{distributed.global_state.coordinator_address}."
  )


def _wait_for(folder: str, indices: Any, timeout: float) -> dict[int, str]:
  """What the processes `indices` have set in a folder of the store."""
  deadline = time.monotonic() + timeout
  while True:
    found = _list(folder)
    missing = [i for i in indices if i not in found]
    if not missing:
      return found
    if failed := _list("failed"):
      raise ValueError(_failure(failed))
    if time.monotonic() > deadline:
      raise ValueError(
        f"{', '.join(map(_name, missing))} did not come to the handshake "
        f"within {timeout:.0f} s. Look at the logs there."
      )
    time.sleep(_POLL)


def _difference(subject: str, other: int, first: Any, second: Any) -> str:
  keys = [
    key
    for key in dict.fromkeys([*first, *second])
    if first.get(key, _ABSENT) != second.get(key, _ABSENT)
  ]
  lines = [
    f"  {key}: {second.get(key, _ABSENT)}, and on process 0 "
    f"{first.get(key, _ABSENT)}"
    for key in keys[:_SHOWN]
  ]
  more = [f"  and {len(keys) - _SHOWN} more"] * (len(keys) > _SHOWN)
  return "\n".join(
    [f"{_name(other)} differs from {_name(0)} in its {subject}:", *lines, *more]
  )


_ABSENT = "(absent)"


def _watch(done: threading.Event) -> None:
  while not done.wait(_WATCH):
    failed = _list("failed")
    # The others may be about to say the same themselves.
    if failed and not done.wait(_WATCH):
      print(f"error: {_failure(failed)}", file=sys.stderr, flush=True)
      _exit()


def _report(text: str) -> None:
  # Where even the coordinator is gone, its absence tells the others.
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    _set(f"failed/{_own()}", text)


def _failure(failed: dict[int, str]) -> str:
  index, text = min(failed.items())
  return f"{_name(index)} has failed, so this one ends too. There: {text}"


def _exit() -> None:
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(1)


def _name(index: int) -> str:
  return f"Process {index} ({hosts().get(index, 'of an unknown host')})"


def _own() -> int:
  # Not jax.process_index(), which starts the devices.
  return distributed.global_state.process_id


def _count() -> int:
  return distributed.global_state.num_processes


def _digest(values: Any) -> str:
  text = json.dumps(values, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _set(key: str, value: str) -> None:
  distributed.global_state.client.key_value_set(f"{_PREFIX}/{key}", value)


def _list(folder: str) -> dict[int, str]:
  """Values by process."""
  found = distributed.global_state.client.key_value_dir_get(
    f"{_PREFIX}/{folder}/"
  )
  return {int(key.rpartition("/")[2]): value for key, value in found}
