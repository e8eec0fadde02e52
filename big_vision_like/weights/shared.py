"""Names that several published models have in common.

Google's flax modules (vision_transformer @ c6de1e5, big_vision @ 0127fb6), and
the SigLIP models of transformers 5.23, vision and text.
"""

import dataclasses

import numpy as np

from big_vision_like.weights import engine
from big_vision_like.weights.engine import Rule

QKV = ("query", "key", "value")


def qkv(path: str) -> list[str]:
  """Our three projections of an attention."""
  return [f"{path}/{name}" for name in QKV]


def inside(rules: list[Rule], ours: str, theirs: str) -> list[Rule]:
  """The rules of a model that is a part `ours` of another.

  Args:
    rules: of the model alone.
    ours: name of the part, which stands behind the collection.
    theirs: prefix of their names.
  """

  def place(path):
    collection, rest = path.split("/", 1)
    return f"{collection}/{ours}/{rest}"

  return [
    dataclasses.replace(
      rule,
      ours=tuple(map(place, rule.ours)),
      theirs=tuple(f"{theirs}{name}" for name in rule.theirs),
    )
    for rule in rules
  ]


# Google's ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Counts:
  """The numbers that flax's modules have in the names of a block."""

  attention: int = 0
  ln2: int = 1
  mlp: int = 0


def google_encoder(
  prefix: str, depth: int, counts: Counts | None = None
) -> list[Rule]:
  """Our "encoder" as the module `prefix`."""
  counts = counts or Counts()
  rules = google_norm("encoder/norm", f"{prefix}/encoder_norm")
  for i in range(depth):
    ours, theirs = f"encoder/blocks_{i}", f"{prefix}/encoderblock_{i}"
    attention = f"{theirs}/MultiHeadDotProductAttention_{counts.attention}"
    rules += google_norm(f"{ours}/ln1", f"{theirs}/LayerNorm_0")
    for name in (*QKV, "out"):
      rules += google_dense(f"{ours}/attn/{name}", f"{attention}/{name}")
    rules += google_norm(f"{ours}/ln2", f"{theirs}/LayerNorm_{counts.ln2}")
    rules += _google_mlp(f"{ours}/mlp", f"{theirs}/MlpBlock_{counts.mlp}")
  return rules


def google_pool() -> list[Rule]:
  """Our "pool"."""
  theirs = "MAPHead_0"
  attention = f"{theirs}/MultiHeadDotProductAttention_0"
  rules = [engine.same("params/pool/probe", f"{theirs}/probe")]
  for name in (*QKV, "out"):
    rules += google_dense(f"pool/attn/{name}", f"{attention}/{name}")
  rules += google_norm("pool/ln", f"{theirs}/LayerNorm_0")
  return rules + _google_mlp("pool/mlp", f"{theirs}/MlpBlock_0")


def google_dense(ours: str, theirs: str) -> list[Rule]:
  """A dense layer; `ours` without the collection."""
  return [
    engine.same(f"params/{ours}/{x}", f"{theirs}/{x}")
    for x in ("kernel", "bias")
  ]


def google_norm(ours: str, theirs: str) -> list[Rule]:
  """A LayerNorm or GroupNorm; `ours` without the collection."""
  return [
    engine.same(f"params/{ours}/{x}", f"{theirs}/{x}")
    for x in ("scale", "bias")
  ]


def _google_mlp(ours, theirs):
  return [
    rule
    for i in (0, 1)
    for rule in google_dense(f"{ours}/fc{i + 1}", f"{theirs}/Dense_{i}")
  ]


def google_stacked(rules: list[Rule]) -> list[Rule]:
  """The same names where scanned layers are stored stacked.

  "encoderblock/x" [depth,...] in place of "encoderblock_0/x" and so on.
  """
  groups: dict[tuple[str, ...], list[Rule]] = {}
  for rule in rules:
    names = tuple(_without_number(name) for name in rule.theirs)
    groups.setdefault(names, []).append(rule)
  return [
    _stack(names, layers) if layers[0].theirs != names else layers[0]
    for names, layers in groups.items()
  ]


def _without_number(name):
  parts = name.split("/")
  layer = [part.startswith("encoderblock_") for part in parts]
  return "/".join("encoderblock" if x else p for p, x in zip(parts, layer))


def _stack(names, layers):
  width = len(layers[0].ours)

  def load(*arrays):
    for name, x in zip(names, arrays):
      if len(x) != len(layers):
        raise ValueError(
          f"{name} holds {len(x)} layers, and the model has {len(layers)}."
        )
    return tuple(
      ours
      for i, rule in enumerate(layers)
      for ours in rule.load(*(x[i] for x in arrays))
    )

  def save(*arrays):
    each = [
      rule.save(*arrays[i * width : (i + 1) * width])
      for i, rule in enumerate(layers)
    ]
    return tuple(map(np.stack, zip(*each)))

  ours = tuple(path for rule in layers for path in rule.ours)
  return Rule(ours, names, load, save)


# SigLIP in transformers -------------------------------------------------------


def siglip_encoder(depth: int, heads: int, norm: str) -> list[Rule]:
  """Our "encoder"; `norm` is the last LayerNorm."""
  rules = engine.norm("params/encoder/norm", norm)
  for i in range(depth):
    ours, theirs = f"params/encoder/blocks_{i}", f"encoder.layers.{i}"
    attn = f"{theirs}.self_attn"
    for path, letter in zip(qkv(f"{ours}/attn"), "qkv"):
      rules += engine.heads(path, f"{attn}.{letter}_proj", heads)
    rules += [
      *engine.heads_out(f"{ours}/attn/out", f"{attn}.out_proj", heads),
      *engine.norm(f"{ours}/ln1", f"{theirs}.layer_norm1"),
      *engine.norm(f"{ours}/ln2", f"{theirs}.layer_norm2"),
      *mlp(f"{ours}/mlp", f"{theirs}.mlp"),
    ]
  return rules


def siglip_pool(heads: int) -> list[Rule]:
  """Our "pool"."""
  ours, theirs = "params/pool", "head"
  return [
    engine.same(f"{ours}/probe", f"{theirs}.probe"),
    *torch_attention(f"{ours}/attn", f"{theirs}.attention", heads),
    *engine.norm(f"{ours}/ln", f"{theirs}.layernorm"),
    *mlp(f"{ours}/mlp", f"{theirs}.mlp"),
  ]


def torch_attention(ours: str, theirs: str, heads: int) -> list[Rule]:
  """torch's MultiheadAttention, which writes in_proj_weight."""
  fused = engine.fused_heads(qkv(ours), f"{theirs}.in_proj#", heads)
  return [
    *(
      dataclasses.replace(rule, theirs=(rule.theirs[0].replace("#.", "_"),))
      for rule in fused
    ),
    *engine.heads_out(f"{ours}/out", f"{theirs}.out_proj", heads),
  ]


def mlp(ours: str, theirs: str, names=("fc1", "fc2")) -> list[Rule]:
  """The two dense layers of an MLP."""
  return [
    rule
    for fc, name in zip(("fc1", "fc2"), names)
    for rule in engine.dense(f"{ours}/{fc}", f"{theirs}.{name}")
  ]


def row(ours: str, theirs: str) -> Rule:
  """Our [1,...] as their [...]."""
  return Rule((ours,), (theirs,), lambda x: (x[None],), lambda x: (x[0],))
