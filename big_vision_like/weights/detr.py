"""DETR's published weights, detection and panoptic.

  detr         the authors' .pth files (facebookresearch/detr @ 29901c5)
  hf           files of transformers' DetrForObjectDetection and, with a mask
               head, DetrForSegmentation; their backbone has timm's names
  hf_modules   the state_dict of the same models in transformers 5

PUBLISHED has the settings of models/detr.py for each published model. Classes
and queries of another number: RESIZE.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from big_vision_like.models import detr as models
from big_vision_like.weights import engine, resnet, shared
from big_vision_like.weights.engine import Rule, Tensors

Shapes = dict[str, tuple[int, ...]]
Resize = Callable[[models.DETR, Tensors, Shapes], Tensors]

# What each layout calls our parts. With a mask head, `prefix` stands before the
# names of the detector.
_MASK_HEAD = {
  **{f"conv{i}": f"lay{i}" for i in range(1, 6)},
  **{f"gn{i}": f"gn{i}" for i in range(1, 6)},
  **{f"adapter{i}": f"adapter{i}" for i in range(1, 4)},
  "out": "out_lay",
}
_DETR = dict(
  prefix="detr.",
  backbone="backbone.0.body.",
  input_proj="input_proj",
  queries="query_embed.weight",
  rows="backbone.1.row_embed.weight",
  columns="backbone.1.col_embed.weight",
  encoder="transformer.encoder.layers.{}",
  encoder_norm="transformer.encoder.norm",
  encoder_norms=("norm1", "norm2"),
  decoder="transformer.decoder.layers.{}",
  decoder_norm="transformer.decoder.norm",
  decoder_norms=("norm1", "norm2", "norm3"),
  attn="self_attn",
  self_attn="self_attn",
  cross_attn="multihead_attn",
  mlp=("linear1", "linear2"),
  class_head="class_embed",
  box="bbox_embed.layers.{}",
  mask_attn="bbox_attention.{}_linear",
  mask_head=_MASK_HEAD,
)
_HF = dict(
  prefix="detr.",
  backbone="model.backbone.conv_encoder.model.",
  input_proj="model.input_projection",
  queries="model.query_position_embeddings.weight",
  rows="model.position_embedding.row_embeddings.weight",
  columns="model.position_embedding.column_embeddings.weight",
  encoder="model.encoder.layers.{}",
  encoder_norms=("self_attn_layer_norm", "final_layer_norm"),
  decoder="model.decoder.layers.{}",
  decoder_norm="model.decoder.layernorm",
  decoder_norms=(
    "self_attn_layer_norm",
    "encoder_attn_layer_norm",
    "final_layer_norm",
  ),
  attn="self_attn",
  self_attn="self_attn",
  cross_attn="encoder_attn",
  out="out_proj",
  mlp=("fc1", "fc2"),
  class_head="class_labels_classifier",
  box="bbox_predictor.layers.{}",
  mask_attn="bbox_attention.{}_linear",
  mask_head=_MASK_HEAD,
)
_HF_MODULES = _HF | dict(
  backbone="model.backbone.model.",
  out="o_proj",
  mlp=("mlp.fc1", "mlp.fc2"),
  mask_attn="bbox_attention.{}_proj",
  mask_head={
    **{f"conv{i}": f"conv{i}.conv" for i in (1, 2)},
    **{f"gn{i}": f"conv{i}.norm" for i in (1, 2)},
    **{f"conv{i + 3}": f"fpn_stages.{i}.refine.conv" for i in range(3)},
    **{f"gn{i + 3}": f"fpn_stages.{i}.refine.norm" for i in range(3)},
    **{f"adapter{i + 1}": f"fpn_stages.{i}.fpn_adapter" for i in range(3)},
    "out": "output_conv",
  },
)


def detr(model: models.DETR) -> list[Rule]:
  """The authors' files."""
  return _rules(model, _DETR)


def hf(model: models.DETR) -> list[Rule]:
  """transformers' files."""
  return _rules(model, _HF)


def hf_modules(model: models.DETR) -> list[Rule]:
  """The modules of transformers 5."""
  return _rules(model, _HF_MODULES)


def _rules(model, names):
  name = model.backbone_settings["name"]
  if name != "resnet":
    raise ValueError(f"Published DETRs stand on resnet, and this on {name!r}.")
  backbone = model.make_backbone(parent=None)
  rules = [
    *shared.inside(resnet.frozen(backbone), "backbone", names["backbone"]),
    _one_by_one("params/input_proj", names["input_proj"]),
    engine.same("params/input_proj/bias", f"{names['input_proj']}.bias"),
    engine.same("params/query_embed", names["queries"]),
    *_layers(model, names),
  ]
  if model.position == "learned":
    for ours in ("rows", "columns"):
      rules.append(engine.same(f"params/position/{ours}", names[ours]))
  if model.num_classes:
    rules += engine.dense("params/class_head", names["class_head"])
  for i, ours in enumerate(("box_fc1", "box_fc2", "box_head")):
    rules += engine.dense(f"params/{ours}", names["box"].format(i))
  if not model.has_masks:
    return rules
  rules = [_prefixed(rule, names["prefix"]) for rule in rules]
  heads = model.size["heads"]
  for ours in ("query", "key"):
    theirs = names["mask_attn"].format(ours[0])
    rules += engine.heads(f"params/mask_attn/{ours}", theirs, heads)
  for ours, theirs in names["mask_head"].items():
    of = engine.norm if ours.startswith("gn") else engine.conv
    rules += of(f"params/mask_head/{ours}", f"mask_head.{theirs}")
  return rules


def _one_by_one(ours, theirs):
  """Our [in,out] as torch's 1 x 1 convolution."""
  return Rule(
    (f"{ours}/kernel",),
    (f"{theirs}.weight",),
    lambda x: (x[:, :, 0, 0].T,),
    lambda x: (x.T[:, :, None, None],),
  )


def _prefixed(rule, prefix):
  theirs = tuple(f"{prefix}{name}" for name in rule.theirs)
  return dataclasses.replace(rule, theirs=theirs)


def _layers(model, names):
  """The encoder, the decoder and their LayerNorms."""
  rules = engine.norm("params/decoder/norm", names["decoder_norm"])
  if model.pre_norm and "encoder_norm" in names:
    rules += engine.norm("params/encoder/norm", names["encoder_norm"])
  attentions = dict(encoder=("attn",), decoder=("self_attn", "cross_attn"))
  for stack, inside in attentions.items():
    for i in range(model.depth(stack)):
      ours, theirs = f"params/{stack}/blocks_{i}", names[stack].format(i)
      for attn in inside:
        there = f"{theirs}.{names[attn]}"
        rules += _attention(model, names, f"{ours}/{attn}", there)
      for j, norm in enumerate(names[f"{stack}_norms"]):
        rules += engine.norm(f"{ours}/ln{j + 1}", f"{theirs}.{norm}")
      rules += shared.mlp(f"{ours}/mlp", theirs, names["mlp"])
  return rules


def _attention(model, names, ours, theirs):
  heads = model.size["heads"]
  if "out" not in names:
    return shared.torch_attention(ours, theirs, heads)
  rules = engine.heads_out(f"{ours}/out", f"{theirs}.{names['out']}", heads)
  for path, letter in zip(shared.qkv(ours), "qkv"):
    rules += engine.heads(path, f"{theirs}.{letter}_proj", heads)
  return rules


LAYOUTS = {"detr": detr, "hf": hf, "hf_modules": hf_modules}
# Some files keep the counters of BatchNorms that were frozen.
OTHER_PARTS = dict.fromkeys(LAYOUTS, r".*\.num_batches_tracked")
# Of the outputs of a head, those that stand for no class.
CLASS_HEADS = {"params/class_head/bias": 1}
_IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
_COCO = dict(_IMAGENET, size=800, longest=1333)
PREPROCESS = {layout: _COCO for layout in LAYOUTS}
PUBLISHED = {
  f"facebook/detr-resnet-{name}": dict(variant=variant)
  for name, variant in (
    ("50", "R50"),
    ("50-dc5", "R50-DC5"),
    ("101", "R101"),
    ("101-dc5", "R101-DC5"),
    ("50-panoptic", "R50-panoptic"),
    ("50-dc5-panoptic", "R50-DC5-panoptic"),
    ("101-panoptic", "R101-panoptic"),
  )
}


# Of COCO's panoptic classes by their ids, for heads of so many.
IS_THING = {250: tuple(i <= 90 for i in range(250))}


# Differences of shape ---------------------------------------------------------


def classes(model: models.DETR, variables: Tensors, shapes: Shapes) -> Tensors:
  """The head for another number of classes: the first of them stay.

  No object stays the last; classes that the file lacks start as fresh ones do,
  drawn from a fixed seed.
  """
  del model
  path = "params/class_head/{}".format
  count = shapes[path("bias")][0]
  kernel, bias = variables[path("kernel")], variables[path("bias")]
  rng, bound = np.random.default_rng(0), len(kernel) ** -0.5

  def fitted(x):
    kept, none = x[..., :-1][..., : count - 1], x[..., -1:]
    more = (*x.shape[:-1], count - 1 - kept.shape[-1])
    fresh = rng.uniform(-bound, bound, more).astype(x.dtype)
    return np.concatenate([kept, fresh, none], -1)

  return variables | {
    path("kernel"): fitted(kernel),
    path("bias"): fitted(bias),
  }


def queries(model: models.DETR, variables: Tensors, shapes: Shapes) -> Tensors:
  """Another number of queries: the first stay, more start as fresh ones do."""
  del model
  path = "params/query_embed"
  table, count = variables[path], shapes[path][0]
  more = (max(count - len(table), 0), table.shape[1])
  fresh = np.random.default_rng(0).normal(size=more).astype(table.dtype)
  table = np.concatenate([table[:count], fresh])
  return variables | {path: table}


RESIZE: dict[str, Resize] = {
  "classes": classes,
  "queries": queries,
  "frozen": resnet.frozen_norms,
}
