"""Losses of predicted masks: focal and dice, a few objects at a time.

Focal: Lin et al., arXiv 1708.02002. Dice: Milletari et al., arXiv 1606.04797,
as DETR has them (section 4.4; facebookresearch/detr @ 29901c5,
models/segmentation.py).
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Integer

from big_vision_like.losses import shards

ALPHA = 0.25
# Of an image, masks of as many objects at a time: one of those of COCO, all of
# small images, since within a loop a CPU computes on one core.
PIXELS = 1_000_000


def mask_losses(
  logits: Float[Array, "b q h w"],
  id_map: Integer[Array, "b hh ww"],
  query: Integer[Array, "b o"],
  inside: Bool[Array, "b hh ww"],
) -> tuple[Float[Array, "b o"], Float[Array, "b o"]]:
  """(focal, dice) of each object's mask with that of its query; 0 for none.

  Masks in full size are of at most PIXELS of each image, but of one object at
  least. Where these are not all objects, they follow each other: the backward
  pass makes them again, and those that no image of a device has take no time.

  Args:
    logits: of the masks, which are resized bilinearly to the map's size.
    id_map: 1 + the slot of the object that a pixel belongs to, or 0.
    query: the query of each slot, -1 where there is no object.
    inside: the pixels that count.
  """
  run = shards.by_device(_mask_losses, (0, 0, 0, 0), 0)
  return run(logits, id_map, query, inside)


def _mask_losses(logits, id_map, query, inside):
  slots, pixels = query.shape[1], id_map.shape[1] * id_map.shape[2]
  count = min(slots, max(1, PIXELS // pixels))
  query = jnp.pad(query, ((0, 0), (0, -slots % count)), constant_values=-1)
  at = jnp.maximum(query, 0)[:, :, None, None]
  matched = jnp.take_along_axis(logits.astype(jnp.float32), at, 1)

  def some(slot, mask, there):
    """[2,b,n] of n slots."""
    size = (*there.shape, *id_map.shape[1:])
    full = jax.image.resize(mask, size, "linear", antialias=False)
    truth = id_map[:, None] == slot[:, None, None] + 1
    of = full, truth, jnp.broadcast_to(inside[:, None], size)
    return jnp.where(there, jnp.stack([focal(*of), dice(*of)]), 0)

  @jax.checkpoint
  def used(args):
    there = args[-1]
    nothing = lambda *_: jnp.zeros((2, *there.shape))
    return jax.lax.cond(there.any(), some, nothing, *args)

  args = (
    rearrange(jnp.arange(query.shape[1]), "(k n) -> k n", n=count),
    rearrange(matched, "b (k n) h w -> k b n h w", n=count),
    rearrange(query >= 0, "b (k n) -> k b n", n=count),
  )
  if count == slots:
    return tuple(some(*(x[0] for x in args)))
  values = rearrange(jax.lax.map(used, args), "k c b n -> c b (k n)")
  return tuple(values[..., :slots])


def focal(
  logits: Float[Array, "*n h w"],
  truth: Bool[Array, "*n h w"],
  inside: Bool[Array, "*n h w"],
) -> Float[Array, "*n"]:
  """Sigmoid focal loss with gamma 2, the mean over pixels."""
  # The logit of the right answer; 1 - p is the probability of the wrong one.
  right = jnp.where(truth, logits, -logits)
  cross_entropy, wrong = jax.nn.softplus(-right), jax.nn.sigmoid(-right)
  loss = jnp.where(truth, ALPHA, 1 - ALPHA) * cross_entropy * wrong**2
  count = jnp.maximum(inside.sum((-2, -1)), 1)
  return jnp.where(inside, loss, 0).sum((-2, -1)) / count


def dice(
  logits: Float[Array, "*n h w"],
  truth: Bool[Array, "*n h w"],
  inside: Bool[Array, "*n h w"],
) -> Float[Array, "*n"]:
  """1 - 2 |a b| / (|a| + |b|), with 1 added to both sides of the fraction."""
  p = jnp.where(inside, jax.nn.sigmoid(logits), 0)
  both = jnp.where(truth, p, 0).sum((-2, -1))
  total = p.sum((-2, -1)) + (truth & inside).sum((-2, -1))
  return 1 - (2 * both + 1) / (total + 1)
