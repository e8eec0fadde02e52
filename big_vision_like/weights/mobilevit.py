"""MobileViT in the names of timm and of transformers.

The weights of the paper's code were trained on BGR images. transformers keeps
that, and its processor swaps the channels; we swap those of the stem's kernel
instead, so that our models read RGB whatever the layout. timm feeds RGB.
"""

import flax.linen as nn

from big_vision_like.models.mobilevit import BLOCKS, DEPTHS, HEADS
from big_vision_like.weights import engine
from big_vision_like.weights.engine import Rule

TIMM = ("conv", "bn")
HF = ("convolution", "normalization")


def conv_bn(ours: str, theirs: str, names: tuple[str, str]) -> list[Rule]:
  """A ConvBN, whose parts they call by `names`."""
  return [
    *engine.conv(f"params/{ours}/conv", f"{theirs}.{names[0]}", bias=False),
    *engine.batch_norm(f"{ours}/bn", f"{theirs}.{names[1]}"),
  ]


def residual_of_timm(ours: str, theirs: str) -> list[Rule]:
  """An inverted residual."""
  return [
    *conv_bn(f"{ours}/expand", f"{theirs}.conv1_1x1", TIMM),
    *conv_bn(f"{ours}/depthwise", f"{theirs}.conv2_kxk", TIMM),
    *conv_bn(f"{ours}/reduce", f"{theirs}.conv3_1x1", TIMM),
  ]


def residual_of_hf(ours: str, theirs: str) -> list[Rule]:
  """An inverted residual."""
  return [
    *conv_bn(f"{ours}/expand", f"{theirs}.expand_1x1", HF),
    *conv_bn(f"{ours}/depthwise", f"{theirs}.conv_3x3", HF),
    *conv_bn(f"{ours}/reduce", f"{theirs}.reduce_1x1", HF),
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
      rules += _layer_of_timm(
        f"params/{ours}/blocks_{i}", f"{theirs}.transformer.{i}"
      )
    rules += engine.norm(f"params/{ours}/norm", f"{theirs}.norm")
    rules += conv_bn(f"{ours}/from_tokens", f"{theirs}.conv_proj", TIMM)
    rules += conv_bn(f"{ours}/fusion", f"{theirs}.conv_fusion", TIMM)
  rules += conv_bn("out", "final_conv", TIMM)
  if model.num_classes:
    rules += engine.dense("params/head", "head.fc")
  return rules


def _layer_of_timm(ours, theirs):
  qkv = [f"{ours}/attn/{part}" for part in ("query", "key", "value")]
  return [
    *engine.norm(f"{ours}/ln1", f"{theirs}.norm1"),
    *engine.fused_heads(qkv, f"{theirs}.attn.qkv", HEADS),
    *engine.heads_out(f"{ours}/attn/out", f"{theirs}.attn.proj", HEADS),
    *engine.norm(f"{ours}/ln2", f"{theirs}.norm2"),
    *engine.dense(f"{ours}/fc1", f"{theirs}.mlp.fc1"),
    *engine.dense(f"{ours}/fc2", f"{theirs}.mlp.fc2"),
  ]


def rules_of_hf(model: nn.Module) -> list[Rule]:
  rules = [_stem_of_hf()]
  rules += engine.batch_norm("stem/bn", "mobilevit.conv_stem.normalization")
  encoder = "mobilevit.encoder.layer"
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
      rules += _layer_of_hf(
        f"params/{ours}/blocks_{i}", f"{theirs}.transformer.layer.{i}"
      )
    rules += engine.norm(f"params/{ours}/norm", f"{theirs}.layernorm")
    rules += conv_bn(f"{ours}/from_tokens", f"{theirs}.conv_projection", HF)
    rules += conv_bn(f"{ours}/fusion", f"{theirs}.fusion", HF)
  rules += conv_bn("out", "mobilevit.conv_1x1_exp", HF)
  if model.num_classes:
    rules += engine.dense("params/head", "classifier")
  return rules


def _stem_of_hf():
  """The kernel, which reads BGR there and RGB here."""
  return Rule(
    ("params/stem/conv/kernel",),
    ("mobilevit.conv_stem.convolution.weight",),
    lambda x: (x.transpose(2, 3, 1, 0)[:, :, [2, 1, 0]],),
    lambda x: (x.transpose(3, 2, 0, 1)[:, [2, 1, 0]],),
  )


def _layer_of_hf(ours, theirs):
  attention = f"{theirs}.attention"
  rules = [
    *engine.norm(f"{ours}/ln1", f"{theirs}.layernorm_before"),
    *engine.norm(f"{ours}/ln2", f"{theirs}.layernorm_after"),
    *engine.heads_out(f"{ours}/attn/out", f"{attention}.output.dense", HEADS),
    *engine.dense(f"{ours}/fc1", f"{theirs}.intermediate.dense"),
    *engine.dense(f"{ours}/fc2", f"{theirs}.output.dense"),
  ]
  for part in ("query", "key", "value"):
    name = f"{attention}.attention.{part}"
    rules += engine.heads(f"{ours}/attn/{part}", name, HEADS)
  return rules


LAYOUTS = {"timm": rules_of_timm, "hf": rules_of_hf}
PREPROCESS = {
  "timm": dict(
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    size=256,
    crop_pct=0.9,
    interpolation="bicubic",
  ),
  "hf": dict(
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    size=256,
    crop_pct=256 / 288,
    interpolation="bilinear",
  ),
}
