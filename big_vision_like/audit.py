"""Watches the first steps for parameters that do not learn.

A parameter that the loss does not reach, or reaches with NaN, goes unnoticed
in a falling loss. The train step reports squared gradients by path anyway, so
looking costs nothing.
"""

import numpy as np

# A zero-initialised head passes no gradient at step 0, and a warmup from 0
# leaves it zero at step 1: a gradient that is still zero at step 2 is a fault.
STEPS = 3


class GradientAudit:
  """Feeds on `grad_sq` of the train step for STEPS steps, then reports once.

  The step has no gradients of frozen parameters, so none are missed here.
  """

  def __init__(self):
    self._seen: dict[str, np.ndarray] = {}
    self._steps = 0

  @property
  def done(self) -> bool:
    return self._steps >= STEPS

  def update(self, grad_sq: dict[str, np.ndarray]) -> list[str]:
    """Takes one step's sums; returns the findings after the last step."""
    for name, squares in grad_sq.items():
      squares = np.asarray(squares)
      old = self._seen.get(name, np.zeros_like(squares))
      self._seen[name] = np.maximum(old, squares)  # NaN stays NaN
    self._steps += 1
    return self._findings() if self.done else []

  def _findings(self) -> list[str]:
    findings = []
    for name, squares in self._seen.items():
      for layer, value in enumerate(np.atleast_1d(squares)):
        where = f"{name} (layer {layer})" if squares.ndim else name
        if not np.isfinite(value):
          findings.append(f"{where}: non-finite gradient")
        elif value == 0:
          findings.append(f"{where}: zero gradient")
    return findings
