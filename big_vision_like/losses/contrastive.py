"""Contrastive losses of image-text pairs; no device ever holds all logits.

Softmax: CLIP (Radford et al., arXiv 2103.00020, figure 3), symmetric. Sigmoid:
SigLIP (Zhai et al., arXiv 2303.15343, equation 1; google-research/big_vision @
0127fb6, trainers/proj/image_text/siglip.py). Chunks: Mustafa et al. 2023, as
NaViT cites them (arXiv 2307.06304, section 2.2), and the SigLIP paper.

Images stay on their device, and the texts of all devices come by in chunks. A
device holds the logits of its images with one chunk of texts; their statistics
and gradients are merged chunk by chunk. Texts come by in one of two ways:

  ring    half of a device's texts travels to the next device, half to the
          previous one, while both are computed on; what is found out about a
          text follows it. For few devices, or many pairs on each.
  gather  a share of each device's texts is gathered everywhere, and what is
          found out is reduced and scattered. For pods: rings are long there,
          and with few pairs a device computes less than a transfer takes.

The gradients need no differentiation through collectives. Those of the sigmoid
come out of the same sweep over the texts as the loss. Those of the softmax need
the statistics of all pairs and so a second one; it computes the logits again,
unless they are few, and then takes a third more products than the dense loss.

A pair's own logit is kept apart from those of the others: the softmax loss of
an image is softplus(logsumexp of the others - own), which keeps its digits
where the pair is easy and the loss near 0. All is done in float32, or in
float64 for float64 embeddings; products have the precision that
`jax_default_matmul_precision` sets.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from big_vision_like.losses import shards

EXCHANGES = ("ring", "gather")
CHUNK = 1024
KEEP_MB = 64
# The logit of what is no pair: finite, as differences of two have to be 0.
_LOWEST = -1e30

# Loss, and which images and which texts prefer their own pair to all others.
Result = tuple[Float[Array, ""], Bool[Array, "*n"], Bool[Array, "*n"]]


def softmax_loss(
  zimg: Float[Array, "*n e"],
  ztxt: Float[Array, "*n e"],
  t: Float[Array, ""],
  mask: Bool[Array, "*n"],
  *,
  exchange: str = "ring",
  chunk: int = CHUNK,
  keep_mb: int = KEEP_MB,
) -> Result:
  """Cross-entropy of each image over all texts, and of each text over images.

  Args:
    zimg: embeddings of the images; axis 0 is split over the mesh's batch axes,
      if a mesh is set.
    ztxt: those of their texts.
    t: factor of the logits, t * zimg @ ztxtᵀ. A bias would change nothing.
    mask: False for what is no pair: it takes no part, whatever its embeddings
      are, and gets no gradient.
    exchange: how texts travel, "ring" or "gather".
    chunk: texts that a device looks at together, those of other devices
      included.
    keep_mb: if the logits of a device's images with all texts take no more MB
      than this, it keeps them for the backward pass.

  Returns:
    The mean over pairs of the mean of both cross-entropies, 0 without a pair;
    two masks of hits. A tie with another is no hit.

  Raises:
    ValueError: for an unknown exchange, a chunk below 1, or if the batch axes
      of the mesh do not divide axis 0.
  """
  plan = _plan(zimg.shape[0], exchange, chunk)
  zimg, ztxt, ids = _flat(zimg, ztxt, mask)
  kept = zimg.dtype.itemsize * ids.size**2 // plan.devices
  plan = dataclasses.replace(plan, keep=kept <= keep_mb * 1e6)
  loss, *hits = _softmax(zimg, ztxt, t.astype(zimg.dtype), ids, plan)
  return loss, *(hit.reshape(mask.shape) for hit in hits)


def sigmoid_loss(
  zimg: Float[Array, "*n e"],
  ztxt: Float[Array, "*n e"],
  t: Float[Array, ""],
  b: Float[Array, ""],
  mask: Bool[Array, "*n"],
  *,
  exchange: str = "ring",
  chunk: int = CHUNK,
) -> Result:
  """Is this text of that image? Binary cross-entropy of all n² answers.

  Arguments, errors and the masks are those of `softmax_loss`; logits are
  t * zimg @ ztxtᵀ + b.

  Returns:
    The sum over all answers divided by the number of pairs, as in the paper.
  """
  plan = _plan(zimg.shape[0], exchange, chunk)
  zimg, ztxt, ids = _flat(zimg, ztxt, mask)
  t, b = t.astype(zimg.dtype), b.astype(zimg.dtype)
  loss, *hits = _sigmoid(zimg, ztxt, t, b, ids, plan)
  return loss, *(hit.reshape(mask.shape) for hit in hits)


def check(exchange: str, chunk: int) -> None:
  """Refuses what no loss can be computed with, see `softmax_loss`."""
  if exchange not in EXCHANGES:
    raise ValueError(
      f"config.task.exchange = {exchange!r}; it is one of {EXCHANGES}."
    )
  if chunk < 1:
    raise ValueError(f"config.task.chunk = {chunk}; it is a number of texts.")


# -- who computes what --------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Plan:
  """Which devices share the pairs, and how texts come to them."""

  axes: tuple[str, ...]
  devices: int
  exchange: str
  chunk: int
  keep: bool = False

  def sum(self, x: Array) -> Array:
    return lax.psum(x, self.axes) if self.axes else x

  def sharded(self, fn: Callable, inputs: str, outputs: str) -> Callable:
    """`fn` on each device: "s" are scalars that all share, "n" is split."""
    if not self.axes:
      return functools.partial(fn, self)
    spec = {"s": P(), "n": P(self.axes)}
    return jax.shard_map(
      functools.partial(fn, self),
      in_specs=tuple(spec[c] for c in inputs),
      out_specs=tuple(spec[c] for c in outputs),
      check_vma=False,
    )


def _plan(rows, exchange, chunk):
  check(exchange, chunk)
  shards.check_rows(rows, "A contrastive batch")
  return _Plan(shards.batch_axes(), shards.count(), exchange, chunk)


def _flat(zimg, ztxt, mask):
  """Embeddings [n e] and an id for each pair [n], -1 for what is none."""
  dtype = jnp.promote_types(zimg.dtype, jnp.float32)

  def flat(z):
    z = jnp.where(mask[..., None], z.astype(dtype), 0)
    return z.reshape(-1, z.shape[-1])

  ids = jnp.arange(mask.size, dtype=jnp.int32).reshape(mask.shape)
  return flat(zimg), flat(ztxt), jnp.where(mask, ids, -1).reshape(-1)


# -- the sweep over all texts -------------------------------------------------


class _Seen(NamedTuple):
  """What is known of n images or texts from some of their pairs.

  Attributes:
    sums: what adds up, [n ...] each.
    best: the highest logit with another.
    total: the sum of exp(logit - best) over all others.
  """

  sums: dict[str, Array]
  best: Array | None = None
  total: Array | None = None


def _see(logits, axis, **sums):
  best = logits.max(axis)
  total = jnp.exp(logits - jnp.expand_dims(best, axis)).sum(axis)
  return _Seen(sums, best, total)


def _nothing(shape):
  """What is known from no pair, in the shapes and dtypes given."""
  full = lambda value: lambda s: jnp.full(s.shape, value, s.dtype)
  return jax.tree.map(full(0), shape)._replace(
    best=jax.tree.map(full(_LOWEST), shape.best)
  )


def _join(a, b):
  sums, best = jax.tree.map(jnp.add, a.sums, b.sums), None
  if a.best is not None:
    best = jnp.maximum(a.best, b.best)
  if a.total is None:
    return _Seen(sums, best)
  total = a.total * jnp.exp(a.best - best) + b.total * jnp.exp(b.best - best)
  return _Seen(sums, best, total)


def _join_devices(plan, seen):
  """Joins what all devices know of the same texts; each keeps its own texts."""
  axes = plan.axes
  scatter = lambda x: lax.psum_scatter(x, axes, tiled=True)
  sums, best, total = jax.tree.map(scatter, seen.sums), None, None
  if seen.best is not None:
    highest = lax.pmax(seen.best, axes)
    if seen.total is not None:
      total = scatter(seen.total * jnp.exp(seen.best - highest))
    own = highest.shape[0] // plan.devices
    best = lax.dynamic_slice_in_dim(highest, lax.axis_index(axes) * own, own)
  return _Seen(sums, best, total)


def _sweep(plan, look, texts, notes=None):
  """Shows this device's images the texts of all devices.

  Args:
    plan: says how.
    look: (texts, note) -> what this device's images and these texts, any number
      of them, tell of each other, a _Seen for either side, and a note.
    texts: arrays [n ...] of this device's texts, `ids` among them.
    notes: of an earlier sweep; None: each note is None.

  Returns:
    What all texts tell of these images, all images of these texts, and notes
    for a sweep in the same order.
  """
  own = texts["ids"].shape[0]
  ring = plan.exchange == "ring" and plan.devices > 1
  ways = 2 if ring else 1
  chunk = plan.chunk if plan.exchange == "ring" else plan.chunk // plan.devices
  chunks = ways * math.ceil(own / (ways * max(chunk, 1)))
  extra = -own % chunks
  texts = {
    k: jnp.pad(
      x,
      ((0, extra),) + ((0, 0),) * (x.ndim - 1),
      constant_values=-1 if k == "ids" else 0,
    )
    for k, x in texts.items()
  }
  run = _ring if ring else _in_turn
  images, seen, notes = run(plan, look, texts, chunks, notes)
  return images, jax.tree.map(lambda x: x[:own], seen), notes


def _in_turn(plan, look, texts, chunks, notes):
  """Chunk by chunk, each gathered from all devices if there are several."""

  def look_everywhere(part, note):
    if plan.devices == 1:
      return look(part, note)
    gather = lambda x: lax.all_gather(x, plan.axes, tiled=True)
    images, seen, note = look(jax.tree.map(gather, part), note)
    return images, _join_devices(plan, seen), note

  images = _nothing(jax.eval_shape(look, texts, None)[0])
  return _scan(look_everywhere, images, texts, chunks, notes)


def _ring(plan, look, texts, chunks, notes):
  """Texts travel once around the devices, a half in either direction."""
  devices = plan.devices

  def send(step, tree):
    ring = [(i, (i + step) % devices) for i in range(devices)]
    return jax.tree.map(lambda x: lax.ppermute(x, plan.axes, ring), tree)

  def hop(state, notes):
    images, ways = state
    # Transfers start before the products that they run beside. What is known
    # of a text leaves one hop after it, as the last look is not ready yet.
    arriving = [send(step, way) for step, way in zip((1, -1), ways)]
    after, written = [], []
    for (here, _), (coming, known), note in zip(ways, arriving, notes):
      images, seen, note = _scan(look, images, here, chunks // 2, note)
      after.append((coming, _join(known, seen)))
      written.append(note)
    return (images, after), written

  pairs = {k: jnp.split(x, 2) for k, x in texts.items()}
  halves = [{k: half[i] for k, half in pairs.items()} for i in (0, 1)]
  images, seen = map(_nothing, jax.eval_shape(look, halves[0], None)[:2])
  start = images, [(half, seen) for half in halves]
  (images, ways), notes = lax.scan(
    hop, start, [None, None] if notes is None else notes, length=devices
  )
  home = [send(step, seen) for step, (_, seen) in zip((1, -1), ways)]
  return images, jax.tree.map(lambda *x: jnp.concatenate(x), *home), notes


def _scan(look, images, texts, chunks, notes):
  """Looks at one chunk after the other; joins what is known of the images."""
  parts = jax.tree.map(lambda x: x.reshape(chunks, -1, *x.shape[1:]), texts)

  def body(images, part):
    news, *rest = look(*part)
    return _join(images, news), rest

  images, (seen, notes) = lax.scan(body, images, (parts, notes))
  seen = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), seen)
  return images, seen, notes


def _logits(images, ids, texts, b=0.0):
  """Logits with others [n m], and the own logit of each image if it is here.

  `images` are embeddings times t.
  """
  logits = images @ texts["z"].T + b
  same = ids[:, None] == texts["ids"]
  real = (ids >= 0)[:, None] & (texts["ids"] >= 0)
  own = jnp.where(same, logits, 0).sum(1)
  return jnp.where(real & ~same, logits, _LOWEST), own


def _pull(gradient, images, texts):
  """The gradient of the logits [n m], led to both sides."""
  return gradient @ texts["z"], gradient.T @ images


def _gradients(plan, pulls, own, t, zimg, ztxt, ids):
  """Those of zimg, ztxt and t, from the pulls of others and of own logits."""
  weight = _weight(plan, ids, zimg.dtype)
  on_images, on_texts = pulls
  on_images = weight * (on_images + own[:, None] * ztxt)
  on_texts = weight * (on_texts + own[:, None] * (t * zimg))
  return t * on_images, on_texts, plan.sum((zimg * on_images).sum())


def _weight(plan, ids, dtype):
  """One pair's share of the mean over the pairs of all devices."""
  return 1 / jnp.maximum(plan.sum((ids >= 0).sum()), 1).astype(dtype)


# -- softmax ------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _softmax(zimg, ztxt, t, ids, plan):
  return _softmax_forward(zimg, ztxt, t, ids, plan)[0]


def _softmax_forward(zimg, ztxt, t, ids, plan):
  forward = plan.sharded(_softmax_statistics, "nnsn", "snnnnnn")
  loss, image_hits, text_hits, *saved = forward(zimg, ztxt, t, ids)
  return (loss, image_hits, text_hits), (zimg, ztxt, t, ids, *saved)


def _softmax_backward(plan, saved, gradients):
  backward = plan.sharded(_softmax_gradients, "nnsnnnnn", "nns")
  return *(gradients[0] * g for g in backward(*saved)), None


_softmax.defvjp(_softmax_forward, _softmax_backward)


def _softmax_statistics(plan, zimg, ztxt, t, ids):
  images = t * zimg

  def look(texts, _):
    logits, own = _logits(images, ids, texts)
    note = logits if plan.keep else None
    return _see(logits, 1, own=own), _see(logits, 0), note

  image, text, notes = _sweep(plan, look, {"z": ztxt, "ids": ids})
  own, real = image.sums["own"], ids >= 0
  # Of the others alone; -1e30 where there are none.
  others = [x.best + jnp.log(x.total) for x in (image, text)]
  losses = 0.5 * sum(jax.nn.softplus(x - own) for x in others)
  loss = plan.sum(jnp.where(real, losses, 0).sum())
  pull = -0.5 * sum(jax.nn.sigmoid(x - own) for x in others)
  return (
    loss * _weight(plan, ids, own.dtype),
    real & (own > image.best),
    real & (own > text.best),
    *(jnp.logaddexp(x, own) for x in others),
    jnp.where(real, pull, 0),
    notes,
  )


def _softmax_gradients(
  plan, zimg, ztxt, t, ids, lse_image, lse_text, own, notes
):
  images = t * zimg

  def look(texts, logits):
    if logits is None:
      logits, _ = _logits(images, ids, texts)
    p = jnp.exp(logits - lse_image[:, None]) + jnp.exp(logits - texts["lse"])
    on_images, on_texts = _pull(0.5 * p, images, texts)
    return _Seen({"pull": on_images}), _Seen({"pull": on_texts}), None

  texts = {"z": ztxt, "ids": ids, "lse": lse_text}
  *seen, _ = _sweep(plan, look, texts, notes)
  pulls = [x.sums["pull"] for x in seen]
  return _gradients(plan, pulls, own, t, zimg, ztxt, ids)


# -- sigmoid ------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _sigmoid(zimg, ztxt, t, b, ids, plan):
  return _sigmoid_forward(zimg, ztxt, t, b, ids, plan)[0]


def _sigmoid_forward(zimg, ztxt, t, b, ids, plan):
  # No statistic is needed of all pairs: one sweep gives loss and gradients.
  forward = plan.sharded(_sigmoid_sweep, "nnssn", "snnnnss")
  *result, on_images, on_texts, on_t, on_b = forward(zimg, ztxt, t, b, ids)
  return tuple(result), (on_images, on_texts, on_t, on_b)


def _sigmoid_backward(plan, saved, gradients):
  return *(gradients[0] * g for g in saved), None


_sigmoid.defvjp(_sigmoid_forward, _sigmoid_backward)


def _sigmoid_sweep(plan, zimg, ztxt, t, b, ids):
  images = t * zimg

  def look(texts, _):
    logits, own = _logits(images, ids, texts, b)
    gradient = jax.nn.sigmoid(logits)
    on_images, on_texts = _pull(gradient, images, texts)
    losses = jax.nn.softplus(logits).sum(1)
    sums = dict(own=own, loss=losses, pull=on_images, bias=gradient.sum(1))
    return (
      _Seen(sums, logits.max(1)),
      _Seen({"pull": on_texts}, logits.max(0)),
      None,
    )

  image, text, _ = _sweep(plan, look, {"z": ztxt, "ids": ids})
  sums, own, real = image.sums, image.sums["own"], ids >= 0
  losses = jnp.where(real, sums["loss"] + jax.nn.softplus(-own), 0)
  pull = jnp.where(real, -jax.nn.sigmoid(-own), 0)
  weight = _weight(plan, ids, own.dtype)
  pulls = sums["pull"], text.sums["pull"]
  return (
    plan.sum(losses.sum()) * weight,
    real & (own > image.best),
    real & (own > text.best),
    *_gradients(plan, pulls, pull, t, zimg, ztxt, ids),
    plan.sum((sums["bias"] + pull).sum()) * weight,
  )
