"""Losses of predicted masks: focal and dice, one object at a time.

Focal: Lin et al., arXiv 1708.02002. Dice: Milletari et al., arXiv 1606.04797,
as DETR has them (section 4.4; facebookresearch/detr @ 29901c5,
models/segmentation.py).
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Integer

from big_vision_like.losses import shards

ALPHA = 0.25
GAMMA = 2.0


def mask_losses(
  logits: Float[Array, "b q h w"],
  id_map: Integer[Array, "b hh ww"],
  query: Integer[Array, "b o"],
) -> tuple[Float[Array, "b o"], Float[Array, "b o"]]:
  """(focal, dice) of each object's mask with that of its query; 0 for none.

  The predicted masks are resized bilinearly to the map's size. Focal is the
  mean over its pixels, padding included as in the reference.

  Only the masks of one object of each image exist in full size at a time; the
  backward pass makes them again. Slots that no image of a device uses take no
  time.

  Args:
    logits: of the masks, at a lower resolution.
    id_map: 1 + the slot of the object that a pixel belongs to, or 0.
    query: the query of each slot, -1 where there is no object.
  """
  return shards.by_device(_mask_losses, (0, 0, 0), 0)(logits, id_map, query)


def _mask_losses(logits, id_map, query):
  rows = query.shape[0]
  at = jnp.maximum(query, 0)[:, :, None, None]
  matched = jnp.take_along_axis(logits.astype(jnp.float32), at, 1)

  @jax.checkpoint
  def one(args):
    slot, mask, there = args

    def compute():
      full = jax.image.resize(mask, id_map.shape, "linear", antialias=False)
      truth = (id_map == slot + 1).astype(jnp.float32)
      values = jnp.stack([focal(full, truth), dice(full, truth)])
      return jnp.where(there, values, 0)

    return jax.lax.cond(there.any(), compute, lambda: jnp.zeros((2, rows)))

  slots = jnp.arange(query.shape[1])
  each = (slots, matched.swapaxes(0, 1), (query >= 0).T)
  values = jax.lax.map(one, each)
  return values[:, 0].T, values[:, 1].T


def focal(
  logits: Float[Array, "*n h w"], truth: Float[Array, "*n h w"]
) -> Float[Array, "*n"]:
  """Sigmoid focal loss, mean over pixels, of masks of 0 and 1."""
  return optax.sigmoid_focal_loss(logits, truth, ALPHA, GAMMA).mean((-2, -1))


def dice(
  logits: Float[Array, "*n h w"], truth: Float[Array, "*n h w"]
) -> Float[Array, "*n"]:
  """1 - 2 |a b| / (|a| + |b|), with 1 added to both sides of the fraction."""
  p = jax.nn.sigmoid(logits)
  total = lambda x: x.sum((-2, -1))
  return 1 - (2 * total(p * truth) + 1) / (total(p) + total(truth) + 1)
