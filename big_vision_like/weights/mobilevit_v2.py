"""MobileViT v2 in the names of timm and of transformers.

Our models read RGB, as those of the paper's code from its version 0.2 on and
timm's do. The documentation of transformers speaks of BGR, as for v1; no
published weights were at hand to decide that, and we change nothing.
"""

import flax.linen as nn
import numpy as np

from big_vision_like.models.mobilevit_v2 import BLOCKS, DEPTHS
from big_vision_like.weights import engine
from big_vision_like.weights.engine import Rule
from big_vision_like.weights.mobilevit import (
  HF,
  TIMM,
  conv_bn,
  residual_of_hf,
  residual_of_timm,
)


def pointwise(ours: str, theirs: str) -> list[Rule]:
  """Our dense layer [in,out] is their 1 x 1 convolution [out,in,1,1]."""
  return [
    Rule(
      (f"{ours}/kernel",),
      (f"{theirs}.weight",),
      lambda x: (x[:, :, 0, 0].T,),
      lambda x: (x.T[:, :, None, None],),
    ),
    engine.same(f"{ours}/bias", f"{theirs}.bias"),
  ]


def fused_pointwise(ours: str, theirs: str) -> list[Rule]:
  """Scores, key and value, which they keep in one convolution [1+2D,D,1,1]."""
  parts = [f"{ours}/{part}" for part in ("scores", "key", "value")]

  def split(x):
    cuts = (1, 1 + (len(x) - 1) // 2)
    return tuple(part.T for part in np.split(x, cuts))

  return [
    Rule(
      tuple(f"{part}/kernel" for part in parts),
      (f"{theirs}.weight",),
      lambda x: split(x[:, :, 0, 0]),
      lambda *x: (np.concatenate([k.T for k in x])[:, :, None, None],),
    ),
    Rule(
      tuple(f"{part}/bias" for part in parts),
      (f"{theirs}.bias",),
      split,
      lambda *x: (np.concatenate(x),),
    ),
  ]


def rules_of_timm(model: nn.Module) -> list[Rule]:
  rules = conv_bn("stem", "stem", TIMM)
  for level, count in enumerate(BLOCKS):
    for i in range(count):
      rules += residual_of_timm(
        f"level{level + 1}_mv{i}", f"stages.{level}.{i}"
      )
  for level, depth in enumerate(DEPTHS, len(BLOCKS)):
    ours, theirs = f"level{level + 1}_vit", f"stages.{level}.1"
    rules += residual_of_timm(f"level{level + 1}_mv0", f"stages.{level}.0")
    rules += conv_bn(f"{ours}/local", f"{theirs}.conv_kxk", TIMM)
    rules += engine.conv(
      f"params/{ours}/to_tokens", f"{theirs}.conv_1x1", bias=False
    )
    for i in range(depth):
      block, layer = f"params/{ours}/blocks_{i}", f"{theirs}.transformer.{i}"
      rules += engine.norm(f"{block}/norm1", f"{layer}.norm1")
      rules += fused_pointwise(f"{block}/attn", f"{layer}.attn.qkv_proj")
      rules += pointwise(f"{block}/attn/out", f"{layer}.attn.out_proj")
      rules += engine.norm(f"{block}/norm2", f"{layer}.norm2")
      rules += pointwise(f"{block}/fc1", f"{layer}.mlp.fc1")
      rules += pointwise(f"{block}/fc2", f"{layer}.mlp.fc2")
    rules += engine.norm(f"params/{ours}/norm", f"{theirs}.norm")
    rules += conv_bn(f"{ours}/from_tokens", f"{theirs}.conv_proj", TIMM)
  if model.num_classes:
    rules += engine.dense("params/head", "head.fc")
  return rules


def rules_of_hf(model: nn.Module) -> list[Rule]:
  rules = conv_bn("stem", "mobilevitv2.conv_stem", HF)
  encoder = "mobilevitv2.encoder.layer"
  for level, count in enumerate(BLOCKS):
    for i in range(count):
      rules += residual_of_hf(
        f"level{level + 1}_mv{i}", f"{encoder}.{level}.layer.{i}"
      )
  for level, depth in enumerate(DEPTHS, len(BLOCKS)):
    ours, theirs = f"level{level + 1}_vit", f"{encoder}.{level}"
    rules += residual_of_hf(
      f"level{level + 1}_mv0", f"{theirs}.downsampling_layer"
    )
    rules += conv_bn(f"{ours}/local", f"{theirs}.conv_kxk", HF)
    rules += engine.conv(
      f"params/{ours}/to_tokens", f"{theirs}.conv_1x1.convolution", bias=False
    )
    for i in range(depth):
      block = f"params/{ours}/blocks_{i}"
      layer = f"{theirs}.transformer.layer.{i}"
      attention = f"{layer}.attention"
      rules += engine.norm(f"{block}/norm1", f"{layer}.layernorm_before")
      rules += fused_pointwise(
        f"{block}/attn", f"{attention}.qkv_proj.convolution"
      )
      rules += pointwise(
        f"{block}/attn/out", f"{attention}.out_proj.convolution"
      )
      rules += engine.norm(f"{block}/norm2", f"{layer}.layernorm_after")
      rules += pointwise(f"{block}/fc1", f"{layer}.ffn.conv1.convolution")
      rules += pointwise(f"{block}/fc2", f"{layer}.ffn.conv2.convolution")
    rules += engine.norm(f"params/{ours}/norm", f"{theirs}.layernorm")
    rules += conv_bn(f"{ours}/from_tokens", f"{theirs}.conv_projection", HF)
  if model.num_classes:
    rules += engine.dense("params/head", "classifier")
  return rules


LAYOUTS = {"timm": rules_of_timm, "hf": rules_of_hf}
PREPROCESS = {
  "timm": dict(
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    size=256,
    crop_pct=0.888,
    interpolation="bicubic",
  ),
  "hf": dict(
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    size=256,
    crop_pct=256 / 288,
    interpolation="bicubic",
  ),
}
