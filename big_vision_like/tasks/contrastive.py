"""Contrastive learning of images and their texts, stacked or packed."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from big_vision_like import api
from big_vision_like.losses import contrastive
from big_vision_like.metrics import Mean
from big_vision_like.tasks import classification

LOSSES = ("softmax", "sigmoid")
TEXT_INPUTS = ("text", "text_segment_ids", "text_positions")
_LABELS = ("label", "multi_label")


@dataclasses.dataclass(frozen=True)
class Task:
  """Each image is to find its text among those of the global batch, or both.

  Stacked texts are `text` int32 [B,T]. In packed rows the texts are packed as
  well: `text`, `text_segment_ids` and `text_positions` int32 [B,S], with the
  text of image slot m where the ids are m. A slot without an image or without
  a text is no pair; which stacked rows are none is for `_mask` to say.

  Attributes:
    loss_name: "softmax", both ways (CLIP, NaViT), or "sigmoid" (SigLIP), see
      losses/contrastive.py.
    exchange: how the texts of all devices come by, "ring" or "gather".
    chunk: how many of them a device looks at together.
    keep_mb: of logits that a device keeps for the softmax's backward pass.
    mean, std: of the pixels in 0..1, a number for all channels or one each.
    num_classes: of the data's labels, which serve evaluation only.
  """

  loss_name: str = "softmax"
  exchange: str = "ring"
  chunk: int = contrastive.CHUNK
  keep_mb: int = contrastive.KEEP_MB
  mean: float | tuple[float, float, float] = 0.5
  std: float | tuple[float, float, float] = 0.5
  num_classes: int = 0

  separable: ClassVar[bool] = False

  def __post_init__(self):
    if self.loss_name not in LOSSES:
      raise ValueError(
        f"config.task.loss_name = {self.loss_name!r}; it is one of {LOSSES}."
      )
    contrastive.check(self.exchange, self.chunk)

  def prepare(
    self, batch: api.Batch, rng: api.Array | None
  ) -> tuple[api.Inputs, api.Targets]:
    """Pixels uint8 -> float32 normalised; texts as they are.

    For evaluation a batch may hold images alone or stacked texts alone.

    Raises:
      ValueError: if there is neither, or packed texts lack their ids.
    """
    del rng
    inputs, mask = {}, batch["_mask"]
    if "patches" in batch or "image" in batch:
      inputs, mask = classification.image_inputs(
        batch, mean=self.mean, std=self.std
      )
    texts = {k: batch[k] for k in TEXT_INPUTS if k in batch}
    if not inputs and not texts:
      raise ValueError(
        "config.task: contrastive learning needs images and texts, but the "
        f"data gives only {sorted(batch)}."
      )
    if mask.ndim == 2 and texts:
      missing = set(TEXT_INPUTS) - set(texts)
      if missing:
        raise ValueError(
          f"The texts of packed rows lack {sorted(missing)}: pack them with "
          "their images, or set config.data.pack to None."
        )
      mask = mask & _present(texts["text_segment_ids"], mask.shape[1])
    truth = {k: batch[k] for k in _LABELS if k in batch}
    return inputs | texts, truth | {"mask": mask}

  def loss(
    self, outputs: api.Outputs, targets: api.Targets
  ) -> tuple[api.Array, dict[str, api.Metric]]:
    """Over the pairs of all devices.

    The metric `image_to_text` is the share of images that are closer to their
    own text than to all others of the batch, `text_to_image` the reverse.
    """
    zimg, ztxt, mask = outputs["zimg"], outputs["ztxt"], targets["mask"]
    t, b = (jnp.asarray(outputs[k], jnp.float32) for k in ("t", "b"))
    how = dict(exchange=self.exchange, chunk=self.chunk)
    if self.loss_name == "softmax":
      result = contrastive.softmax_loss(
        zimg, ztxt, t, mask, keep_mb=self.keep_mb, **how
      )
    else:
      result = contrastive.sigmoid_loss(zimg, ztxt, t, b, mask, **how)
    loss, image_hits, text_hits = result
    pairs = mask.sum(dtype=jnp.float32)
    metrics = {
      "loss": Mean(loss * pairs, pairs),
      "image_to_text": Mean.of(image_hits, mask),
      "text_to_image": Mean.of(text_hits, mask),
      "temperature": Mean.of(t),
    }
    if self.loss_name == "sigmoid":
      metrics["bias"] = Mean.of(b)
    return loss, metrics

  def predict(
    self, outputs: api.Outputs, targets: api.Targets
  ) -> dict[str, api.Array]:
    """`zimg` and `ztxt`, those there are, float32 [B,E] or packed [B,M,E].

    With the mask and the labels of the data.
    """
    z = {k: outputs[k] for k in ("zimg", "ztxt") if k in outputs}
    return {k: x.astype(jnp.float32) for k, x in z.items()} | targets


def _present(segment_ids, slots):
  """bool [B,M]: does slot m, counted from 1, have a token?"""
  ids = jnp.arange(1, slots + 1)
  return (segment_ids[:, None, :] == ids[:, None]).any(-1)
