"""Learnable memory on a frozen ViT, and its baselines (arXiv 2203.15243).

  python launch.py --config configs/vit_i1k.py --workdir runs/vit
  python launch.py --config configs/memory_transfer.py:run=runs/vit,data=DATA
    DATA = digit_scenes:plain/color: the colour of the digit, beside a ViT that
    knows its class, in a minute or two on two CPU cores. `python -m
    big_vision_like memory demo` compares all methods.
    DATA = folder:/path and runs/vit what `convert` makes of published weights:
    the paper's recipe.

Arguments:
  run      run folder of the backbone: a training, or what `convert` made. With
           extends= one that has these tasks: of a training, or what `python -m
           big_vision_like memory join` made.
  data     digit_scenes[:level[/target]], folder:PATH, tar:PATH or tfds:NAME.
  method   full, head, head_cls or memory: what is trained. All; the head; it
           and the class token; these and the cells.
  cells    a layer; the paper has 1, 2, 5, 10 and 20, and recommends 5.
  mask     1: the backbone's tokens do not see those of the task, so that none
           of its answers changes. 0: they do, the plain form of the paper.
  task     the name of the task; without, the target or the source of the data.
  extends  tasks that this one looks at, such as color+digit.
  steps    0: 20,000 of the paper.
  lr, batch, size: 0.03 and 512 without; of a fresh ViT, where there is no run.

Figures (Table 2, ViT-B/32 from ImageNet-21k): CIFAR-100 91.8 full, 85.8 head,
88.6 head and class token, 90.9 to 91.1 with 1 to 20 cells; Places-365 55.9,
50.9, 52.4, 53.3 to 54.1. Without the mask, the iNaturalist accuracy of 50.0
falls to 17.3 when three tasks are joined.
The paper has SGD with momentum, clipping, a warmup of 5 steps and 512 images a
step. It does not say learning rates, momentum, clip and decay: those here are
of ViT's fine-tuning (arXiv 2010.11929, B.1.1). With the mask and a frozen
backbone no gradient passes through the backbone, which saves two thirds of a
step.
"""

import re

from big_vision_like import record
from big_vision_like.data import sources
from configs import common

METHODS = ("full", "head", "head_cls", "memory")


def get_config(arg=None):
  a = common.arguments(
    arg,
    run="",
    data="digit_scenes:plain",
    method="memory",
    cells=5,
    mask=1,
    task="",
    extends="",
    steps=0,
    lr=0.0,
    batch=0,
    size="local",
  )
  if a.method not in METHODS:
    raise ValueError(
      f"configs/memory_transfer.py has no method={a.method}; it has: "
      f"{', '.join(METHODS)}."
    )
  c = common.base()
  with c.unlocked():
    c.data.source = sources.settings(a.data)
    c.task = dict(name="classification", loss_name="softmax", labels="label")
    common.start_from(c, a.run, a.size)
    _method(c, a)
    c.optim.name = "sgd"
    c.optim.lr = a.lr or 0.03
    c.optim.settings.momentum = 0.9
    c.optim.schedule = dict(name="cosine", warmup=5)
    local = c.data.source.name == "digit_scenes" and a.size == "local"
    c.batch_size = a.batch or (64 if local else 512)
    c.total_steps = a.steps or (400 if local else 20_000)
    c.log_every = 50 if local else 100
    _data(c, a, local)
    common.validate(c, limit=1000 if local else 50_000)
    _evaluate_as_the_run(c, a)
  return c.lock()


def _method(c, a):
  """The model, and what of it is frozen."""
  what = {
    "full": "all of it",
    "head": "a head",
    "head_cls": "a head and a class token",
    "memory": f"a head, a class token and {a.cells} cells a layer",
  }[a.method]
  c.notice = f"This trains {what} on {a.run or 'a fresh ViT'}, for {a.data}."
  if a.extends or c.model.name == "memory":
    return _extension(c, a)
  if a.method in ("full", "head"):
    c.optim.frozen = () if a.method == "full" else (r"(?!head/).*",)
    return
  cells = a.cells if a.method == "memory" else 0
  c.model = dict(
    name="memory",
    backbone=c.model.to_dict(),
    tasks={_name(c, a): dict(cells=cells)},
    task=_name(c, a),
    # A class token alone is trained in the place of the backbone's.
    mask=a.method == "memory" and bool(a.mask),
    attention="auto",
  )
  c.optim.frozen = ("backbone/.*",)
  if a.run:
    c.init_into = "backbone"


def _name(c, a):
  return a.task or c.data.source.get("target", c.data.source.name)


def _extension(c, a):
  """A task on top of others, which stay as they are."""
  if c.model.name != "memory" or not a.extends or a.method != "memory":
    raise ValueError(
      "configs/memory_transfer.py: method=memory with extends=TASK takes run= "
      "with a folder of tasks, and all else one without. Got "
      f"method={a.method}, extends={a.extends!r} and run={a.run!r}, a folder "
      f"of {c.model.name!r}."
    )
  if not c.model.mask:
    raise ValueError(
      f"The tasks of {a.run} were trained without the mask, so that another "
      "one would change what they answer: there is nothing to extend."
    )
  name, old = _name(c, a), c.model.tasks.to_dict()
  if name in old:
    raise ValueError(f"{a.run} has a task {name!r} already; give task=NAME.")
  stored = record.read_run(a.run)
  c.model.backbone = stored["config"]["model"]["backbone"]
  for task in old.values():  # The one that was trained there.
    task.setdefault("num_classes", len(stored["label_names"]))
  c.model.tasks = {
    **old,
    name: dict(cells=a.cells, extends=tuple(a.extends.split("+"))),
  }
  c.model.task = name
  c.optim.frozen = ("backbone/.*", *(f"tasks/{k}/.*" for k in old))
  c.init_skip = (f"tasks/{name}/.*",)


def _data(c, a, local):
  backbone = c.model.get("backbone", c.model)
  if backbone.name == "navit":  # Packed as it was, nothing dropped.
    stored = record.read_run(a.run)["config"]["data"]
    c.data.pack = stored["pack"]
    c.data.sizes = stored.get("sizes") or dict(kind="native")
    if local:
      c.batch_size = a.batch or 8
    return
  c.data.eval_ops = f"decode|resize({32 if local else 224})"
  if a.run:
    c.data.eval_ops = record.read_run(a.run)["config"]["data"]["eval_ops"]
  if local:
    c.data.ops = c.data.eval_ops
    return
  # Inception's, at the side that the backbone is evaluated at.
  side = re.findall(r"(?:resize|crop)\((\d+)", c.data.eval_ops)[-1]
  c.data.ops = f"decode|random_resized_crop({side}, scale=(0.05, 1.0))|flip_lr"
  c.data.workers = 8


def _evaluate_as_the_run(c, a):
  """Packed images are evaluated with as many tokens."""
  if c.data.pack is not None:
    evals = record.read_run(a.run)["config"].get("evals", {})
    tokens = evals.get("val", {}).get("data", {}).get("tokens")
    if tokens:
      c.evals.val.data.tokens = tokens
