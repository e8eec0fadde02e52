"""Text towers of SigLIP and SigLIP 2, without the projection behind them.

  hf           transformers' SiglipTextModel
  open_clip    open_clip's TextTransformer without a causal mask (timm's models
               on the hub), which its files have behind "text."
  big_vision   big_vision's text_transformer, with big_vision_stacked for layers
               in one array

The first two pool the last token. All have GELU's tanh approximation, but the
configs of open_clip for SigLIP 1 say the exact one by oversight.
"""

from big_vision_like.models import text
from big_vision_like.weights import engine, shared


def _hf(model: text.TextTransformer) -> list[engine.Rule]:
  size = text.row(model.variant, model.sizes)
  tables = {"embedding": "token", "pos_embed": "position"}
  return [
    *(
      engine.same(f"params/{ours}", f"embeddings.{theirs}_embedding.weight")
      for ours, theirs in tables.items()
    ),
    *shared.siglip_encoder(size["depth"], size["heads"], "final_layer_norm"),
  ]


def _open_clip(model: text.TextTransformer) -> list[engine.Rule]:
  size = text.row(model.variant, model.sizes)
  rules = [
    engine.same("params/embedding", "token_embedding.weight"),
    engine.same("params/pos_embed", "positional_embedding"),
    *engine.norm("params/encoder/norm", "ln_final"),
  ]
  for i in range(size["depth"]):
    ours, theirs = f"params/encoder/blocks_{i}", f"transformer.resblocks.{i}"
    attn = f"{theirs}.attn"
    rules += [
      *shared.torch_attention(f"{ours}/attn", attn, size["heads"]),
      *engine.norm(f"{ours}/ln1", f"{theirs}.ln_1"),
      *engine.norm(f"{ours}/ln2", f"{theirs}.ln_2"),
      *shared.mlp(f"{ours}/mlp", f"{theirs}.mlp", ("c_fc", "c_proj")),
    ]
  return rules


def _big_vision(model: text.TextTransformer) -> list[engine.Rule]:
  size = text.row(model.variant, model.sizes)
  rules = [
    engine.same("params/embedding", "Embed_0/embedding"),
    engine.Rule(
      ("params/pos_embed",),
      ("pos_embedding",),
      lambda x: (x[0],),
      lambda x: (x[None],),
    ),
    *shared.google_encoder("Encoder_0", size["depth"]),
  ]
  return rules + (shared.google_pool() if model.pool == "map" else [])


def _big_vision_stacked(model: text.TextTransformer) -> list[engine.Rule]:
  return shared.google_stacked(_big_vision(model))


LAYOUTS = {
  "hf": _hf,
  "open_clip": _open_clip,
  "big_vision": _big_vision,
  "big_vision_stacked": _big_vision_stacked,
}
