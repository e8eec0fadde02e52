import math

import numpy as np
import pytest
import scipy.special
import scipy.stats

from big_vision_like.data import budgets
from big_vision_like.data.budgets import Drop, Sizes


def rng(seed=0):
  return np.random.default_rng(seed)


# Mean tokens at patch 16, [64, 384] pixels: the integral of the law's density,
# rounded to whole tokens.
MEAN_TOKENS = [
  ("side", "normal", -0.5, 186),
  ("side", "normal", 0.0, 225),
  ("side", "uniform", 0.0, 229),
  ("side", "normal", 0.5, 266),
  ("area", "normal", -0.5, 256),
  ("area", "normal", 0.0, 296),
  ("area", "uniform", 0.0, 296),
  ("area", "normal", 0.5, 336),
]


@pytest.mark.parametrize(("kind", "dist", "mean", "expected"), MEAN_TOKENS)
def test_mean_tokens_of_the_paper(kind, dist, mean, expected):
  sizes = Sizes(kind, dist, 64, 384, mean=mean)
  tokens = sizes.tokens(rng(), 200_000, patch=16)
  # Three standard errors, and the rounding of the table.
  error = 3 * tokens.std() / math.sqrt(len(tokens)) + 0.5
  assert abs(tokens.mean() - expected) < error


@pytest.mark.parametrize("mean", [-0.5, 0.0, 0.5])
@pytest.mark.parametrize("kind", ["side", "area"])
def test_sizes_follow_the_truncated_normal(kind, mean):
  sizes = Sizes(kind, "normal", 61, 379, mean=mean, std=0.7)
  side = np.sqrt(sizes.tokens(rng(1), 20_000, patch=13)) * 13
  low, high, x = (61, 379, side) if kind == "side" else (61**2, 379**2, side**2)
  u = 2 * (x - low) / (high - low) - 1
  law = scipy.stats.truncnorm(
    (-1 - mean) / 0.7, (1 - mean) / 0.7, loc=mean, scale=0.7
  )
  assert scipy.stats.kstest(u, law.cdf).pvalue > 1e-3


def test_native_tokens_are_the_area():
  hw = np.array([[37, 53], [1, 1000]])
  np.testing.assert_allclose(
    budgets.native_tokens(hw, patch=7), [37 * 53 / 49, 1000 / 49]
  )


# P(d < 0.1) in per cent, as printed in figure 15a of the paper.
BETA = [
  (0.4, 0.10, 60.3),
  (0.4, 0.25, 11.5),
  (0.4, 0.35, 1.3),
  (0.7, 0.10, 66.9),
  (0.7, 0.25, 27.3),
  (0.7, 0.50, 2.3),
  (0.7, 0.65, 0.1),
  (0.9, 0.10, 70.4),
  (0.9, 0.25, 33.5),
  (0.9, 0.50, 5.9),
  (0.9, 0.70, 0.9),
  (0.9, 0.85, 0.1),
]


@pytest.mark.parametrize(("most", "mean", "percent"), BETA)
def test_beta_percentages_of_the_paper(most, mean, percent):
  n = 200_000
  drop = Drop("beta", max=most, mean=mean)
  rates = drop.rates(rng(), np.ones(n), seen=np.zeros(n))
  assert rates.max() <= most
  assert abs(rates.mean() - mean) < 0.005
  # The paper's figures are themselves from samples: 0.7 points.
  assert abs(100 * (rates < 0.1).mean() - percent) < 0.7


def test_resolution_law_is_linear_and_narrow():
  drop = Drop("resolution", min=0.1, max=0.9, s_min=16, s_max=576)
  tokens = np.repeat([4.0, 16.0, 156.0, 296.0, 576.0, 900.0], 5_000)
  rates = drop.rates(rng(), tokens, seen=np.zeros(len(tokens)))
  mean = np.repeat([0.1, 0.1, 0.3, 0.5, 0.9, 0.9], 5_000)
  assert np.abs(rates - mean).max() <= 0.04
  law = scipy.stats.truncnorm(-2, 2, scale=0.02)
  assert scipy.stats.kstest(rates - mean, law.cdf).pvalue > 1e-3


@pytest.mark.parametrize(("mu", "tau"), [(1 / 2, 0.1), (2 / 3, -0.2)])
def test_schedule_is_the_sigmoid(mu, tau):
  drop = Drop("schedule", min=0.2, max=0.8, mu=mu, tau=tau)
  seen = np.linspace(0, 1, 101)
  rates = drop.rates(rng(), np.ones(101), seen=seen)
  expected = 0.2 + 0.6 * scipy.special.expit((seen - mu) / tau)
  np.testing.assert_allclose(rates, expected, rtol=1e-12)
  assert (np.diff(rates) * np.sign(tau) > 0).all()


def test_constant_and_none():
  seen = np.zeros(3)
  np.testing.assert_array_equal(Drop().rates(rng(), seen, seen=seen), 0)
  constant = Drop("constant", rate=0.37)
  np.testing.assert_array_equal(constant.rates(rng(), seen, seen=seen), 0.37)


def test_images_per_row_of_the_paper():
  """Table 2: 4.88 images in 256 tokens need a mean drop of about 0.53."""
  tokens = Sizes("side", "uniform", 64, 256).tokens(rng(), 50_000, patch=16)
  stairs = budgets.plan_staircase(
    tokens,
    Drop("constant", rate=0.53),
    capacity=32 * 256,
    length=256,
    max_count=32 * 16,
    blocks=100,
  )
  assert len(stairs.counts) == 1
  assert abs(stairs.counts[0] / 32 - 4.88) < 0.05


@pytest.mark.parametrize("blocks", [1, 7, 613, 4001])
@pytest.mark.parametrize("tau", [0.1, -0.1])
def test_staircase_is_the_schedule_over_images_seen(blocks, tau):
  drop = Drop("schedule", min=0.2, max=0.8, mu=0.5, tau=tau)
  tokens = Sizes("side", "uniform", 64, 256).tokens(rng(), 2048, patch=16)
  stairs = budgets.plan_staircase(
    tokens, drop, capacity=8192, length=256, max_count=10_000, blocks=blocks
  )
  assert len(stairs.counts) <= 1000
  start = 0
  for block in range(blocks):
    assert stairs(block)[0] == start
    count = stairs(block)[1]
    seen = np.array([(start + count / 2) / stairs.total])
    kept = budgets.kept_tokens(tokens, drop.scheduled(seen), length=256)
    # Half an image of rounding, and the curvature within a coarse span.
    assert abs(count * kept.mean() / 8192 - 1) < (0.02 if blocks > 7 else 0.35)
    start += count
  assert start == stairs.total
  at = np.linspace(0, 1, 2_001)
  kept = budgets.kept_tokens(
    tokens[:, None], drop.scheduled(at)[None], length=256
  )
  # Quantiles for the sample, and rounding to whole images.
  assert abs(stairs.total * kept.mean() / (blocks * 8192) - 1) < 0.01


def test_staircase_refuses_too_few_slots():
  with pytest.raises(ValueError, match=r"takes 16\.0 images .* only 7 slots"):
    budgets.plan_staircase(
      np.full(10, 16.0),
      Drop(),
      capacity=32 * 256,
      length=256,
      max_count=32 * 7,
      blocks=3,
    )


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    (dict(kind="length"), "data.sizes.kind is 'length'; it can be side, area"),
    (dict(dist="beta"), "data.sizes.dist is 'beta'; it can be uniform, normal"),
    (dict(low=65, high=64), "0 < low <= high, in pixels, not low=65, high=64"),
    (dict(low=0), "0 < low <= high"),
    (dict(dist="normal", mean=9.0, std=0.1), "next to no mass in"),
    (dict(dist="normal", std=0.0), "next to no mass in"),
  ],
)
def test_sizes_refusals(kwargs, message):
  with pytest.raises(ValueError, match=message):
    Sizes(**kwargs)


def test_native_sizes_are_not_drawn():
  with pytest.raises(ValueError, match="read from the files, not drawn"):
    Sizes("native").tokens(rng(), 3, patch=16)


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    (dict(law="gamma"), "data.drop.law is 'gamma'; it can be none, constant"),
    (dict(law="constant"), r"exactly the settings \['rate'\], not \[\]"),
    (dict(law="none", rate=0.5), r"exactly the settings \[\], not \['rate'\]"),
    (dict(law="constant", rate=1.0), r"data.drop.rate is a share .* not 1.0"),
    (dict(law="beta", max=0.4, mean=0.4), "needs 0 < mean < max"),
    (
      dict(law="resolution", min=0.1, max=0.9, s_min=64, s_max=64),
      "needs 0 < s_min < s_max, in tokens",
    ),
    (
      dict(law="schedule", min=0.1, max=0.9, mu=0.5, tau=0),
      "data.drop.tau must not be 0",
    ),
  ],
)
def test_drop_refusals(kwargs, message):
  with pytest.raises(ValueError, match=message):
    Drop(**kwargs)
