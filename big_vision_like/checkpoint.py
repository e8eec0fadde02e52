"""Checkpoints: written in the background, restored onto any devices.

  <run>/checkpoints/<step>/params/       a tree of arrays
                          /model_state/  likewise, where the model has any
                          /ema/          averages of both, where the run keeps
                                         them
                          /train/        step, rng, opt_state
                          /meta/metadata JSON: what the loop gave, the scores

A step is written under a temporary name and renamed when it is complete, and
renamed again before it is deleted, so a part of one never counts as a
checkpoint. Trees are stored as nested dicts of plain arrays: they can be read
without the code that wrote them.
"""

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint import checkpoint_managers as policies

from big_vision_like import api, trees

FOLDER = "checkpoints"
RUN_FILE = "run.json"

# Regexes of the config keys that may differ when a run continues: how and where
# it is computed and watched, never what is computed. (Micro-batches draw their
# own dropout, but a smaller machine may have to have more of them.)
FREE_KEYS = (
  "notice",
  "mesh/.*",
  "sharding",
  "accum_steps",
  "log_every",
  "checkpoint/.*",
  "evals/.*",
  "data/(workers|threads|prefetch|max_broken|text/path)",
  "model/(attention|remat)",
)

_DELETED = "deleted"
_TREES = ("params", "ema", "model_state", "train")


class Checkpointer:
  """Saves and restores the train states of one run.

  Every method is called by all processes, at the same step.
  """

  def __init__(
    self,
    folder: str | os.PathLike,
    *,
    keep_last: int = 2,
    keep_every: int = 0,
    best: Sequence[str] | None = None,
  ):
    """Opens the folder and clears what an interrupted save left there.

    A checkpoint stays as long as one of the three rules wants it.

    Args:
      folder: of the checkpoints; made if missing.
      keep_last: how many of the newest to keep.
      keep_every: keep every step that is a multiple of this; 0: no more.
      best: metric and "max" or "min": keep the best scored one. Checkpoints
        saved without that metric do not take part.
    """
    if keep_last < 1:
      raise ValueError(
        f"config.checkpoint.keep_last = {keep_last}: a run needs its newest "
        "checkpoint to continue, so at least 1."
      )
    if best is not None and (len(best) != 2 or best[1] not in ("max", "min")):
      raise ValueError(
        f"config.checkpoint.best = {best} is not a metric and its direction, "
        "such as ('val/accuracy', 'max') or ('val/loss', 'min')."
      )
    self.folder = Path(folder).absolute()
    self._best = best
    self._manager = _manager(
      self.folder,
      cleanup_tmp_directories=True,
      todelete_subdir=_DELETED,
      preservation_policy=_keep(keep_last, keep_every, best),
      # Besides the policy, orbax writes metrics only where this is set.
      best_fn=None if best is None else _score(*best),
      best_mode="max" if best is None else best[1],
    )
    self.wait()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exc):
    self.close()

  def save(
    self,
    step: int,
    state: api.TrainState,
    meta: Mapping[str, Any],
    metrics: Mapping[str, float] | None = None,
  ):
    """Starts to write a checkpoint.

    Returns once the arrays are copied: `state` may be donated then. Waits for
    the save before, and raises its error if it failed.

    Args:
      step: its name, usually `state.step`.
      state: any train state of concrete arrays.
      meta: whatever JSON can hold; the data position, for one.
      metrics: the scores of this very state, as far as there are any.

    Raises:
      ValueError: if there is a checkpoint of this step, which stays as it is.
    """
    self.wait()
    if step in self._manager.all_steps():
      raise ValueError(
        f"There is a checkpoint of step {step} in {self.folder} already; it "
        "was not overwritten."
      )
    metrics = {k: float(v) for k, v in (metrics or {}).items()}
    record = {"meta": dict(meta), "metrics": metrics, "best": self._best}
    items = {k: ocp.args.PyTreeSave(v) for k, v in _items(state).items()}
    # By way of text, since writing goes on while the caller may change it.
    items["meta"] = ocp.args.JsonSave(json.loads(json.dumps(record)))
    with _no_nagging():
      saved = self._manager.save(
        step,
        args=ocp.args.Composite(**items),
        metrics=metrics if self._scored(metrics) else None,
        force=True,
      )
    if not saved:
      raise RuntimeError(f"orbax refused to save step {step}.")

  def _scored(self, metrics: dict[str, float]) -> bool:
    if self._best is None or not metrics:
      return False
    if self._best[0] not in metrics:
      logging.warning(
        "config.checkpoint.best names %r, but this checkpoint has the scores "
        "%s.",
        self._best[0],
        ", ".join(metrics),
      )
      return False
    return math.isfinite(metrics[self._best[0]])

  def steps(self) -> list[int]:
    """The complete checkpoints, oldest first."""
    self.wait()
    return sorted(self._manager.all_steps())

  def latest(self) -> int | None:
    """The newest complete checkpoint."""
    return max(self.steps(), default=None)

  def best(self) -> int | None:
    """The checkpoint with the best score, if any has been scored."""
    self.wait()
    step = None if self._best is None else self._manager.best_step()
    if step is None or self._best[0] not in self._manager.metrics(step):
      return None
    return step

  def restore(
    self, state: api.TrainState, *, step: int | None = None
  ) -> tuple[api.TrainState, dict[str, Any]]:
    """Reads a checkpoint onto the shardings of an abstract state.

    Args:
      state: abstract arrays with shardings, as `sharding.with_shardings` makes
        them; the checkpoint may come from other devices or hosts.
      step: the newest one, unless given.

    Returns:
      The state and the `meta` that it was saved with.

    Raises:
      ValueError: if there is no such checkpoint, or if its arrays are not
        those of `state`, by name, shape and dtype.
    """
    steps = self.steps()
    step = max(steps, default=None) if step is None else step
    if step not in steps:
      raise ValueError(
        f"There is no checkpoint of step {step} in {self.folder}; there are: "
        f"{steps}."
      )
    wanted = _items(state)
    _check_same(
      wanted, self._manager.item_metadata(step), self.folder / f"{step}"
    )
    items = {k: _restore_args(v) for k, v in wanted.items()}
    items["meta"] = ocp.args.JsonRestore()
    loaded = self._manager.restore(step, args=ocp.args.Composite(**items))
    return _rebuild(state, loaded), loaded["meta"]["meta"]

  def reached_preemption(self, step: int) -> bool:
    """Whether the cluster asked any process to stop. Call it at every step."""
    return self._manager.reached_preemption(step)

  def wait(self):
    """Until the save under way is complete; raises its error if it failed."""
    self._manager.wait_until_finished()
    if jax.process_index() == 0:
      # What cannot be deleted now is no reason to stop: it is tried again.
      shutil.rmtree(self.folder / _DELETED, ignore_errors=True)

  def close(self):
    self.wait()
    self._manager.close()


def load_variables(
  path: str | os.PathLike, *, step: int | str = "latest", ema: bool = True
) -> dict[str, Any]:
  """The variables of a trained model as numpy arrays, on any machine.

  Where there are several processes, all of them call it.

  Args:
    path: a run folder, its folder of checkpoints, or one checkpoint.
    step: a step, "latest" or "best"; for a path of many checkpoints.
    ema: take the moving average, of the parameters and of the running
      statistics, where the run kept one.

  Returns:
    What `model.apply` takes: "params" and the other collections.

  Raises:
    ValueError: if there is no such checkpoint.
  """
  folder, only = _find_checkpoints(Path(path).absolute())
  with _manager(folder, create=False) as manager:
    step = only if only is not None else _choose_step(manager, step, folder)
    stored = manager.item_metadata(step)
    averages = ema and stored.get("ema") is not None
    names = ("model_state", "ema" if averages else "params")
    items = {
      k: ocp.args.PyTreeRestore(
        restore_args=jax.tree.map(
          lambda _: ocp.RestoreArgs(restore_type=np.ndarray), _tree(stored[k])
        )
      )
      for k in names
      if stored.get(k) is not None
    }
    loaded = manager.restore(step, args=ocp.args.Composite(**items))
  own = loaded["ema"] if averages else {"params": loaded["params"]}
  return {**(loaded.get("model_state") or {}), **own}


def load_params(
  path: str | os.PathLike, *, step: int | str = "latest", ema: bool = True
) -> dict[str, Any]:
  """Only the parameters of `load_variables`."""
  return load_variables(path, step=step, ema=ema)["params"]


def check_same_config(folder: str | os.PathLike, config: str):
  """Refuses to continue a run with a config that would train another one.

  Args:
    folder: of the run; its `run.json`, if it exists, has the `config` there.
    config: the resolved config as JSON.

  Raises:
    ValueError: listing the keys that differ, apart from FREE_KEYS.
  """
  path = Path(folder) / RUN_FILE
  if not path.exists():
    return
  stored = _flatten(json.loads(path.read_text())["config"])
  current = flat_config(config)
  differing = [
    f"  {key}: {stored.get(key, '(absent)')} -> {current.get(key, '(absent)')}"
    for key in dict.fromkeys([*stored, *current])
    if stored.get(key, _ABSENT) != current.get(key, _ABSENT)
    and not any(re.fullmatch(regex, key) for regex in FREE_KEYS)
  ]
  if differing:
    raise ValueError(
      f"The run in {folder} has another config, so it cannot be continued "
      "with this one. Choose another --workdir, or undo these changes (run -> "
      "now):\n" + "\n".join(differing)
    )


def check_same_tokenizer(folder: str | os.PathLike, tokenizer: str | None):
  """Refuses a tokenizer whose ids mean other tokens to the run in a folder.

  Args:
    folder: of the run; its `run.json`, if it exists, has the fingerprint.
    tokenizer: the fingerprint of the one that is to be used; None: no texts.
  """
  path = Path(folder) / RUN_FILE
  stored = (
    json.loads(path.read_text()).get("tokenizer") if path.exists() else None
  )
  if stored and stored != tokenizer:
    raise ValueError(
      f"The run in {folder} was trained with another tokenizer (fingerprint "
      f"{stored}) than config.data.text now gives ({tokenizer}): its model's "
      "vocabulary would mean other words. Use the same file as then."
    )


_ABSENT = object()


def flat_config(config: str) -> dict[str, Any]:
  """The values of a resolved config in JSON, by path such as "optim/lr"."""
  return _flatten(json.loads(config))


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
  if not isinstance(tree, dict) or not tree:
    return {prefix: tree}
  flat: dict[str, Any] = {}
  for key, value in tree.items():
    flat |= _flatten(value, f"{prefix}/{key}" if prefix else key)
  return flat


def _keep(keep_last, keep_every, best):
  rules = [policies.LatestN(n=keep_last)]
  if keep_every:
    rules.append(policies.EveryNSteps(keep_every))
  if best is not None:
    rules.append(
      policies.BestN(
        get_metric_fn=_score(*best),
        reverse=best[1] == "min",
        n=1,
        keep_checkpoints_without_metrics=False,
      )
    )
  return policies.AnyPreservationPolicy(rules)


def _score(metric: str, mode: str) -> Callable[[Mapping[str, float]], float]:
  # An earlier part of the run may have been scored by another metric.
  worst = -math.inf if mode == "max" else math.inf
  return lambda metrics: metrics.get(metric, worst)


def _manager(folder: Path, **options: Any) -> ocp.CheckpointManager:
  handlers = {name: ocp.PyTreeCheckpointHandler() for name in _TREES}
  return ocp.CheckpointManager(
    folder,
    options=ocp.CheckpointManagerOptions(save_interval_steps=0, **options),
    item_handlers=handlers | {"meta": ocp.JsonCheckpointHandler()},
  )


@contextlib.contextmanager
def _no_nagging() -> Iterator[None]:
  """Without orbax's warning at each checkpoint that has not been scored."""
  calm = lambda record: "tracked_metric" not in record.getMessage()
  logger = logging.get_absl_logger()
  logger.addFilter(calm)
  try:
    yield
  finally:
    logger.removeFilter(calm)


def _items(state: api.TrainState) -> dict[str, dict[str, Any]]:
  """What is stored, by folder: nested dicts of plain arrays, none empty."""
  train = {"step": state.step, "rng": state.rng, "opt_state": state.opt_state}
  items = {
    "params": state.params,
    "ema": state.ema,
    "model_state": state.model_state,
    "train": train,
  }
  flat = {name: trees.flatten(tree) for name, tree in items.items()}
  return {
    name: trees.unflatten({k: _plain(x) for k, x in leaves.items()})
    for name, leaves in flat.items()
    if leaves
  }


def _is_key(x: Any) -> bool:
  return jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key)


def _plain(x: Any) -> Any:
  """Typed keys as their numbers, concrete or abstract."""
  if not _is_key(x):
    return x
  if not isinstance(x, jax.ShapeDtypeStruct):
    return jax.random.key_data(x)
  data = jax.eval_shape(jax.random.key_data, x)
  return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=x.sharding)


def _rebuild(state: api.TrainState, loaded: Mapping[str, Any]):
  """Puts loaded trees back into the containers of the abstract state."""
  parts = {
    "params": loaded["params"],
    "ema": loaded.get("ema"),
    "model_state": loaded.get("model_state"),
    **loaded["train"],
  }
  leaves = trees.flatten(parts)

  def one(path, wanted):
    x = leaves[trees.path_name(path)]
    if not _is_key(wanted):
      return x
    impl: list[Any] = []
    jax.eval_shape(lambda k: impl.append(jax.random.key_impl(k)), wanted)
    return jax.random.wrap_key_data(x, impl=impl[0])

  return jax.tree_util.tree_map_with_path(one, state)


def _restore_args(tree: Any) -> ocp.args.PyTreeRestore:
  return ocp.args.PyTreeRestore(
    tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree)
  )


def _tree(metadata: Any) -> Any:
  """The stored arrays' shapes and dtypes as nested dicts."""
  return getattr(metadata, "tree", metadata)


def _check_same(wanted: dict[str, Any], stored: Any, path: Path):
  def flat(items):
    return {
      k: (tuple(x.shape), np.dtype(x.dtype).name)
      for k, x in trees.flatten(items).items()
    }

  here = flat(wanted)
  there = flat(
    {k: _tree(stored[k]) for k in _TREES if stored.get(k) is not None}
  )
  if here != there:
    raise ValueError(
      f"The checkpoint {path} does not hold the train state of this run's "
      f"model and optimizer.\n{differences(here, there)}"
    )


def differences(here: dict[str, Any], there: dict[str, Any]) -> str:
  """A model's parameters beside a checkpoint's, where they differ."""
  changed = [k for k in here if k in there and here[k] != there[k]]
  return (
    listing("Only in the model", {k: here[k] for k in here if k not in there})
    + listing(
      "Only in the checkpoint", {k: there[k] for k in there if k not in here}
    )
    + listing(
      "Different (model, checkpoint)",
      {k: f"{here[k]}, {there[k]}" for k in changed},
    )
  )


def listing(title: str, rows: Mapping[str, Any]) -> str:
  """A titled table of names and values; empty without rows."""
  if not rows:
    return ""
  width = max(map(len, rows))
  lines = [f"  {name:{width}}  {value}" for name, value in rows.items()]
  return "\n".join([f"{title} ({len(rows)}):", *lines, ""])


def _find_checkpoints(path: Path) -> tuple[Path, int | None]:
  """The folder of checkpoints, and the step if the path names one."""
  if (path / "params").is_dir() and path.name.isdigit():
    return path.parent, int(path.name)
  folder = path / FOLDER if (path / FOLDER).is_dir() else path
  if folder.is_dir() and any(p.name.isdigit() for p in folder.iterdir()):
    return folder, None
  raise ValueError(
    f"No checkpoint at {path}. It has to be a run folder with a {FOLDER!r} "
    "folder, such a folder, or one of the numbered checkpoints in it."
  )


def _choose_step(manager, step: int | str, folder: Path) -> int:
  steps = sorted(manager.all_steps())
  if step == "best":
    return _best_step(manager, steps, folder)
  step = max(steps, default=None) if step == "latest" else step
  if step not in steps:
    raise ValueError(
      f"There is no checkpoint {step!r} in {folder}; there are: {steps}."
    )
  return step


def _best_step(manager, steps: list[int], folder: Path) -> int:
  args = ocp.args.Composite(meta=ocp.args.JsonRestore())
  records = {s: manager.restore(s, args=args)["meta"] for s in steps}
  best = records[max(steps)]["best"]
  metric, mode = best or (None, None)
  sign = -1 if mode == "min" else 1
  scores = {
    s: sign * r["metrics"].get(metric, math.nan) for s, r in records.items()
  }
  scores = {s: score for s, score in scores.items() if math.isfinite(score)}
  if not scores:
    raise ValueError(
      f"No checkpoint in {folder} is scored by config.checkpoint.best = {best}."
    )
  return max(scores, key=lambda s: (scores[s], s))
