"""NaViT with texts, as on WebLI in Patch n' Pack (arXiv 2307.06304).

  python launch.py --config configs/navit_webli.py
    The local size on `digit_scenes` and its captions, on two CPU cores.
  python launch.py --config configs/navit_webli.py:data=tar:/path
    The local size on images of your own with captions, see data/sources/.
  python launch.py --config \\
      configs/navit_webli.py:size=B/16,data=tar:/path,text=sentencepiece:/file
    The paper's run (sec. 3, app. B; Table 2), at its shortest length.

Arguments:
  size   local, B/32, B/16 or L/16.
  data   digit_scenes[:level], folder:PATH, tar:PATH or tfds:NAME[:VERSION].
  text   bytes, or sentencepiece:FILE; the paper has T5's 32,000 words.
  steps  length of the run. Table 2 has four lengths a size; 0 is the shortest.
  optim  of the paper's sizes: adafactor (the form of big_vision) or adamw.

Here: of 38 different captions, the local size finds that of a new scene in 0.27
of all cases, and among its first five in 0.81; colours are learned at once,
digits slowly.
WebLI is not public. On TPU v3, B/16 took 260 to 2600 TPU hours for 93k to 920k
steps of 4096 rows. The paper does not say how long rows of texts are, how wide
the embeddings, where the temperature starts, or which optimizer and warmup it
has: ours are those of its nearest public relatives, LiT and ViT-g in
big_vision, and rows of texts that hold five of the longest.
"""

from big_vision_like.data import sources, tokenizers
from configs import common, navit_jft

# What the captions of `digit_scenes` have around the name of a class.
_COLORS = ("white", "yellow", "orange", "green")
_DIGITS = tuple(f"a large {c} {{}} on a plain background" for c in _COLORS)


def get_config(arg=None):
  a = common.arguments(
    arg,
    size="local",
    data="digit_scenes:plain",
    text="bytes",
    steps=0,
    optim="adafactor",
  )
  sizes = ("local", *navit_jft.STEPS)
  common.check_size(a.size, sizes, "configs/navit_webli.py")
  c = common.base()
  with c.unlocked():
    c.data.source = sources.settings(a.data)
    c.data.text = tokenizers.settings(a.text)
    c.task = dict(name="contrastive", loss_name="softmax")
    limit = 2000 if a.size == "local" else 25_000
    data = dict(split="validation", limit=limit)
    c.evals.val = dict(name="retrieval", data=data)
    c.evals.zeroshot = dict(name="zeroshot", data=data)
    if c.data.source.name == "digit_scenes":
      c.evals.zeroshot.templates = _DIGITS
    if a.size == "local":
      _local(c, a)
    else:
      _paper(c, a)
    c.evals.val.every = max(1, c.total_steps // 5)
    c.checkpoint.every = max(1, c.total_steps // 10)
    c.checkpoint.best = ("val/image_to_text_r1", "max")
  return c.lock()


def _local(c, a):
  """A size that two CPU cores train in minutes."""
  c.notice = (
    "WebLI is not public. This trains the local size of NaViT's two towers on "
    f"{a.data}; configs/navit_webli.py:size=B/16,data=... is the paper's run "
    "on data of yours."
  )
  digits = c.data.source.name == "digit_scenes"
  c.total_steps = a.steps or 2000
  c.batch_size = 8
  # Unrolled layers compile slower and run faster on a CPU.
  tower = dict(variant="local" if digits else "local/16", scan=False)
  c.model = _towers(features=64, image=tower, length=64)
  c.model.text.variant = "local"
  # Whole captions pooled differ by few of their bytes: in so few steps, digits
  # are not told apart then.
  c.model.text.pool = "last"
  c.data.text.length = 64
  if digits:
    c.data.pack = dict(length=128, patch=4, max_images=16)
    c.data.sizes = dict(kind="side", dist="uniform", low=16, high=22)
    c.data.text.row = 384
  else:
    c.data.pack = dict(length=256, patch=16, max_images=16)
    c.data.sizes = dict(kind="side", dist="uniform", low=64, high=192)
    c.data.text.row = 512
  c.data.drop = dict(law="beta", mean=0.1, max=0.4)
  c.optim.lr = 2e-3
  c.optim.wd = 0.05
  c.optim.schedule = dict(name="cosine", warmup=0.05)
  for evaluation in c.evals.values():
    evaluation.data.tokens = 25 if digits else 144


def _paper(c, a):
  """App. B: resize and token dropping are the only augmentation."""
  c.notice = (
    f"WebLI is not public. This trains NaViT-{a.size} and its text tower with "
    f"the paper's recipe on {a.data}."
  )
  c.total_steps = a.steps or navit_jft.STEPS[a.size][0]
  c.batch_size = 4096
  c.log_every = 100
  width = dict(B=768, L=1024)[a.size[0]]
  length = 64 if c.data.text.name == "bytes" else 24
  c.model = _towers(features=width, image=dict(variant=a.size), length=length)
  c.model.text.variant = a.size[0]
  c.model.update(dtype="bfloat16", remat="names")
  c.data.text.update(length=length, row=16 * length // 3)
  navit_jft.paper_rows(c, a.size)
  c.data.workers = 8
  c.optim.name = a.optim
  c.optim.lr = 3e-3
  c.optim.wd = 1e-6
  navit_jft.paper_schedule(c, a.size)


def _towers(*, features, image, length):
  """Both towers with the paper's changes of the architecture."""
  changes = dict(bias=False, qk_norm="layer", pool="map")
  return dict(
    name="two_towers",
    image=dict(name="navit", **image),
    text=dict(length=length, scan=image.get("scan", True), **changes),
    features=features,
    temperature=10.0,
  )
