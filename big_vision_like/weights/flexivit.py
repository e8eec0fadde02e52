"""FlexiViT's weights as timm 1.0.31 and big_vision @ 0127fb6 name them.

timm's flexivit_* have patches of 16 pixels and 15 x 15 positions, so they are
`Model(variant="S/16", table=15, gelu="exact")`, which other grids may be asked
of. The files of big_vision give their sizes by the shapes of the kernel and of
the positions. Kernel and table are stored as they are: to resize them is to
lose some of them.
"""

from big_vision_like.models import flexivit
from big_vision_like.models.layers import variants
from big_vision_like.weights import engine

_QKV = ("query", "key", "value")


def _row(model):
  return variants.sizes(model.variant, flexivit.VARIANTS, model.sizes)


def _timm(model: flexivit.FlexiViT) -> list[engine.Rule]:
  size = _row(model)
  rules = [
    engine.same("params/cls", "cls_token"),
    engine.same("params/pos_embed", "pos_embed"),
    *engine.conv("params/embed", "patch_embed.proj"),
    *engine.norm("params/encoder/norm", "norm"),
  ]
  for i in range(size["depth"]):
    ours, theirs = f"params/encoder/blocks_{i}", f"blocks.{i}"
    attn, heads = f"{ours}/attn", size["heads"]
    qkv = [f"{attn}/{x}" for x in _QKV]
    rules += [
      *engine.norm(f"{ours}/ln1", f"{theirs}.norm1"),
      *engine.norm(f"{ours}/ln2", f"{theirs}.norm2"),
      *engine.fused_heads(qkv, f"{theirs}.attn.qkv", heads),
      *engine.heads_out(f"{attn}/out", f"{theirs}.attn.proj", heads),
      *engine.dense(f"{ours}/mlp/fc1", f"{theirs}.mlp.fc1"),
      *engine.dense(f"{ours}/mlp/fc2", f"{theirs}.mlp.fc2"),
    ]
  if model.num_classes:
    rules += engine.dense("params/head", "head")
  return rules


def _big_vision(model: flexivit.FlexiViT) -> list[engine.Rule]:
  layers = {"embed": "embedding", "encoder/norm": "Transformer/encoder_norm"}
  for i in range(_row(model)["depth"]):
    ours, theirs = f"encoder/blocks_{i}", f"Transformer/encoderblock_{i}"
    attention = f"{theirs}/MultiHeadDotProductAttention_0"
    layers |= {
      f"{ours}/ln1": f"{theirs}/LayerNorm_0",
      f"{ours}/ln2": f"{theirs}/LayerNorm_1",
      f"{ours}/mlp/fc1": f"{theirs}/MlpBlock_0/Dense_0",
      f"{ours}/mlp/fc2": f"{theirs}/MlpBlock_0/Dense_1",
    }
    for name in (*_QKV, "out"):
      layers[f"{ours}/attn/{name}"] = f"{attention}/{name}"
  if model.num_classes:
    layers["head"] = "head"
  rules = [
    engine.same("params/cls", "cls"),
    engine.same("params/pos_embed", "pos_embedding"),
  ]
  for ours, theirs in layers.items():
    norm = ours.endswith(("ln1", "ln2", "norm"))
    for leaf in ("scale" if norm else "kernel", "bias"):
      rules.append(engine.same(f"params/{ours}/{leaf}", f"{theirs}/{leaf}"))
  return rules


LAYOUTS = {"timm": _timm, "big_vision": _big_vision}

_INPUT = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
SETTINGS = {"timm": dict(table=15, gelu="exact")}
PREPROCESS = {
  "timm": dict(
    **_INPUT,
    size=flexivit.IMAGE_SIZE,
    crop_pct=0.95,
    interpolation="bicubic",
  ),
  # 240 of 272 pixels a side.
  "big_vision": dict(
    **_INPUT,
    size=flexivit.IMAGE_SIZE,
    crop_pct=240 / 272,
    interpolation="bilinear",
  ),
}
