"""A stack of pre-norm blocks: scanned or unrolled, rematerialised or not."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from big_vision_like.api import INTERMEDIATES, SCANNED, PyTree
from big_vision_like.models.layers import memory as memories
from big_vision_like.models.layers.blocks import Block, BlockConfig, shard_batch

# What the backward pass finds saved; it recomputes the rest.
#   none   everything
#   names  queries, keys and values, attention's output, the MLP's hidden layer
#   dots   the results of all matrix products without a batch axis
#   full   the blocks' inputs
REMAT = {
  "none": None,
  "names": jax.checkpoint_policies.save_only_these_names(
    "qkv", "attn_out", "attn_lse", "mlp_h"
  ),
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "full": jax.checkpoint_policies.nothing_saveable,
}


class Encoder(nn.Module):
  """`depth` blocks and, if `norm`, a LayerNorm.

  Scanned, the parameters of all blocks lie stacked under "blocks" and compile
  once; unrolled, they lie under "blocks_0", "blocks_1" and so on, and XLA may
  optimise across layers. `stack_blocks` and `unstack_blocks` lead from one to
  the other.

  Attributes:
    depth: number of blocks.
    config: what the blocks are made of.
    stochastic_depth: rate at which the last block's branches are left out; it
      grows linearly from 0 at the first block. Drawn for each image, in packed
      rows too, and for each of the two branches.
    remat: one of REMAT.
    scan: scan over the blocks.
    norm: of the tokens, after the last block.
  """

  depth: int
  config: BlockConfig
  stochastic_depth: float = 0.0
  remat: str = "none"
  scan: bool = True
  norm: bool = True

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b l d"],
    *,
    train: bool,
    segment_ids: Int[Array, "b l"] | None = None,
    mask: Bool[Array, "#b #k #l #l"] | None = None,
    max_segments: int | None = None,
    memory: memories.Memory | None = None,
  ) -> Float[Array, "b l d"] | tuple[Float[Array, "b l d"], dict]:
    """Encodes tokens; `max_segments` is for attention's backends.

    With `memory` also the class tokens of its tasks, by name: they go through
    the same blocks and the same LayerNorm.
    """
    block = self.rematerialised()
    settings = dict(config=self.config, train=train, max_segments=max_segments)
    x, cells = shard_batch(x), None
    if memory is not None:
      cells = memory.replace(tokens={})
      x = x, dict(memory.tokens)
    rates = None
    if self.stochastic_depth:
      rates = jnp.linspace(0.0, self.stochastic_depth, self.depth)
    if self.scan:
      x, _ = nn.scan(
        block,
        variable_axes={"params": 0, INTERMEDIATES: 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, nn.broadcast, nn.broadcast, 0),
        length=self.depth,
      )(**settings, name=SCANNED)(x, rates, segment_ids, mask, cells)
    else:
      for i in range(self.depth):
        rate = None if rates is None else rates[i]
        name = f"{SCANNED}_{i}"
        x, _ = block(**settings, name=name)(
          x, rate, segment_ids, mask, memories.of_layer(cells, i)
        )
    norm = self.config.layer_norm("norm") if self.norm else lambda x: x
    if memory is None:
      return norm(x)
    x, tokens = x
    return norm(x), {k: norm(t) for k, t in tokens.items()}

  def rematerialised(self):
    if self.remat not in REMAT:
      raise ValueError(f"remat is {self.remat!r}; it is one of {list(REMAT)}.")
    if not 0 <= self.stochastic_depth < 1:
      raise ValueError(
        f"stochastic_depth is {self.stochastic_depth}; it is a rate in [0, 1)."
      )
    if self.remat == "none":
      return Block
    # A scan's body cannot be merged with its own recomputation anyway.
    return nn.remat(Block, policy=REMAT[self.remat], prevent_cse=not self.scan)


def stack_blocks(params: PyTree) -> PyTree:
  """Parameters for scan=True from an encoder's for scan=False.

  Works on any nested dict that holds "blocks_0", "blocks_1", ... somewhere.
  """
  if not isinstance(params, dict):
    return params
  prefix = f"{SCANNED}_"
  blocks = [key for key in params if key.startswith(prefix)]
  rest = {k: stack_blocks(v) for k, v in params.items() if k not in blocks}
  if not blocks:
    return rest
  layers = [params[f"{prefix}{i}"] for i in range(len(blocks))]
  return {SCANNED: jax.tree.map(lambda *x: jnp.stack(x), *layers), **rest}


def unstack_blocks(params: PyTree) -> PyTree:
  """The inverse of `stack_blocks`."""
  if not isinstance(params, dict):
    return params
  rest = {k: unstack_blocks(v) for k, v in params.items() if k != SCANNED}
  if SCANNED not in params:
    return rest
  depth = jax.tree.leaves(params[SCANNED])[0].shape[0]

  def layer(i):
    return jax.tree.map(lambda x: x[i], params[SCANNED])

  layers = {f"{SCANNED}_{i}": layer(i) for i in range(depth)}
  return {**layers, **rest}
