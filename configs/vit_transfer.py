"""Fine-tunes a ViT, often at a higher resolution (arXiv 2010.11929, B.1.1).

  python launch.py --config configs/vit_i1k.py --workdir runs/vit
  python launch.py --config configs/vit_transfer.py:run=runs/vit
    A ViT trained here at 32 pixels goes on at 48: minutes on two CPU cores.
  python -m big_vision_like convert B_16.npz runs/b --model vit --variant B/16
  python launch.py --config configs/vit_transfer.py:run=runs/b,data=folder:/path
    Published weights, at 384 pixels.

Arguments:
  run         run folder to start from: a training, or what `convert` made.
  data        digit_scenes[:level[/target]], folder:PATH, tar:PATH or tfds:NAME.
  resolution  side of the images; 0: 48 for digit_scenes, else 384. Positions
              are interpolated, patches keep their size.
  steps, lr   the paper sweeps lr over .003, .01, .03, .06 in 20,000 steps for
              ImageNet; .001, .003, .01, .03 in 10,000 for CIFAR and in 500 for
              Pets and Flowers. 0: 20,000 steps at .03.
  batch       images a step; 0: 512.
  polyak      decay of the averaged parameters; the paper's best figures have
              .9999 (and 512 or 518 pixels for L/16 and H/14).
  size        of a fresh ViT, where there is no run: to see that it runs.

Figures (Table 5): at 384 pixels and without averaging, ImageNet-21k to ImageNet
top-1 83.97 (B/16), 81.28 (B/32), 85.15 (L/16), 80.99 (L/32), 85.13 (H/14).
Here: a ViT with an accuracy of 0.868 at 32 pixels has 0.882 at 48, on 1,000 new
scenes.
The head starts at 0. The crops of the paper's sizes are those of
google-research/vision_transformer @ c6de1e5: 448 pixels resized, 384 cut out.
"""

from big_vision_like.data import sources
from configs import common


def get_config(arg=None):
  a = common.arguments(
    arg,
    run="",
    data="digit_scenes:plain",
    resolution=0,
    steps=0,
    lr=0.0,
    batch=0,
    polyak=0.0,
    size="local",
  )
  c = common.base()
  with c.unlocked():
    c.data.source = sources.settings(a.data)
    c.task = dict(name="classification", loss_name="softmax", labels="label")
    common.start_from(c, a.run, a.size)
    if c.model.name in ("navit", "memory"):
      raise ValueError(
        f"configs/vit_transfer.py is for images of one size, and {a.run} is of "
        f"{c.model.name!r}. NaViT goes on with configs/navit_jft.py and "
        f"--config.init_from={a.run}, a memory with configs/memory_transfer.py."
      )
    if a.run and c.model.name in ("vit", "deepvit"):
      c.init_resize = ("positions",)
    c.optim.name = "sgd"
    c.optim.lr = a.lr or 0.03
    c.optim.settings.momentum = 0.9
    c.ema_decay = a.polyak
    if c.data.source.name == "digit_scenes" and a.size == "local":
      _local(c, a)
    else:
      _paper(c, a)
    common.validate(c, limit=1000 if a.size == "local" else 50_000)
  return c.lock()


def _local(c, a):
  c.notice = (
    f"This fine-tunes {a.run or f'a fresh ViT {a.size}'} on {a.data}; data=... "
    "is for data of yours."
  )
  side = a.resolution or 48
  c.total_steps = a.steps or 1200
  c.batch_size = a.batch or 64
  # Of the paper's shares, 7 to 6, the crops would lack whole digits.
  c.data.ops = f"decode|resize({side * 13 // 12})|random_crop({side})"
  c.data.eval_ops = f"decode|resize({side})"
  c.optim.schedule = dict(name="cosine", warmup=0.1)


def _paper(c, a):
  side = a.resolution or 384
  c.total_steps = a.steps or 20_000
  c.batch_size = a.batch or 512
  c.log_every = 100
  c.data.ops = f"decode|resize({side * 7 // 6})|random_crop({side})|flip_lr"
  c.data.eval_ops = f"decode|resize({side})"
  c.data.workers = 8
  c.optim.schedule = dict(name="cosine", warmup=0 if a.steps else 500)
