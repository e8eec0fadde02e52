"""How many tokens an image gets: the laws of resolution and token dropping.

Budgets are random numbers, drawn before any pixel is read, so that rows can be
planned from them. They are a matter of training only. "Resolution R" means the
area of an R x R square with the aspect ratio kept (NaViT, arXiv 2307.06304).
"""

import dataclasses
import math
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float, Int

# A law whose truncation throws away more draws than this is a mistake.
_MIN_ACCEPTED = 1e-3


def truncated_normal(
  rng: np.random.Generator,
  mean: Float[np.ndarray, " n"],
  *,
  std: float,
  low: Float[np.ndarray, " n"],
  high: Float[np.ndarray, " n"],
) -> Float[np.ndarray, " n"]:
  """Normal draws, each redrawn until it lies in its [low, high]."""
  x = rng.normal(mean, std)
  while (outside := (x < low) | (x > high)).any():
    x[outside] = rng.normal(mean[outside], std)
  return x


@dataclasses.dataclass(frozen=True)
class Sizes:
  """The law of the resolutions (NaViT section 3.3, figure 7).

  u is drawn on [-1, 1] and mapped linearly to the side, [low, high] pixels, or
  to the area, [low², high²]. `kind="native"` keeps the size of each file.

  Attributes:
    kind: "side", "area" or "native".
    dist: "uniform", or "normal" truncated to [-1, 1].
    low: smallest resolution in pixels.
    high: largest resolution in pixels.
    mean: of the normal before truncation; the paper has -0.5, 0 and 0.5.
    std: of the normal before truncation.
  """

  kind: str = "side"
  dist: str = "uniform"
  low: float = 64
  high: float = 256
  mean: float = -0.5
  std: float = 1.0

  def __post_init__(self) -> None:
    _one_of("data.sizes.kind", self.kind, ("side", "area", "native"))
    _one_of("data.sizes.dist", self.dist, ("uniform", "normal"))
    if not 0 < self.low <= self.high:
      raise ValueError(
        "data.sizes needs 0 < low <= high, in pixels, not "
        f"low={self.low}, high={self.high}."
      )
    if self.dist == "normal" and self._accepted() < _MIN_ACCEPTED:
      raise ValueError(
        "data.sizes: a normal with mean="
        f"{self.mean} and std={self.std} has next to no mass in [-1, 1], "
        "where it is mapped to [low, high]."
      )

  def _accepted(self) -> float:
    if self.std <= 0:
      return 0.0
    cdf = lambda u: math.erf((u - self.mean) / (self.std * math.sqrt(2)))
    return (cdf(1) - cdf(-1)) / 2

  def tokens(
    self, rng: np.random.Generator, count: int, *, patch: int
  ) -> Float[np.ndarray, " count"]:
    """Draws areas, in patches and not rounded. Not for native sizes."""
    if self.kind == "native":
      raise ValueError("Native sizes are read from the files, not drawn.")
    one = np.ones(count)
    if self.dist == "uniform":
      u = rng.uniform(-1, 1, count)
    else:
      u = truncated_normal(
        rng, self.mean * one, std=self.std, low=-one, high=one
      )
    share = (u + 1) / 2
    if self.kind == "area":
      area = self.low**2 + share * (self.high**2 - self.low**2)
    else:
      area = (self.low + share * (self.high - self.low)) ** 2
    return area / patch**2


def native_tokens(
  hw: Int[np.ndarray, "n 2"], *, patch: int
) -> Float[np.ndarray, " n"]:
  """The areas of images of (height, width) pixels, in patches, unrounded."""
  return hw.prod(axis=1) / patch**2


@dataclasses.dataclass(frozen=True)
class Drop:
  """The law of the share of tokens that an image loses (NaViT section 3.4).

  Which tokens go is uniform; how many is a matter of this law:

    none        no token is dropped
    constant    `rate` for all images
    beta        d = max * Beta(7/3 u, 7/3 (1 - u)) with u = mean / max
    resolution  normal of std 0.02, cut at two of them, around a mean that is
                linear in the image's tokens: min at s_min, max at s_max
    schedule    min + (max - min) * sigmoid((n - mu) / tau) after the share n
                of all training images: mu and tau are shares too, and a
                negative tau makes the rate fall
  """

  law: str = "none"
  rate: float | None = None
  mean: float | None = None
  min: float | None = None
  max: float | None = None
  s_min: float | None = None
  s_max: float | None = None
  mu: float | None = None
  tau: float | None = None

  SETTINGS: ClassVar[dict[str, tuple[str, ...]]] = {
    "none": (),
    "constant": ("rate",),
    "beta": ("max", "mean"),
    "resolution": ("min", "max", "s_min", "s_max"),
    "schedule": ("min", "max", "mu", "tau"),
  }
  STD: ClassVar[float] = 0.02

  def __post_init__(self) -> None:
    _one_of("data.drop.law", self.law, tuple(self.SETTINGS))
    needs = self.SETTINGS[self.law]
    has = [
      f.name
      for f in dataclasses.fields(self)[1:]
      if getattr(self, f.name) is not None
    ]
    if set(has) != set(needs):
      raise ValueError(
        f"data.drop: the law {self.law!r} takes exactly the settings "
        f"{list(needs)}, not {has}."
      )
    self._check_values()

  def _check_values(self) -> None:
    for name in ("rate", "min", "max", "mean"):
      value = getattr(self, name)
      if value is not None and not 0 <= value < 1:
        raise ValueError(
          f"data.drop.{name} is a share of an image's tokens in [0, 1), "
          f"not {value}."
        )
    if self.law == "beta" and not 0 < self.mean < self.max:
      raise ValueError(
        "data.drop: the law 'beta' needs 0 < mean < max, not "
        f"mean={self.mean}, max={self.max}."
      )
    if self.law == "resolution" and not 0 < self.s_min < self.s_max:
      raise ValueError(
        "data.drop: the law 'resolution' needs 0 < s_min < s_max, in tokens, "
        f"not s_min={self.s_min}, s_max={self.s_max}."
      )
    if self.law == "schedule" and self.tau == 0:
      raise ValueError(
        "data.drop.tau must not be 0: it is the share of training over which "
        "the rate moves, positive to rise and negative to fall."
      )

  def rates(
    self,
    rng: np.random.Generator,
    tokens: Float[np.ndarray, " n"],
    *,
    seen: Float[np.ndarray, " n"],
  ) -> Float[np.ndarray, " n"]:
    """Draws the share that each image loses.

    Args:
      rng: what is drawn from.
      tokens: areas of the whole images, in patches.
      seen: the share of all training images before each, in [0, 1].
    """
    if self.law == "none":
      return np.zeros(len(tokens))
    if self.law == "constant":
      return np.full(len(tokens), float(self.rate))
    if self.law == "beta":
      u = self.mean / self.max
      return self.max * rng.beta(7 / 3 * u, 7 / 3 * (1 - u), len(tokens))
    if self.law == "schedule":
      return self.scheduled(seen)
    mean = np.interp(tokens, (self.s_min, self.s_max), (self.min, self.max))
    width = 2 * self.STD
    rate = truncated_normal(
      rng, mean, std=self.STD, low=mean - width, high=mean + width
    )
    return np.clip(rate, 0, 1 - self.STD)

  def scheduled(self, seen: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """The rate of the law "schedule" after these shares of all images."""
    # tanh does not overflow where exp would.
    sigmoid = (1 + np.tanh((seen - self.mu) / self.tau / 2)) / 2
    return self.min + (self.max - self.min) * sigmoid


@dataclasses.dataclass(frozen=True)
class Staircase:
  """Which images of the training stream each block of rows takes.

  All blocks of a span take the same number, so that any block is found without
  counting through those before it. Only a schedule needs more than one span.

  Attributes:
    counts: images in a block, for each span.
    starts: images before each span.
    blocks: blocks in a span; the last span goes on without end.
    total: images in the whole of training.
  """

  counts: tuple[int, ...]
  starts: tuple[int, ...]
  blocks: int
  total: int

  def __call__(self, block: int) -> tuple[int, int]:
    """The first image of a block, and how many it takes."""
    span = min(block // self.blocks, len(self.counts) - 1)
    count = self.counts[span]
    return self.starts[span] + (block - span * self.blocks) * count, count


def kept_tokens(
  tokens: Float[np.ndarray, "*n"],
  rates: Float[np.ndarray, "*n"],
  *,
  length: int,
) -> Float[np.ndarray, "*n"]:
  """What is left of images after dropping: at least 1, at most a row."""
  return np.clip(tokens * (1 - rates), 1, length)


def plan_staircase(
  tokens: Float[np.ndarray, " n"],
  drop: Drop,
  *,
  capacity: int,
  length: int,
  max_count: int,
  blocks: int,
  spans: int = 1000,
) -> Staircase:
  """How many images fill blocks of `capacity` tokens under the drop law.

  The schedule is a function of the images seen, while blocks hold a constant
  number of tokens. A block is reached when the images before it have filled
  those before it, so the share of blocks done is the integral of the kept
  tokens over the share of images seen, which we invert.

  Args:
    tokens: a sample of the images' areas, in patches.
    drop: the law of dropping.
    capacity: tokens in a block of rows.
    length: tokens in a row.
    max_count: image slots in a block.
    blocks: blocks in the whole of training.
    spans: how many steps the staircase has at most.

  Raises:
    ValueError: if a block needs more images than it has slots.
  """
  if drop.law == "schedule":
    width = -(-blocks // spans)
    edges = np.minimum(np.arange(0, blocks + width, width), blocks)
    share, kept = _schedule_in_time(tokens, drop, edges / blocks, length)
    images = share * blocks / np.diff(edges) * capacity / kept
  else:
    width = blocks
    rates = drop.rates(_rng(), tokens, seen=np.zeros(len(tokens)))
    kept = kept_tokens(tokens, rates, length=length)
    images = capacity / kept.mean(keepdims=True)
  counts = np.rint(images).astype(int)
  if counts.max() > max_count:
    rows = capacity // length
    raise ValueError(
      f"A row of {length} tokens takes {counts.max() / rows:.1f} images on "
      f"average under these laws of size and dropping, but it has only "
      f"{max_count // rows} slots: raise data.pack.max_images."
    )
  counts = np.maximum(counts, 1)
  starts = np.append(0, np.cumsum(counts[:-1] * width))
  last = blocks - width * (len(counts) - 1)
  total = starts[-1] + last * counts[-1]
  return Staircase(
    counts=tuple(counts.tolist()),
    starts=tuple(starts.tolist()),
    blocks=width,
    total=int(total),
  )


def _schedule_in_time(
  tokens: Float[np.ndarray, " n"],
  drop: Drop,
  edges: Float[np.ndarray, " spans+1"],
  length: int,
) -> tuple[Float[np.ndarray, " spans"], float]:
  """The share of all images in each span of training, and their mean length.

  `edges` are shares of the blocks, from 0 to 1.
  """
  tokens = np.quantile(tokens, (np.arange(1024) + 0.5) / 1024)
  seen = np.linspace(0, 1, 1025)
  rates = drop.scheduled(seen)[:, None]
  kept = kept_tokens(tokens[None], rates, length=length).mean(axis=1)
  done = np.append(0, np.cumsum(kept[1:] + kept[:-1]) / 2)
  share = np.diff(np.interp(edges, done / done[-1], seen))
  return share, float(done[-1]) / 1024


def _rng() -> np.random.Generator:
  """For estimates that must not depend on the seed of a run."""
  return np.random.Generator(np.random.Philox(key=0))


def _one_of(key: str, value: Any, choices: tuple[str, ...]) -> None:
  if value not in choices:
    raise ValueError(f"{key} is {value!r}; it can be {', '.join(choices)}.")
