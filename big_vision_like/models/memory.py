"""Learnable memory: many tasks on one frozen ViT, which none of them changes.

Paper: Sandler et al., "Fine-tuning Image Transformers using Learnable Memory",
arXiv 2203.15243. No official code is public. layers/memory.py says how memory
enters the blocks and who looks at whom.
Parameters of a task on a backbone of depth L and width D, with m cells a layer
and C classes: L m D + D + (D + 1) C. On ViT-B/32 with 100 classes 77,668
without cells, and 86,884, 123,748, 169,828 and 261,988 with 1, 5, 10 and 20.
Deviations: none known from what the paper says. Where it is silent:
  - The class token of a task is the backbone's own plus what the task learns,
    which starts at 0, so that training starts from the backbone's solution.
    Backbones without one (pool "gap" or "map") leave it at N(0, 0.02).
  - A class token passes the backbone's last LayerNorm before its head, and no
    hidden layer (`rep_size`).
  - The backbone always computes as in evaluation, without dropout.
"""

import inspect
import re
from collections.abc import Hashable, Mapping, Sequence

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from big_vision_like import resolve
from big_vision_like.api import SCANNED, PyTree
from big_vision_like.models.layers import memory as memories
from big_vision_like.models.layers.blocks import Block
from big_vision_like.models.layers.encoder import stack_blocks

BACKBONE = "backbone"
TASKS = "tasks"
SETTINGS = ("cells", "num_classes", "extends")
# Of the paper, for cells (and here for the tokens that start from nothing).
_INIT = nn.initializers.normal(0.02)


class Task(nn.Module):
  """What a task adds: a class token, cells for each block, and a head."""

  depth: int
  width: int
  heads: int
  cells: int
  num_classes: int
  own_token: bool
  folded: bool
  head_zero_init: bool

  def setup(self):
    zeros = nn.initializers.zeros
    self.cls = self.param(
      "cls", zeros if self.own_token else _INIT, (self.width,)
    )
    if not self.cells:
      self.memory = None
    elif self.folded:
      shape = (self.depth, self.cells, self.heads, self.width // self.heads)
      self.memory = tuple(self.param(k, zeros, shape) for k in ("key", "value"))
    else:
      shape = (self.depth, self.cells, self.width)
      self.memory = self.param("memory", _INIT, shape)
    self.head = nn.Dense(
      self.num_classes,
      kernel_init=zeros
      if self.head_zero_init
      else nn.initializers.lecun_normal(),
      dtype=jnp.float32,
    )

  def __call__(self, token: Float[Array, "*b d"]) -> Float[Array, "*b c"]:
    """The logits of what the blocks made of the class token."""
    return self.head(token)


class Tasks(nn.Module):
  """The tasks around a backbone."""

  settings: Mapping[str, Mapping[str, Hashable]]  # of Task, by name
  sees: flax.core.FrozenDict
  place: str

  @nn.compact
  def __call__(self, backbone) -> dict[str, Array]:
    """The outputs of backbone(memory), and logits/NAME of each task."""
    tasks = {k: Task(**v, name=k) for k, v in self.settings.items()}
    memory = memories.Memory(
      tokens={k: task.cls for k, task in tasks.items()},
      cells={k: t.memory for k, t in tasks.items() if t.memory is not None},
      sees=self.sees,
      place=self.place,
    )
    outputs = backbone(memory)
    logits = {
      f"logits/{k}": task(outputs[f"token/{k}"]) for k, task in tasks.items()
    }
    return {**outputs, **logits}


class MemoryViT(nn.Module):
  """A ViT with tasks.

  All parameters of the ViT lie under "backbone", those of a task under
  "tasks/NAME": `cls`, `memory` and `head`. So config.optim.frozen =
  ("backbone/.*",) trains the tasks alone, and with the mask no gradient passes
  through the backbone at all.

  Attributes:
    backbone: settings of its model, as those of config.model.
    tasks: by name, `cells` a layer (0: a class token and a head), `num_classes`
      (without: those of the model) and `extends`, the names of tasks whose
      class token and cells it sees too. What these extend has to be there.
    task: the name whose answer is `logits`; None: the only task.
    num_classes: of the tasks that name no number themselves.
    mask: the tasks see the backbone's tokens and are not seen. Without, all
      tokens see all class tokens and cells; then those of the tasks stand in
      place of the backbone's own class token, unless it has a head.
    folded: cells are stored as the keys and values that they give, see `fold`.
    head_zero_init: start the heads' kernels at 0, as for fine-tuning.
    attention, dtype, remat: go before the backbone's.
  """

  backbone: Mapping[str, Hashable]
  tasks: Mapping[str, Mapping[str, Hashable]]
  task: str | None = None
  num_classes: int | None = None
  mask: bool = True
  folded: bool = False
  head_zero_init: bool = True
  attention: str | None = None
  dtype: str | None = None
  remat: str | None = None

  def __post_init__(self):
    for name in (BACKBONE, TASKS):  # Models are hashable.
      value = flax.core.freeze(dict(getattr(self, name)))
      object.__setattr__(self, name, value)
    check_tasks(self.tasks)
    super().__post_init__()

  @nn.compact
  def __call__(
    self, *, train: bool, task: str | None = None, **inputs: Array
  ) -> dict[str, Array]:
    """Reads what the backbone reads.

    Args:
      train: changes nothing.
      task: goes before the attribute, a compile-time constant; "backbone" asks
        for the backbone's own head.
      **inputs: of the backbone.

    Returns:
      What the backbone returns, its logits as logits/backbone; token/NAME and
      logits/NAME float32 of each task, 0 in image slots of packed rows that
      have no image; of the one that is asked for also as pooled and logits.
    """
    del train
    asked = self.asked(task)
    backbone = self.make_backbone(name=BACKBONE)
    outputs = dict(
      Tasks(self.task_settings(backbone), self.sees(), self.place, name=TASKS)(
        lambda memory: backbone(**inputs, memory=memory, train=False)
      )
    )
    if "logits" in outputs:
      outputs[f"logits/{BACKBONE}"] = outputs.pop("logits")
    for k, x in outputs.items():
      if "example_mask" in inputs and k.startswith(("token/", "logits/")):
        outputs[k] = jnp.where(inputs["example_mask"][..., None], x, 0)
    outputs["logits"] = outputs[f"logits/{asked}"]
    if asked != BACKBONE:
      outputs["pooled"] = outputs[f"token/{asked}"]
    return outputs

  @property
  def place(self) -> str:
    if self.mask:
      return "beside"
    return "among" if self.backbone.get("num_classes") else "instead"

  def asked(self, task: str | None = None) -> str:
    """The task whose answer is `logits`.

    Raises:
      ValueError: if it is not there.
    """
    known = list(self.tasks)
    if self.backbone.get("num_classes"):
      known.append(BACKBONE)
    task = task or self.task
    if task is None and len(self.tasks) == 1:
      return known[0]
    if task not in known:
      raise ValueError(
        f"The task {task!r} is asked for, and not loaded; there are: "
        f"{', '.join(known)}."
      )
    return task

  def sees(self) -> flax.core.FrozenDict:
    return flax.core.FrozenDict(
      {k: (k, *v.get("extends", ())) for k, v in self.tasks.items()}
    )

  def make_backbone(self, name: str | None = None) -> nn.Module:
    """The model of the backbone; without a name it is no part of this one.

    Raises:
      ValueError: if that kind of model takes no memory.
    """
    over = {k: getattr(self, k) for k in ("attention", "dtype", "remat")}
    settings = {**self.backbone, **{k: v for k, v in over.items() if v}}
    place = {"name": name} if name else {"parent": None}
    model = resolve.make(
      "models", "Model", "config.model.backbone", settings, **place
    )
    if "memory" not in inspect.signature(type(model).__call__).parameters:
      raise ValueError(
        f"config.model.backbone: {self.backbone['name']!r} takes no memory; "
        "vit, flexivit and navit do."
      )
    return model

  def task_settings(self, backbone: nn.Module) -> flax.core.FrozenDict:
    """The settings of each Task."""
    for name, task in self.tasks.items():
      if not (task.get("num_classes") or self.num_classes):
        raise ValueError(
          f"The task {name!r} has no number of classes: set num_classes of "
          f"config.model.tasks.{name}."
        )
    size = backbone.size
    common = dict(
      depth=size["depth"],
      width=size["width"],
      heads=size["heads"],
      own_token=getattr(backbone, "pool", "tok") == "tok",
      folded=self.folded,
      head_zero_init=self.head_zero_init,
    )
    return flax.core.freeze(
      {
        name: dict(
          common,
          cells=task.get("cells", 0),
          num_classes=task.get("num_classes") or self.num_classes,
        )
        for name, task in self.tasks.items()
      }
    )


def check_tasks(tasks: Mapping[str, Mapping[str, Hashable]]) -> None:
  """Refuses tasks that cannot be built, by name.

  Raises:
    ValueError: for names that cannot be, unknown settings, and extensions
      whose base is missing.
  """
  if not tasks:
    raise ValueError("config.model.tasks is empty: a memory needs a task.")
  for name, task in tasks.items():
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name == BACKBONE:
      raise ValueError(
        f"A task cannot be called {name!r}: a name has letters, digits, - and "
        f"_, and {BACKBONE!r} is the backbone's."
      )
    wrong = set(task) - set(SETTINGS)
    if wrong or task.get("cells", 0) < 0:
      raise ValueError(
        f"config.model.tasks.{name} = {dict(task)}: a task has "
        f"{', '.join(SETTINGS)}, and at least 0 cells."
      )
    for base in task.get("extends", ()):
      if base not in tasks or base == name:
        raise ValueError(
          f"The task {name!r} extends {base!r}, which is not loaded; there "
          f"are: {', '.join(tasks)}."
        )


def bases_first(extends: Mapping[str, Sequence[str]]) -> list[str]:
  """The names of tasks, each behind those that it extends."""
  order: list[str] = []

  def visit(name):
    for base in extends[name]:
      visit(base)
    if name not in order:
      order.append(name)

  for name in extends:
    visit(name)
  return order


def fold(model: MemoryViT, params: PyTree) -> tuple[MemoryViT, PyTree]:
  """The same model with the cells as constants: no image changes their keys.

  It computes the same without LayerNorm and projections of the cells, and
  cannot be trained further.
  """
  backbone = model.make_backbone()
  blocks = stack_blocks(params[BACKBONE]["encoder"])[SCANNED]
  block = Block(backbone.block_config, train=False)
  tasks = {}
  for name, task in params[TASKS].items():
    tasks[name] = {k: v for k, v in task.items() if k != "memory"}
    if "memory" in task:
      keys, values = jax.jit(
        lambda blocks, cells: memories.fold(block, blocks, cells)
      )(blocks, task["memory"])
      tasks[name] |= {"key": keys, "value": values}
  return model.clone(folded=True), {**params, TASKS: tasks}


Model = MemoryViT
