"""EfficientViT on ImageNet-1k, as in its paper (arXiv 2305.07027).

  python launch.py --config configs/efficientvit_i1k.py
    The local size on `digit_scenes`: minutes on two CPU cores.
  python launch.py --config configs/efficientvit_i1k.py:size=M5,data=folder:/x
    The paper's run: 300 epochs at 2,048 images a step, 8 V100 for 30 hours.

Arguments: size (local, M0 to M5), data, steps.
Figures: top-1 63.2, 68.4, 70.8, 73.4, 74.3, 77.1 for M0 to M5 at 224 px.
Here: the local size reaches an accuracy of 0.95, on 1,000 new scenes.
The recipe is that of microsoft/Cream @ 4a13c40, whose learning rate of 1e-3 is
for 512 images. Its colour jitter has no effect there beside RandAugment.
Not the paper's: the learning rate falls by step and not by epoch.
"""

from big_vision_like.data import sources
from configs import common

_VARIANTS = ("M0", "M1", "M2", "M3", "M4", "M5")
_EPOCHS, _IMAGES = 300, 1_281_167
_OPS = (
  "decode",
  "random_resized_crop(224, interpolation='bicubic')",
  "flip_lr",
  "rand_augment(2, 9, mstd=0.5)",
  "random_erasing(0.25)",
)


def get_config(arg=None):
  a = common.arguments(arg, size="local", data="digit_scenes:plain", steps=0)
  common.check_size(
    a.size, ("local", *_VARIANTS), "configs/efficientvit_i1k.py"
  )
  c = common.base()
  with c.unlocked():
    c.data.source = sources.settings(a.data)
    c.task = dict(name="classification", loss_name="softmax")
    c.task.label_smoothing = 0.1
    c.task.mean = (0.485, 0.456, 0.406)
    c.task.std = (0.229, 0.224, 0.225)
    c.model = dict(name="efficientvit", variant=a.size)
    c.optim.wd = 0.025
    c.optim.clip, c.optim.clip_mode = 0.02, "agc"
    if a.size == "local":
      _local(c, a)
    else:
      _paper(c, a)
    common.validate(c, limit=1000 if a.size == "local" else 50_000)
  return c.lock()


def _local(c, a):
  c.notice = (
    f"This trains the local size of EfficientViT on {a.data}; configs/"
    "efficientvit_i1k.py:size=M5,data=... is the paper's run on data of yours."
  )
  c.total_steps = a.steps or 600
  c.batch_size = 32
  # Maps of 6, 3 and 2 pixels a side.
  c.data.ops = c.data.eval_ops = "decode|resize(96)"
  c.optim.lr = 2e-3
  c.optim.schedule = dict(name="cosine", warmup=0.05)


def _paper(c, a):
  c.total_steps = a.steps or _EPOCHS * _IMAGES // 2048
  c.batch_size = 2048
  c.log_every = 100
  c.task.mixup, c.task.cutmix = 0.8, 1.0
  c.data.ops = "|".join(_OPS)
  c.data.eval_ops = (
    "decode|resize_small(256, interpolation='bicubic')|center_crop(224)"
  )
  c.data.repeats = 3
  c.data.workers = 8
  c.optim.lr = 4e-3
  c.optim.schedule = dict(
    name="cosine",
    warmup=5 / _EPOCHS,
    warmup_start=1e-6 / c.optim.lr,
    end=1e-5 / c.optim.lr,
  )
