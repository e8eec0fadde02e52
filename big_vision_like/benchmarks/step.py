"""Images a second in training, against programs that others published.

The same images for all. Ours takes uint8 images and plans, drops, packs and
normalises them inside the measured time. vit-pytorch packs in its forward
pass, from normalised float32 images; timm's NaFlexViT takes patches padded to
256 tokens. What they need is prepared and on the device before the clock runs.
"""

import importlib.util
from collections.abc import Callable, Sequence

import jax

from big_vision_like.benchmarks import measure, workload

OURS, VIT_PYTORCH, NAFLEX = "ours", "vit-pytorch NaViT", "timm NaFlexViT"
# What a peer needs to be installed, and the ratio that we aim at.
PEERS = {
  VIT_PYTORCH: (("torch", "vit_pytorch"), 1.5),
  NAFLEX: (("torch", "timm"), 2.0),
}


def run(
  *,
  images: int = 32,
  lengths: Sequence[int] = (256, 1024, 4096),
  drops: Sequence[float] = (0.0, 0.5),
  repeats: int = 7,
  dtype: str = "float32",
  size: workload.Size = workload.SIZE,
) -> str:
  """The table.

  Args:
    images: in each step at the shortest rows, and at least in the others.
    lengths: of the rows.
    drops: shares of the tokens that are dropped.
    repeats: interleaved rounds.
    dtype: of activations; torch's autocast for the peers.
    size: of the Transformer.
  """
  rows = []
  for drop in drops:
    for length in lengths:
      work = workload.make_workload(images, drop=drop)
      if length > min(lengths):
        work = workload.fill_rows(work, length)
      calls = _calls(work, length, size=size, dtype=dtype)
      times = measure.interleaved(calls, repeats=repeats)
      rows.append(_row(work, length, times))
  tokens = workload.make_workload(images).lengths.mean()
  note = (
    f"Images of 64 to 256 pixels, {tokens:.0f} tokens each before dropping, as "
    f"many as fill the last row; width {size.width}, depth {size.depth}, "
    f"{size.heads} heads, MLP {size.mlp}, {dtype}, AdamW, on "
    f"{jax.device_count()} x {jax.devices()[0].device_kind}. Ratios are "
    "medians over interleaved rounds; ours includes packing and normalising. "
    "Aims at rows of 256 without dropping: "
    + ", ".join(f"{aim} x {name}" for name, (_, aim) in PEERS.items())
    + "."
  )
  return measure.table("Training, images/s", rows, note)


def _calls(
  work: workload.Workload, length: int, *, size: workload.Size, dtype: str
) -> dict[str, Callable[[], float]]:
  settings = dict(size=size, dtype=dtype)
  calls = {OURS: workload.our_step(work, length, **settings)[1]}
  if installed(VIT_PYTORCH):
    from big_vision_like.benchmarks import peers

    calls[VIT_PYTORCH] = peers.vit_pytorch_step(work, length, **settings)
  if installed(NAFLEX):
    from big_vision_like.benchmarks import peers

    calls[NAFLEX] = peers.naflex_step(work, **settings)
  return calls


def installed(peer: str) -> bool:
  """Whether a peer can be measured here."""
  return all(importlib.util.find_spec(name) for name in PEERS[peer][0])


def _row(work, length, times):
  row = {
    "row": length,
    "dropped": f"{work.drop:.0%}",
    "images": len(work.images),
    "tokens": int(work.lengths.sum()),
    "slots": workload.Packer(work, length).slots,
    OURS: len(work.images) / times.median(OURS),
  }
  for peer in PEERS:
    if peer in times.seconds:
      row[peer] = len(work.images) / times.median(peer)
      row[f"ours / {peer}"] = times.ratio(peer, OURS)
    else:
      row[peer] = "not installed"
  return row
