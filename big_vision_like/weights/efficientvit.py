"""Published names of EfficientViT's weights: timm's, and microsoft/Cream's.

Cream's files also store which entry of the table of biases each pair of pixels
of a window reads.
"""

import math

import numpy as np

from big_vision_like.models import efficientvit
from big_vision_like.models.layers.resize import resize_cubic
from big_vision_like.weights import engine
from big_vision_like.weights.engine import Rule, Tensors

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
      rules.append(_biases(f"params/{ours}", theirs, stored=stored))
      for h in range(heads):
        rules += conv_bn(f"{ours}/qkv{h}", f"{theirs}.qkvs.{h}")
        rules += conv_bn(f"{ours}/dw{h}", f"{theirs}.dws.{h}")
      rules += conv_bn(f"{ours}/proj", f"{theirs}.proj.1")
  names = ["head", "head_dist"] if model.distillation else ["head"]
  for name in names if model.num_classes else []:
    rules += engine.batch_norm(f"{name}/bn", f"{name}.bn")
    rules += engine.dense(f"params/{name}/linear", f"{name}.{linear}")
  return rules


def _biases(ours, theirs, *, stored):
  ours, theirs = f"{ours}/attention_biases", f"{theirs}.attention_bias"
  if not stored:
    return engine.same(ours, f"{theirs}es")

  def save(table):
    side = math.isqrt(table.shape[1])
    return table, efficientvit.offsets(side).astype(np.int64)

  names = (f"{theirs}es", f"{theirs}_idxs")
  return Rule((ours,), names, lambda table, _: (table,), save)


LAYOUTS = {"timm": timm, "official": official}


def attention_biases(
  model: efficientvit.EfficientViT,
  variables: Tensors,
  shapes: dict[str, tuple[int, ...]],
) -> Tensors:
  """Fits the tables of biases to the windows of the model's images.

  As Cream's code has it, for fine-tuning on larger images and for detection:
  bicubically, each head's table by itself.
  """
  del model
  resized = {}
  for path, table in variables.items():
    if path.endswith("/attention_biases") and path in shapes:
      old, new = (math.isqrt(n) for n in (table.shape[1], shapes[path][1]))
      grid = resize_cubic(table.T.reshape(old, old, -1), (new, new))
      resized[path] = grid.reshape(new**2, -1).T
  return variables | resized


RESIZE = {"attention_biases": attention_biases}
