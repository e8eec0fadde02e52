"""Our jitted training step, as the tables time it."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax

from big_vision_like import api, flops, optim, train_step, trees


class Training:
  """A model with the state of its training, by AdamW at a constant rate."""

  def __init__(
    self,
    model: nn.Module,
    task: api.Task,
    example: Mapping[str, Any],
    *,
    lr: float = 1e-3,
    wd: float = 0.05,
    clip: float | None = None,
    frozen: Sequence[str] = (),
  ):
    self.model, self.task, self.example = model, task, example
    self.frozen, rng = tuple(frozen), jax.random.key(0)
    init = functools.partial(train_step.init_variables, model, task)
    params, _ = jax.eval_shape(init, rng, example)
    self.tx, _ = optim.make(
      name="adamw",
      lr=lr,
      wd=wd,
      clip=clip,
      schedule=dict(name="constant"),
      total_steps=1_000_000,
      params=trees.split(params, self.frozen)[0],
    )
    init = functools.partial(
      train_step.init_state, model, task, self.tx, frozen=self.frozen
    )
    self.state = jax.jit(init)(rng, example)
    self.step = jax.jit(self._make_step(model), donate_argnums=0)

  def _make_step(self, model):
    return train_step.make_train_step(
      model, self.task, self.tx, frozen=self.frozen
    )

  def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Trains one step, to its end; the metrics."""
    self.state, metrics = self.step(self.state, batch)
    jax.block_until_ready(self.state)
    return metrics

  def flops(self) -> float:
    """Model FLOPs of a step, see flops.py."""
    model = self.model
    if hasattr(model, "attention"):
      model = model.clone(attention="xla")
    return flops.count_flops(self._make_step(model), self.state, self.example)
