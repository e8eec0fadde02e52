"""Speed against the share of attention layers, as EfficientViT argues.

Liu et al., arXiv 2305.07027, section 2.1: blocks have as many attention layers
as FFNs, and most of what attention does is bound by memory, so that fewer of
them make a network of the same products faster. The table has networks of one
width and one count of layers, or of nearly the same multiply-adds, whose share
of attention layers differs. It says nothing about accuracy: the paper's best
small networks have 20 to 40 %.
"""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax

from big_vision_like import flops
from big_vision_like.benchmarks import measure
from big_vision_like.models.layers.blocks import (
  MLP,
  BlockConfig,
  MultiHeadAttention,
)

SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
USUAL = 0.5


class Stack(nn.Module):
  """Residual layers with LayerNorms, attention spread evenly among FFNs."""

  config: BlockConfig
  attention: int
  ffn: int

  @nn.compact
  def __call__(self, x):
    total = self.attention + self.ffn
    for i in range(total):
      y = self.config.layer_norm(f"ln_{i}")(x)
      before, after = (j * self.attention // total for j in (i, i + 1))
      if after > before:
        y = MultiHeadAttention(self.config, name=f"attn_{i}")(y)
      else:
        y = MLP(self.config, name=f"mlp_{i}")(y, train=False)
      x = x + y
    return x


def run(
  *,
  shares: Sequence[float] = SHARES,
  layers: int = 24,
  width: int = 192,
  heads: int = 3,
  tokens: int = 196,
  batch: int = 16,
  repeats: int = 7,
) -> str:
  """The table; the defaults are the widths of DeiT-Ti and ViT-Ti/16.

  Args:
    shares: of attention layers; 0.5, that of ViT, is always among them.
    layers: in all, at a share of 0.5.
    width: of the network; the FFNs are 4 times as wide.
    heads: of attention.
    tokens: of an image.
    batch: images.
    repeats: interleaved rounds.
  """
  config = BlockConfig(heads=heads, mlp=4 * width)
  x = jax.random.normal(jax.random.key(0), (batch, tokens, width))
  unit = {
    kind: _products(Stack(config, *counts), x)
    for kind, counts in (("attention", (1, 0)), ("ffn", (0, 1)))
  }
  budget = layers / 2 * sum(unit.values())
  stacks, calls = {}, {}
  for share in sorted({*shares, USUAL}):
    mean = share * unit["attention"] + (1 - share) * unit["ffn"]
    for law, count in (("layers", layers), ("products", budget / mean)):
      attention = round(share * count)
      stack = Stack(config, attention, round(count) - attention)
      stacks[law, share] = stack
      calls[law, share] = _call(stack, x)
  times = measure.interleaved(calls, repeats=repeats)
  rows = [
    _row(stack, law, share, times, _products(stack, x), batch)
    for (law, share), stack in sorted(stacks.items(), key=lambda x: x[0])
  ]
  note = (
    f"Width {width}, {heads} heads, {tokens} tokens, batches of {batch}, "
    f"float32, on {jax.device_count()} x {jax.devices()[0].device_kind}. "
    f"`speed` is that of a network with {USUAL:.0%} attention layers, as ViT "
    "has, in the same round; `equal` is what networks are equal in."
  )
  return measure.table("Share of attention layers against speed", rows, note)


def _row(stack, law, share, times, products, batch):
  seconds = times.median((law, share))
  return {
    "equal": law,
    "attention": f"{share:.0%}",
    "layers": f"{stack.attention} + {stack.ffn} FFN",
    "multiply-adds": f"{products / batch / 1e9:.3f} G",
    "images/s": batch / seconds,
    "G multiply-adds/s": products / seconds / 1e9,
    "speed": times.ratio((law, USUAL), (law, share)),
  }


def _products(stack: Stack, x: jax.Array) -> float:
  """Multiply-adds of a call, with all scores of attention."""
  plain = stack.clone(
    config=BlockConfig(
      heads=stack.config.heads, mlp=stack.config.mlp, attention="xla"
    )
  )
  variables = jax.eval_shape(plain.init, jax.random.key(0), x)
  return flops.count_flops(plain.apply, variables, x) / 2


def _call(stack: Stack, x: jax.Array) -> Callable[[], object]:
  variables = jax.jit(stack.init)(jax.random.key(1), x)
  apply = jax.jit(stack.apply)
  return lambda: jax.block_until_ready(apply(variables, x))
