"""Boxes by centre or by corners, and how much they have in common.

Generalised IoU: Rezatofighi et al., arXiv 1902.09630. Reference:
facebookresearch/detr @ 29901c5, util/box_ops.py. Deviations: boxes without area
give finite values and gradients where the reference divides 0 by 0, and
inverted corners count as no area where it stops.

Leading axes broadcast: `giou(a[:, None], b[None])` compares all pairs.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

# Areas are those of fractions of an image; a pixel of 4000 x 4000 has 6e-8.
_LEAST_AREA = 1e-12


def to_corners(boxes: Float[Array, "*n 4"]) -> Float[Array, "*n 4"]:
  """(centre x, centre y, width, height) -> (x0, y0, x1, y1)."""
  center, size = boxes[..., :2], boxes[..., 2:]
  return jnp.concatenate([center - size / 2, center + size / 2], -1)


def to_centers(boxes: Float[Array, "*n 4"]) -> Float[Array, "*n 4"]:
  """(x0, y0, x1, y1) -> (centre x, centre y, width, height)."""
  low, high = boxes[..., :2], boxes[..., 2:]
  return jnp.concatenate([(low + high) / 2, high - low], -1)


def iou(
  a: Float[Array, "*#n 4"], b: Float[Array, "*#n 4"]
) -> Float[Array, "*#n"]:
  """Intersection over union of boxes given by corners; 0 without area."""
  shared, union = _areas(a, b)
  return shared / jnp.maximum(union, _LEAST_AREA)


def giou(
  a: Float[Array, "*#n 4"], b: Float[Array, "*#n 4"]
) -> Float[Array, "*#n"]:
  """IoU less the share of the hull that neither of the two boxes covers.

  Of boxes given by corners; -1 (far apart) to 1 (equal).
  """
  shared, union = _areas(a, b)
  hull = _area(
    jnp.minimum(a[..., :2], b[..., :2]), jnp.maximum(a[..., 2:], b[..., 2:])
  )
  rest = (hull - union) / jnp.maximum(hull, _LEAST_AREA)
  return shared / jnp.maximum(union, _LEAST_AREA) - rest


def _areas(a, b):
  """Of the intersection and of the union."""
  shared = _area(
    jnp.maximum(a[..., :2], b[..., :2]), jnp.minimum(a[..., 2:], b[..., 2:])
  )
  own = [_area(x[..., :2], x[..., 2:]) for x in (a, b)]
  return shared, own[0] + own[1] - shared


def _area(low, high):
  width_height = jnp.maximum(high - low, 0)
  return width_height[..., 0] * width_height[..., 1]
