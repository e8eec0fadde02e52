"""The loss of a set of boxes: match, then compare what is matched.

DETR, Carion et al., arXiv 2005.12872, sections 3.1 and A.2. Reference:
facebookresearch/detr @ 29901c5, models/matcher.py and models/detr.py.

Everything carries a leading axis of decoder layers, which are matched each on
its own. Targets are brought to their queries, not queries to their targets:
predictions are used where they are, and no gradient is scattered.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from big_vision_like.losses import boxes as box
from big_vision_like.losses import matching, shards

DENOMINATORS = ("global", "device")


class Costs(NamedTuple):
  """Weights of what a match costs."""

  label: float = 1.0
  l1: float = 5.0
  giou: float = 2.0


class Losses(NamedTuple):
  """One number for each layer, not yet weighted."""

  ce: Float[Array, " l"]
  l1: Float[Array, " l"]
  giou: Float[Array, " l"]


def match(
  logits: Float[Array, "l b q c"],
  boxes: Float[Array, "l b q 4"],
  label: Int[Array, "b o"],
  true_boxes: Float[Array, "b o 4"],
  costs: Costs,
) -> Int[Array, "l b q"]:
  """The target that each query answers for, or -1; no gradient passes.

  Args:
    logits: of the classes and, last, of no object.
    boxes: predicted, (centre x, centre y, width, height).
    label: of the targets; -1 where there is none.
    true_boxes: of the targets, likewise.
    costs: the weights of `matching_cost`.
  """
  cost = shards.by_device(
    functools.partial(matching_cost, costs=costs), (1, 1, 0, 0), 1
  )
  args = jax.lax.stop_gradient((logits, boxes, label, true_boxes))
  return matching.assign(cost(*args), label >= 0)


def matching_cost(
  logits: Float[Array, "l b q c"],
  boxes: Float[Array, "l b q 4"],
  label: Int[Array, "b o"],
  true_boxes: Float[Array, "b o 4"],
  costs: Costs,
) -> Float[Array, "l b o q"]:
  """Of each target with each query.

  The L1 distance of the boxes by centre, less the probability of the target's
  label (not its logarithm), less the GIoU.
  """
  p = jax.nn.softmax(logits, -1)
  at = jnp.maximum(label, 0)[None, :, None, :]
  likely = jnp.take_along_axis(p, at, -1).swapaxes(-1, -2)
  a, b = true_boxes[None, :, :, None], boxes[:, :, None]
  distance = jnp.abs(a - b).sum(-1)
  overlap = box.giou(box.to_corners(a), box.to_corners(b))
  return costs.l1 * distance - costs.label * likely - costs.giou * overlap


def losses(
  logits: Float[Array, "l b q c"],
  boxes: Float[Array, "l b q 4"],
  label: Int[Array, "b o"],
  true_boxes: Float[Array, "b o 4"],
  target: Int[Array, "l b q"],
  mask: Bool[Array, " b"],
  *,
  no_object: float,
  denominators: str,
) -> Losses:
  """Classes of all queries, boxes of the matched ones.

  Args:
    logits: as for `match`, and so on.
    boxes: predicted.
    label: of the targets.
    true_boxes: of the targets.
    target: what `match` says.
    mask: False for rows that hold no image; they count nowhere.
    no_object: the weight of queries without a target in the cross-entropy.
    denominators: see `number_of_boxes`. "global" divides the cross-entropy by
      the weights of all queries, "device" takes the mean over devices of what
      each gets from its own.
  """
  matched = target >= 0
  at = jnp.maximum(target, 0)
  own = jnp.take_along_axis(jnp.expand_dims(label, 0), at, -1)
  classes = jnp.where(matched, own, logits.shape[-1] - 1)
  nll = optax.softmax_cross_entropy_with_integer_labels(logits, classes)
  weight = jnp.where(matched, 1.0, no_object) * mask[:, None]

  truth = jnp.take_along_axis(true_boxes[None], at[..., None], 2)
  l1 = jnp.abs(boxes - truth).sum(-1)
  overlap = box.giou(box.to_corners(boxes), box.to_corners(truth))
  total = lambda x: jnp.where(matched, x, 0).sum((1, 2))
  count = number_of_boxes(label, mask, denominators)
  return Losses(
    ce=_weighted_mean(nll, weight, mask, denominators),
    l1=total(l1) / count,
    giou=total(1 - overlap) / count,
  )


def number_of_boxes(
  label: Int[Array, "b o"], mask: Bool[Array, " b"], denominators: str
) -> Float[Array, ""]:
  """What the losses of matched pairs are divided by: at least 1.

  "global" counts the targets of the global batch, so that the loss does not
  depend on the number of devices. "device" is the reference with one process
  on each device: there the count of each process is at least 1, so that of all
  together is at least the number of those with images.
  """
  count = (label >= 0).sum(dtype=jnp.float32)
  least = 1.0 if denominators == "global" else _by_device(mask).any(1).sum()
  return jnp.maximum(jnp.maximum(count, least), 1.0)


def _weighted_mean(values, weight, mask, denominators):
  """Over queries [l b q], of all devices or of each."""
  if denominators == "global":
    total, size = (values * weight).sum((1, 2)), weight.sum((1, 2))
    return total / jnp.where(size > 0, size, 1)
  parts = [
    jax.vmap(_by_device)(x).sum((2, 3)) for x in (values * weight, weight)
  ]
  means = parts[0] / jnp.where(parts[1] > 0, parts[1], 1)
  devices = _by_device(mask).any(1).sum()
  return means.sum(1) / jnp.maximum(devices, 1)


def _by_device(x):
  """[b ...] -> [devices, rows of each, ...]."""
  return x.reshape(shards.count(), -1, *x.shape[1:])


def cardinality_error(
  logits: Float[Array, "b q c"], label: Int[Array, "b o"]
) -> Float[Array, " b"]:
  """By how many objects more or fewer are named than there are."""
  named = (logits.argmax(-1) != logits.shape[-1] - 1).sum(-1)
  return jnp.abs(named - (label >= 0).sum(-1)).astype(jnp.float32)


def class_error(
  logits: Float[Array, "b q c"],
  label: Int[Array, "b o"],
  target: Int[Array, "b q"],
) -> Float[Array, "b q"]:
  """100 where the best class is not that of the query's target, or else 0."""
  own = jnp.take_along_axis(label, jnp.maximum(target, 0), -1)
  return 100.0 * (logits.argmax(-1) != own)


def query_of(target: Int[Array, "b q"], slots: int) -> Int[Array, "b o"]:
  """The query of each target slot, -1 for none: a match seen from there."""
  here = target[:, None, :] == jnp.arange(slots)[:, None]
  return jnp.where(here.any(-1), here.argmax(-1), -1)
