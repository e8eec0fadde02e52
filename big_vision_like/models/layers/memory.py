"""Learnable memory: what tasks add to the blocks of a frozen ViT.

Sandler et al., arXiv 2203.15243. In each block a task has cells, learned
tokens that join the others before the first LayerNorm and are keys and values
only: they never ask, and nothing of them leaves the block. A task also has a
class token of its own. Who may look at whom is table 1 of the paper:

  asks                      looks at
  the model's own tokens    themselves
  class token of a task     those, itself, its cells; with extension also the
                            class tokens and cells of the tasks it extends

Nothing is masked for that: each class token is handed the keys that it may
see. So the model's own tokens pass through the very products that they pass
through without tasks, and those of a task do not depend on what other tasks
are there. In the plain form of the paper the class tokens of tasks stand among
the others, and all look at all of them and at all cells.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from big_vision_like.api import PyTree

# Where the class tokens of tasks are:
#   beside   the other tokens, unseen by them (the paper's attention mask)
#   among    the other tokens: the plain form
#   instead  of the model's own class token: the plain form of a single task
PLACES = ("beside", "among", "instead")
# Keys and values [m,K,E], or by layer [depth,m,K,E].
Folded = tuple[Array, Array]


@flax.struct.dataclass
class Memory:
  """What tasks add, by the name of the task.

  Attributes:
    tokens: class tokens [D], as they are added to the model's own one; on
      their way through the blocks [B,S,D], S image slots of a packed row or 1.
    cells: [depth,m,D], or the keys and values that blocks make of them.
    sees: the tasks whose class token and cells a task's class token sees: its
      own, and those that it extends.
    place: one of PLACES.
  """

  tokens: Mapping[str, Array]
  cells: Mapping[str, Array | Folded]
  # Hashable, since jitted programs are cached by it.
  sees: flax.core.FrozenDict = flax.struct.field(pytree_node=False)
  place: str = flax.struct.field(pytree_node=False)

  @property
  def masked(self) -> bool:
    """Whether the model's own tokens see nothing of all this."""
    return self.place == "beside"

  def normalised(
    self, norm: Callable[[Array], Array], tokens: Mapping[str, Array]
  ) -> "Memory":
    """As attention reads it: `norm` of the class tokens and of the cells."""
    return self.replace(
      tokens={k: norm(t) for k, t in tokens.items()},
      cells={
        k: c if isinstance(c, tuple) else norm(c) for k, c in self.cells.items()
      },
    )


class Keys(NamedTuple):
  """Keys [B,S,K,E], values, and the image that each is of, if packed."""

  k: Array
  v: Array
  ids: Array | None


def enter(
  x: Float[Array, "b n d"], memory: Memory, *, own_token: bool
) -> tuple[Float[Array, "b t d"], Memory]:
  """Adds the class tokens of tasks to the tokens of images.

  A class token starts at the model's own one, position included, plus what the
  task has learned.

  Args:
    x: the model's tokens, its own class token first if it has one. For packed
      rows those that each image has besides its patches, [1,R,D].
    memory: with tokens [D].
    own_token: whether the model has a class token.

  Returns:
    The tokens, those of tasks first if they are among them, and the memory as
    blocks take it.
  """
  own = x[:, :1] if own_token else jnp.zeros((len(x), 1, x.shape[-1]), x.dtype)
  tokens = {k: own + t.astype(x.dtype) for k, t in memory.tokens.items()}
  if memory.masked:
    return x, memory.replace(tokens=tokens)
  x = x[:, 1:] if own_token and memory.place == "instead" else x
  x = jnp.concatenate([*tokens.values(), x], 1)
  return x, memory.replace(tokens={})


def in_slots(
  tokens: Mapping[str, Float[Array, "1 1 d"]], rows: int, slots: int, dtype: Any
) -> dict[str, Float[Array, "b m d"]]:
  """A copy of each class token for each image slot of packed rows."""
  return {
    k: jnp.tile(t.astype(dtype), (rows, slots, 1)) for k, t in tokens.items()
  }


def leave(
  x: Float[Array, "*b t d"],
  memory: Memory,
  beside: Mapping[str, Array],
  *,
  own_token: bool,
) -> tuple[Float[Array, "*b n d"], dict[str, Float[Array, "*b d"]]]:
  """The inverse of `enter`: the model's tokens, and one of each task.

  The last task's class token is left where the model's own one was, if it
  stood in its place.

  Args:
    x: what the blocks made of the tokens; packed, of those besides patches.
    memory, own_token: as they were given to `enter`.
    beside: what the blocks made of class tokens that were beside.
  """
  if memory.masked:
    tokens = {k: t.reshape(*x.shape[:-2], -1) for k, t in beside.items()}
  else:
    tokens = {k: x[..., i, :] for i, k in enumerate(memory.tokens)}
    left = own_token and memory.place == "instead"
    x = x[..., len(tokens) - left :, :]
  return x, {f"token/{k}": t for k, t in tokens.items()}


def of_layer(memory: Memory | None, layer: int) -> Memory | None:
  """The cells of one block."""
  return jax.tree.map(lambda x: x[layer], memory)


def attend(
  project: Callable[[str, Array], Array],
  attention: Callable[..., Array],
  own: Keys,
  query: Float[Array, "b l k e"],
  memory: Memory,
  *,
  backend: str,
  slots: int | None,
) -> tuple[Array, dict[str, Array], dict[str, Folded]]:
  """Attention of a block with memory, before the output projection.

  Args:
    project: (name, normalised tokens) to "query", "key" or "value".
    attention: (q, k, v, segment_ids=, kv_segment_ids=, backend=).
    own: keys of the model's tokens.
    query: their queries.
    memory: of this block, tokens and cells normalised.
    backend: of attention. One that is for self-attention only gives way to
      "auto" where there are more keys than queries.
    slots: image slots of a packed row, None if it is not packed.

  Returns:
    What the model's tokens read, what each class token reads, and the cells'
    keys and values.
  """
  folded = {
    name: cells
    if isinstance(cells, tuple)
    else (project("key", cells), project("value", cells))
    for name, cells in memory.cells.items()
  }
  batch = query.shape[0]
  cells = {k: _cell_keys(kv, batch, slots) for k, kv in folded.items()}

  def read(q, ids, *parts):
    k, v, kv_ids = _joined(parts)
    cross = q.shape[1] != k.shape[1] and backend not in ("xla", "blockwise")
    return attention(
      q,
      k,
      v,
      segment_ids=ids,
      kv_segment_ids=kv_ids,
      backend="auto" if cross else backend,
    )

  if not memory.masked:
    return read(query, own.ids, own, *cells.values()), {}, folded
  ids = _slot_ids(batch, slots, 1)
  tokens = {
    name: Keys(project("key", t), project("value", t), ids)
    for name, t in memory.tokens.items()
  }
  out = {}
  for name, t in memory.tokens.items():
    seen = [x[k] for k in memory.sees[name] for x in (tokens, cells) if k in x]
    out[name] = read(project("query", t), ids, own, *seen)
  return read(query, own.ids, own), out, folded


def _cell_keys(folded, batch, slots):
  """Each image of a packed row has a copy of the cells, under its id."""
  count = folded[0].shape[0]
  tile = lambda x: jnp.tile(x[None], (batch, slots or 1, 1, 1))
  return Keys(*map(tile, folded), _slot_ids(batch, slots, count))


def _slot_ids(
  batch: int, slots: int | None, repeats: int
) -> Int[Array, "b s"] | None:
  """1..slots, each so often, or as often in a row as there are copies."""
  if slots is None:
    return None
  ids = jnp.arange(1, slots + 1, dtype=jnp.int32)
  ids = jnp.repeat(ids, repeats)
  return jnp.broadcast_to(ids, (batch, len(ids)))


def _joined(parts):
  if len(parts) == 1:
    return parts[0]
  k, v, ids = zip(*parts)
  ids = None if ids[0] is None else jnp.concatenate(ids, 1)
  return jnp.concatenate(k, 1), jnp.concatenate(v, 1), ids


def fold(block: Callable[..., PyTree], params: PyTree, cells: Array) -> Folded:
  """The keys and values [depth,m,K,E] of cells [depth,m,D], constants.

  Args:
    block: a Block.
    params: of all blocks, stacked.
    cells: of one task.
  """

  def one(layer, cells):
    memory = Memory({}, {"": cells}, flax.core.FrozenDict(), "among")
    x = jnp.zeros((1, 1, cells.shape[-1]), cells.dtype)
    _, folded = block.apply({"params": layer}, (x, {}), memory=memory)
    return folded[""]

  return jax.vmap(one)(params, cells)
