"""Every key that a run reads, with its default; and the argument language.

A config file starts from `base()`, fills in its recipe and returns the locked
result, so that a typo in a config or on the command line fails with the
nearest real key.
"""

import difflib

import ml_collections
from ml_collections import ConfigDict

from big_vision_like import record


def base() -> ConfigDict:
  """The defaults. Sections named `dict()` take the settings of a plug-in."""
  c = ConfigDict()
  # Printed before anything else: what a user should know about this run.
  c.notice = ""
  c.seed = 0
  # Steps, and rows (packed) or images (stacked) in the global batch of each.
  c.total_steps = ml_collections.config_dict.placeholder(int)
  c.batch_size = ml_collections.config_dict.placeholder(int)
  # Micro-batches that one step is cut into; the update stays the same.
  c.accum_steps = 1
  # Decay of the moving average of parameters and running statistics; 0 keeps
  # none. Evaluation uses the average where there is one.
  c.ema_decay = 0.0

  # name = file in models/, and what its `Model` takes.
  c.model = ConfigDict()
  # What to start from: a run folder, a checkpoint, a file of published weights
  # (.safetensors, .npz, .pth) or "hf://org/name"; regexes of the parameters
  # that stay freshly initialised; what may be resized to fit, such as
  # ("positions",); and the part of the model that is meant, such as "backbone":
  # its settings are those of config.model.backbone.
  c.init_from = ""
  c.init_skip = ()
  c.init_resize = ()
  c.init_into = ""
  # Collection of variables -> run folder to fill it from: dict(teacher=...).
  c.init_collections = ConfigDict()
  # Model keyword -> choices, one drawn at each step (one compile each).
  c.static = ConfigDict()
  # name = file in tasks/, and what its `Task` takes.
  c.task = ConfigDict()

  c.data = ConfigDict()
  # name = file in data/sources/, and what its `Source` takes.
  c.data.source = ConfigDict()
  c.data.split = "train"
  # Before packing or stacking, in training and in evaluation.
  c.data.ops = "decode"
  c.data.eval_ops = "decode"
  # Packed rows: length, patch, max_images, what else PackSpec takes, and
  # optionally mode="stream" with open_rows. None stacks images of one size.
  c.data.pack = None
  # Law of resolutions and law of token dropping, for packed training.
  c.data.sizes = None
  c.data.drop = None
  # For stacked training: (height, width, images in the global batch) triples,
  # one drawn at each step (one compile each); data.ops then say {h} and {w}.
  # data.multi_scale.scales makes those of MobileViT. None: one size.
  c.data.scales = None
  # Repeated augmentation, for stacked training: an image comes so often in a
  # row, each time augmented anew.
  c.data.repeats = 1
  # Captions: name = file in data/tokenizers/ (bytes, sentencepiece), what its
  # `Tokenizer` takes, and length, row (for packed images), pad and clean, see
  # data/text.py. None reads no captions.
  c.data.text = None
  # Boxes in the place of labels, for stacked training of images of all sizes:
  # canvases, a list of (height, width) of which each batch takes the smallest
  # that holds it (one compile each), max_objects, masks and window, see
  # data/objects.py. None reads labels.
  c.data.objects = None
  # Worker processes (0: none) and reading threads, batches read ahead.
  c.data.workers = 0
  c.data.threads = 2
  c.data.prefetch = 2
  # A larger share of unreadable images stops the run.
  c.data.max_broken = 0.05

  c.optim = ConfigDict()
  c.optim.name = "adamw"
  c.optim.lr = 1e-3
  # Multiplied by the learning rate of the step and by the rule of wd_mults.
  c.optim.wd = 0.0
  # Largest global norm of the gradients ("norm"), or largest share of a unit's
  # norm that its gradient may have ("agc"); 0 does not clip.
  c.optim.clip = 1.0
  c.optim.clip_mode = "norm"
  c.optim.schedule = ConfigDict(dict(name="cosine", warmup=0.1))
  # Rules over parameter paths: first match wins.
  c.optim.lr_mults = ((".*", 1.0),)
  c.optim.wd_mults = ((".*/kernel", 1.0), (".*", 0.0))
  # Regexes of parameters that never change and carry no optimizer state.
  c.optim.frozen = ()
  # Further settings of the named optimizer.
  c.optim.settings = ConfigDict()

  # Devices along each axis; -1 takes what is left.
  c.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1))
  # A name in sharding.RULES, or a rule list over parameter paths.
  c.sharding = "data"

  c.log_every = 50
  c.checkpoint = ConfigDict()
  c.checkpoint.every = 1000
  c.checkpoint.keep_last = 2
  # Keep every checkpoint whose step is a multiple of this; 0 keeps none.
  c.checkpoint.keep_every = 0
  # Metric and direction ("max" or "min") of the best checkpoint; None: none.
  c.checkpoint.best = None

  # name -> dict(name = file in evaluators/, every = steps (0: at the end),
  # data = dict(split, limit, tokens, batch_size), static = model keywords such
  # as dict(grid=15), and its settings).
  c.evals = ConfigDict()
  return c.lock()


def arguments(arg: str | None, **defaults: str | int) -> ConfigDict:
  """Parses "size=B/16,data=folder:/path" over the defaults.

  Raises:
    ValueError: for an argument that the config does not have.
  """
  values = ConfigDict(defaults)
  for part in filter(None, (arg or "").split(",")):
    key, equals, value = part.partition("=")
    if not equals or key not in defaults:
      near = difflib.get_close_matches(key, defaults, 1)
      hint = f" Did you mean {near[0]!r}?" if near else ""
      raise ValueError(
        f"Config argument {part!r} is not of the form key=value with a key of "
        f"this config: {', '.join(defaults)}.{hint}"
      )
    values[key] = type(defaults[key])(value)
  return values


def check_size(size: str, sizes: tuple[str, ...], config: str) -> None:
  """Refuses a size that a config does not have, and lists those it has."""
  if size not in sizes:
    raise ValueError(
      f"{config} has no size={size}; it has: {', '.join(sizes)}."
    )


# What fine-tuning does without, and sets itself.
_PRETRAINING = (
  "num_classes",
  "rep_size",
  "head_zero_init",
  "head_bias",
  "dropout",
  "stochastic_depth",
)


def start_from(c: ConfigDict, run: str, size: str) -> None:
  """The model of a run folder and its weights; the head is new and starts at 0.

  Pixels are normalised as they were. `convert` makes run folders of published
  weights. Without a run, a fresh ViT of a size: only to see that a config runs.
  """
  if not run:
    c.model = dict(name="vit", variant=size, head_zero_init=True)
    return
  stored = record.read_run(run)
  model = stored["config"]["model"]
  c.model = {k: v for k, v in model.items() if k not in _PRETRAINING}
  if model["name"] in ("vit", "flexivit", "navit"):  # Others start near it.
    c.model.head_zero_init = True
  for key in ("mean", "std"):
    if key in stored["config"]["task"]:
      c.task[key] = stored["config"]["task"][key]
  c.init_from = run
  if stored["label_names"]:
    c.init_skip = ("(head|pre_logits)/.*",)


def validate(c: ConfigDict, *, limit: int) -> None:
  """Scores a classification five times in a run, on `limit` held-out images.

  Call it when the task and the length of the run are set.
  """
  c.evals.val = dict(
    name="classification",
    loss_name=c.task.loss_name,
    every=max(1, c.total_steps // 5),
    data=dict(split="validation", limit=limit),
  )
  c.checkpoint.every = max(1, c.total_steps // 10)
