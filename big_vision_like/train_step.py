"""The one training step: prepare, apply, loss, gradient, update.

Pure functions over `TrainState`; they know `api.py` and nothing more. The loop
jits them once with pinned shardings.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from big_vision_like import api, trees
from big_vision_like.metrics import Mean

Step = Callable[..., tuple[api.TrainState, dict[str, api.Metric]]]


def init_state(
  model: nn.Module,
  task: api.Task,
  tx: optax.GradientTransformation,
  rng: api.Array,
  batch: api.Batch,
  *,
  frozen: Sequence[str] = (),
  ema: bool = False,
) -> api.TrainState:
  """A fresh state; only the shapes of `batch` matter, `frozen` as below."""
  params, model_state = init_variables(model, task, rng, batch)
  trained, _ = trees.split(params, frozen)
  return api.TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    model_state=model_state,
    opt_state=tx.init(trained),
    rng=rng,
    ema=jax.tree.map(jnp.copy, averaged(params, model_state)) if ema else None,
  )


def averaged(
  params: api.PyTree, model_state: Mapping[str, api.PyTree]
) -> dict[str, api.PyTree]:
  """What a moving average is of: parameters and running statistics.

  Both, as timm's ModelEma and Apple's ml-cvnets have it: the statistics of the
  parameters of the last steps are not those of their average. Constants, such
  as a teacher in `model_state`, are left out.
  """
  statistics = {k: x for k, x in model_state.items() if k == api.STATISTICS}
  return {"params": params, **statistics}


def restart_average(state: api.TrainState) -> api.TrainState:
  """The state whose average, if it keeps one, begins where it stands."""
  if state.ema is None:
    return state
  now = averaged(state.params, state.model_state)
  return state.replace(ema=jax.tree.map(jnp.copy, now))


def init_variables(
  model: nn.Module, task: api.Task, rng: api.Array, batch: api.Batch
) -> tuple[api.PyTree, api.PyTree]:
  """(params, other collections) of a fresh model."""
  inputs, _ = task.prepare(batch, None)
  variables = dict(model.init(rng, train=False, **inputs))
  return variables.pop("params"), variables


def make_loss(model: nn.Module, task: api.Task) -> Callable[..., Any]:
  """(params, model_state, batch, rng, static) -> loss, (model_state, metrics).

  The loss of training.
  """

  def loss_fn(params, model_state, batch, rng, static=()):
    prepare_rng, dropout_rng = jax.random.split(rng)
    inputs, targets = task.prepare(batch, prepare_rng)
    outputs, model_state = model.apply(
      {"params": params, **model_state},
      train=True,
      rngs={"dropout": dropout_rng},
      mutable=list(model_state),
      **inputs,
      **dict(static),
    )
    loss, metrics = task.loss(outputs, targets)
    return loss, (dict(model_state), metrics)

  return loss_fn


def make_train_step(
  model: nn.Module,
  task: api.Task,
  tx: optax.GradientTransformation,
  *,
  frozen: Sequence[str] = (),
  accum_steps: int = 1,
  ema_decay: float = 0.0,
) -> Step:
  """(state, batch, static) -> (state, metrics), pure and not yet jitted.

  Parameters whose whole path a regex of `frozen` matches are constants of the
  step: the loss is not differentiated by them, `tx` never sees them, and they
  leave as they came.

  With `accum_steps` k > 1 the batch is cut into k micro-batches that run one
  after the other; their gradients are weighted by the number of examples in
  each, so the update equals that of the whole batch even where packed rows
  hold different numbers of images.

  The metrics of the task are joined by `grad_norm`, `update_norm`,
  `param_norm`, over the trained parameters, and `grad_sq`: the sum of squared
  gradients by parameter path, a vector over layers for scanned parameters. The
  audit of the first steps reads it.

  Raises:
    ValueError: if micro-batches are asked of a task that is not separable, or,
      when the step is traced, by `trees.frozen_mask`.
  """
  if accum_steps > 1 and not task.separable:
    raise ValueError(
      f"config.accum_steps = {accum_steps}, but the loss of "
      f"{type(task).__module__} is not a mean over examples, so micro-batches "
      "would change it. Set accum_steps = 1."
    )

  loss = make_loss(model, task)

  def loss_fn(trained, constant, *args):
    return loss(trees.merge(trained, constant), *args)

  grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

  def step(state, batch, static=()):
    rng = jax.random.fold_in(state.rng, state.step)
    trained, constant = trees.split(state.params, frozen)
    if accum_steps == 1:
      (_, (model_state, metrics)), grads = grad_fn(
        trained, constant, state.model_state, batch, rng, static
      )
    else:
      grads, model_state, metrics = _accumulate(
        grad_fn,
        (trained, constant),
        state.model_state,
        batch,
        rng,
        static,
        accum_steps,
      )
    updates, opt_state = tx.update(grads, state.opt_state, trained)
    trained = optax.apply_updates(trained, updates)
    metrics = metrics | _norms(grads, updates, trained)
    ema = state.ema
    if ema is not None:
      # In this form, what does not change stays as it is, bit by bit.
      ema = jax.tree.map(
        lambda old, new: old + (1.0 - ema_decay) * (new - old),
        ema,
        averaged(trees.merge(trained, constant), model_state),
      )
    return state.replace(
      step=state.step + 1,
      params=trees.merge(trained, constant),
      model_state=model_state,
      opt_state=opt_state,
      ema=ema,
    ), metrics

  return step


def _accumulate(grad_fn, params, model_state, batch, rng, static, accum_steps):
  # Row i goes to micro-batch i % k: a micro-batch then takes an equal share of
  # every device's rows, and no row changes its device.
  batches = jax.tree.map(
    lambda x: x.reshape(-1, accum_steps, *x.shape[1:]).swapaxes(0, 1), batch
  )

  def body(carry, xs):
    model_state, total = carry
    index, micro = xs
    micro_rng = jax.random.fold_in(rng, index)
    (_, (model_state, metrics)), grads = grad_fn(
      *params, model_state, micro, micro_rng, static
    )
    count = metrics["loss"].count
    grads = jax.tree.map(lambda g: g * count, grads)
    return (model_state, jax.tree.map(jnp.add, total, grads)), metrics

  zeros = jax.tree.map(jnp.zeros_like, params[0])
  (model_state, total), metrics = jax.lax.scan(
    body, (model_state, zeros), (jnp.arange(accum_steps), batches)
  )
  metrics = jax.tree.map(lambda x: x.sum(0), metrics)
  count = jnp.maximum(metrics["loss"].count, 1.0)
  return jax.tree.map(lambda g: g / count, total), model_state, metrics


def _norms(grads, updates, params):
  squares = {
    name: _sum_squares(g, keep_layers=api.SCANNED in name.split("/"))
    for name, g in trees.flatten(grads).items()
  }
  total = sum(s.sum() for s in squares.values())
  return {
    "grad_norm": Mean.of(jnp.sqrt(total)),
    "update_norm": Mean.of(optax.tree.norm(updates)),
    "param_norm": Mean.of(optax.tree.norm(params)),
    "grad_sq": squares,
  }


def _sum_squares(x, *, keep_layers):
  axes = tuple(range(1 if keep_layers else 0, x.ndim))
  return jnp.square(x.astype(jnp.float32)).sum(axes)


def make_predict(model: nn.Module, task: api.Task) -> api.Measure:
  """(state, batch, static) -> predictions; uses the EMA where there is one."""

  def predict(state, batch, static=()):
    inputs, targets = task.prepare(batch, None)
    outputs = model.apply(
      state.variables(), train=False, **inputs, **dict(static)
    )
    return task.predict(outputs, targets)

  return predict
