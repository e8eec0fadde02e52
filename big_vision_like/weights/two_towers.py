"""SigLIP and SigLIP 2: both towers, the projection, temperature and bias.

  hf           transformers' SiglipModel, and its Siglip2Model (NaFlex)
  open_clip    what timm has on the hub for open_clip; fixed sizes
  big_vision   big_vision's .npz; big_vision_stacked: layers in one array

The image tower is models/vit.py for fixed sizes and models/navit.py for NaFlex.
PUBLISHED has the settings of models/two_towers.py for each published model,
PREPARED how its images and texts are prepared.
"""

from big_vision_like.models import two_towers
from big_vision_like.weights import engine, navit, shared

# By model: our layout of its tower for each layout of both.
_IMAGE_LAYOUTS = {
  "vit": dict(hf="siglip", open_clip="timm"),
  "navit": dict(hf="hf", open_clip="timm"),
}


def _both(
  model: two_towers.TwoTowers, layout: str, image: str, text: str, head: str
) -> list[engine.Rule]:
  """The rules of both towers and of the text's projection.

  Args:
    model: the two towers.
    layout: of both.
    image: prefix of the image tower's names.
    text: prefix of the text tower's.
    head: the projection's.
  """
  name = model.image["name"]
  known = _IMAGE_LAYOUTS.get(name)
  if known is None or model.features_of("image") is not None:
    raise ValueError(
      f"SigLIP's image tower is one of {', '.join(_IMAGE_LAYOUTS)} without a "
      f"projection, features=(None, E); this is {name!r} with "
      f"features={model.features}."
    )
  image_rules = engine.layouts(name)[known.get(layout, layout)]
  text_rules = engine.layouts("text")[layout]
  rules = [
    *shared.inside(image_rules(model.make("image", parent=None)), "img", image),
    *shared.inside(text_rules(model.make("text", parent=None)), "txt", text),
  ]
  if model.features_of("text") is None:
    return rules
  if layout in ("hf", "open_clip"):
    return rules + engine.dense("params/txt_head", head)
  return rules + shared.google_dense("txt_head", head)


def _scalars(model, t, b, shape):
  names = {"t": t} | ({"b": b} if model.bias is not None else {})
  return [
    engine.reshaped(f"params/{ours}", theirs, (), shape)
    for ours, theirs in names.items()
  ]


def _hf(model: two_towers.TwoTowers) -> list[engine.Rule]:
  rules = _both(model, "hf", "vision_model.", "text_model.", "text_model.head")
  return rules + _scalars(model, "logit_scale", "logit_bias", (1,))


def _open_clip(model: two_towers.TwoTowers) -> list[engine.Rule]:
  head = "text.text_projection"
  rules = _both(model, "open_clip", "visual.trunk.", "text.", head)
  return rules + _scalars(model, "logit_scale", "logit_bias", ())


def _big_vision(
  model: two_towers.TwoTowers, layout: str = "big_vision"
) -> list[engine.Rule]:
  places = ("img/", "txt/", "txt/head")
  rules = _both(model, layout, *places)
  return rules + _scalars(model, "t", "b", (1,))


def _big_vision_stacked(model: two_towers.TwoTowers) -> list[engine.Rule]:
  return _big_vision(model, "big_vision_stacked")


LAYOUTS = {
  "hf": _hf,
  "open_clip": _open_clip,
  "big_vision": _big_vision,
  "big_vision_stacked": _big_vision_stacked,
}


# What was published -----------------------------------------------------------

# Of a name: the sizes of the towers and the width of the embeddings.
_SIZES = {
  "base": ("B", "B", 768),
  "large": ("L", "L", 1024),
  "so400m": ("So400m", "So400m", 1152),
  "giant-opt": ("g-opt", "So400m", 1536),
}
_SIGLIP = (
  "base-patch16-224",
  "base-patch16-256",
  "base-patch16-384",
  "base-patch16-512",
  "large-patch16-256",
  "large-patch16-384",
  "so400m-patch14-224",
  "so400m-patch14-384",
)
_SIGLIP2 = (
  *_SIGLIP,
  "base-patch32-256",
  "large-patch16-512",
  "so400m-patch16-256",
  "so400m-patch16-384",
  "so400m-patch16-512",
  "giant-opt-patch16-256",
  "giant-opt-patch16-384",
)
_NAFLEX = ("base-patch16-naflex", "so400m-patch16-naflex")
_WORDS = {"siglip": 32_000, "siglip2": 256_000}


def _settings(family: str, name: str) -> dict:
  size, patch, pixels = name.rsplit("-", 2)
  image, text, width = _SIZES[size]
  variant = f"{image}/{patch.removeprefix('patch')}"
  tower = dict(name="vit", variant=variant, pool="map")
  if pixels == "naflex":
    tower = dict(name="navit", variant=variant, **navit.SETTINGS["hf"])
  return dict(
    image=tower,
    text=dict(variant=text, vocab_size=_WORDS[family]),
    features=(None, width),
    bias=-10.0,
  )


_NAMES = [
  *(("siglip", name) for name in _SIGLIP),
  *(("siglip2", name) for name in (*_SIGLIP2, *_NAFLEX)),
]
PUBLISHED = {
  f"google/{family}-{name}": _settings(family, name) for family, name in _NAMES
}


# How images and texts are prepared. Fixed images become square, whole; where
# the patches do not divide them, of the next smaller size that they divide.
_INPUT = dict(mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear")
_TEXT = {
  "siglip": dict(length=64, pad=1, clean="canonical"),
  "siglip2": dict(length=64, pad=0, clean="lower"),
}
_FIXED = dict(_INPUT, size=224, crop_pct=None)
PREPROCESS = {layout: _FIXED for layout in LAYOUTS}


def _prepared(family: str, name: str) -> dict:
  _, patch, pixels = name.rsplit("-", 2)
  side, text = int(patch.removeprefix("patch")), _TEXT[family]
  if pixels == "naflex":
    text = dict(text, row=16 * text["length"])
    return dict(_INPUT, size=256, crop_pct=1.0, text=text)
  size = int(pixels) // side * side
  return dict(_INPUT, size=size, crop_pct=None, text=text)


PREPARED = {
  f"google/{family}-{name}": _prepared(family, name) for family, name in _NAMES
}
