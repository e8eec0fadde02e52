"""The vision towers of SigLIP 2 NaFlex, and timm's NaFlexViT.

Their code pads images to a common length, ours packs them. Layouts:

  timm              NaFlexViT without LayerScale: the SigLIP 2 models
  timm_layer_scale  with LayerScale: timm's own models. The scales multiply the
                    projections before them, and are written as 1.
  hf                transformers' Siglip2VisionModel. There is no classifier,
                    and with vision_use_head=False, which is any `pool` but
                    "map", no pooling.
  hf_two_towers     the same in files of a whole Siglip2Model, as Google has
                    published them; the text tower is left out
  big_vision        SigLIP 2 NaFlex's image tower in big_vision's files, and
                    big_vision_stacked with its layers in one array

All have biases everywhere, so the model needs bias=True. Names do not tell
naflexvit_base_patch16_par_gap from _gap: it needs keep_aspect=True. These of
timm's NaFlexViT are not read: naflexvit_so150m2_*, which have no biases in
queries, keys and values (and no published weights), and *_radio_*, which have
no last LayerNorm and resize their tables without antialias.
"""

import dataclasses
import functools

import numpy as np

from big_vision_like.models import navit
from big_vision_like.models.layers import variants
from big_vision_like.weights import engine, shared

_SIGLIP2 = dict(
  position="resized_bilinear", max_grid=16, bias=True, qk_norm=None
)
_GAP = dict(
  position="resized_bicubic",
  max_grid=16,
  bias=True,
  qk_norm=None,
  gelu="exact",
  registers=4,
  pool="gap",
  fc_norm=True,
)
# The keywords of navit.Model that published weights are for; what a layout
# alone says is that they are SigLIP 2's, or naflexvit_base_patch16_gap's.
SETTINGS = {
  "timm": _SIGLIP2,
  "timm_layer_scale": _GAP,
  "hf": _SIGLIP2,
  "hf_two_towers": _SIGLIP2,
  "big_vision": _SIGLIP2,
  "big_vision_stacked": _SIGLIP2,
}
PUBLISHED = {
  "google/siglip2-base-patch16-naflex": dict(variant="B/16", **_SIGLIP2),
  "google/siglip2-so400m-patch16-naflex": dict(variant="So400m/16", **_SIGLIP2),
  "naflexvit_base_patch16_siglip": dict(variant="B/16", **_SIGLIP2),
  "naflexvit_so400m_patch16_siglip": dict(variant="So400m/16", **_SIGLIP2),
  "naflexvit_base_patch16_gap": dict(variant="B/16", **_GAP),
  "naflexvit_base_patch16_par_gap": dict(
    variant="B/16", keep_aspect=True, **_GAP
  ),
  "naflexvit_base_patch16_parfac_gap": dict(
    variant="B/16",
    keep_aspect=True,
    **_GAP | dict(position="resized_factorised"),
  ),
}


def _timm(
  model: navit.NaViT, *, layer_scale: bool = False
) -> list[engine.Rule]:
  size = variants.sizes(model.variant, navit.VARIANTS, model.sizes)
  rules = [
    *engine.dense("params/embed", "embeds.proj"),
    *_timm_positions(model, size["width"]),
  ]
  if model.fc_norm:
    rules += engine.norm("params/fc_norm", "fc_norm")
  else:
    rules += engine.norm("params/encoder/norm", "norm")
  if model.pool == "tok":
    rules.append(engine.same("params/cls", "embeds.cls_token"))
  if model.registers:
    rules.append(engine.same("params/registers", "embeds.reg_token"))
  for i in range(size["depth"]):
    ours, theirs = f"params/encoder/blocks_{i}", f"blocks.{i}"
    rules += _timm_block(ours, theirs, size, layer_scale)
  if model.pool == "map":
    rules += _timm_pool("params/pool", "attn_pool", size["heads"])
  if model.num_classes:
    rules += engine.dense("params/head", "head")
  return rules


def _timm_positions(model, width):
  ours, theirs, side = "params/pos_embed", "embeds.pos_embed", model.max_grid
  if model.position == "resized_factorised":
    pairs = [("rows", f"{theirs}_y"), ("columns", f"{theirs}_x")]
    shape = (side, width)
  else:
    pairs, shape = [("table", theirs)], (side, side, width)
  return [
    engine.reshaped(f"{ours}/{table}", name, shape, (1, *shape))
    for table, name in pairs
  ]


def _timm_block(ours, theirs, size, layer_scale):
  attn, heads = f"{theirs}.attn", size["heads"]
  out = engine.heads_out(f"{ours}/attn/out", f"{attn}.proj", heads)
  fc2 = engine.dense(f"{ours}/mlp/fc2", f"{theirs}.mlp.fc2")
  if layer_scale:
    out = [_scaled(*out, f"{theirs}.ls1.gamma")]
    fc2 = [_scaled(*fc2, f"{theirs}.ls2.gamma")]
  return [
    *engine.norm(f"{ours}/ln1", f"{theirs}.norm1"),
    *engine.fused_heads(shared.qkv(f"{ours}/attn"), f"{attn}.qkv", heads),
    *out,
    *engine.norm(f"{ours}/ln2", f"{theirs}.norm2"),
    *engine.dense(f"{ours}/mlp/fc1", f"{theirs}.mlp.fc1"),
    *fc2,
  ]


def _scaled(kernel, bias, gamma):
  """One rule of a projection's two and of the LayerScale behind it."""

  def load(w, b, scale):  # The outputs are the last axis of both of ours.
    return kernel.load(w)[0] * scale, bias.load(b)[0] * scale

  def save(w, b):
    return *kernel.save(w), *bias.save(b), np.ones_like(b)

  names = (*kernel.theirs, *bias.theirs, gamma)
  return engine.Rule((*kernel.ours, *bias.ours), names, load, save)


def _timm_pool(ours, theirs, heads):
  query, *key_value = shared.qkv(f"{ours}/attn")
  return [
    engine.same(f"{ours}/probe", f"{theirs}.latent"),
    *engine.heads(query, f"{theirs}.q", heads),
    *engine.fused_heads(key_value, f"{theirs}.kv", heads),
    *engine.heads_out(f"{ours}/attn/out", f"{theirs}.proj", heads),
    *engine.norm(f"{ours}/ln", f"{theirs}.norm"),
    *shared.mlp(f"{ours}/mlp", f"{theirs}.mlp"),
  ]


def _hf_two_towers(model: navit.NaViT) -> list[engine.Rule]:
  return [
    dataclasses.replace(
      rule, theirs=tuple(f"vision_model.{k}" for k in rule.theirs)
    )
    for rule in _hf(model)
  ]


def _hf(model: navit.NaViT) -> list[engine.Rule]:
  size = variants.sizes(model.variant, navit.VARIANTS, model.sizes)
  side, width = model.max_grid, size["width"]
  rules = [
    *engine.dense("params/embed", "embeddings.patch_embedding"),
    engine.reshaped(
      "params/pos_embed/table",
      "embeddings.position_embedding.weight",
      (side, side, width),
      (side**2, width),
    ),
  ]
  rules += shared.siglip_encoder(size["depth"], size["heads"], "post_layernorm")
  if model.pool == "map":
    rules += shared.siglip_pool(size["heads"])
  return rules


def _big_vision(model: navit.NaViT) -> list[engine.Rule]:
  size = variants.sizes(model.variant, navit.VARIANTS, model.sizes)
  rules = shared.google_dense("embed", "embedding")
  rules.append(engine.same("params/pos_embed/table", "pos_embedding"))
  rules += shared.google_encoder("Transformer", size["depth"])
  return rules + (shared.google_pool() if model.pool == "map" else [])


def _big_vision_stacked(model: navit.NaViT) -> list[engine.Rule]:
  return shared.google_stacked(_big_vision(model))


LAYOUTS = {
  "timm": _timm,
  "timm_layer_scale": functools.partial(_timm, layer_scale=True),
  "hf": _hf,
  "hf_two_towers": _hf_two_towers,
  "big_vision": _big_vision,
  "big_vision_stacked": _big_vision_stacked,
}
OTHER_PARTS = {"hf_two_towers": r"text_model\..*|logit_scale|logit_bias"}
# Images keep their aspect ratio; `size` is the side of a square with as many
# patches. Crops there are none.
_COMMON = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), crop_pct=1.0)
_TIMM = dict(_COMMON, size=384, interpolation="bicubic")
_SIGLIP = dict(_COMMON, size=256, interpolation="bilinear")
PREPROCESS = {
  "timm": _TIMM,
  "timm_layer_scale": _TIMM,
  "hf": _SIGLIP,
  "hf_two_towers": _SIGLIP,
  "big_vision": _SIGLIP,
  "big_vision_stacked": _SIGLIP,
}
