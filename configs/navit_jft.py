"""NaViT classification, as on JFT-4B in Patch n' Pack (arXiv 2307.06304).

  python launch.py --config configs/navit_jft.py
    The local size on `digit_scenes`: two CPU cores, under 8 minutes, held-out
    mean average precision at least 0.95.
  python launch.py --config configs/navit_jft.py:data=folder:/path/to/images
    The local size on your own images, a folder per class.
  python launch.py --config configs/navit_jft.py:size=B/16,data=tar:/path
    The paper's run (sec. 3, app. B; Table 2), at its shortest length.

Arguments:
  size   local, B/32, B/16 or L/16.
  data   digit_scenes[:level], folder:PATH, tar:PATH or tfds:NAME[:VERSION].
  steps  length of the run. Table 2 has four lengths a size; 0 is the shortest.
  optim  of the paper's sizes: adafactor (the form of big_vision) or adamw.

The paper reports ImageNet 10-shot; on TPU v3, B/16 took 260 to 2600 TPU hours
for 93k to 920k steps of 4096 rows. It names neither optimizer, warmup nor
timescale: ours are those of its nearest public relative, ViT-g in big_vision.
"""

from big_vision_like.data import sources
from configs import common

# Steps and cooldown of the four run lengths of Table 2.
COOLDOWN = (10_000, 50_000, 100_000, 100_000)
STEPS = {
  "B/32": (98_000, 240_000, 480_000, 970_000),
  "B/16": (93_000, 230_000, 460_000, 920_000),
  "L/16": (97_000, 240_000, 480_000, 960_000),
}


def get_config(arg=None):
  a = common.arguments(
    arg, size="local", data="digit_scenes:plain", steps=0, optim="adafactor"
  )
  common.check_size(a.size, ("local", *STEPS), "configs/navit_jft.py")
  c = common.base()
  with c.unlocked():
    c.data.source = sources.settings(a.data)
    embedded = c.data.source.name == "digit_scenes"
    c.task = dict(
      name="classification",
      loss_name="sigmoid",
      labels="multi_label" if embedded else "label",
    )
    c.evals.val = dict(
      name="classification",
      data=dict(
        split="validation", limit=2000 if a.size == "local" else 50_000
      ),
    )
    c.evals.fewshot = dict(
      name="fewshot",
      data=dict(
        split="validation", limit=1000 if a.size == "local" else 50_000
      ),
    )
    c.evals.predictions = dict(
      name="predictions", data=dict(split="validation", limit=24)
    )
    if a.size == "local":
      _local(c, a)
    else:
      _paper(c, a)
    c.evals.val.every = max(1, c.total_steps // 5)
    c.checkpoint.every = max(1, c.total_steps // 10)
    c.checkpoint.best = ("val/mAP", "max")
  return c.lock()


def _local(c, a):
  """A size that two CPU cores train in minutes."""
  c.notice = (
    "JFT-4B is not public. This trains the local size of NaViT on "
    f"{a.data}; configs/navit_jft.py:size=B/16,data=... is the "
    "paper's run on data of yours."
  )
  # Digits of 8x8 pixels need small patches; photographs need area.
  digits = c.data.source.name == "digit_scenes"
  c.total_steps = a.steps or (2200 if digits else 1000)
  c.batch_size = 8
  c.model = dict(name="navit", variant="local", position="factorised_add")
  c.model.attention = "auto"
  # The chance rate of ten classes: it spares the head a long way down.
  c.model.head_bias = -2.2
  # Unrolled layers compile slower and run faster on a CPU.
  c.model.scan = False
  if digits:
    c.data.pack = dict(length=128, patch=4, max_images=16)
    c.data.sizes = dict(kind="side", dist="uniform", low=16, high=22)
  else:
    c.data.pack = dict(length=256, patch=16, max_images=16)
    c.data.sizes = dict(kind="side", dist="uniform", low=64, high=192)
    c.model.variant = "local/16"
  c.data.drop = dict(law="beta", mean=0.1, max=0.4)
  c.optim.lr = 2e-3
  c.optim.wd = 0.05
  c.optim.schedule = dict(name="cosine", warmup=0.05)
  for evaluation in c.evals.values():
    evaluation.data.tokens = 25 if digits else 144
  c.evals.budget = dict(
    name="budget_curve",
    tokens=(9, 12, 16, 20, 25, 30, 36) if digits else (36, 64, 100, 144, 196),
    data=dict(split="validation", limit=1000),
  )


def _paper(c, a):
  """App. B: resize and token dropping are the only augmentation."""
  c.notice = (
    f"JFT-4B is not public. This trains NaViT-{a.size} with the paper's recipe "
    f"on {a.data}."
  )
  c.total_steps = a.steps or STEPS[a.size][0]
  c.batch_size = 4096
  c.log_every = 100
  c.model = dict(name="navit", variant=a.size, dtype="bfloat16", remat="names")
  c.model.head_bias = -10.0
  paper_rows(c, a.size)
  c.data.workers = 8
  c.optim.name = a.optim
  c.optim.lr = 8e-4
  c.optim.wd = 0.03
  c.optim.wd_mults = (("head/kernel", 100.0), (".*/kernel", 1.0), (".*", 0.0))
  paper_schedule(c, a.size)


def paper_rows(c, size):
  """Rows, resolutions and token dropping of sec. 3 and Table 2."""
  patch = int(size.partition("/")[2])
  c.data.pack = dict(length=(256 // patch) ** 2, patch=patch, max_images=16)
  c.data.sizes = dict(kind="side", dist="uniform", low=64, high=256)
  # Table 2 implies these means: 4.9 images in 256 tokens, 5.4 in 64.
  mean = 0.53 if patch == 16 else 0.58
  c.data.drop = dict(law="beta", mean=mean, max=0.9)


def paper_schedule(c, size):
  """That of a run of `c.total_steps`."""
  # Where the run is of a length in Table 2, so is its cooldown.
  cooldown = dict(zip(STEPS[size], COOLDOWN)).get(c.total_steps, 0.1)
  c.optim.schedule = dict(
    name="rsqrt", warmup=10_000, timescale=10_000, cooldown=cooldown
  )
