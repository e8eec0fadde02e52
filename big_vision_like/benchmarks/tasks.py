"""What the tasks of a learnable memory add to the time of an answer."""

import statistics
from collections.abc import Mapping

import jax

from big_vision_like import api
from big_vision_like.benchmarks import measure
from big_vision_like.models import memory


def lines(
  model: memory.MemoryViT,
  params: api.PyTree,
  inputs: Mapping[str, api.Array],
  *,
  images: int,
  repeats: int = 9,
) -> list[str]:
  """A line of text for each task; they join one after the other.

  Args:
    model: with the tasks.
    params: its parameters.
    inputs: of one batch.
    images: how many there are in it.
    repeats: rounds of timing; the times of a round follow each other.
  """
  names = memory.bases_first(
    {k: task.get("extends", ()) for k, task in model.tasks.items()}
  )
  times = measure.interleaved(
    {
      count: _call(model, params, inputs, names[:count])
      for count in range(len(names) + 1)
    },
    repeats=repeats,
  )
  text = [f"{images} images: {1e3 * times.median(0):.2f} ms without tasks."]
  width = max(map(len, names))
  for count, name in enumerate(names, 1):
    before, after = times.seconds[count - 1], times.seconds[count]
    more = 1e3 * statistics.median(b - a for a, b in zip(before, after))
    share = more / (1e3 * times.median(0))
    text.append(f"  {name:{width}}  adds {more:.2f} ms ({share:.1%}).")
  return text


def _call(model, params, inputs, names):
  """Waits for the answers of the backbone and of some tasks."""
  part, own = model.make_backbone(), params[memory.BACKBONE]
  if names:
    tasks = {k: model.tasks[k] for k in names}
    part = model.clone(tasks=tasks, task=names[0])
    some = {k: params[memory.TASKS][k] for k in names}
    own = {memory.BACKBONE: own, memory.TASKS: some}

  @jax.jit
  def answers(params, inputs):
    out = part.apply({"params": params}, train=False, **inputs)
    return {k: x for k, x in out.items() if k.startswith(("logits", "pooled"))}

  return lambda: jax.block_until_ready(answers(own, inputs))
