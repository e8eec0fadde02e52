"""The published programs that we measure ourselves against, in torch.

Both get what the benchmark's images are in float32, normalised and on the
device before the clock runs.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from big_vision_like.benchmarks import torchvision_ops
from big_vision_like.benchmarks.workload import (
  CLASSES,
  LONGEST,
  PATCH,
  Size,
  Workload,
)


def device() -> torch.device:
  return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait() -> None:
  """Until the device has done what it was told."""
  if device().type == "cuda":
    torch.cuda.synchronize()


def vit_pytorch_model(
  work: Workload, *, size: Size
) -> tuple[torch.nn.Module, list[torch.Tensor]]:
  """vit-pytorch's NaViT, and its images."""
  torchvision_ops.declare()
  from vit_pytorch.na_vit import NaViT

  model = NaViT(
    image_size=LONGEST * PATCH,
    patch_size=PATCH,
    num_classes=CLASSES,
    dim=size.width,
    depth=size.depth,
    heads=size.heads,
    mlp_dim=size.mlp,
    dim_head=size.width // size.heads,
    token_dropout_prob=work.drop or None,
  )
  images = [
    torch.from_numpy(_normalise(x)).permute(2, 0, 1).contiguous().to(device())
    for x in work.images
  ]
  return model, images


def vit_pytorch_step(
  work: Workload, length: int, *, size: Size, dtype: str
) -> Callable[[], float]:
  """Packs in its forward pass, into rows of `length`, and trains one step."""
  model, images = vit_pytorch_model(work, size=size)
  forward = lambda: model(images, group_images=True, group_max_seq_len=length)
  return train(model, forward, work.labels, dtype)


def naflex_model(
  work: Workload, *, size: Size
) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
  """timm's NaFlexViT, and its images padded to 256 tokens each."""
  torchvision_ops.declare()
  from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg

  config = NaFlexVitCfg(
    patch_size=PATCH,
    embed_dim=size.width,
    depth=size.depth,
    num_heads=size.heads,
    mlp_ratio=size.mlp / size.width,
    embed_proj_type="linear",
    pos_embed="factorized",
    global_pool="map",
    patch_drop_rate=work.drop,
  )
  patches = np.zeros((len(work.images), LONGEST, 3 * PATCH**2), np.float32)
  coord = np.zeros((len(work.images), LONGEST, 2), np.int64)
  valid = np.zeros((len(work.images), LONGEST), bool)
  for i, image in enumerate(work.images):
    h, w = image.shape[0] // PATCH, image.shape[1] // PATCH
    folded = _normalise(image).reshape(h, PATCH, w, PATCH, 3)
    patches[i, : h * w] = folded.swapaxes(1, 2).reshape(h * w, -1)
    coord[i, : h * w] = np.stack(np.divmod(np.arange(h * w), w), -1)
    valid[i, : h * w] = True
  inputs = dict(patches=patches, patch_coord=coord, patch_valid=valid)
  inputs = {k: torch.from_numpy(x).to(device()) for k, x in inputs.items()}
  return NaFlexVit(config, num_classes=CLASSES), inputs


def naflex_step(
  work: Workload, *, size: Size, dtype: str
) -> Callable[[], float]:
  """Trains one step on padded images."""
  model, inputs = naflex_model(work, size=size)
  return train(model, lambda: model(inputs), work.labels, dtype)


def contrastive_loss(
  name: str, zimg: np.ndarray, ztxt: np.ndarray
) -> Callable[[], float]:
  """open_clip's loss, "softmax" or "sigmoid", with all gradients."""
  torchvision_ops.declare()
  from open_clip import loss as losses

  z = [torch.from_numpy(x).to(device()).requires_grad_() for x in (zimg, ztxt)]
  scalars = [
    torch.tensor(x, device=device(), requires_grad=True) for x in (10.0, -10.0)
  ]
  softmax = name == "softmax"
  loss_fn = losses.ClipLoss() if softmax else losses.SigLipLoss()
  inputs = [*z, *(scalars[:1] if softmax else scalars)]

  def run() -> float:
    for x in inputs:
      x.grad = None
    loss = loss_fn(*inputs)
    loss.backward()
    return loss.item()

  return run


def _normalise(image):
  return image.astype(np.float32) / 127.5 - 1


def train(
  model: torch.nn.Module,
  forward: Callable[[], torch.Tensor],
  labels: np.ndarray,
  dtype: str,
) -> Callable[[], float]:
  """Trains the model one step by what `forward` returns; the loss."""
  model = model.to(device()).train()
  labels = torch.from_numpy(labels).to(device())
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
  low = dtype == "bfloat16"

  def run() -> float:
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(device().type, torch.bfloat16, enabled=low):
      logits = forward()
    loss = F.cross_entropy(logits.float(), labels)
    loss.backward()
    optimizer.step()
    wait()
    return loss.item()

  return run
