"""Zero-shot classification: each image goes to the class whose prompts it fits.

A class is the mean of the embeddings of its name in several sentences, as in
CLIP (Radford et al., arXiv 2103.00020, section 3.1.4).
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from big_vision_like import api
from big_vision_like.evaluators import classification


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """`run` gives `accuracy`, `top5_accuracy` (of more classes) and `examples`.

  Images need no text, but a label: of several, any counts.

  Attributes:
    templates: sentences with {} for the name of a class.
    class_names: of the classes in order; None: those of the data.
  """

  templates: Sequence[str] = ("a photo of a {}.",)
  class_names: Sequence[str] | None = None

  def __post_init__(self):
    if not self.templates or not all("{}" in t for t in self.templates):
      raise ValueError(
        "The templates of zero-shot classification are sentences with {} for "
        f"the name of a class; got {self.templates!r}."
      )

  def run(
    self, *, predict: api.Predict, batches: api.Batches, folder: Path
  ) -> dict[str, float]:
    del folder
    names = self.class_names or batches.label_names
    if not names:
      raise ValueError(
        "Zero-shot classification needs the names of the classes, and the data "
        "has none: set class_names."
      )
    data = embed_images(predict, batches())
    data["logits"] = data.pop("zimg") @ self.classes(predict, batches, names).T
    targets = classification.multi_hot(data)
    labelled = targets.any(1)
    if not labelled.any():
      raise ValueError("No image of the evaluation data carries a label.")
    logits, targets = data["logits"][labelled], targets[labelled]
    scores = {
      "accuracy": float(classification.hits(logits, targets, 1).mean()),
      "examples": float(len(logits)),
    }
    if len(names) > 5:
      hits = classification.hits(logits, targets, 5)
      scores["top5_accuracy"] = float(hits.mean())
    return scores

  def classes(
    self, predict: api.Predict, batches: api.Batches, names: Sequence[str]
  ) -> Float[np.ndarray, "c e"]:
    """The embeddings of the classes, of length 1."""
    prompts = [t.replace("{}", name) for name in names for t in self.templates]
    z = embed_texts(predict, batches, prompts)
    z = z.reshape(len(names), len(self.templates), -1).mean(1)
    return z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-6)


def embed_texts(
  predict: api.Predict, batches: api.Batches, texts: Sequence[str]
) -> Float[np.ndarray, "n e"]:
  """ztxt of texts, in their order.

  Raises:
    ValueError: if a text has no token.
  """
  found: dict[int, np.ndarray] = {}
  for batch, host in batches.texts(texts):
    ids = classification.global_rows(batch, host["example_id"])
    text_ids = classification.global_rows(batch, host["text_id"])
    empty = ids[(ids >= 0) & (text_ids < 0)]
    if empty.size:
      raise ValueError(f"The prompt {texts[empty[0]]!r} is an empty text.")
    ztxt = predict(batch)["ztxt"]
    found |= {
      int(ids[tuple(at)]): ztxt[tuple(at)] for at in np.argwhere(ids >= 0)
    }
  return np.stack([found[i] for i in range(len(texts))])


def embed_images(predict: api.Predict, batches) -> dict[str, np.ndarray]:
  """`zimg` and the labels of all images, with a text or without."""
  parts: dict[str, list[np.ndarray]] = {}
  for batch, host in batches:
    there = classification.global_rows(batch, host["example_id"]) >= 0
    out = predict(batch)
    for key in ("zimg", "label", "multi_label"):
      if key in out:
        parts.setdefault(key, []).append(np.asarray(out[key])[there])
  return {key: np.concatenate(values) for key, values in parts.items()}
