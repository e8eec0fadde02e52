"""DeepViT on ImageNet-1k, by the authors' recipe (arXiv 2103.11886).

  python launch.py --config configs/deepvit_i1k.py
    The local size on `digit_scenes`: minutes on two CPU cores.
  python launch.py --config configs/deepvit_i1k.py:depth=24,width=48,plain=1
  python launch.py --config configs/deepvit_i1k.py:depth=24,width=48
    Attention in a deep and narrow ViT, and with re-attention: both write the
    similarity of their layers into evaluations/similarity, with a picture.
  python launch.py --config configs/deepvit_i1k.py:size=S,data=folder:/path
    300 epochs of ImageNet-1k at 224 pixels.

Arguments: size (local, 16B, 24B, 32B, S, L), data, steps; depth and width,
where not those of the size; plain (1: no block mixes heads, which is a ViT of
the same shape).
Figures: top-1 79.10 (16B), 79.99 (24B), 80.90 (32B), 82.3 (S), 83.1 (L), from
the README of zhoudaquan/dvit_repo @ 1ccb152; recipe: its scripts/*.yaml.
Here: the local size reaches accuracies of 0.78 to 0.82, on 1,000 new scenes.
Not the authors': the number of their GPUs, of 32 images each, is not known,
and we take 8; the learning rate ends at 0 where theirs ends at 1e-5 and stays
there for 10 more epochs; their cosine regulariser, which S and L do without,
is left out.
"""

from big_vision_like.data import sources
from configs import common

_VARIANTS = ("16B", "24B", "32B", "S", "L")
_IMAGES = 1_281_167


def get_config(arg=None):
  a = common.arguments(
    arg,
    size="local",
    data="digit_scenes:plain",
    steps=0,
    depth=0,
    width=0,
    plain=0,
  )
  common.check_size(a.size, ("local", *_VARIANTS), "configs/deepvit_i1k.py")
  c = common.base()
  with c.unlocked():
    c.data.source = sources.settings(a.data)
    c.task = dict(name="classification", loss_name="softmax")
    c.task.label_smoothing = 0.1
    c.model = dict(name="deepvit", variant=a.size)
    sizes = dict(depth=a.depth, mixing=a.depth) if a.depth else {}
    if a.width:
      sizes |= dict(width=a.width, mlp=3 * a.width)
    if a.plain:
      sizes["mixing"] = 0
    if sizes:
      c.model.sizes = sizes
    c.optim.clip = 0
    c.optim.wd = 0.05
    if a.size == "local":
      _local(c, a)
    else:
      _paper(c, a)
    common.validate(c, limit=1000 if a.size == "local" else 50_000)
    c.evals.similarity = dict(
      name="attention_similarity",
      data=dict(split="validation", batch_size=64),
    )
  return c.lock()


def _local(c, a):
  c.notice = (
    f"This trains the local size of DeepViT on {a.data}; configs/"
    "deepvit_i1k.py:size=S,data=... is the authors' run on data of yours."
  )
  c.total_steps = a.steps or 600
  c.batch_size = 64
  c.data.ops = c.data.eval_ops = "decode|resize(32)"
  # Narrow models take larger steps; this one's width is 96.
  c.optim.lr = 1e-3 * 96 / (a.width or 96)
  c.optim.schedule = dict(name="cosine", warmup=0.1)


def _paper(c, a):
  c.batch_size = 8 * 32
  epoch = _IMAGES // c.batch_size
  c.total_steps = a.steps or 300 * epoch
  c.log_every = 100
  c.ema_decay = 0.99996
  c.model.dtype = "bfloat16"
  c.model.stochastic_depth = 0.2
  # 32B's file is the one that is not DeiT's.
  c.task.mixup = 0.1 if a.size == "32B" else 0.8
  c.task.cutmix = 0.0 if a.size == "32B" else 1.0
  c.data.ops = (
    "decode|random_resized_crop(224)|flip_lr"
    "|rand_augment(num_ops=2, magnitude=9, mstd=0.5)|random_erasing(p=0.25)"
  )
  c.data.eval_ops = (
    "decode|resize_center_crop(224, crop_pct=0.9, interpolation='bicubic')"
  )
  c.data.workers = 8
  c.optim.lr = 5e-4
  c.optim.schedule = dict(
    name="cosine",
    warmup=5 * epoch if not a.steps else 5 / 300,
    warmup_start=1e-6 / c.optim.lr,
    end=1e-5 / c.optim.lr,
  )
