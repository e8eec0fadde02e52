"""Panoptic DETR on COCO: things and stuff (arXiv 2005.12872, section 4.4).

  python launch.py --config configs/detr_coco.py:pretrain=1 --workdir runs/net
  python launch.py \\
      --config configs/detr_coco_panoptic.py:boxes=1,init=runs/net \\
      --workdir runs/boxes
  python launch.py --config configs/detr_coco_panoptic.py:tune=runs/boxes
    A small one for digits, the things, on photographs, the stuff, in the two
    steps of the paper: boxes of both, then the mask head alone. Minutes on two
    CPU cores.
  python launch.py \\
      --config configs/detr_coco_panoptic.py:size=R50,data=coco:/coco,tune=RUN
    The same on COCO, from a run of size=R50,boxes=1: 25 epochs.

Arguments: size (local, R50, R50-DC5, R101), data, init, tune, queries and steps
as in configs/detr_coco.py; boxes=1 leaves the mask head out.

Figures (Table 5): PQ 43.4 (R50), 44.6 (R50-DC5), 45.1 (R101).
Here: a PQ of 0.34 (things 0.11, stuff 0.50), on 500 new scenes, in nine
minutes. With 10,000 steps of boxes, of eleven minutes, 0.41 (0.29, 0.50).
Without tune= and boxes=1, boxes and masks are learned together, which the paper
finds as good. The authors' detector drops units while its mask head is trained,
and so does this one.
"""

from configs import common, detr_coco

_SIZES = ("local", "R50", "R50-DC5", "R101")
_IMAGES = 118_287


def get_config(arg=None):
  a = common.arguments(
    arg, size="local", data="", init="", tune="", queries=0, steps=0, boxes=0
  )
  common.check_size(a.size, _SIZES, "configs/detr_coco_panoptic.py")
  c = common.base()
  with c.unlocked():
    data = a.data or "digit_scenes:photo_boxes/panoptic"
    detr_coco.detector(c, a, data, "configs/detr_coco_panoptic.py")
    c.model.masks = c.data.objects.masks = not a.boxes
    if c.data.source.name == "coco":
      c.data.source.panoptic, c.data.source.masks = True, not a.boxes
    if a.boxes and a.size == "local":
      c.total_steps = a.steps or 7_500  # Of ten minutes, masks need two.
    if a.tune:
      _mask_head(c, a)
    detr_coco.validate(c, a, "coco" if a.boxes else "panoptic")
  return c.lock()


def _mask_head(c, a):
  """The mask head alone; nothing else moves. The paper has 25 epochs."""
  if a.boxes:
    raise ValueError("tune= trains the mask head, which boxes=1 leaves out.")
  c.init_from = a.tune
  c.init_skip = ("mask_(attn|head)/.*",)
  c.model.backbone.frozen, c.init_resize = True, ("frozen",)
  c.optim.frozen = ("(?!mask_(attn|head)/).*",)
  c.optim.schedule = dict(name="steps", drops=(0.6,))
  c.total_steps = a.steps or 25 * _IMAGES // c.batch_size
  if a.size == "local":
    c.total_steps = a.steps or 800
    c.optim.lr = 5e-3  # All that is trained is fresh.
