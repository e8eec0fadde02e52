"""The augmentations against timm and torchvision, on the same drawn numbers."""

import pickle
import random

import numpy as np
import pytest
from PIL import Image

from big_vision_like.data import augment, ops

RNG = np.random.default_rng(0)


def photograph(h=47, w=61, seed=0):
  """Smooth colours with a little noise: every operation changes it."""
  rng = np.random.default_rng(seed)
  small = Image.fromarray(rng.integers(20, 230, (5, 7, 3), dtype=np.uint8))
  image = np.asarray(small.resize((w, h), Image.Resampling.BICUBIC), np.int16)
  noise = rng.integers(-5, 6, (h, w, 3))
  return np.clip(image + noise, 0, 255).astype(np.uint8)


def run(spec, image, seed=0, **example):
  example = {"id": 0, "image": image, **example}
  return ops.parse(spec)(example, np.random.default_rng(seed))


class Recorder:
  """A generator that keeps what was drawn from it, in order."""

  def __init__(self, seed):
    self._rng, self.drawn = np.random.default_rng(seed), []

  def __getattr__(self, name):
    draw = getattr(self._rng, name)

    def recorded(*args, **kwargs):
      value = draw(*args, **kwargs)
      self.drawn.append((name, value))
      return value

    return recorded

  def take(self, *names):
    """The next of the drawn numbers, which has to be of a given kind."""
    name, value = self.drawn.pop(0)
    assert name in names
    return value


# timm's names of our operations, in the order of timm's table.
TIMM = {
  "auto_contrast": "AutoContrast",
  "equalize": "Equalize",
  "invert": "Invert",
  "rotate": "Rotate",
  "posterize": "PosterizeIncreasing",
  "solarize": "SolarizeIncreasing",
  "solarize_add": "SolarizeAdd",
  "color": "ColorIncreasing",
  "contrast": "ContrastIncreasing",
  "brightness": "BrightnessIncreasing",
  "sharpness": "SharpnessIncreasing",
  "shear_x": "ShearX",
  "shear_y": "ShearY",
  "translate_x": "TranslateXRel",
  "translate_y": "TranslateYRel",
}


@pytest.mark.parity
def test_the_operations_are_timms_in_timms_order():
  from timm.data import auto_augment

  assert list(augment.OPERATIONS) == list(TIMM)
  assert list(TIMM.values()) == auto_augment._RAND_INCREASING_TRANSFORMS
  plain = [n.removesuffix("Increasing") for n in TIMM.values()]
  assert plain == auto_augment._RAND_TRANSFORMS


def replayed(monkeypatch, recorder, timm_ops):
  """Lets timm draw what the recorder drew."""
  from timm.data import auto_augment

  replay = type("replay", (), {})
  replay.random = lambda: recorder.take("random")
  replay.gauss = lambda mean, std: recorder.take("normal")
  monkeypatch.setattr(auto_augment, "random", replay)
  choice = lambda ops, n, **_: [timm_ops[i] for i in recorder.take("integers")]
  monkeypatch.setattr(np.random, "choice", choice)


def posterize(image, bits, **kwargs):
  """timm's, but for 0 bits: black once, and refused by Pillow now."""
  from timm.data import auto_augment

  if bits == 0:
    return Image.new("RGB", image.size)
  return auto_augment.posterize(image, bits, **kwargs)


@pytest.mark.parity
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
  ("spec", "increasing", "settings"),
  [
    ("rand-m9-mstd0.5-inc1", True, ()),
    ("rand-m9-mstd0.5-inc0", False, (2, 9, 0.5, 0.5, False)),
    ("rand-m5-n4-mstd3-p0.8-inc1", True, (4, 5, 3.0, 0.8, True)),
    ("rand-m7-n3-mstd0-inc1", True, (3, 7, 0.0)),
  ],
)
def test_rand_augment_is_timms_bitwise(
  monkeypatch, spec, increasing, settings, interpolation
):
  """Whole chains: the same draws in the same order give the same bytes."""
  from timm.data import auto_augment

  hparams = {
    "translate_const": 100,
    "img_mean": (124, 116, 104),
    "interpolation": augment.RESAMPLING[interpolation],
  }
  theirs = auto_augment.rand_augment_transform(spec, hparams)
  for op in theirs.ops:
    if op.name.startswith("Posterize"):
      op.aug_fn = posterize
  names, changed = set(), 0
  for seed in range(60):
    image = photograph(seed=seed)
    recorder = Recorder(seed)
    example = {"id": 0, "image": image}
    ours = augment.rand_augment(
      example, recorder, *settings, interpolation=interpolation
    )["image"]
    names |= {theirs.ops[i].name for i in recorder.drawn[0][1]}
    with monkeypatch.context() as patched:
      replayed(patched, recorder, theirs.ops)
      expected = np.asarray(theirs(Image.fromarray(image)))
    assert not recorder.drawn
    np.testing.assert_array_equal(ours, expected)
    changed += not np.array_equal(ours, image)
  assert names == {op.name for op in theirs.ops}
  assert any("Increasing" in name for name in names) == increasing
  assert changed > 30


@pytest.mark.parity
@pytest.mark.parametrize("increasing", [True, False])
@pytest.mark.parametrize("name", TIMM)
def test_what_a_magnitude_means_is_timms(monkeypatch, name, increasing):
  from timm.data import auto_augment

  theirs = TIMM[name] if increasing else TIMM[name].removesuffix("Increasing")
  level_fn = auto_augment.LEVEL_TO_ARG[theirs]
  for magnitude in (0.0, 0.7, 2.5, 4.99, 9.0, 10.0):
    for seed in range(4):
      value = augment.argument(
        name, magnitude, np.random.default_rng(seed), increasing=increasing
      )
      if level_fn is None:
        assert value == 0.0
        continue
      draw = np.random.default_rng(seed)
      monkeypatch.setattr(random, "random", draw.random)
      # The order of multiplication differs: one unit in the last place.
      (expected,) = level_fn(magnitude, {})
      np.testing.assert_allclose(value, expected, rtol=1e-15)
      assert isinstance(value, int) == isinstance(expected, int)


def test_rand_augment_draws_as_its_settings_say():
  recorder, n = Recorder(3), 4000
  image = photograph(2, 2)
  for _ in range(n):
    augment.rand_augment({"image": image}, recorder, mstd=2.0)
  counts = np.zeros(15)
  for name, value in recorder.drawn:
    if name == "integers":
      assert value.shape == (2,)
      np.add.at(counts, value, 1)
  magnitudes = [v for name, v in recorder.drawn if name == "normal"]
  # Four standard deviations of each count and of the mean.
  expected = 2 * n / 15
  assert np.abs(counts - expected).max() < 4 * np.sqrt(expected)
  assert abs(len(magnitudes) - n) < 4 * np.sqrt(n / 2)
  assert abs(np.mean(magnitudes) - 9) < 4 * 2 / np.sqrt(n)
  assert abs(np.std(magnitudes) - 2) < 4 * 2 / np.sqrt(2 * n)


@pytest.mark.parametrize("op", ["rand_augment", "rand_augment_torchvision"])
def test_rand_augment_refuses_boxes(op):
  with pytest.raises(ValueError, match=r"leave behind \['objects'\]"):
    run(op, photograph(), objects={"boxes": np.zeros((1, 4))})


# torchvision's names of our operations, in the order of its table.
TORCHVISION = {
  "identity": "Identity",
  "shear_x": "ShearX",
  "shear_y": "ShearY",
  "translate_x": "TranslateX",
  "translate_y": "TranslateY",
  "rotate": "Rotate",
  "brightness": "Brightness",
  "color": "Color",
  "contrast": "Contrast",
  "sharpness": "Sharpness",
  "posterize": "Posterize",
  "solarize": "Solarize",
  "auto_contrast": "AutoContrast",
  "equalize": "Equalize",
}


def of_torchvision(num_ops, magnitude, interpolation="bilinear", fill=None):
  from torchvision import transforms

  mode = transforms.InterpolationMode(interpolation)
  return transforms.RandAugment(
    num_ops, magnitude, interpolation=mode, fill=fill
  )


@pytest.mark.parity
@pytest.mark.parametrize("name", TORCHVISION)
def test_each_operation_is_torchvisions_bitwise(name):
  """Its argument at every magnitude, and the image that it makes."""
  from torchvision.transforms import autoaugment

  theirs = of_torchvision(2, 9)
  assert list(augment.OPERATIONS_TORCHVISION) == list(TORCHVISION)
  for h, w in ((47, 61), (331, 662)):
    space = theirs._augmentation_space(31, (h, w))
    assert list(space) == list(TORCHVISION.values())
    values, signed = space[TORCHVISION[name]]
    image = photograph(h, w)
    for magnitude in range(31) if h < 331 else (1, 10, 30):
      value = float(values[magnitude]) if values.ndim else 0.0
      for sign in (1, -1) if signed else (1,):
        draw = type("draw", (), {"integers": lambda _, n, s=sign: s < 0})()
        ours = augment.argument_torchvision(name, magnitude, draw, h=h, w=w)
        canvas = augment.Canvas((0, 0, 0), Image.Resampling.BILINEAR)
        picture = Image.fromarray(image)
        got = augment._APPLY_TORCHVISION[name](picture, ours, canvas)
        expected = autoaugment._apply_op(
          picture, TORCHVISION[name], sign * value, theirs.interpolation, None
        )
        np.testing.assert_array_equal(
          np.asarray(got), np.asarray(expected), err_msg=f"{magnitude} {sign}"
        )


@pytest.mark.parity
@pytest.mark.parametrize(
  ("settings", "fill"),
  [((2, 9), None), ((3, 30, (9, 80, 200), "bicubic"), [9, 80, 200])],
)
def test_rand_augment_is_torchvisions_bitwise(monkeypatch, settings, fill):
  """Whole chains: the same draws in the same order give the same bytes."""
  import torch

  theirs = of_torchvision(*settings[:2], *settings[3:], fill=fill)
  changed = 0
  for seed in range(40):
    image = photograph(seed=seed)
    recorder = Recorder(seed)
    ours = augment.rand_augment_torchvision(
      {"id": 0, "image": image}, recorder, *settings
    )["image"]
    with monkeypatch.context() as patched:
      take = lambda high, size, r=recorder: torch.tensor([r.take("integers")])
      patched.setattr(torch, "randint", take)
      expected = np.asarray(theirs(Image.fromarray(image)))
    assert not recorder.drawn
    np.testing.assert_array_equal(ours, expected)
    changed += not np.array_equal(ours, image)
  assert changed > 20


@pytest.mark.parity
def test_color_jitter_is_torchvisions_bitwise(monkeypatch):
  import torch
  from torchvision import transforms

  theirs = transforms.ColorJitter(0.4, 0.3, 0.2)
  for seed in range(20):
    image = photograph(seed=seed)
    recorder = Recorder(seed)
    ours = augment.color_jitter(
      {"image": image}, recorder, brightness=0.4, contrast=0.3, saturation=0.2
    )["image"]
    order = recorder.take("permutation")
    factors = [recorder.take("uniform") for _ in range(3)]
    by_kind = [factors[list(order).index(kind)] for kind in range(3)]
    fixed = (torch.tensor([*order.tolist(), 3]), *by_kind, None)
    monkeypatch.setattr(theirs, "get_params", lambda *_, f=fixed: f)
    expected = np.asarray(theirs(Image.fromarray(image)))
    np.testing.assert_array_equal(ours, expected)
    # What torchvision draws from, for the same settings.
    for kind, width in enumerate((0.4, 0.3, 0.2)):
      assert 1 - width <= by_kind[kind] <= 1 + width


@pytest.mark.parity
def test_erased_boxes_are_timms(monkeypatch):
  import torch
  from timm.data import random_erasing

  for seed in range(60):
    h, w = (31, 47) if seed % 2 else (64, 9)
    recorder = Recorder(seed)
    box = augment.erased_box(
      recorder, h, w, area=(0.02, 1 / 3), aspect=(0.3, 1 / 0.3)
    )
    theirs = random_erasing.RandomErasing(1.0, mode="pixel", device="cpu")
    replay = type("replay", (), {})
    replay.random = lambda: 0.0
    replay.uniform = lambda low, high, r=recorder: r.take("uniform")
    replay.randint = lambda low, high, r=recorder: r.take("integers")
    image = torch.zeros(3, h, w)
    # timm draws the area first and scales it, as we do.
    with monkeypatch.context() as patched:
      patched.setattr(random_erasing, "random", replay)
      theirs(image)
    assert not recorder.drawn
    erased = np.argwhere(image.numpy()[0])
    if box is None:
      assert not len(erased)
      continue
    y, x, height, width = box
    # Noise is nowhere exactly 0.
    np.testing.assert_array_equal(erased.min(0), [y, x])
    np.testing.assert_array_equal(erased.max(0) + 1, [y + height, x + width])
    assert len(erased) == height * width


def test_random_erasing_writes_the_noise_of_the_normalised_image():
  image = np.full((96, 96, 3), 7, np.uint8)
  erased = []
  for seed in range(40):
    out = run("random_erasing(1.0, (0.3, 0.3), (1, 1))", image, seed)["image"]
    ys, xs = np.nonzero((out != 7).any(-1))
    assert np.ptp(ys) == np.ptp(xs) == round(np.sqrt(0.3 * 96 * 96)) - 1
    box = out[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    erased.append(box.reshape(-1, 3))
  mean, std = np.array(augment.IMAGENET_MEAN), np.array(augment.IMAGENET_STD)
  z = (np.concatenate(erased) / 255 - mean) / std
  # Black is at -1.80 in blue: the noise is whole up to there.
  inside = np.abs(z) < 1.75
  # P(|N| < 1.75) = 0.91988. Half a byte is 0.0087 wide, which moves 0.0015 of
  # the numbers over an edge at most; of 337,000, four deviations are 0.0019.
  assert abs(inside.mean() - 0.91988) < 0.0015 + 0.0019
  # Four deviations of the mean are 0.006, an uneven edge moves it by 0.003.
  assert np.abs(z[inside].mean()) < 0.009
  assert (image == 7).all()


def test_random_erasing_happens_with_its_probability():
  image = photograph()
  kept = sum(
    np.array_equal(run("random_erasing(0.25)", image, s)["image"], image)
    for s in range(400)
  )
  assert abs(kept - 300) < 4 * np.sqrt(400 * 0.25 * 0.75)


@pytest.mark.parametrize(
  "spec",
  [
    "rand_augment",
    "rand_augment_torchvision",
    "color_jitter",
    "random_erasing(1.0)",
  ],
)
def test_the_seed_alone_decides_and_the_example_stays(spec):
  image = photograph()
  before = image.copy()
  image.flags.writeable = False
  op = pickle.loads(pickle.dumps(ops.parse(spec)))
  outs = [
    op({"image": image}, np.random.default_rng(seed))["image"]
    for seed in (5, 5, *range(6, 16))
  ]
  np.testing.assert_array_equal(outs[0], outs[1])
  assert len({o.tobytes() for o in outs}) > 4
  for out in outs:
    assert out.dtype == np.uint8
    assert out.shape == image.shape
  np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize(
  ("spec", "sentence"),
  [
    ("rand_augment(0)", "num_ops is a positive whole number"),
    ("rand_augment(magnitude=11)", "magnitude is a number from 0 to 10"),
    (
      "rand_augment_torchvision(2, 31)",
      "magnitude is a whole number from 0 to 30",
    ),
    ("rand_augment(increasing=1)", "increasing is True or False"),
    ("rand_augment(fill=(1, 2))", "fill is three numbers"),
    ("rand_augment(interpolation='area')", "one of bilinear, bicubic"),
    ("random_erasing(2.0)", "p is a number from 0 to 1"),
    ("random_resized_crop((3, 0))", "size is a positive whole number, or two"),
    ("resize_center_crop(3, 0)", "crop_pct is a number above 0 and at most 1"),
  ],
)
def test_refusals(spec, sentence):
  with pytest.raises(ValueError, match=sentence):
    ops.parse(spec)


@pytest.mark.parametrize("op", ["rand_augment", "color_jitter"])
def test_undecoded_images_say_what_is_missing(op):
  with pytest.raises(ValueError, match="put `decode` first"):
    run(op, b"?")


def test_a_crop_of_two_sides():
  image = photograph()
  out = run("random_resized_crop((13, 29))", image, 3)["image"]
  rng = np.random.default_rng(3)
  box = ops._random_box(rng, 47, 61, (0.08, 1.0), (3 / 4, 4 / 3))
  np.testing.assert_array_equal(out, ops.resize(image, 13, 29, box=box))


@pytest.mark.parity
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_random_resized_crop_is_torchvisions(interpolation):
  from torchvision.transforms import InterpolationMode
  from torchvision.transforms import functional as F

  mode = InterpolationMode(interpolation)
  worst = 0
  for seed in range(12):
    image = photograph(97, 113, seed=seed)
    spec = f"random_resized_crop(31, interpolation='{interpolation}')"
    ours = run(spec, image, seed)["image"]
    rng = np.random.default_rng(seed)
    x0, y0, x1, y1 = ops._random_box(rng, 97, 113, (0.08, 1.0), (3 / 4, 4 / 3))
    expected = F.resized_crop(
      Image.fromarray(image), y0, x0, y1 - y0, x1 - x0, [31, 31], mode
    )
    error = np.abs(ours.astype(int) - np.asarray(expected).astype(int)).max()
    worst = max(worst, int(error))
  # Bilinear enlargement is OpenCV's, which rounds its weights differently.
  assert worst <= (1 if interpolation == "bilinear" else 0)


@pytest.mark.parity
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 0.95, 1.0])
def test_resize_center_crop_is_timms_evaluation(crop_pct, interpolation):
  from timm.data import transforms_factory

  for hw in ((97, 113), (113, 97), (64, 65), (211, 50), (40, 41), (32, 99)):
    for size in (32, 37):
      image = photograph(*hw)
      ours = run(
        f"resize_center_crop({size}, {crop_pct}, '{interpolation}')", image
      )["image"]
      theirs = transforms_factory.transforms_imagenet_eval(
        size, crop_pct=crop_pct, interpolation=interpolation, normalize=False
      )(Image.fromarray(image))
      expected = theirs.numpy().transpose(1, 2, 0)
      assert ours.shape == expected.shape
      error = np.abs(ours.astype(int) - expected.astype(int)).max()
      # See above: OpenCV enlarges where the image is smaller.
      enlarged = interpolation == "bilinear" and min(hw) < size / crop_pct
      assert error <= (1 if enlarged else 0), (hw, size)


def test_resize_small_takes_an_interpolation():
  image = photograph(97, 113)
  out = run("resize_small(40, 'bicubic')", image)["image"]
  bicubic = Image.fromarray(image).resize((47, 40), Image.Resampling.BICUBIC)
  np.testing.assert_array_equal(out, np.asarray(bicubic))
