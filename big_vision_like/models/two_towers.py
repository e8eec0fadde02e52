"""Two towers: images and texts embedded on one sphere, pairs near each other.

Papers: Radford et al. (CLIP, arXiv 2103.00020), Zhai et al. (SigLIP, arXiv
2303.15343), Dehghani et al. (NaViT, arXiv 2307.06304). Reference:
google-research/big_vision @ 0127fb6, `two_towers.py`. The loss is in
tasks/contrastive.py.
Parameters of SigLIP, with 32,000 words: B/16 at 224 pixels 203,155,970, L/16 at
256 pixels 652,150,786; SigLIP 2 B/16 NaFlex, with 256,000 words, 375,234,050.
Deviations: CLIP's bound of 100 on the temperature is not kept, as in SigLIP.
"""

import math
from collections.abc import Hashable, Mapping

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from big_vision_like import resolve


class TwoTowers(nn.Module):
  """An image tower and a text tower, by the names of their files in models/.

  Attributes:
    image: settings of the image tower, `name` among them: any model of images
      that returns `pooled`.
    text: settings of the text tower; its `name` is "text" unless given.
    vocab_size: tokens of the tokenizer.
    features: E, of both projections; or (image's, text's), None for none.
    temperature: where the learned factor of the logits starts. CLIP has 1/0.07,
      SigLIP 10.
    bias: where the learned bias of the logits starts, -10 for SigLIP; None:
      there is no bias, as for a softmax.
    dtype, attention, remat: of both towers, where they have such a setting;
      None: what the towers' own settings say.
  """

  image: Mapping[str, Hashable]
  text: Mapping[str, Hashable]
  vocab_size: int | None = None
  features: int | tuple[int | None, int | None] = 512
  temperature: float = 10.0
  bias: float | None = None
  dtype: str | None = None
  attention: str | None = None
  remat: str | None = None

  def __post_init__(self):
    for name in ("image", "text"):  # Models are hashable.
      settings = flax.core.FrozenDict(getattr(self, name))
      object.__setattr__(self, name, settings)
    if not isinstance(self.features, int):
      object.__setattr__(self, "features", tuple(self.features))
    super().__post_init__()

  @nn.compact
  def __call__(
    self,
    *,
    text: Int[Array, "b l"] | None = None,
    text_segment_ids: Int[Array, "b l"] | None = None,
    text_positions: Int[Array, "b l"] | None = None,
    train: bool,
    **inputs: Hashable | Array,
  ) -> dict[str, Array]:
    """Reads pairs, or one of a kind only.

    Args:
      text: tokens; None embeds images alone.
      text_segment_ids, text_positions: of packed texts.
      train: passed on to the towers.
      **inputs: those of the image tower, its compile-time keywords too; without
        its arrays, texts are embedded alone. Packed texts need `example_mask`,
        which says how many slots there are.

    Returns:
      zimg, ztxt float32 [B,E] or packed [B,M,E], of length 1, 0 in slots
      without an image or a text; scalars t and b of the logits.
    """
    outputs = {}
    if any(key in inputs for key in ("image", "patches")):
      pooled = self.make("image", name="img")(train=train, **inputs)["pooled"]
      present = inputs.get("example_mask")
      outputs["zimg"] = self.project(pooled, "image", "img_head", present)
    if text is not None:
      packed, present = {}, None
      if text_segment_ids is not None:
        slots = inputs["example_mask"].shape[1]
        packed = dict(
          segment_ids=text_segment_ids, positions=text_positions, slots=slots
        )
        ids = jnp.arange(1, slots + 1)[:, None]
        present = (text_segment_ids[:, None] == ids).any(-1)
      pooled = self.make("text", name="txt")(text, train=train, **packed)[
        "pooled"
      ]
      outputs["ztxt"] = self.project(pooled, "text", "txt_head", present)
    log = math.log(self.temperature)
    t = self.param("t", nn.initializers.constant(log), (), jnp.float32)
    outputs["t"] = jnp.exp(t)
    outputs["b"] = jnp.zeros(())
    if self.bias is not None:
      start = nn.initializers.constant(self.bias)
      outputs["b"] = self.param("b", start, (), jnp.float32)
    return outputs

  def make(self, kind, **extra):
    """The tower "image" or "text"."""
    settings = {"name": "text"} if kind == "text" else {}
    settings |= getattr(self, kind)
    if kind == "text" and self.vocab_size is not None:
      self.check_vocabulary()
      settings["vocab_size"] = self.vocab_size
    for key in ("dtype", "attention", "remat"):
      value = getattr(self, key)
      if value and resolve.takes("models", settings["name"], "Model", key):
        settings[key] = value
    section = f"config.model.{kind}"
    return resolve.make("models", "Model", section, settings, **extra)

  def check_vocabulary(self):
    own = self.text.get("vocab_size", self.vocab_size)
    if own != self.vocab_size:
      raise ValueError(
        f"config.model.text.vocab_size = {own}, but the tokenizer of "
        f"config.data.text has {self.vocab_size} tokens: it is not the one "
        "that the model, or its checkpoint, was made for."
      )

  def features_of(self, kind):
    """The width of the projection of "image" or "text"; None: there is none."""
    if isinstance(self.features, int):
      return self.features
    return self.features[("image", "text").index(kind)]

  def project(self, pooled, kind, name, present):
    """To the sphere, in float32; 0 where nothing is `present`."""
    features = self.features_of(kind)
    z = pooled.astype(jnp.float32)
    if features is not None:
      z = nn.Dense(features, dtype=jnp.float32, name=name)(z)
    z = normalise(z)
    return z if present is None else jnp.where(present[..., None], z, 0)


def normalise(x: Float[Array, "*n e"]) -> Float[Array, "*n e"]:
  """Vectors of length 1; 0 stays 0, with a finite gradient."""
  return x * jax.lax.rsqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-12))


Model = TwoTowers
