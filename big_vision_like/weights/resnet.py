"""ResNet in torchvision's names, which are also timm's and DETR's.

Source: torchvision 0.28, timm 1.0.31, facebookresearch/detr @ 29901c5. A model
with frozen BatchNorms reads all layouts.
"""

from collections.abc import Callable

from big_vision_like.models import resnet
from big_vision_like.weights import engine
from big_vision_like.weights.engine import Tensors

_IMAGENET = dict(
  mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), size=224
)
PREPROCESS = {
  "torchvision": dict(_IMAGENET, crop_pct=0.875, interpolation="bilinear"),
  "timm": dict(_IMAGENET, crop_pct=0.95, interpolation="bicubic"),
  "frozen": dict(_IMAGENET, crop_pct=0.875, interpolation="bilinear"),
}


def torchvision(model: resnet.ResNet) -> list[engine.Rule]:
  """`resnet50` and `resnet101`."""
  return rules(model, counter=True)


def frozen(model: resnet.ResNet) -> list[engine.Rule]:
  """The same without counters of batches.

  As FrozenBatchNorm2d has it, and files from before torch kept counters.
  """
  return rules(model, counter=False)


def rules(
  model: resnet.ResNet, *, counter: bool, ours: str = "", theirs: str = ""
) -> list[engine.Rule]:
  """The rules, with a path before ours ("a/") and one before theirs ("a.")."""

  def conv_bn(here, conv, bn):
    here = f"{ours}{here}"
    return [
      *engine.conv(f"params/{here}_conv", f"{theirs}{conv}", bias=False),
      *engine.batch_norm(
        f"{here}_bn", f"{theirs}{bn}", counter=counter, frozen=model.frozen
      ),
    ]

  found = conv_bn("stem", "conv1", "bn1")
  size = resnet.VARIANTS[model.variant]
  convs = (1, 2) if size.get("basic") else (1, 2, 3)
  for s, depth in enumerate(size["stages"]):
    for b in range(depth):
      here, there = f"stage{s}_block{b}", f"layer{s + 1}.{b}"
      for i in convs:
        found += conv_bn(
          f"{here}/conv{i}", f"{there}.conv{i}", f"{there}.bn{i}"
        )
      if not b:
        proj = f"{there}.downsample"
        found += conv_bn(f"{here}/proj", f"{proj}.0", f"{proj}.1")
  if model.num_classes:
    found += engine.dense(f"params/{ours}head", f"{theirs}fc")
  return found


LAYOUTS = {"torchvision": torchvision, "timm": torchvision, "frozen": frozen}


def _head_of_others(model):
  return None if model.num_classes else r"fc\..*"


# A backbone takes a classifier's file.
OTHER_PARTS = dict.fromkeys(LAYOUTS, _head_of_others)

Shapes = dict[str, tuple[int, ...]]
Resize = Callable[[resnet.ResNet, Tensors, Shapes], Tensors]


def frozen_norms(
  model: resnet.ResNet, variables: Tensors, shapes: Shapes
) -> Tensors:
  """Makes constants of the BatchNorms that a run has trained."""
  del model

  def place(path):
    constant = path.replace("params/", "batch_stats/", 1)
    moves = path not in shapes and constant in shapes
    return constant if moves else path

  return {place(path): x for path, x in variables.items()}


def head(model: resnet.ResNet, variables: Tensors, shapes: Shapes) -> Tensors:
  """Drops a head for other classes: the model keeps its fresh one, if any."""
  del model
  theirs = {k: x for k, x in variables.items() if k.startswith("params/head/")}
  if all(x.shape == shapes.get(k) for k, x in theirs.items()):
    return variables
  return {k: x for k, x in variables.items() if k not in theirs}


RESIZE: dict[str, Resize] = {"frozen": frozen_norms, "head": head}
