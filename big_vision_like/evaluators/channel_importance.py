"""Which channels does a model need? Taylor importance of Q, K, V and FFN.

EfficientViT (Liu et al., arXiv 2305.07027, section 2.3) prunes by it to see
where a Transformer wants its channels: fewer queries and keys, narrower FFNs,
values as wide as the embedding. The score is that of Molchanov et al. (arXiv
1906.10771): to first order, a channel without which the loss changes by much.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from big_vision_like import api, capture, pictures, trees

# Layers whose outputs are channels that may go, by the name of the layer. One
# that gives queries, keys and values at once gives them in this order, its
# values as wide as its input, and the other two share the rest.
KINDS = {
  "query": ("Q",),
  "key": ("K",),
  "value": ("V",),
  "qkv": ("Q", "K", "V"),
  "fc1": ("FFN",),
  "pw1": ("FFN",),
}
_PARAMETER = re.compile(
  r"((?P<block>.*?)/)?"
  rf"(?P<layer>((attn|mlp|mixer|ffn\d+)/)?({'|'.join(KINDS)})\d*)/"
  r"(?P<leaf>(conv/|bn/)?(kernel|bias|scale))"
)
NOTE = (
  "Importance of a channel: |sum of weight x gradient|. Dashed: channels that "
  "there are; solid: those kept when the least important of all layers go."
)


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """Importance of each channel, and where the important ones are.

  A channel's score is |sum of weight x gradient| over the weights that make it
  (the scale and bias of its BatchNorm, if it has one: without these it is
  gone), of the loss of a batch in evaluation mode, averaged over batches. So
  it depends on the batch size, and images need labels. Reallocation: the
  `keep` share of all channels with the highest scores is what one would leave.

  `run` gives for each kind, `Q`, `K`, `V` and `FFN`, its share of the summed
  importance, and `_kept`, the share of its channels that are left. `folder`
  gets `channel_importance.json`, a row for each layer and kind with the scores
  of all channels, and `.png`.

  Attributes:
    images: how many, at most.
    keep: the share of all channels that stays.
  """

  images: int = 256
  keep: float = 0.5

  def __post_init__(self):
    if not 0 < self.keep <= 1:
      raise ValueError(
        f"keep = {self.keep}; it is the share of the channels that stays, "
        "above 0 and up to 1."
      )

  def measure(self, model: nn.Module, task: api.Task) -> api.Measure:
    def importance(state, batch, static=()):
      inputs, targets = task.prepare(batch, None)
      variables = state.variables()

      def loss(params):
        outputs = model.apply(
          variables | {"params": params}, train=False, **inputs, **dict(static)
        )
        return task.loss(outputs, targets)[0]

      params = variables["params"]
      grads = jax.grad(loss)(params)
      lent = capture.run(model, task, state, batch, static)
      order = [x.name for x in capture.features(lent, batch)]
      found = channels(params, grads, order)
      if not found:
        raise ValueError(
          f"{type(model).__name__} has no layer for queries, keys, values or "
          f"an FFN: none is called {', '.join(KINDS)}."
        )
      return {"layers": found, "batches": jnp.ones(())}

    return importance

  def run(
    self, *, predict: api.Predict, batches: api.Batches, folder: Path
  ) -> dict[str, float]:
    summed = capture.total(predict, batches(limit=self.images))
    found = jax.tree.map(lambda x: x / summed["batches"], summed["layers"])
    rows = table(found, self.keep)
    if jax.process_index() == 0:
      path = folder / "channel_importance.json"
      path.write_text(json.dumps(rows, indent=1) + "\n")
      pictures.panels(_panels(rows), path.with_suffix(".png"), note=NOTE)
    scores = {}
    for kind in dict.fromkeys(row["kind"] for row in rows):
      mine = [row for row in rows if row["kind"] == kind]
      scores[kind] = sum(row["share"] for row in mine)
      kept, there = (sum(x[k] for x in mine) for k in ("kept", "channels"))
      scores[f"{kind}_kept"] = kept / there
    return scores


def channels(
  params: api.PyTree, grads: api.PyTree, order: list[str]
) -> dict[str, dict[str, dict[str, Array]]]:
  """Block -> kind -> the `scores` of its channels and the `width` they read.

  Args:
    params: of any model.
    grads: likewise.
    order: of the blocks; others follow, in the order of their names.
  """
  layers: dict[tuple[str, str], dict[str, tuple[Array, Array]]] = {}
  flat = trees.flatten(grads)
  for path, weights in trees.flatten(params).items():
    for name, w, g in _unstacked(path, weights, flat[path]):
      if match := _PARAMETER.fullmatch(name):
        layer = match["block"] or "", match["layer"]
        layers.setdefault(layer, {})[match["leaf"]] = (w, g)
  blocks: dict[str, dict[str, list[tuple[Array, int]]]] = {}
  for (block, layer), leaves in layers.items():
    for kind, scores, width in _layer_scores(layer, leaves):
      kinds = blocks.setdefault(block, {})
      kinds.setdefault(kind, []).append((scores, width))
  known = {name: i for i, name in enumerate(order)}
  ranked = sorted(blocks, key=lambda b: (known.get(b, len(known)), _natural(b)))
  return capture.by_layer(
    (
      block,
      {
        kind: {
          "scores": jnp.concatenate([scores for scores, _ in parts]),
          "width": jnp.float32(sum(width for _, width in parts)),
        }
        for kind, parts in blocks[block].items()
      },
    )
    for block in ranked
  )


def _unstacked(path, weights, grads):
  """The layers of a scanned parameter, under names of their own."""
  parts = path.split("/")
  if api.SCANNED not in parts:
    return [(path, weights, grads)]
  at = parts.index(api.SCANNED)
  names = (
    "/".join([*parts[:at], f"{api.SCANNED}_{i}", *parts[at + 1 :]])
    for i in range(len(weights))
  )
  return list(zip(names, weights, grads))


def _layer_scores(layer, leaves):
  """(kind, scores, width of the input) of what a layer gives."""
  kernel = leaves["conv/kernel" if "conv/kernel" in leaves else "kernel"][0]
  inputs = 3 if kernel.ndim == 4 else 1  # a convolution's, a dense layer's
  width = kernel.shape[inputs - 1]
  normed = {k: x for k, x in leaves.items() if k.startswith("bn/")}
  total = 0.0
  for name, (w, g) in (normed or leaves).items():
    product = w.astype(jnp.float32) * g.astype(jnp.float32)
    axes = tuple(range(inputs)) if name.endswith("kernel") else ()
    total = total + product.sum(axes)
  scores = jnp.abs(total).reshape(-1)
  name = layer.rpartition("/")[2]
  kinds = KINDS.get(name) or KINDS[name.rstrip("0123456789")]
  sizes = [scores.size] if len(kinds) == 1 else [(scores.size - width) // 2] * 2
  parts = jnp.split(scores, np.cumsum(sizes[: len(kinds) - 1]))
  return [(kind, part, width) for kind, part in zip(kinds, parts)]


def _natural(name: str) -> list[int | str]:
  """A key that sorts blocks_2 before blocks_10."""
  return [int(x) if x.isdecimal() else x for x in re.split(r"(\d+)", name) if x]


def table(found: dict[str, Any], keep: float) -> list[dict[str, Any]]:
  """A row for each block and kind, first to last."""
  every = np.concatenate(
    [x["scores"] for kinds in found.values() for x in kinds.values()]
  )
  kept = max(1, round(keep * len(every)))
  threshold = np.sort(every)[-kept]
  return [
    {
      "layer": capture.layer_name(key),
      "kind": kind,
      "width": round(float(x["width"])),
      "channels": len(x["scores"]),
      "kept": int((x["scores"] >= threshold).sum()),
      "importance": float(x["scores"].mean()),
      "share": float(x["scores"].sum() / every.sum()),
      "scores": [float(s) for s in x["scores"]],
    }
    for key, kinds in found.items()
    for kind, x in kinds.items()
  ]


def _panels(rows):
  blocks = list(dict.fromkeys(row["layer"] for row in rows))
  importance, ratio = {}, {}
  for kind in dict.fromkeys(row["kind"] for row in rows):
    by_block = {row["layer"]: row for row in rows if row["kind"] == kind}
    mine = [by_block.get(block) for block in blocks]

    def curve(value, mine=mine):
      return np.array([np.nan if row is None else value(row) for row in mine])

    importance[kind] = curve(lambda row: row["importance"])
    ratio[kind] = curve(lambda row: row["kept"] / row["width"])
    before = curve(lambda row: row["channels"] / row["width"])
    ratio[f"{kind} before"] = before
  return {
    "mean importance of a channel": importance,
    "channels / width of the embedding": ratio,
  }
