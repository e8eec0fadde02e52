"""DETR on COCO, as in its paper (arXiv 2005.12872).

  python launch.py --config configs/detr_coco.py:pretrain=1 --workdir runs/net
  python launch.py --config configs/detr_coco.py:init=runs/net
    A small DETR for digits on photographs, `digit_scenes:photo_boxes`. First
    its backbone learns to tell digits apart, as the paper's comes from
    ImageNet: together minutes on two CPU cores.
  python launch.py \\
      --config configs/detr_coco.py:size=R50,data=coco:/coco,init=resnet50.pth
    The paper's run: 500 epochs of 64 images a step.
  python launch.py \\
      --config configs/detr_coco.py:size=R50,data=coco:/own,tune=detr-r50.pth
    Fine-tuning of a whole detector on data of your own, from hundreds of images
    on: classes are those of its file, steps grow with it.

Arguments:
  size      local, R50, R50-DC5, R101, R101-DC5.
  data      digit_scenes:LEVEL, coco:PATH or tfds:NAME.
  pretrain  1: train the local backbone as a classifier.
  init      what the backbone starts from: a run, or torchvision's weights.
  tune      what the whole detector starts from: a run, or published weights.
  queries   the most objects that an image can have; 0: 100, locally 12.
            `inspect` proposes a number.
  steps     0: those of the recipe.

Figures (Table 1): AP 42.0 (R50), 43.3 (R50-DC5), 43.5 (R101), 44.9 (R101-DC5);
after 150 epochs of R50, 39.5. DC5 is scored with images alone, batch_size = 1.
Here: the local size reaches AP50 0.86 and AP 0.61, on 500 new scenes; by what
rounding makes of a run, two hundredths more or less.
Published weights know the ids of COCO as 91 classes: data.source.raw_ids=True.
Batches are sorted by canvas within windows, the authors' are not; the class
head of a fine-tuning starts anew.
"""

import math

from big_vision_like import build
from big_vision_like.data import sources
from configs import common

_SIZES = ("local", "R50", "R50-DC5", "R101", "R101-DC5")
_IMAGES = 118_287
# The digits of the local backbone's pictures are as large as the detector's.
_PRETRAINING = "digit_scenes:photo"
_SIDES = ", ".join(str(side) for side in range(480, 801, 32))
_OPS = (
  "decode|flip_lr|detr_crop((400, 500, 600), 384, 600)"
  f"|detr_resize(({_SIDES}), 1333)"
)


def get_config(arg=None):
  a = common.arguments(
    arg,
    size="local",
    data="",
    pretrain=0,
    init="",
    tune="",
    queries=0,
    steps=0,
  )
  common.check_size(a.size, _SIZES, "configs/detr_coco.py")
  c = common.base()
  with c.unlocked():
    if a.pretrain:
      pretrain(c, a)
      return c.lock()
    data = a.data or "digit_scenes:photo_boxes"
    detector(c, a, data, "configs/detr_coco.py")
    if a.tune:
      _tune(c, a)
    validate(c, a, "coco")
  return c.lock()


def pretrain(c, a):
  """The local backbone as a classifier of single digits."""
  if a.size != "local":
    raise ValueError(
      f"pretrain=1 is for the local size. The backbone of {a.size} starts from "
      "ImageNet: init=FILE takes torchvision's weights, or a run."
    )
  data = a.data or _PRETRAINING
  c.notice = f"This trains the backbone of the local DETR on {data}."
  c.data.source = sources.settings(data)
  c.task = dict(name="classification", loss_name="softmax")
  c.task.mean, c.task.std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
  c.model = dict(name="resnet", variant="local")
  c.total_steps = a.steps or 2000
  c.batch_size = 16
  c.data.ops = c.data.eval_ops = "decode|resize(40)"
  c.optim.lr = 1.5e-3
  c.optim.wd = 1e-4
  c.optim.wd_mults = ((".*", 1.0),)
  c.optim.schedule = dict(name="cosine", warmup=0.1)
  common.validate(c, limit=1000)


def detector(c, a, data, config):
  """Data, model, task and recipe of a detector, for `config`."""
  if a.init and a.tune:
    raise ValueError(
      "init= is for the backbone alone, tune= for all: give one."
    )
  c.data.source = sources.settings(data)
  c.task = dict(name="detection")
  c.model = dict(
    name="detr",
    variant=a.size,
    num_queries=a.queries or 100,
    backbone=_backbone(a.size),
  )
  c.optim.wd = 1e-4
  # Norms, biases and queries decay as well.
  c.optim.wd_mults = ((".*", 1.0),)
  if a.size == "local":
    c.notice = (
      f"This trains the local size of DETR on {data}; {config}:size=R50,"
      "data=coco:PATH,init=... is the paper's run."
    )
    if not (a.init or a.tune):
      c.notice += " Its backbone is fresh, which takes several times longer."
    _local(c, a)
  else:
    _paper(c, a)
  if a.init:
    c.init_from, c.init_into = a.init, "backbone"
    # A classifier's head goes, and its BatchNorms become constants.
    c.init_resize = ("head",) if a.size == "local" else ("head", "frozen")


def validate(c, a, evaluator):
  """Scores five times in a run; call it when the length of the run is set."""
  c.evals.val = dict(
    name=evaluator,
    every=max(1, c.total_steps // 5),
    data=dict(split="validation"),
  )
  if a.size == "local":
    c.evals.val.data.limit = 500
  c.checkpoint.every = max(1, c.total_steps // 10)


def _backbone(size):
  """Its BatchNorms stay those of the classification, but for the local size."""
  variant, _, rest = size.partition("-")
  return dict(
    name="resnet",
    variant=variant,
    frozen=size != "local",
    dilation=rest.startswith("DC5"),
  )


def _local(c, a):
  c.total_steps = a.steps or 13_000
  c.batch_size = 8
  c.ema_decay = 0.999
  # In so few steps, boxes are found long before their classes are known.
  c.task.ce_weight = 1.5
  c.model.num_queries = a.queries or 12
  # As small and brief as it is, it learns faster so; and with BatchNorms that
  # go on learning, since its pictures fill their canvas.
  c.model.pre_norm = True
  c.model.dropout = c.model.attention_dropout = 0.0
  c.model.temperature, c.model.scale = 100.0, 8 * math.pi
  # Within a scan, a CPU computes on one core.
  c.model.scan = False
  c.data.ops = c.data.eval_ops = "decode|resize(64)"
  c.data.objects = dict(canvases=((64, 64),), max_objects=c.model.num_queries)
  c.optim.lr = 7e-4
  c.optim.clip = 0.5
  c.optim.schedule = dict(name="constant", warmup=0.04, cooldown=0.5)


def _paper(c, a):
  c.total_steps = a.steps or 500 * _IMAGES // 64
  c.batch_size = 64
  c.log_every = 100
  c.model.dtype = "bfloat16"
  c.data.ops = _OPS
  c.data.eval_ops = "decode|detr_resize(800, 1333)"
  c.data.objects = dict(
    canvases=(
      *((608, 1088), (1088, 608)),
      *((800, 1344), (1344, 800), (1344, 1344)),
    ),
    max_objects=c.model.num_queries,
    window=16,
  )
  c.data.workers = 8
  c.optim.lr = 1e-4
  c.optim.clip = 0.1
  c.optim.schedule = dict(name="steps", drops=(0.8,))
  c.optim.lr_mults = (("backbone/.*", 0.1), (".*", 1.0))
  c.optim.frozen = ("backbone/(stem|stage0)_.*",)


# Of a fine-tuning, by the number of images: epochs, but never fewer steps.
_TUNE_EPOCHS, _TUNE_STEPS = 60, 600


def _tune(c, a):
  """Small data: the learned detector, a new head, steps by what there is."""
  c.init_from = a.tune
  c.init_skip = ("class_head/.*",)
  c.init_resize = ("queries",)
  c.batch_size = 8
  c.data.objects.window = 1
  c.data.workers = 0
  c.optim.schedule = dict(name="steps", drops=(0.75,), warmup=0.02)
  # So few steps that an average would lag behind.
  c.ema_decay = 0.0
  if a.size == "local":
    c.optim.lr = 3e-4
    c.data.ops = "decode|flip_lr|detr_crop((64, 80, 96), 48, 96)|resize(64)"
  images = len(build.make_source(c, "train"))
  c.total_steps = a.steps or max(
    _TUNE_STEPS, _TUNE_EPOCHS * images // c.batch_size
  )
