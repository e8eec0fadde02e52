"""Published names of EfficientViT's weights: timm's, and microsoft/Cream's.

Cream's files also store which entry of the table of biases each pair of pixels
reads, for the windows of 224 pixels.
"""

import numpy as np

from big_vision_like.models import efficientvit
from big_vision_like.weights import engine

PREPROCESS = {
  layout: dict(
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    size=224,
    crop_pct=0.875,
    interpolation="bicubic",
  )
  for layout in ("timm", "official")
}


def timm(model: efficientvit.EfficientViT) -> list[engine.Rule]:
  """`efficientvit_m0` to `m5` of timm, which have one head."""

  def place(stage, block):
    return f"stages.{stage}.blocks.{block}"

  def downsample(stage):
    base = f"stages.{stage}.downsample"
    return f"{base}.res1", f"{base}.patchmerge", f"{base}.res2"

  stems = [f"patch_embed.conv{i + 1}" for i in range(4)]
  return _rules(
    model, stems, place, downsample, conv="conv", linear="linear", stored=False
  )


def official(model: efficientvit.EfficientViT) -> list[engine.Rule]:
  """microsoft/Cream @ 4a13c40, with or without its second head."""

  def place(stage, block):
    # Behind the three parts of the downsampling, if there is one.
    return f"blocks{stage + 1}.{block + (3 if stage else 0)}"

  def downsample(stage):
    return tuple(f"blocks{stage + 1}.{i}" for i in range(3))

  stems = [f"patch_embed.{2 * i}" for i in range(4)]
  return _rules(
    model, stems, place, downsample, conv="c", linear="l", stored=True
  )


def _rules(model, stems, place, downsample, *, conv, linear, stored):
  row = model.row()

  def conv_bn(ours, theirs):
    return [
      *engine.conv(f"params/{ours}/conv", f"{theirs}.{conv}", bias=False),
      *engine.batch_norm(f"{ours}/bn", f"{theirs}.bn"),
    ]

  def ffn(ours, theirs):
    return [
      rule
      for name in ("pw1", "pw2")
      for rule in conv_bn(f"{ours}/{name}", f"{theirs}.{name}")
    ]

  rules = []
  for i, theirs in enumerate(stems):
    rules += conv_bn(f"stem{i}", theirs)
  for s, (depth, heads) in enumerate(zip(row["depths"], row["heads"])):
    if s:
      ours = f"down{s}"
      before, merge, after = downsample(s)
      for i, theirs in enumerate((before, after)):
        rules += conv_bn(f"{ours}/dw{i}", f"{theirs}.0.m")
        rules += ffn(f"{ours}/ffn{i}", f"{theirs}.1.m")
      for i in (1, 2, 3):
        rules += conv_bn(f"{ours}/mixer/conv{i}", f"{merge}.conv{i}")
      for name, fc in (("squeeze", "fc1"), ("excite", "fc2")):
        rules += engine.conv(f"params/{ours}/mixer/{name}", f"{merge}.se.{fc}")
    for b in range(depth):
      ours, theirs = f"stage{s}_block{b}", place(s, b)
      for i in (0, 1):
        rules += conv_bn(f"{ours}/dw{i}", f"{theirs}.dw{i}.m")
        rules += ffn(f"{ours}/ffn{i}", f"{theirs}.ffn{i}.m")
      ours, theirs = f"{ours}/mixer", f"{theirs}.mixer.m.attn"
      biases = "attention_biases"
      rules.append(engine.same(f"params/{ours}/{biases}", f"{theirs}.{biases}"))
      if stored:
        side = (7, 7, 4)[s]
        index = efficientvit.offsets(side).astype(np.int64)
        rules.append(engine.constant(f"{theirs}.attention_bias_idxs", index))
      for h in range(heads):
        rules += conv_bn(f"{ours}/qkv{h}", f"{theirs}.qkvs.{h}")
        rules += conv_bn(f"{ours}/dw{h}", f"{theirs}.dws.{h}")
      rules += conv_bn(f"{ours}/proj", f"{theirs}.proj.1")
  names = ["head", "head_dist"] if model.distillation else ["head"]
  for name in names if model.num_classes else []:
    rules += engine.batch_norm(f"{name}/bn", f"{name}.bn")
    rules += engine.dense(f"params/{name}/linear", f"{name}.{linear}")
  return rules


LAYOUTS = {"timm": timm, "official": official}
