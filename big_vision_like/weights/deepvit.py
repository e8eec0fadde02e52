"""DeepViT's weights as zhoudaquan/dvit_repo @ 1ccb152 names them."""

from big_vision_like.models import deepvit
from big_vision_like.models.layers import variants
from big_vision_like.weights import engine, vit


def _official(model: deepvit.DeepViT) -> list[engine.Rule]:
  size = variants.sizes(model.variant, deepvit.VARIANTS, model.sizes)
  plain = size["depth"] - size["mixing"]
  rules = [
    engine.same("params/cls", "cls_token"),
    engine.same("params/pos_embed", "pos_embed"),
    *engine.conv("params/embed/proj", "patch_embed.proj"),
    *engine.norm("params/norm", "norm"),
  ]
  if size["stem"]:
    for i in (1, 2):
      conv = f"embed/conv{i}"
      rules += engine.conv(
        f"params/{conv}/conv", f"patch_embed.conv{i}", bias=False
      )
      rules += engine.batch_norm(f"{conv}/bn", f"patch_embed.bn{i}")
  for i in range(size["depth"]):
    ours = f"plain/blocks_{i}" if i < plain else f"mixing/blocks_{i - plain}"
    rules += _block(ours, f"blocks.{i}", size["heads"], mixing=i >= plain)
  if model.num_classes:
    rules += engine.dense("params/head", "head")
  return rules


def _block(ours, theirs, heads, *, mixing):
  attn, path = f"params/{ours}/attn", f"params/{ours}"
  qkv = [f"{attn}/{x}" for x in ("query", "key", "value")]
  rules = [
    *engine.norm(f"{path}/ln1", f"{theirs}.norm1"),
    *engine.norm(f"{path}/ln2", f"{theirs}.norm2"),
    *engine.fused_heads(qkv, f"{theirs}.attn.qkv", heads),
    *engine.heads_out(f"{attn}/out", f"{theirs}.attn.proj", heads),
    *engine.dense(f"{path}/fc1", f"{theirs}.mlp.fc1"),
    *engine.dense(f"{path}/fc2", f"{theirs}.mlp.fc2"),
  ]
  if mixing:
    matrix = f"{theirs}.attn.reatten_matrix"
    rules += [
      engine.Rule(
        (f"{attn}/mix/kernel",),
        (f"{matrix}.weight",),
        lambda x: (x[:, :, 0, 0].T,),
        lambda x: (x.T[:, :, None, None],),
      ),
      engine.same(f"{attn}/mix/bias", f"{matrix}.bias"),
      *engine.batch_norm(f"{ours}/attn/norm", f"{theirs}.attn.var_norm"),
    ]
  return rules


LAYOUTS = {"official": _official}
RESIZE = {"positions": vit.positions("corners")}


def _preprocess(model: deepvit.DeepViT) -> dict:
  """Of the 224 models; the one of L at 384 pixels crops nothing."""
  del model
  return dict(
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    size=deepvit.IMAGE_SIZE,
    crop_pct=0.9,
    interpolation="bicubic",
  )


PREPROCESS = {"official": _preprocess}
