"""From a config to the parts of a run.

A ConfigDict stops here: below, there are plain keyword arguments. Training
and every command build their parts with these functions, so that they cannot
disagree.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import optax
from ml_collections import ConfigDict

from big_vision_like import (
  api,
  flops,
  optim,
  resolve,
  sharding,
  train_step,
  trees,
)
from big_vision_like.data import budgets, multi_scale, packing, pipeline
from big_vision_like.data.batches import Faults
from big_vision_like.data.objects import ObjectSpec
from big_vision_like.data.text import TextSpec


@dataclasses.dataclass(frozen=True)
class Parts:
  """What a config describes, ready to be run; see the functions below."""

  config: ConfigDict
  mesh: jax.sharding.Mesh
  source: api.Source
  train_data: Any
  batch_spec: api.Batch
  model: nn.Module
  task: api.Task
  text: TextSpec | None

  def init_variables(self, rng: api.Array) -> tuple[api.PyTree, api.PyTree]:
    return train_step.init_variables(
      self.model, self.task, rng, zeros(self.batch_spec)
    )

  @functools.cached_property
  def params_shape(self) -> api.PyTree:
    return jax.eval_shape(self.init_variables, jax.random.key(0))[0]

  @property
  def identity(self) -> dict[str, Any]:
    """What `run.json` says of the data."""
    tokenizer = None if self.text is None else self.text.tokenizer.fingerprint
    is_thing = getattr(self.source, "is_thing", None)
    return {
      "data": pipeline.fingerprint(self.source),
      "label_names": list(self.source.label_names),
      "tokenizer": tokenizer,
      **({} if is_thing is None else {"is_thing": list(is_thing)}),
    }


def build(
  config: ConfigDict, *, mesh: jax.sharding.Mesh | None = None
) -> Parts:
  """Checks the config and makes its parts; no parameter is allocated yet.

  `mesh` goes before the one that `config.mesh` asks for, such as one of devices
  that are not here.
  """
  for key in ("total_steps", "batch_size"):
    if config[key] is None:
      raise ValueError(f"config.{key} is not set.")
  mesh = mesh or sharding.make_mesh(dict(config.mesh))
  _check_batch_size(config, mesh, config.batch_size, "config.batch_size")
  if config.data.scales is not None:
    for h, w, batch_size in multi_scale.check(config.data.scales):
      where = f"The batch of {h} x {w} in config.data.scales"
      _check_batch_size(config, mesh, batch_size, where)
  source = make_source(config, config.data.split)
  task = make_task(config, len(source.label_names))
  text = make_text(config)
  model = make_model(config, task.num_classes, text)
  train_data = make_train_data(config, source, task.num_classes, mesh, text)
  return Parts(
    config=config,
    mesh=mesh,
    source=source,
    train_data=train_data,
    batch_spec=pipeline.spec(train_data),
    model=model,
    task=task,
    text=text,
  )


def _check_batch_size(
  config: ConfigDict, mesh: jax.sharding.Mesh, batch_size: int, key: str
) -> None:
  """Refuses what micro-batches or devices cannot share evenly."""
  sharding.check_batch_size(batch_size, mesh, key=key)
  if batch_size % config.accum_steps:
    raise ValueError(
      f"{key} = {batch_size} is not divisible by "
      f"config.accum_steps = {config.accum_steps}."
    )
  sharding.check_batch_size(batch_size // config.accum_steps, mesh, key=key)


def plain(section: ConfigDict | None) -> dict[str, Any]:
  """A config section as keyword arguments."""
  return {} if section is None else section.to_dict()


def make_task(config: ConfigDict, num_classes: int) -> api.Task:
  """The task; a class count of its own config goes before the data's."""
  settings = {"num_classes": num_classes, **plain(config.task)}
  return resolve.make("tasks", "Task", "config.task", settings)


def make_model(
  config: ConfigDict,
  num_classes: int,
  text: TextSpec | None = None,
  **changes: Any,
) -> nn.Module:
  """The model, with `changes` of its settings.

  From the data come the sizes that it takes and its config leaves open.
  """
  settings = {**plain(config.model), **changes}
  name, sizes = settings.get("name"), {"num_classes": num_classes}
  if text is not None:
    sizes["vocab_size"] = text.tokenizer.vocab_size
  for key, size in sizes.items():
    if name and resolve.takes("models", name, "Model", key):
      settings.setdefault(key, size)
  return resolve.make("models", "Model", "config.model", settings)


def source_model(parts: Parts) -> tuple[str, nn.Module]:
  """The model that config.init_from is for, behind the name of its file.

  A part of a model, such as a backbone, has its parameters and the section of
  its settings under the same name, config.init_into.
  """
  config, part = parts.config, parts.config.init_into
  if not part:
    return config.model.name, parts.model
  if part not in config.model or part not in parts.params_shape:
    raise ValueError(
      f"config.init_into = {part!r} names no part of the model that has "
      f"settings; the parameters are {', '.join(parts.params_shape)}."
    )
  settings = plain(config.model[part])
  return settings["name"], resolve.make(
    "models", "Model", f"config.model.{part}", settings
  )


def make_text(config: ConfigDict) -> TextSpec | None:
  """How captions become tokens; None if config.data.text is."""
  settings = plain(config.data.text)
  if not settings:
    return None
  fields = {f.name for f in dataclasses.fields(TextSpec)} & set(settings)
  own = {key: settings.pop(key) for key in fields}
  tokenizer = resolve.make(
    "data/tokenizers", "Tokenizer", "config.data.text", settings
  )
  return TextSpec(tokenizer, **own)


def make_source(config: ConfigDict, split: str) -> api.Source:
  settings = plain(config.data.source)
  return resolve.make(
    "data/sources", "Source", "config.data.source", settings, split=split
  )


def _pack(config: ConfigDict) -> packing.PackSpec | None:
  if config.data.pack is None:
    return None
  return packing.PackSpec(**plain(config.data.pack))


def _objects(config: ConfigDict) -> ObjectSpec | None:
  settings = plain(config.data.objects)
  return ObjectSpec(**settings) if settings else None


def make_train_data(
  config: ConfigDict,
  source: api.Source,
  num_classes: int,
  mesh: jax.sharding.Mesh,
  text: TextSpec | None = None,
):
  data = config.data
  parts, part_count = sharding.held_parts(mesh)
  pack = _pack(config)
  if pack is None and (data.sizes is not None or data.drop is not None):
    raise ValueError(
      "config.data.sizes and config.data.drop are laws of packed rows, but "
      "config.data.pack is None."
    )
  return pipeline.train_data(
    source,
    ops=data.ops,
    pack=pack,
    sizes=None if pack is None else budgets.Sizes(**plain(data.sizes)),
    drop=None if pack is None else budgets.Drop(**plain(data.drop)),
    scales=data.scales,
    repeats=data.repeats,
    text=text,
    objects=_objects(config),
    batch_size=config.batch_size,
    total_steps=config.total_steps,
    seed=config.seed,
    num_classes=num_classes,
    parts=parts,
    part_count=part_count,
  )


def make_optimizer(
  parts: Parts,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """The gradient transformation, and the learning rate by step."""
  settings = plain(parts.config.optim)
  settings.update(settings.pop("settings"))
  trained, _ = trees.split(parts.params_shape, settings.pop("frozen"))
  return optim.make(
    **settings, total_steps=parts.config.total_steps, params=trained
  )


def make_init(
  parts: Parts, tx: optax.GradientTransformation
) -> Callable[[], api.TrainState]:
  """A function that makes the fresh state of a run."""

  def init():
    return train_step.init_state(
      parts.model,
      parts.task,
      tx,
      jax.random.key(parts.config.seed),
      zeros(parts.batch_spec),
      frozen=parts.config.optim.frozen,
      ema=parts.config.ema_decay > 0,
    )

  return init


def abstract_state(
  parts: Parts, tx: optax.GradientTransformation
) -> api.TrainState:
  """Shapes and dtypes of the state, on the shardings of the run."""
  shapes = jax.eval_shape(make_init(parts, tx))
  rules = parts.config.sharding
  rules = sharding.RULES[rules] if isinstance(rules, str) else rules
  places = sharding.state_shardings(shapes, parts.mesh, rules)
  return sharding.with_shardings(shapes, places)


def jit_train_step(
  parts: Parts,
  tx: optax.GradientTransformation,
  state_shardings: api.TrainState,
):
  """The step of `train_step.make_train_step`, jitted; it donates the state."""
  config = parts.config
  step = train_step.make_train_step(
    parts.model,
    parts.task,
    tx,
    frozen=config.optim.frozen,
    accum_steps=config.accum_steps,
    ema_decay=config.ema_decay,
  )
  return jax.jit(
    step,
    donate_argnums=0,
    static_argnums=2,
    in_shardings=(state_shardings, sharding.batch_sharding(parts.mesh)),
    out_shardings=(state_shardings, sharding.replicated(parts.mesh)),
  )


def count_step_flops(
  parts: Parts, tx: optax.GradientTransformation, *, remat: bool = False
) -> float:
  """Model FLOPs of a training step on the global batch.

  By convention they are those of plain attention without rematerialisation:
  neither what a kernel skips nor what it computes twice counts. Of batches
  with several shapes, we take the mean over how often they occur.

  With `remat`, what the config has computed twice counts twice.
  """
  plain = (
    {"attention": "xla"} if remat else {"attention": "xla", "remat": "none"}
  )
  model = parts.model.clone(
    **{k: v for k, v in plain.items() if hasattr(parts.model, k)}
  )
  step = train_step.make_train_step(
    model, parts.task, tx, frozen=parts.config.optim.frozen
  )
  state = jax.eval_shape(make_init(dataclasses.replace(parts, model=model), tx))
  return sum(
    share * flops.count_flops(step, state, spec)
    for spec, share in zip(
      pipeline.specs(parts.train_data), pipeline.shares(parts.train_data)
    )
    if share
  )


def zeros(spec: api.Batch) -> api.Batch:
  return jax.tree.map(lambda s: jax.numpy.zeros(s.shape, s.dtype), spec)


@dataclasses.dataclass(frozen=True)
class EvalBatches:
  """Opens passes over evaluation data: the `api.Batches` of a run."""

  parts: Parts
  settings: dict[str, Any]  # split, and what pipeline.eval_data takes

  @property
  def label_names(self) -> tuple[str, ...]:
    return self.parts.source.label_names

  @property
  def is_thing(self) -> tuple[bool, ...] | None:
    return getattr(self.parts.source, "is_thing", None)

  def __call__(
    self, *, split: str | None = None, **overrides: Any
  ) -> Iterator[tuple[api.Batch, dict[str, Any]]]:
    dataset, source = self._data(split, overrides)
    return self._open(dataset, source)

  def texts(
    self, texts: Sequence[str]
  ) -> Iterator[tuple[api.Batch, dict[str, Any]]]:
    dataset, source = self._data(None, {})
    return self._open(pipeline.text_data(texts, like=dataset), source)

  def _data(self, split, overrides):
    config = self.parts.config
    settings = dict(self.settings) | overrides
    source = make_source(config, split or settings.get("split", "validation"))
    if config.data.objects and source.label_names != self.label_names:
      odd = sorted({*source.label_names} ^ {*self.label_names})
      raise ValueError(
        "The classes of evaluation and training differ in "
        f"{', '.join(odd) or 'their order'}: both files of config.data.source "
        "need the same categories."
      )
    settings.pop("split", None)
    settings.setdefault("batch_size", config.batch_size)
    parts, part_count = sharding.held_parts(self.parts.mesh)
    dataset = pipeline.eval_data(
      source,
      ops=config.data.eval_ops,
      pack=_pack(config),
      text=self.parts.text,
      objects=_objects(config),
      num_classes=self.parts.task.num_classes,
      parts=parts,
      part_count=part_count,
      **settings,
    )
    return dataset, source

  def _open(self, dataset, source):
    data = self.parts.config.data
    faults = Faults(source.name, max_broken=data.max_broken, training=False)
    iterator = pipeline.open_iterator(
      dataset,
      workers=data.workers,
      threads=data.threads,
      prefetch=data.prefetch,
    )
    placed = sharding.batch_sharding(self.parts.mesh)
    try:
      for batch in iterator:
        arrays, host = pipeline.to_device(batch, placed)
        faults.update(host)
        yield arrays, host
    finally:
      iterator.close()


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """One entry of `config.evals`; `static` are keywords of the model."""

  name: str
  every: int
  evaluator: api.Evaluator
  batches: EvalBatches
  static: api.Static


def make_evaluations(parts: Parts) -> list[Evaluation]:
  evaluations = []
  for name, section in parts.config.evals.items():
    settings = plain(section)
    every = settings.pop("every", 0)
    data = settings.pop("data", {})
    static = tuple(sorted(settings.pop("static", {}).items()))
    evaluator = resolve.make(
      "evaluators", "Evaluator", f"config.evals.{name}", settings
    )
    batches = EvalBatches(parts, data)
    evaluations.append(Evaluation(name, every, evaluator, batches, static))
  return evaluations


def jit_measures(
  parts: Parts,
  evaluations: Sequence[Evaluation],
  state_shardings: api.TrainState,
) -> dict[str, api.Measure]:
  """What each evaluation is lent: (state, batch, static) -> numpy arrays.

  Its evaluator's `measure`; those without one share one compiled `predict`.
  """
  predict = _jit(
    parts, train_step.make_predict(parts.model, parts.task), state_shardings
  )
  measures = dict.fromkeys((e.name for e in evaluations), predict)
  for name, evaluator in ((e.name, e.evaluator) for e in evaluations):
    if hasattr(evaluator, "measure"):
      measure = evaluator.measure(parts.model, parts.task)
      measures[name] = _jit(parts, measure, state_shardings)
  return measures


def _jit(parts, measure, state_shardings):
  compiled = jax.jit(
    measure,
    static_argnums=2,
    in_shardings=(state_shardings, sharding.batch_sharding(parts.mesh)),
    out_shardings=sharding.replicated(parts.mesh),
  )
  return lambda state, batch, static=(): jax.device_get(
    compiled(state, batch, static)
  )


def run_evaluation(
  evaluation: Evaluation,
  measure: api.Measure,
  state: api.TrainState,
  folder: Path,
) -> dict[str, float]:
  """Scores by metric name, prefixed with the evaluation's.

  `measure` is what `jit_measures` has for it.
  """
  target = folder / evaluation.name
  target.mkdir(parents=True, exist_ok=True)
  try:
    scores = evaluation.evaluator.run(
      predict=functools.partial(measure, state, static=evaluation.static),
      batches=evaluation.batches,
      folder=target,
    )
  except Exception as e:
    e.add_note(f"In config.evals.{evaluation.name}.")
    raise
  return {f"{evaluation.name}/{k}": v for k, v in scores.items()}
