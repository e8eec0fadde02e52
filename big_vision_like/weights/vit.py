"""Published names of ViT's weights: Google's, timm's and transformers'.

Source: google-research/vision_transformer @ c6de1e5, google-research/big_vision
@ 0127fb6, timm 1.0.31, transformers 5.23. Google's models have GELU's tanh
approximation (`gelu="tanh"`); those that timm and transformers trained have the
exact one. transformers has a LayerNorm epsilon of 1e-12.
"""

from collections.abc import Callable

import numpy as np

from big_vision_like.models import vit
from big_vision_like.models.layers import position_table
from big_vision_like.models.layers.resize import pi_resize
from big_vision_like.weights import engine, shared
from big_vision_like.weights.engine import Rule, Tensors

_INPUT = dict(mean=(0.5,) * 3, std=(0.5,) * 3, size=vit.IMAGE_SIZE)
# The whole image becomes square; nothing is cropped.
_SQUASH = dict(_INPUT, crop_pct=None, interpolation="bilinear")
PREPROCESS = {
  "google": _SQUASH,
  "linen": _SQUASH,
  "big_vision": _SQUASH,
  "big_vision_stacked": _SQUASH,
  "timm": dict(_INPUT, crop_pct=0.9, interpolation="bicubic"),
  "hf": _SQUASH,
  "hf_modules": _SQUASH,
  "siglip": _SQUASH,
}
# What the model has to be besides its variant.
_TRANSFORMERS = dict(gelu="exact", ln_eps=1e-12)
SETTINGS = {
  "timm": dict(gelu="exact"),
  "hf": _TRANSFORMERS,
  "hf_modules": _TRANSFORMERS,
}
# Where positions lie in all of Google's files but big_vision's.
_POSITIONS = "Transformer/posembed_input/pos_embedding"


# Google's ---------------------------------------------------------------------


def google(model: vit.ViT) -> list[Rule]:
  """The .npz files of the ViT and AugReg papers, hybrids included.

  Modules are counted together ("MlpBlock_3"), and GroupNorm's vectors are
  [1,1,1,C], as before flax's linen.
  """
  counts = shared.Counts(attention=1, ln2=2, mlp=3)
  return _flax(model, counts, group_norm=_padded)


def linen(model: vit.ViT) -> list[Rule]:
  """The same model saved by today's vision_transformer code."""
  return _flax(model, shared.Counts(), group_norm=shared.google_norm)


def big_vision(model: vit.ViT) -> list[Rule]:
  """big_vision's.

  Its class token has no position: ours is 0 then, and what is not 0 at export
  goes into the token.
  """
  return _flax(
    model,
    shared.Counts(),
    group_norm=shared.google_norm,
    positions="pos_embedding",
  )


def big_vision_stacked(model: vit.ViT) -> list[Rule]:
  """The same where big_vision scanned the layers."""
  return shared.google_stacked(big_vision(model))


def _flax(model, counts, group_norm, positions=_POSITIONS):
  size = vit.row(model.variant, model.sizes)
  rules = _hybrid_of_google(size.get("stages"), group_norm)
  rules += shared.google_dense("embed", "embedding")
  rules += _tokens_of_google(model, positions)
  rules += shared.google_encoder("Transformer", size["depth"], counts)
  if model.pool == "map":
    rules += shared.google_pool()
  for name in _dense_layers(model):
    rules += shared.google_dense(name, name)
  return rules


def _tokens_of_google(model, theirs):
  token, table = model.pool == "tok", model.position == "learn"
  positions = "params/pos_embed", theirs
  if token and table and theirs != _POSITIONS:

    def load(cls, pos):
      return cls, np.pad(pos, ((0, 0), (1, 0), (0, 0)))

    def save(cls, pos):
      return cls + pos[:, :1], pos[:, 1:]

    return [
      Rule(("params/cls", positions[0]), ("cls", positions[1]), load, save)
    ]
  rules = [engine.same("params/cls", "cls")] if token else []
  return rules + ([engine.same(*positions)] if table else [])


def _hybrid_of_google(stages, norm):
  if stages is None:
    return []
  rules = [
    engine.same("params/resnet/stem_conv/kernel", "conv_root/kernel"),
    *norm("resnet/stem_gn", "gn_root"),
  ]
  for ours, theirs, first in _units(stages, "block{}/unit{}/", 1):
    for i in ("1", "2", "3", *(("_proj",) if first else ())):
      name = "proj" if i == "_proj" else f"conv{i}"
      kernel = f"params/{ours}/{name}_conv/kernel"
      rules.append(engine.same(kernel, f"{theirs}conv{i}/kernel"))
      rules += norm(f"{ours}/{name}_gn", f"{theirs}gn{i}")
  return rules


def _units(stages, name, start):
  """Our path, theirs, and whether it is a stage's first, of each block."""
  for s, depth in enumerate(stages):
    for b in range(depth):
      yield (
        f"resnet/stage{s}_block{b}",
        name.format(s + start, b + start),
        not b,
      )


def _padded(ours, theirs):
  def squeeze(x):
    return (x.reshape(-1),)

  def pad(x):
    return (x.reshape(1, 1, 1, -1),)

  return [
    Rule((f"params/{ours}/{x}",), (f"{theirs}/{x}",), squeeze, pad)
    for x in ("scale", "bias")
  ]


# torch's ----------------------------------------------------------------------


def timm(model: vit.ViT) -> list[Rule]:
  """`vit_*` of timm, hybrids `vit_*_r*` included.

  With `pool="gap"` those with a norm before the mean (`fc_norm=False`). The
  hidden layer of the head has the name of timm's earlier versions.
  """
  size = vit.row(model.variant, model.sizes)
  heads = size["heads"]
  rules = _hybrid_of_timm(size.get("stages"))
  rules += engine.conv("params/embed", "patch_embed.proj")
  rules += _tokens(model, "cls_token", "pos_embed")
  for i in range(size["depth"]):
    ours, theirs = f"params/encoder/blocks_{i}", f"blocks.{i}"
    rules += engine.norm(f"{ours}/ln1", f"{theirs}.norm1")
    rules += engine.fused_heads(
      shared.qkv(f"{ours}/attn"), f"{theirs}.attn.qkv", heads
    )
    rules += engine.heads_out(f"{ours}/attn/out", f"{theirs}.attn.proj", heads)
    rules += engine.norm(f"{ours}/ln2", f"{theirs}.norm2")
    rules += shared.mlp(f"{ours}/mlp", f"{theirs}.mlp")
  rules += engine.norm("params/encoder/norm", "norm")
  if model.pool == "map":
    ours, theirs = "params/pool", "attn_pool"
    rules.append(engine.same(f"{ours}/probe", f"{theirs}.latent"))
    rules += engine.heads(f"{ours}/attn/query", f"{theirs}.q", heads)
    rules += engine.fused_heads(
      [f"{ours}/attn/{x}" for x in ("key", "value")], f"{theirs}.kv", heads
    )
    rules += engine.heads_out(f"{ours}/attn/out", f"{theirs}.proj", heads)
    rules += engine.norm(f"{ours}/ln", f"{theirs}.norm")
    rules += shared.mlp(f"{ours}/mlp", f"{theirs}.mlp")
  return rules + _head(model, pre_logits="pre_logits.fc", head="head")


def _hybrid_of_timm(stages):
  if stages is None:
    return []
  base = "patch_embed.backbone"

  def conv_gn(ours, conv, norm):
    return [
      *engine.conv(f"params/{ours}_conv", f"{base}.{conv}", bias=False),
      *engine.norm(f"params/{ours}_gn", f"{base}.{norm}"),
    ]

  stem = "stem." if stages else ""
  rules = conv_gn("resnet/stem", f"{stem}conv", f"{stem}norm")
  for ours, theirs, first in _units(stages, "stages.{}.blocks.{}", 0):
    for i in (1, 2, 3):
      rules += conv_gn(
        f"{ours}/conv{i}", f"{theirs}.conv{i}", f"{theirs}.norm{i}"
      )
    if first:
      proj = f"{theirs}.downsample"
      rules += conv_gn(f"{ours}/proj", f"{proj}.conv", f"{proj}.norm")
  return rules


# What transformers calls the parts of a layer, in files and, from version 5 on,
# as modules.
_HF_FILES = dict(
  layer="vit.encoder.layer.{}",
  query="attention.attention.query",
  key="attention.attention.key",
  value="attention.attention.value",
  out="attention.output.dense",
  fc1="intermediate.dense",
  fc2="output.dense",
)
_HF_MODULES = dict(
  layer="vit.layers.{}",
  query="attention.q_proj",
  key="attention.k_proj",
  value="attention.v_proj",
  out="attention.o_proj",
  fc1="mlp.fc1",
  fc2="mlp.fc2",
)


def hf(model: vit.ViT) -> list[Rule]:
  """Files of transformers' ViTForImageClassification, with a class token."""
  return _hf(model, _HF_FILES)


def hf_modules(model: vit.ViT) -> list[Rule]:
  """The state_dict of the same model in transformers 5."""
  return _hf(model, _HF_MODULES)


def _hf(model, names):
  size = vit.row(model.variant, model.sizes)
  heads, embeddings = size["heads"], "vit.embeddings"
  rules = engine.conv(
    "params/embed", f"{embeddings}.patch_embeddings.projection"
  )
  rules += _tokens(
    model, f"{embeddings}.cls_token", f"{embeddings}.position_embeddings"
  )
  for i in range(size["depth"]):
    ours, theirs = f"params/encoder/blocks_{i}", names["layer"].format(i)
    rules += engine.norm(f"{ours}/ln1", f"{theirs}.layernorm_before")
    for name in shared.QKV:
      rules += engine.heads(
        f"{ours}/attn/{name}", f"{theirs}.{names[name]}", heads
      )
    rules += engine.heads_out(
      f"{ours}/attn/out", f"{theirs}.{names['out']}", heads
    )
    rules += engine.norm(f"{ours}/ln2", f"{theirs}.layernorm_after")
    for fc in ("fc1", "fc2"):
      rules += engine.dense(f"{ours}/mlp/{fc}", f"{theirs}.{names[fc]}")
  rules += engine.norm("params/encoder/norm", "vit.layernorm")
  return rules + _head(model, pre_logits="vit.pooler.dense", head="classifier")


def siglip(model: vit.ViT) -> list[Rule]:
  """transformers' SiglipVisionModel, which has `pool="map"` and no head."""
  size = vit.row(model.variant, model.sizes)
  positions = "embeddings.position_embedding.weight"
  return [
    *engine.conv("params/embed", "embeddings.patch_embedding"),
    shared.row("params/pos_embed", positions),
    *shared.siglip_encoder(size["depth"], size["heads"], "post_layernorm"),
    *shared.siglip_pool(size["heads"]),
  ]


def _tokens(model, cls, positions):
  rules = []
  if model.pool == "tok":
    rules.append(engine.same("params/cls", cls))
  if model.position == "learn":
    rules.append(engine.same("params/pos_embed", positions))
  return rules


def _head(model, **names):
  return [
    rule
    for name in _dense_layers(model)
    for rule in engine.dense(f"params/{name}", names[name])
  ]


def _dense_layers(model):
  """What is behind the pooling."""
  layers = ["pre_logits"] if model.rep_size else []
  return layers + (["head"] if model.num_classes else [])


LAYOUTS = {
  "google": google,
  "linen": linen,
  "big_vision": big_vision,
  "big_vision_stacked": big_vision_stacked,
  "timm": timm,
  "hf": hf,
  "hf_modules": hf_modules,
  "siglip": siglip,
}


# Differences of shape ---------------------------------------------------------

Shapes = dict[str, tuple[int, ...]]
Resize = Callable[[vit.ViT, Tensors, Shapes], Tensors]


def positions(kind: str) -> Resize:
  """Fits the table of positions to the model's grid; both are square."""

  def resize(model, variables, shapes):
    path = "params/pos_embed"
    if path not in variables or variables[path].shape == shapes[path]:
      return variables
    del model
    prefix = int("params/cls" in variables)
    size = position_table.square(shapes[path][1] - prefix)
    table = position_table.resize_positions(
      variables[path], size, kind=kind, prefix=prefix
    )
    return variables | {path: table}

  return resize


def patch(model: vit.ViT, variables: Tensors, shapes: Shapes) -> Tensors:
  """Fits the kernel of the patches, by FlexiViT's rule."""
  del model
  path = "params/embed/kernel"
  kernel = pi_resize(variables[path], shapes[path][:2])
  return variables | {path: kernel}


def head(model: vit.ViT, variables: Tensors, shapes: Shapes) -> Tensors:
  """Drops a head for other classes: the model keeps its fresh one."""
  del model
  theirs = {k: x for k, x in variables.items() if k.startswith("params/head/")}
  if all(x.shape == shapes.get(k) for k, x in theirs.items()):
    return variables
  return {k: x for k, x in variables.items() if k not in theirs}


# "positions" is for Google's files and what was made of them.
RESIZE: dict[str, Resize] = {
  "positions": positions("corners"),
  "positions_antialias": positions("antialias"),
  "patch": patch,
  "head": head,
}
