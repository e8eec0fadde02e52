"""Do the layers of a model attend alike? DeepViT's attention collapse.

Zhou et al., arXiv 2103.11886, section 3: in deep ViTs the attention maps of
neighbouring blocks become nearly equal, and so do their features. Two maps are
compared column by column: a column says how much a token gives to every other.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from big_vision_like import api, capture, pictures

# Cosines of positive vectors are near 1 whatever they say: independent maps
# have .99 where logits deviate by .1, and .40 where they deviate by 1.
TRAP = (
  "Nearly uniform maps are alike whatever they attend to, so read the "
  "distance to chance, the similarity of different tokens (dashed), and of "
  "trained models only."
)


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """Cosine similarity of attention maps, and of features, between layers.

  Maps: the cosine of equal columns, mean over heads, tokens and images.
  Features: the cosine of a token's outputs of two blocks. Beside each stands
  `chance`, the same between different tokens: it is what similarity is worth
  nothing below. Layers of other shapes are not compared.

  `run` gives for both, `attention` and `features`, the mean over neighbouring
  layers and its `_chance`; and `similar_blocks`, how many attend as the one
  before. `folder` gets `attention_similarity.json` with all pairs, and `.png`.

  Attributes:
    images: how many, at most. The maps of all layers of a batch are held at
      once, so long rows and deep models want small batches.
    softmax: take the maps of re-attention before it mixes heads.
    threshold: from which similarity a block counts as similar. DeepViT's is
      not known; 0.9 is what its figures speak of.
  """

  images: int = 256
  softmax: bool = False
  threshold: float = 0.9

  def measure(self, model: nn.Module, task: api.Task) -> api.Measure:
    def similarities(state, batch, static=()):
      lent = capture.run(model, task, state, batch, static)
      maps = capture.maps(lent, batch, softmax=self.softmax)
      # A token's features are a column of one head, too.
      features = [
        dataclasses.replace(f, values=f.values.swapaxes(1, 2)[:, None, None])
        for f in capture.features(lent, batch)
      ]
      if not maps and not features:
        raise ValueError(
          f"{type(model).__name__} lends neither attention maps nor features; "
          "big_vision_like/capture.py says how a model does."
        )
      there = capture.images(batch)
      return {
        "attention": compare_layers(maps, there),
        "features": compare_layers(features, there),
      }

    return similarities

  def run(
    self, *, predict: api.Predict, batches: api.Batches, folder: Path
  ) -> dict[str, float]:
    summed = capture.total(predict, batches(limit=self.images))
    rows, panels, scores = [], {}, {}
    for kind, layers in summed.items():
      if not layers:
        continue
      names = list(map(capture.layer_name, layers))
      similar, chance = means(layers)
      rows += table(kind, names, similar, chance)
      panels[f"{kind}: similarity of layers"] = similar
      next_to = {"similarity": similar, "chance": chance}
      next_to = {k: np.diagonal(x, 1) for k, x in next_to.items()}
      panels[f"{kind}: to the next layer"] = next_to
      if np.isfinite(next_to["similarity"]).any():
        scores[kind] = float(np.nanmean(next_to["similarity"]))
        scores[f"{kind}_chance"] = float(np.nanmean(next_to["chance"]))
      if kind == "attention":
        similar = next_to["similarity"] > self.threshold
        scores["similar_blocks"] = float(similar.sum())
    if jax.process_index() == 0:
      path = folder / "attention_similarity.json"
      path.write_text(json.dumps(rows, indent=1) + "\n")
      pictures.panels(panels, path.with_suffix(".png"), note=TRAP)
    return scores


def compare_layers(
  layers: list[capture.Layer], there: Bool[Array, "b m"]
) -> dict[str, dict[str, Array]]:
  """Sums over images, by layer: its row of the matrices of all layers."""
  count = len(layers)
  matrices = {
    key: jnp.zeros((count, count)) for key in ("similarity", "chance", "images")
  }
  shapes = [layer.values.shape for layer in layers]
  for shape in dict.fromkeys(shapes):
    group = [i for i, other in enumerate(shapes) if other == shape]
    values = jnp.stack([layers[i].values for i in group])
    members = layers[group[0]].members
    similarity, chance = compare(values, members)
    # A token alone says nothing.
    used = there & (members.sum(-1) > 1)
    found = {"similarity": similarity, "chance": chance}
    found = {
      k: jnp.where(used[..., None, None], x, 0).sum((0, 1))
      for k, x in found.items()
    }
    found["images"] = jnp.full((len(group),) * 2, used.sum(), jnp.float32)
    at = jnp.ix_(jnp.array(group), jnp.array(group))
    matrices = {k: x.at[at].set(found[k]) for k, x in matrices.items()}
  return capture.by_layer(
    (layer.name, {k: x[i] for k, x in matrices.items()})
    for i, layer in enumerate(layers)
  )


def compare(
  maps: Float[Array, "p b g k q s"], members: Bool[Array, "b m s"]
) -> tuple[Float[Array, "b m p p"], Float[Array, "b m p p"]]:
  """Cosines between the columns of p layers' maps, for each image.

  Returns:
    The mean over windows, heads and the image's tokens of the cosine of the
    same token's columns, and of two different tokens' columns: chance. Columns
    of zeros have cosine 0.
  """
  heads, windows = maps.shape[3], maps.shape[2]
  norm = jnp.linalg.norm(maps, axis=-2, keepdims=True)
  columns = maps / jnp.where(norm == 0, 1, norm)
  members = members.astype(maps.dtype)
  n = members.sum(-1)[..., None, None]
  same = jnp.einsum("pbgkqs,rbgkqs->bspr", columns, columns)
  same = jnp.einsum("bspr,bms->bmpr", same, members)
  # The sum over all pairs of tokens is the product of the sums.
  summed = jnp.einsum("pbgkqs,bms->pbgkqm", columns, members)
  pairs = jnp.einsum("pbgkqm,rbgkqm->bmpr", summed, summed)
  others = (pairs - same) / jnp.maximum(n * (n - 1), 1)
  scale = heads * windows
  return same / jnp.maximum(n, 1) / scale, others / scale


def means(
  layers: dict[str, dict[str, np.ndarray]],
) -> tuple[Float[np.ndarray, "p p"], Float[np.ndarray, "p p"]]:
  """Similarity and chance; NaN where layers cannot be compared."""
  summed = {
    key: np.stack([layer[key] for layer in layers.values()])
    for key in ("similarity", "chance", "images")
  }
  images = np.where(summed["images"] > 0, summed["images"], np.nan)
  return summed["similarity"] / images, summed["chance"] / images


def table(
  kind: str,
  names: list[str],
  similarity: Float[np.ndarray, "p p"],
  chance: Float[np.ndarray, "p p"],
) -> list[dict[str, Any]]:
  """A row for each pair of layers that can be compared."""
  return [
    {
      "kind": kind,
      "layer": names[i],
      "other": names[j],
      "similarity": float(similarity[i, j]),
      "chance": float(chance[i, j]),
    }
    for i, j in np.argwhere(np.isfinite(similarity))
    if i <= j
  ]
