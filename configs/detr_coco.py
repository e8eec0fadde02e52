"""DETR on COCO, as in its paper (arXiv 2005.12872).

  python launch.py --config configs/detr_coco.py:pretrain=1 --workdir runs/net
  python launch.py --config configs/detr_coco.py:init=runs/net
    A small DETR for `digit_scenes`. Its backbone first learns which digits are
    in a picture, as the paper's comes from ImageNet: together minutes on two
    CPU cores.
  python launch.py \\
      --config configs/detr_coco.py:size=R50,data=coco:/path,init=resnet50.pth
    The paper's run: 500 epochs of 64 images a step.
  python launch.py \\
      --config configs/detr_coco.py:size=R50,data=coco:/own,tune=detr_r50.pth
    Fine-tuning of a whole detector on data of your own, hundreds of images or
    more: classes and queries are those of the data, and steps grow with it.

Arguments:
  size      local, R50, R50-DC5, R101, R101-DC5.
  data      digit_scenes:LEVEL, coco:PATH, or tfds:NAME.
  pretrain  1: train the backbone of the local size as a classifier.
  init      what the backbone starts from: a run, or torchvision's weights.
  tune      what the whole detector starts from: a run or published weights.
  steps     0: those of the recipe.
Figures (Table 1): AP 42.0 (R50), 43.3 (R50-DC5), 43.5 (R101), 44.9 (R101-DC5);
of 150 epochs of R50, 39.5. Published weights know the raw ids of 91 classes:
--config.data.source.raw_ids=True.
"""

from big_vision_like.data import sources
from configs import common

_SIZES = ("local", "R50", "R50-DC5", "R101", "R101-DC5")
_IMAGES = 118_287


def get_config(arg=None):
  a = common.arguments(
    arg,
    size="local",
    data="digit_scenes:photo_boxes",
    pretrain=0,
    init="",
    tune="",
    steps=0,
  )
  common.check_size(a.size, _SIZES, "configs/detr_coco.py")
  c = common.base()
  with c.unlocked():
    c.data.source = sources.settings(a.data)
    c.optim.wd = 1e-4
    c.optim.wd_mults = ((".*", 1.0),)
    if a.pretrain:
      _backbone(c, a)
      return c.lock()
    c.task = dict(name="detection")
    c.model = dict(name="detr", variant=a.size)
    if a.size == "local":
      _local(c, a)
    else:
      _paper(c, a)
    if a.init:
      c.init_from, c.init_into = a.init, "backbone"
      c.init_skip = ("(head|fc)/.*",)
    c.evals.val = dict(
      name="coco",
      every=max(1, c.total_steps // 5),
      data=dict(split="validation"),
    )
    if a.size == "local":
      c.evals.val.data.limit = 500
    c.checkpoint.every = max(1, c.total_steps // 10)
  return c.lock()


def _backbone(c, a):
  c.notice = f"This trains the backbone of the local DETR on {a.data}."
  c.task = dict(name="classification", loss_name="softmax")
  c.task.mean, c.task.std = _MEAN, _STD
  c.model = dict(name="resnet", variant="local")
  c.total_steps = a.steps or 1500
  c.batch_size = 32
  c.data.ops = c.data.eval_ops = "decode|resize(40)"
  c.optim.lr = 2e-3
  c.optim.schedule = dict(name="cosine", warmup=0.1)
  common.validate(c, limit=1000)


def _local(c, a):
  c.notice = (
    f"This trains the local size of DETR on {a.data}; configs/detr_coco.py:"
    "size=R50,data=coco:/path,init=... is the paper's run."
  )
  c.total_steps = a.steps or 3000
  c.batch_size = 16
  c.model.num_queries = 12
  c.model.pre_norm = True
  c.model.dropout = c.model.attention_dropout = 0.0
  c.model.temperature, c.model.scale = 100.0, 8 * 3.14159265
  c.data.ops = "decode|detr_resize((56, 64, 72), 96)"
  c.data.eval_ops = "decode|detr_resize(64, 96)"
  c.data.objects = dict(canvases=((64, 96), (96, 64), (96, 96)), max_objects=12)
  c.optim.lr = 1e-3
  c.optim.clip = 0.5
  c.optim.schedule = dict(name="constant", warmup=200, cooldown=0.3)


_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _paper(c, a):
  pass
