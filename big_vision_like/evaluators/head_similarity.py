"""Do the heads of a layer attend alike? EfficientViT's redundancy of heads.

Liu et al., arXiv 2305.07027, section 2.2: heads that read the same features
learn similar maps; heads that read a share of the channels each do so less.
"""

import dataclasses
import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from big_vision_like import api, capture, pictures

NOTE = (
  "Nearly uniform maps are alike whatever they attend to: read the distance to "
  "chance, what is left of the mean when the keys of one head are shuffled."
)


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """Cosine similarity between the attention maps of a layer's heads.

  `run` gives, as means over the layers with several heads, `max`, the cosine
  of a head's map with the one most like it (the paper's figure), `mean`, that
  with all others, and `chance`, the latter with shuffled keys. `folder` gets
  `head_similarity.json` with a row for each layer, and `.png`.

  Attributes:
    images: how many, at most; see attention_similarity.
    softmax: take the maps of re-attention before it mixes heads.
  """

  images: int = 256
  softmax: bool = False

  def measure(self, model: nn.Module, task: api.Task) -> api.Measure:
    def similarities(state, batch, static=()):
      lent = capture.run(model, task, state, batch, static)
      layers = capture.maps(lent, batch, softmax=self.softmax)
      layers = [x for x in layers if x.values.shape[2] > 1]
      if not layers:
        raise ValueError(
          f"{type(model).__name__} lends no attention maps of several heads; "
          "big_vision_like/capture.py says how a model does."
        )
      there = capture.images(batch)
      return capture.by_layer((x.name, _summed(x, there)) for x in layers)

    return similarities

  def run(
    self, *, predict: api.Predict, batches: api.Batches, folder: Path
  ) -> dict[str, float]:
    rows = []
    summed = capture.total(predict, batches(limit=self.images))
    for key, layer in summed.items():
      images = layer.pop("images")
      if images:
        found = {k: float(x / images) for k, x in layer.items()}
        rows.append({"layer": capture.layer_name(key), **found})
    if not rows:
      raise ValueError(
        "No layer attends over more than one token: the images are too small "
        "for this model."
      )
    curves = {
      key: np.array([row[key] for row in rows])
      for key in ("max", "mean", "chance")
    }
    if jax.process_index() == 0:
      path = folder / "head_similarity.json"
      path.write_text(json.dumps(rows, indent=1) + "\n")
      panels = {"similarity of heads": curves}
      pictures.panels(panels, path.with_suffix(".png"), note=NOTE)
    return {key: float(x.mean()) for key, x in curves.items()}


def _summed(layer: capture.Layer, there: Bool[Array, "b m"]):
  similarity, chance = compare_heads(layer.values, layer.members)
  heads = similarity.shape[-1]
  own = jnp.eye(heads, dtype=bool)
  used = there & (layer.members.sum(-1) > 1)
  found = {
    "max": jnp.where(own, -jnp.inf, similarity).max(-1).mean(-1),
    "mean": jnp.where(own, 0, similarity).sum((-2, -1)) / heads / (heads - 1),
    "chance": jnp.where(own, 0, chance).sum((-2, -1)) / heads / (heads - 1),
  }
  found = {k: jnp.where(used, x, 0).sum() for k, x in found.items()}
  return found | {"images": used.sum(dtype=jnp.float32)}


def compare_heads(
  maps: Float[Array, "b g k q s"], members: Bool[Array, "b m s"]
) -> tuple[Float[Array, "b m k k"], Float[Array, "b m k k"]]:
  """Cosines between the whole maps of heads, for each image.

  Returns:
    The cosines, and their mean over all shuffles of one head's keys.
  """
  members = members.astype(maps.dtype)
  # A query sees its own image only, so the keys tell whose entries are whose.
  products = jnp.einsum("bgkqs,bgjqs->bskj", maps, maps)
  products = jnp.einsum("bskj,bms->bmkj", products, members)
  sums = jnp.einsum("bgkqs,bms->bgkqm", maps, members)
  shuffled = jnp.einsum("bgkqm,bgjqm->bmkj", sums, sums)
  shuffled = shuffled / jnp.maximum(members.sum(-1), 1)[..., None, None]
  norm = jnp.sqrt(jnp.diagonal(products, axis1=-2, axis2=-1))
  norm = norm[..., :, None] * norm[..., None, :]
  norm = jnp.where(norm == 0, 1, norm)
  return products / norm, shuffled / norm
