"""The host loop. It never learns what it trains.

The order is fixed: evaluate state t, checkpoint (state t, data position),
fetch a batch, dispatch the step, log the step before. So a checkpoint holds
exactly what has been evaluated, a resumed run sees exactly the batches that an
uninterrupted one would have seen, and the device never waits for the log.
"""

import contextlib
import dataclasses
import itertools
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from big_vision_like import (
  allocator,
  api,
  audit,
  build,
  checkpoint,
  compilation,
  flops,
  object_pictures,
  observe,
  pictures,
  processes,
  record,
  sharding,
  train_step,
  trees,
  warm_start,
)
from big_vision_like.data import batches, pipeline


def train(
  config: ConfigDict, workdir: str | Path, *, command: str = ""
) -> dict[str, float]:
  """Trains to `config.total_steps`, from the newest checkpoint if there is one.

  Args:
    config: made by `configs/common.py:base`.
    workdir: the run folder; made if missing.
    command: what a user types to continue this run.

  Returns:
    The last scores of all evaluations.
  """
  started = time.time()
  allocator.keep_freed_memory()  # Before anything asks JAX for its devices.
  folder, resolved = Path(workdir), config.to_json_best_effort()
  processes.agree(
    {
      "versions": record.versions(),
      "code": record.git_state() or {},
      "config": checkpoint.flat_config(resolved),
    }
  )
  if config.notice:
    _say(config.notice)
  _say(f"Run folder: {workdir}")
  compilation.enable_compilation_cache()
  checkpoint.check_same_config(folder, resolved)
  parts = build.build(config)
  for line in getattr(parts.source, "notes", ()):
    _say(line)
  with (
    jax.set_mesh(parts.mesh),
    observe.Interrupt() as interrupt,
    contextlib.ExitStack() as stack,
  ):
    return _Run(parts, folder, command, started, interrupt, stack).loop()


def all_static(config: ConfigDict) -> list[api.Static]:
  """Everything that `draw_static` may give."""
  choices = [[(k, v) for v in vs] for k, vs in sorted(config.static.items())]
  return list(itertools.product(*choices))


def draw_static(config: ConfigDict, step: int) -> api.Static:
  """The compile-time keywords of a step; equal on all hosts."""
  rng = np.random.default_rng((config.seed, step))
  return tuple(
    (key, choices[rng.integers(len(choices))])
    for key, choices in sorted(config.static.items())
  )


@dataclasses.dataclass
class _Pending:
  """A dispatched step whose numbers are still on the device."""

  step: int
  metrics: dict[str, Any]
  host: dict[str, Any]
  counts: dict[str, float]


class _Run:
  """The state of one call of `train`."""

  def __init__(self, parts, folder, command, started, interrupt, stack):
    self.parts, self.config, self.folder = parts, parts.config, folder
    self.command, self.started = command, started
    self.interrupt = interrupt
    config = self.config
    self.tx, self.lr_fn = build.make_optimizer(parts)
    self.evaluations = build.make_evaluations(parts)
    identity = parts.identity
    checkpoint.check_same_tokenizer(folder, identity["tokenizer"])
    processes.agree({"devices": record.local_devices(), "data": identity})
    processes.connect(parts.mesh)
    record.record_run(
      folder,
      config.to_json_best_effort(),
      {**identity, "hosts": processes.hosts()},
      overview=trees.overview(parts.params_shape),
    )
    self.writer = stack.enter_context(observe.Writer(folder))
    settings = build.plain(config.checkpoint)
    self.checkpoint_every = settings.pop("every")
    self.checkpointer = stack.enter_context(
      checkpoint.Checkpointer(folder / checkpoint.FOLDER, **settings)
    )
    self.state, self.step, position = self._start()
    self.first_step = self.step
    self.train_step = build.jit_train_step(parts, self.tx, self.shardings)
    self.measures = build.jit_measures(parts, self.evaluations, self.shardings)
    self.audit = audit.GradientAudit()
    self.recompiles = compilation.RecompileGuard(
      pipeline.specs(parts.train_data), all_static(config)
    )
    self.faults = batches.Faults(
      parts.source.name, max_broken=config.data.max_broken, training=True
    )
    self.scores: dict[str, float] = {}  # the last of each evaluation
    self.fresh_scores: dict[str, float] = {}  # of the state as it is
    self.window: list[dict[str, api.Metric]] = []
    self.pending: _Pending | None = None
    self.totals = {"images": 0, "tokens": 0, "slots": 0}
    self.feed = stack.enter_context(
      contextlib.closing(self._open_data(position))
    )
    self.progress = stack.enter_context(
      contextlib.closing(
        observe.Progress(config.total_steps, initial=self.step)
      )
    )

  # -- start ------------------------------------------------------------------

  def _start(self) -> tuple[api.TrainState, int, pipeline.State]:
    """State on the run's shardings, step and data position.

    Restored, or fresh, or fresh with imported parameters.
    """
    config = self.config
    abstract = build.abstract_state(self.parts, self.tx)
    self.shardings = jax.tree.map(lambda x: x.sharding, abstract)
    if self.checkpointer.latest() is not None:
      state, meta = self.checkpointer.restore(abstract)
      _say(f"Continuing from step {meta['step']} of {self.folder}.")
      return state, meta["step"], meta["data"]
    init = build.make_init(self.parts, self.tx)
    state = jax.jit(init, out_shardings=self.shardings)()
    if config.init_from:
      state = self._init_from(state)
    for collection, path in config.init_collections.items():
      state = self._fill(state, collection, path)
    return state, 0, 0

  def _init_from(self, state: api.TrainState) -> api.TrainState:
    config, part = self.config, self.config.init_into
    name, model = build.source_model(self.parts)
    own = {
      k: x
      for k, x in state.model_state.items()
      if k not in config.init_collections and (not part or part in x)
    }
    whole = {"params": state.params, **own}
    fresh = {k: x[part] if part else x for k, x in whole.items()}
    loaded = warm_start.load(
      config.init_from,
      name=name,
      model=model,
      shapes=fresh,
      resize=tuple(config.init_resize),
    )
    filled, report = warm_start.init_from(
      {**fresh.pop("params"), **fresh},
      {**loaded.pop("params"), **loaded},
      skip=tuple(config.init_skip),
    )
    _say(f"Parameters from {config.init_from}:\n{report}")
    filled = {"params": filled, **{k: filled.pop(k) for k in fresh}}
    if part:
      filled = {k: {**whole[k], part: x} for k, x in filled.items()}
    params = filled.pop("params")
    model_state = {**state.model_state, **filled}
    return train_step.restart_average(
      state.replace(params=params, model_state=model_state)
    )

  def _fill(
    self, state: api.TrainState, collection: str, path: str
  ) -> api.TrainState:
    """Takes the variables of another run, such as those of a teacher."""
    if collection not in state.model_state:
      raise ValueError(
        f"config.init_collections names {collection!r}, which the model does "
        f"not have; it has {', '.join(state.model_state) or 'none'}."
      )
    filled, report = warm_start.init_from(
      state.model_state[collection], checkpoint.load_variables(path)
    )
    _say(f"{collection.capitalize()} from {path}:\n{report}")
    model_state = {**state.model_state, collection: filled}
    return train_step.restart_average(state.replace(model_state=model_state))

  def _open_data(self, position: pipeline.State) -> pipeline.DeviceFeed:
    data = self.config.data
    iterator = pipeline.open_iterator(
      self.parts.train_data,
      start=position,
      workers=data.workers,
      threads=data.threads,
      prefetch=data.prefetch,
    )
    return pipeline.prefetch_to_device(
      iterator, sharding.batch_sharding(self.parts.mesh), size=data.prefetch
    )

  # -- the loop ---------------------------------------------------------------

  def loop(self) -> dict[str, float]:
    total = self.config.total_steps
    while True:
      last = self.step >= total
      stop = self.interrupt.requested or self.checkpointer.reached_preemption(
        self.step
      )
      if last or not stop:
        self._evaluate(last)
      self._save(force=last or stop)
      if last or stop:
        break
      self._advance()
    self.checkpointer.wait()
    if stop and not last:
      self.progress.close()
      _say(
        f"\nStopped after step {self.step} of {total}; everything is saved in "
        f"{self.folder}. To continue:\n  {self.command}"
      )
      return self.scores
    self._finish()
    return self.scores

  def _advance(self):
    waited = self.feed.waited
    batch, host = next(self.feed)
    counts = self._count(host)
    self.faults.update(host)
    static = draw_static(self.config, self.step)
    change = self.recompiles.check(batch, static)
    if change and self.step - self.first_step >= audit.STEPS:
      self.progress.say(f"Step {self.step} compiles again: {change}")
    self.state, metrics = self.train_step(self.state, batch, static)
    if self.step == self.first_step:
      self._while_the_first_step_runs(batch)
    counts["waited"] = self.feed.waited - waited
    previous = self.pending
    self.pending = _Pending(self.step, metrics, host, counts)
    self.step += 1
    self.fresh_scores = {}
    if previous is not None:
      self._log(previous)

  def _while_the_first_step_runs(self, batch):
    self.progress.flops = build.count_step_flops(self.parts, self.tx)
    self.progress.peak = flops.peak_flops_of(jax.devices())
    if self.step == 0 and jax.process_index() == 0:
      draw = object_pictures if "boxes" in batch else pictures
      draw.training_batch(
        _addressable(batch), self.folder / "pictures" / "training_batch.png"
      )

  def _count(self, host: dict[str, np.ndarray]) -> dict[str, float]:
    """Images, and tokens of packed rows, in a batch.

    Of several processes, each counts its part of the batch for the whole.
    """
    counts = {"images": int((host["example_id"] >= 0).sum())}
    if "num_tokens" in host:
      counts["tokens"] = int(host["num_tokens"].sum())
      rows = len(host["num_tokens"])
      counts["slots"] = rows * self.config.data.pack.length
    parts, part_count = sharding.held_parts(self.parts.mesh)
    return {k: n * part_count // len(parts) for k, n in counts.items()}

  def _drain(self):
    """Waits for the dispatched step, so that its loss has been checked."""
    if self.pending is not None:
      previous, self.pending = self.pending, None
      self._log(previous)

  def _log(self, done: _Pending):
    """Reads a finished step; writes at every `log_every`-th."""
    loss = float(jax.device_get(done.metrics["loss"].compute()))
    if not np.isfinite(loss):
      raise FloatingPointError(self._non_finite(done, loss))
    if not self.audit.done:
      findings = self.audit.update(jax.device_get(done.metrics["grad_sq"]))
      if findings:
        self.progress.say(
          "Parameters that the loss does not reach:\n  " + "\n  ".join(findings)
        )
    for key in self.totals:
      self.totals[key] += done.counts.get(key, 0)
    self.progress.update(done.step + 1, loss=loss, **done.counts)
    done.metrics.pop("grad_sq")
    self.window.append(done.metrics)
    if (done.step + 1) % self.config.log_every == 0:
      self._write_window(done.step + 1)

  def _write_window(self, step: int):
    metrics, self.window = self.window, []
    merged = metrics[0]
    for other in metrics[1:]:
      merged = {k: v.merge(other[k]) for k, v in merged.items()}
    values = {
      f"train/{k}": float(v.compute())
      for k, v in jax.device_get(merged).items()
    }
    values["train/lr"] = float(self.lr_fn(step - 1))
    self.writer.write(step, values | self.progress.rates())

  def _non_finite(self, done: _Pending, loss: float) -> str:
    ids = np.asarray(done.host["example_id"]).ravel()
    good = self.checkpointer.latest()
    return (
      f"The loss of step {done.step} is {loss}. Examples of its batch: "
      f"{ids[ids >= 0].tolist()}. Last good checkpoint: "
      f"{'none' if good is None else f'step {good}'} in "
      f"{self.folder / 'checkpoints'}."
    )

  # -- evaluation, checkpoints, end -------------------------------------------

  def _evaluate(self, last: bool):
    due = [
      e
      for e in self.evaluations
      if last or (e.every and self.step and self.step % e.every == 0)
    ]
    if not due or (self.step == self.first_step and not last):
      return
    self._drain()
    with self.progress.paused():
      for evaluation in due:
        scores = build.run_evaluation(
          evaluation,
          self.measures[evaluation.name],
          self.state,
          self.folder / "evaluations",
        )
        if not scores:  # it only draws
          continue
        self.scores |= scores
        self.fresh_scores |= scores
        self.writer.write(self.step, scores)
        self.progress.say(observe.score_line(self.step, scores))

  def _save(self, *, force: bool):
    due = self.checkpoint_every and self.step % self.checkpoint_every == 0
    if not (force or due) or self.step == self.checkpointer.latest():
      return
    if self.step == self.first_step and not force:
      return
    self._drain()
    meta = {"step": self.step, "data": self.feed.get_state()}
    with self.progress.paused():
      self.checkpointer.save(self.step, self.state, meta, self.fresh_scores)

  def _finish(self):
    self.progress.close()
    if jax.process_index() != 0:
      return
    pictures.learning_curves(
      self.folder / "metrics.jsonl",
      self.folder / "pictures" / "learning_curves.png",
    )
    table = observe.summary(
      scores=self.scores,
      totals=self.totals,
      seconds=time.time() - self.started,
      train_seconds=self.progress.seconds,
      parameters=trees.count(self.parts.params_shape),
      steps=self.step,
    )
    (self.folder / "summary.txt").write_text(table + "\n")
    print(table)
    print(f"Everything is in {self.folder}.")


def _say(text: str):
  """Prints for all processes once."""
  if jax.process_index() == 0:
    print(text, flush=True)


def _addressable(batch: api.Batch) -> dict[str, np.ndarray]:
  """The rows that this process holds."""
  return {
    k: np.concatenate([s.data for s in x.addressable_shards])
    for k, x in batch.items()
  }
