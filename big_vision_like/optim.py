"""Optimizers: optax parts in one fixed order, steered by parameter rules.

The order: clip the gradients by their global norm, or each by the norm of its
parameter (adaptive gradient clipping), scale them by the optimizer, add decayed
weights, multiply by the learning rate of the step and of the parameter. Weight
decay is thus decoupled, and multiplied by the learning rate, as the papers
quote it.
"""

import difflib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from big_vision_like import api, trees


def make(
  *,
  name: str,
  lr: int | float,
  wd: int | float,
  clip: int | float | None,
  clip_mode: str = "norm",
  schedule: Mapping[str, Any],
  total_steps: int,
  params: api.PyTree,
  lr_mults: trees.Rules = ((".*", 1.0),),
  wd_mults: trees.Rules = ((".*/kernel", 1.0), (".*", 0.0)),
  **settings: Any,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """The gradient transformation of a run and its learning rate by step.

  The paper's "weight decay 0.03, head 3.0" is wd=0.03 with
  wd_mults=[("head/.*kernel", 100.0), (".*/kernel", 1.0), (".*", 0.0)].

  Args:
    name: one of OPTIMIZERS.
    lr: peak learning rate.
    wd: weight decay; step t subtracts lr(t) * lr_mult * wd * wd_mult * p.
    clip: largest global norm of the gradients; None or 0 does not clip.
    clip_mode: "norm" for that, or "agc" to make `clip` the largest share that
      the norm of a gradient may have of its parameter's, see `adaptive_clip`.
    schedule: `name` of a schedule and its settings, see `make_schedule`.
    total_steps: length of the run.
    params: the parameters that are trained, or their shapes. Frozen ones never
      come here: the step sets them apart, see `trees.split`.
    lr_mults: rules: what multiplies the learning rate of a parameter.
    wd_mults: rules: what multiplies its weight decay.
    **settings: those of the optimizer, such as b2.

  Raises:
    ValueError: for unknown names and settings, and for a parameter that no
      rule covers.
  """
  clip_by = _choose(CLIPS, clip_mode, "config.optim.clip_mode")
  lr_fn = make_schedule(lr=lr, total_steps=total_steps, **schedule)
  build = _choose(OPTIMIZERS, name, "config.optim.name")
  _check_settings(build, settings, f"config.optim.settings of {name!r}")
  names = list(trees.flatten(params))
  decay = {
    k: wd * trees.match(k, wd_mults, "config.optim.wd_mults") for k in names
  }
  mults = {k: trees.match(k, lr_mults, "config.optim.lr_mults") for k in names}
  for k, mult in mults.items():
    if mult <= 0:
      raise ValueError(
        f"config.optim.lr_mults gives {k!r} the multiplier {mult}; it has to "
        "be positive. List what shall not train in config.optim.frozen."
      )
  tx = optax.chain(
    clip_by(clip, params) if clip else optax.identity(),
    build(names, **settings),
    _each(lambda k, update, param: update + decay[k] * param),
    optax.scale_by_schedule(lambda count: -lr_fn(count)),
    _each(lambda k, update, param: update * mults[k]),
  )
  return tx, lr_fn


def adaptive_clip(
  factor: int | float, params: api.PyTree
) -> optax.GradientTransformation:
  """Adaptive gradient clipping (Brock et al. 2021), unit by unit as in timm.

  Where the gradient of a unit has a norm above factor * max(|unit|, 1e-3), it
  is scaled down to that. A unit is what feeds one output of a kernel; a bias,
  a scale or any other vector as a whole; of other arrays (tables, tokens), one
  index of the leading axis. Every layer of scanned parameters has its own.
  """
  axes = {k: _unit_axes(k, x.ndim) for k, x in trees.flatten(params).items()}
  parts = {
    str(group): optax.adaptive_grad_clip(factor, axis=group)
    for group in set(axes.values())
  }

  def labels(tree):
    return jax.tree_util.tree_map_with_path(
      lambda path, _: str(axes[trees.path_name(path)]), tree
    )

  return optax.partition(parts, labels)


def _unit_axes(name: str, ndim: int) -> tuple[int, ...]:
  """The axes that the norm of a unit is taken over."""
  parts = name.split("/")
  first = int(api.SCANNED in parts)
  axes = tuple(range(first, ndim))
  if len(axes) <= 1 or parts[-1] == "bias":
    return axes
  if parts[-1] != "kernel":
    return axes[1:]
  if len(axes) == 3 and re.fullmatch(".*(query|key|value)/kernel", name):
    return axes[:1]  # (D, K, head): a unit for each head's channel
  return axes[:-1]


CLIPS = {
  "norm": lambda clip, params: optax.clip_by_global_norm(clip),
  "agc": adaptive_clip,
}


_DURATIONS = ("warmup", "warmup_start", "cooldown")


def make_schedule(
  *,
  lr: int | float,
  total_steps: int,
  name: str,
  warmup: int | float = 0,
  warmup_start: float = 0.0,
  cooldown: int | float = 0,
  **settings: Any,
) -> optax.Schedule:
  """The learning rate as a function of the step (the formulas of big_vision).

  lr * shape * min(1, step / warmup) * min(1, (total_steps - step) / cooldown)

  where the warmup begins at a share `warmup_start` of the learning rate, and
  shape, with t = step - warmup (0 before) and progress t / (total_steps
  - warmup), is

    constant  1
    linear    1 - (1 - end) * progress            end = 0, a share of lr
    cosine    end + (1 - end) * (1 + cos(pi * progress)) / 2        end = 0
    rsqrt     1 / sqrt(1 + t / timescale)         timescale = 10,000
    steps     factor ** (how many of `drops` have passed)    factor = 0.1

  Durations and drops are steps, or, below 1, shares of `total_steps`; drops
  are counted from the start of the run.

  Raises:
    ValueError: for unknown names and settings, and if warmup and cooldown
      take more than the whole run.
  """
  shape = _choose(SCHEDULES, name, "config.optim.schedule.name")
  where = f"config.optim.schedule {name!r}"
  _check_settings(shape, settings, where, also=_DURATIONS)
  warmup = _steps(warmup, total_steps, "warmup")
  cooldown = _steps(cooldown, total_steps, "cooldown")
  if "timescale" in settings:
    timescale = _steps(settings["timescale"], total_steps, "timescale")
    settings = settings | {"timescale": max(timescale, 1)}
  if name == "steps" and "drops" not in settings:
    raise ValueError(f"{where} needs drops, such as drops=(0.67,).")
  if "drops" in settings:
    drops = (_steps(at, total_steps, "drops") for at in settings["drops"])
    settings = settings | {"drops": tuple(at - warmup for at in drops)}
  if warmup + cooldown > total_steps:
    raise ValueError(
      f"config.optim.schedule: warmup ({warmup} steps) and cooldown "
      f"({cooldown} steps) do not fit into config.total_steps = {total_steps}. "
      "Below 1 they are shares of the run, which fit any length."
    )
  span = max(total_steps - warmup, 1)

  def schedule(step):
    value = lr * shape(jnp.clip(step - warmup, 0, span), span, **settings)
    if warmup:
      rise = jnp.minimum(1.0, step / warmup)
      value *= warmup_start + (1.0 - warmup_start) * rise
    if cooldown:
      value *= jnp.clip((total_steps - step) / cooldown, 0.0, 1.0)
    return jnp.asarray(value, jnp.float32)

  return schedule


def _constant(t, span):
  del t, span
  return 1.0


def _linear(t, span, *, end: int | float = 0.0):
  return 1.0 - (1.0 - end) * t / span


def _cosine(t, span, *, end: int | float = 0.0):
  return end + (1.0 - end) * 0.5 * (1.0 + jnp.cos(jnp.pi * t / span))


def _rsqrt(t, span, *, timescale: int | float = 10_000):
  del span
  return 1.0 / jnp.sqrt(1.0 + t / timescale)


def _drops(t, span, *, drops: Sequence[int | float], factor: float = 0.1):
  del span
  return factor ** sum(jnp.where(t >= at, 1.0, 0.0) for at in drops)


SCHEDULES = {
  "constant": _constant,
  "linear": _linear,
  "cosine": _cosine,
  "rsqrt": _rsqrt,
  "steps": _drops,
}


def _adamw(
  names: list[str],
  *,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  mu_dtype: str | None = None,
):
  del names
  return optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=mu_dtype)


def _adafactor(
  names: list[str],
  *,
  min_dim_size_to_factor: int = 32,
  decay_rate: float = 0.8,
  beta2_cap: float = 0.999,
  clip_threshold: int | float | None = None,
  momentum: int | float | None = 0.9,
  momentum_dtype: str = "bfloat16",
  eps: float = 1e-30,
):
  """The variant of "Scaling Vision Transformers" (arXiv 2106.04560, 3.4).

  beta2 of the step t = 1, 2, ... is min(beta2_cap, 1 - t^-decay_rate);
  matrices are factored over their two largest axes. The momentum is a moving
  average without bias correction.
  """
  scale = optax.scale_by_factored_rms(
    decay_rate=decay_rate,
    min_dim_size_to_factor=min_dim_size_to_factor,
    epsilon=eps,
    decay_rate_fn=lambda count, rate: jnp.minimum(
      beta2_cap, 1.0 - (count + 1.0) ** -rate
    ),
  )
  if clip_threshold:
    scale = optax.chain(scale, optax.clip_by_block_rms(clip_threshold))
  scale = _by_layer(scale, names)
  if not momentum:
    return scale
  return optax.chain(scale, optax.ema(momentum, False, momentum_dtype))


def _sgd(
  names: list[str],
  *,
  momentum: int | float = 0.9,
  nesterov: bool = False,
  momentum_dtype: str | None = None,
):
  del names
  if not momentum:
    return optax.identity()
  return optax.trace(momentum, nesterov, momentum_dtype)


OPTIMIZERS = {"adamw": _adamw, "adafactor": _adafactor, "sgd": _sgd}


def _by_layer(
  tx: optax.GradientTransformation, names: list[str]
) -> optax.GradientTransformation:
  """Applies `tx` to each layer of scanned parameters on its own.

  Without it a stack of 32 biases would be factored like a matrix, and a
  scanned model would train differently from an unrolled one.
  """
  vmapped = optax.GradientTransformation(
    jax.vmap(tx.init), jax.vmap(lambda *xs: tx.update(*xs))
  )
  groups = {_stack(name) for name in names}
  parts = {g: vmapped if g != _SINGLE else tx for g in groups}

  def labels(tree):
    return jax.tree_util.tree_map_with_path(
      lambda path, _: _stack(trees.path_name(path)), tree
    )

  return optax.partition(parts, labels)


_SINGLE = "single"


def _stack(name: str) -> str:
  """The path of the scanned layers that a parameter belongs to."""
  parts = name.split("/")
  if api.SCANNED not in parts:
    return _SINGLE
  return "/".join(parts[: parts.index(api.SCANNED) + 1])


def _each(
  fn: Callable[[str, api.Array, api.Array], api.Array],
) -> optax.GradientTransformation:
  """Maps fn(path, update, parameter) over the updates."""

  def update(updates, params):
    return jax.tree_util.tree_map_with_path(
      lambda path, u, p: fn(trees.path_name(path), u, p), updates, params
    )

  return optax.stateless(update)


def _steps(value: int | float, total_steps: int, what: str) -> int:
  if value < 0 or (value >= 1 and value != int(value)):
    raise ValueError(
      f"config.optim.schedule.{what} = {value} is neither a number of steps "
      "nor a share of the run between 0 and 1."
    )
  return round(value * total_steps) if value < 1 else int(value)


def _choose(table: dict[str, Any], name: str, where: str) -> Any:
  if name not in table:
    near = difflib.get_close_matches(name, table, 1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(
      f"{where} = {name!r} is unknown.{hint} There are: {', '.join(table)}."
    )
  return table[name]


def _check_settings(
  fn: Callable[..., Any],
  settings: dict[str, Any],
  where: str,
  also: Sequence[str] = (),
):
  parameters = inspect.signature(fn).parameters.values()
  known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
  known += also
  for key in settings:
    if key not in known:
      near = difflib.get_close_matches(key, known, 1)
      hint = f" Did you mean {near[0]!r}?" if near else ""
      raise ValueError(
        f"{where} does not take {key!r}.{hint} It takes: "
        f"{', '.join(known) or 'no settings'}."
      )
