"""The image operations against Pillow, jax, scipy and torchvision."""

import io
import pickle
import struct
import zlib

import cv2
import jax
import numpy as np
import pytest
from PIL import Image
from scipy import stats

from big_vision_like.data import augment, ops

RNG = np.random.default_rng(0)  # for ops that do not draw


def noise(*shape, seed=0, dtype=np.uint8):
  high = np.iinfo(dtype).max
  rng = np.random.default_rng(seed)
  return rng.integers(0, high, shape, dtype=dtype, endpoint=True)


def encoded(image, format, **kwargs):
  file = io.BytesIO()
  image = image if isinstance(image, Image.Image) else Image.fromarray(image)
  image.save(file, format, **kwargs)
  return file.getvalue()


def by_pillow(data):
  return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def rotated_by_exif():
  exif = Image.Exif()
  exif[0x0112] = 6  # "turn by 90 degrees"
  return encoded(noise(31, 43, 3), "JPEG", exif=exif)


def palette_with_transparency():
  image = Image.fromarray(noise(13, 17, 3)).quantize(16)
  image.info["transparency"] = bytes(range(16))
  return encoded(image, "PNG")


def animation(format):
  frames = [Image.fromarray(noise(13, 17, 3, seed=s)) for s in range(3)]
  return encoded(
    frames[0], format, save_all=True, append_images=frames[1:], lossless=True
  )


UNUSUAL = {
  "jpeg": lambda: encoded(noise(31, 43, 3), "JPEG", quality=92),
  "progressive": lambda: encoded(noise(31, 43, 3), "JPEG", progressive=True),
  "grey jpeg": lambda: encoded(noise(31, 43), "JPEG"),
  "cmyk jpeg": lambda: encoded(
    Image.fromarray(noise(31, 43, 4), "CMYK"), "JPEG"
  ),
  "exif jpeg": rotated_by_exif,
  "png": lambda: encoded(noise(13, 17, 3), "PNG"),
  "grey png": lambda: encoded(noise(13, 17), "PNG"),
  "rgba png": lambda: encoded(noise(13, 17, 4), "PNG"),
  "grey alpha png": lambda: encoded(
    Image.fromarray(noise(13, 17, 4)).convert("LA"), "PNG"
  ),
  "palette png": lambda: encoded(
    Image.fromarray(noise(13, 17, 3)).quantize(16), "PNG"
  ),
  "transparent palette png": palette_with_transparency,
  "one-bit png": lambda: encoded(
    Image.fromarray(noise(13, 17)).convert("1"), "PNG"
  ),
  "animated png": lambda: animation("PNG"),
  "animated gif": lambda: animation("GIF"),
  "animated webp": lambda: animation("WEBP"),
  "bmp": lambda: encoded(noise(13, 17, 3), "BMP"),
  "tiff": lambda: encoded(noise(13, 17, 3), "TIFF"),
  "1x1 jpeg": lambda: encoded(noise(1, 1, 3), "JPEG"),
  "1xN jpeg": lambda: encoded(noise(1, 997, 3), "JPEG"),
  "Nx1 png": lambda: encoded(noise(997, 1, 3), "PNG"),
}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("kind", UNUSUAL)
def test_decode_agrees_with_pillow(kind):
  data = UNUSUAL[kind]()
  image = ops.decode(data)
  assert image.dtype == np.uint8
  assert image.shape[:2] == ops.image_hw(data)
  np.testing.assert_array_equal(image, by_pillow(data))


def test_decode_leaves_the_exif_rotation_alone():
  assert ops.decode(rotated_by_exif()).shape == (31, 43, 3)


def test_decode_takes_the_first_frame_of_an_animation():
  # PNG is lossless: the frame itself, not only what Pillow makes of the file.
  np.testing.assert_array_equal(
    ops.decode(animation("PNG")), noise(13, 17, 3, seed=0)
  )


@pytest.mark.parametrize("shape", [(13, 17), (13, 17, 3)])
def test_decode_takes_the_upper_half_of_16_bits(shape):
  image = noise(*shape, dtype=np.uint16)
  data = cv2.imencode(".png", image[..., ::-1] if len(shape) == 3 else image)
  expected = (image >> 8).astype(np.uint8).reshape(13, 17, -1)
  np.testing.assert_array_equal(
    ops.decode(data[1].tobytes()), np.broadcast_to(expected, (13, 17, 3))
  )


def png_of_size(width, height):
  """A whole PNG, but for its pixels."""
  ihdr = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  chunks = [(b"IHDR", ihdr), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
  return b"\x89PNG\r\n\x1a\n" + b"".join(
    struct.pack(">I", len(data))
    + kind
    + data
    + struct.pack(">I", zlib.crc32(kind + data))
    for kind, data in chunks
  )


BROKEN = {
  "empty": (b"", "The file is empty"),
  "text": (b"To whom it may concern,\n" * 99, "Not an image"),
  "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "Not an"),
  "truncated jpeg": (UNUSUAL["jpeg"]()[:-400], "pixels: .* truncated"),
  "truncated png": (UNUSUAL["png"]()[:-200], "pixels: .* truncated"),
  "truncated webp": (UNUSUAL["animated webp"]()[:-200], "Cannot|Not an image"),
  "cut header": (UNUSUAL["jpeg"]()[:60], "Cannot|Not an image"),
  "bomb": (png_of_size(60_000, 60_000), "DecompressionBomb.*3600000000 pixels"),
  "no pixels": (png_of_size(17, 13), "Cannot decode the pixels"),
  "no width": (png_of_size(0, 13), "Not an image"),
  "floats": (encoded(np.ones((5, 7), np.float32), "TIFF"), "Floating-point"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_images_say_why(kind):
  data, reason = BROKEN[kind]
  with pytest.raises(ops.BrokenImage, match=reason):
    ops.decode(data)


def test_a_missing_file_is_a_broken_image(tmp_path):
  with pytest.raises(ops.BrokenImage, match="No such file"):
    ops.image_hw(tmp_path / "no.jpg")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_bytes_are_decoded_or_refused_and_nothing_else():
  rng = np.random.default_rng(0)
  refused = 0
  for kind in UNUSUAL:
    for _ in range(20):
      data = bytearray(UNUSUAL[kind]())
      for place in rng.integers(len(data), size=5):
        data[place] = rng.integers(256)
      try:
        image = ops.decode(bytes(data))
      except ops.BrokenImage:
        refused += 1
        continue
      assert image.dtype == np.uint8
      assert image.shape[2:] == (3,)
  assert 20 < refused < 20 * len(UNUSUAL)


def test_arrays_pass_through_when_they_are_images():
  image = noise(5, 7, 3)
  assert ops.decode(image) is image


@pytest.mark.parametrize(
  "array",
  [
    np.zeros((5, 7, 3), np.float32),
    noise(5, 7),
    noise(5, 7, 4),
    noise(0, 7, 3),
    noise(2, 5, 7, 3),
  ],
)
def test_other_arrays_are_refused(array):
  with pytest.raises(ValueError, match=r"must be uint8 \[H,W,3\]"):
    ops.decode(array)


@pytest.mark.parametrize(
  ("before", "after"),
  [
    ((211, 307), (101, 97)),
    ((211, 307), (199, 31)),
    ((53, 71), (211, 307)),  # both sides grow
    ((53, 71), (211, 71)),
    ((53, 71), (97, 29)),  # one grows, one shrinks
    ((1, 211), (13, 17)),
    ((31, 37), (1, 1)),
  ],
)
def test_resize_is_the_antialiased_bilinear_of_jax(before, after):
  image = noise(*before, 3)
  expected = jax.image.resize(
    image.astype(np.float32), (*after, 3), "bilinear", antialias=True
  )
  # Pillow and OpenCV round to 8 bits, Pillow after each of the two axes.
  np.testing.assert_allclose(
    ops.resize(image, *after).astype(np.float32), expected, atol=1.5, rtol=0
  )


def test_resize_of_a_box_is_that_of_the_crop():
  image = noise(53, 71, 3)
  np.testing.assert_array_equal(
    ops.resize(image, 17, 19, box=(11, 7, 47, 43)),
    ops.resize(image[7:43, 11:47], 17, 19),
  )


def test_resize_to_the_same_size_is_the_image_itself():
  image = noise(53, 71, 3)
  assert ops.resize(image, 53, 71) is image


def scene():
  """Two filled rectangles whose boxes and masks say the same."""
  image = np.zeros((30, 40, 3), np.uint8)
  mask = np.zeros((30, 40), np.uint8)
  boxes = np.array([[2, 3, 9, 11], [21, 12, 33, 27]], np.float32)
  for i, (x0, y0, x1, y1) in enumerate(boxes.astype(int), start=1):
    mask[y0:y1, x0:x1] = i
    image[y0:y1, x0:x1] = 100 * i
  return {
    "id": 3,
    "image": image,
    "label": 5,
    "instance_mask": mask,
    "semantic_mask": np.array([0, 8, 6], np.uint8)[mask],
    "objects": {"boxes": boxes, "label": np.array([7, 5], np.int32)},
  }


def extents(mask, value):
  rows = np.flatnonzero((mask == value).any(axis=1))
  cols = np.flatnonzero((mask == value).any(axis=0))
  return [cols[0], rows[0], cols[-1] + 1, rows[-1] + 1]


def assert_aligned(example):
  """Image, boxes and both masks show each object in the same place."""
  assert example["image"].shape[:2] == example["instance_mask"].shape
  for i, box in enumerate(example["objects"]["boxes"], start=1):
    label = example["objects"]["label"][i - 1]
    np.testing.assert_allclose(extents(example["instance_mask"], i), box)
    np.testing.assert_allclose(
      extents(example["semantic_mask"], label + 1), box
    )
    inside = example["image"][example["instance_mask"] == i]
    assert np.median(inside) == {7: 100, 5: 200}[label]


@pytest.mark.parametrize(
  "spec",
  [
    "flip_lr(1)",
    "flip_lr(1.0)|flip_lr(p=0)",
    "resize(60, 80)",
    "resize(90)|flip_lr(1)",
    "resize_small(60)",
    "center_crop(24, 36)",
    "random_crop(29, 37)",
    "random_resized_crop(60, scale=(1, 1))",
    "detr_resize(60)",
    "detr_crop(60, 37, 60, p=1)",
  ],
)
def test_boxes_and_masks_move_with_the_image(spec):
  before = scene()
  after = ops.parse(spec)(before, np.random.default_rng(0))
  assert len(after["objects"]["boxes"])
  if "random_resized" not in spec and "(90)" not in spec:
    assert_aligned(after)
  else:  # not by whole factors: an edge may fall inside a pixel
    for i, box in enumerate(after["objects"]["boxes"], start=1):
      shown = extents(after["instance_mask"], i)
      np.testing.assert_allclose(shown, box, atol=0.5)
  assert (after["id"], after["label"]) == (3, 5)
  np.testing.assert_array_equal(before["image"], scene()["image"])
  np.testing.assert_array_equal(
    before["objects"]["boxes"], scene()["objects"]["boxes"]
  )


def test_objects_outside_a_crop_are_dropped_and_the_rest_renumbered():
  example = ops._crop_resize(scene(), (18, 10, 38, 30), 40, 40)
  np.testing.assert_array_equal(example["objects"]["boxes"], [[6, 4, 30, 34]])
  np.testing.assert_array_equal(example["objects"]["label"], [5])
  assert set(np.unique(example["instance_mask"])) == {0, 1}
  assert_aligned(example)


def test_cut_objects_keep_what_is_inside():
  example = ops._crop_resize(scene(), (5, 5, 25, 25), 20, 20)
  np.testing.assert_array_equal(
    example["objects"]["boxes"], [[0, 0, 4, 6], [16, 7, 20, 20]]
  )
  assert_aligned(example)


def test_flip_mirrors_half_of_the_images():
  op = ops.parse("flip_lr")
  rng = np.random.default_rng(0)
  image = noise(5, 7, 3)
  flips = 0
  for _ in range(400):
    out = op({"image": image}, rng)["image"]
    flips += np.array_equal(out, image[:, ::-1])
    assert np.array_equal(out, image) or np.array_equal(out, image[:, ::-1])
  assert 160 < flips < 240  # four standard deviations


@pytest.mark.parametrize("hw", [(31, 43), (101, 67), (23, 23), (1, 29)])
def test_sizes(hw):
  example = {"image": noise(*hw, 3)}
  rng = np.random.default_rng(0)

  def shape(spec):
    return ops.parse(spec)(example, rng)["image"].shape

  assert shape("resize(19)") == (19, 19, 3)
  assert shape("resize(19, 13)") == (19, 13, 3)
  assert min(shape("resize_small(17)")[:2]) == 17
  assert shape("center_crop(29)") == (29, 29, 3)
  assert shape("random_crop(37, w=29)") == (37, 29, 3)
  assert shape("random_resized_crop(53)") == (53, 53, 3)


def test_resize_small_keeps_the_aspect_ratio():
  out = ops.parse("resize_small(37)")({"image": noise(74, 202, 3)}, RNG)
  assert out["image"].shape == (37, 101, 3)


def test_center_crop_is_the_middle():
  image = noise(31, 43, 3)
  out = ops.parse("center_crop(11, 13)")({"image": image}, RNG)["image"]
  np.testing.assert_array_equal(out, image[10:21, 15:28])


def test_random_crop_reaches_every_place():
  image = np.zeros((5, 7, 3), np.uint8)
  image[..., 0], image[..., 1] = np.indices((5, 7))
  op, rng = ops.parse("random_crop(3, 4)"), np.random.default_rng(0)
  corners = {
    tuple(op({"image": image}, rng)["image"][0, 0, :2]) for _ in range(200)
  }
  assert corners == {(y, x) for y in range(3) for x in range(4)}


def detr_size(h, w, size, longest):
  """DETR's arithmetic (datasets/transforms.py), in its order."""
  low, high = float(min(w, h)), float(max(w, h))
  if high / low * size > longest:
    size = round(longest * low / high)
  return (int(size * h / w), size) if w < h else (size, int(size * w / h))


def test_detr_resize_rounds_as_the_reference():
  rng = np.random.default_rng(0)
  for _ in range(300):
    h, w = (int(n) for n in rng.integers(7, 2000, 2))
    size, longest = (int(n) for n in rng.integers((100, 900), (900, 1400)))
    op = ops.parse(f"detr_resize({size}, {longest})")
    assert op.output_hw((h, w), RNG) == detr_size(h, w, size, longest)
  # Typical ones, one that is limited, a sliver.
  op = ops.parse("detr_resize(800, 1333)")
  for hw, after in (
    ((480, 640), (800, 1066)),
    ((640, 427), (1199, 800)),
    ((375, 1000), (500, 1333)),
    ((1, 5000), (1, 5000)),
  ):
    assert op.output_hw(hw, RNG) == after


def test_detr_ops_draw_as_the_paper_says():
  rng = np.random.default_rng(0)
  op = ops.parse("detr_resize((20, 30, 50), 70)")
  sides = [min(op.output_hw((101, 103), rng)) for _ in range(600)]
  counts = np.unique(sides, return_counts=True)
  assert counts[0].tolist() == [20, 30, 50]
  assert stats.chisquare(counts[1]).pvalue > 1e-3
  op = ops.parse("detr_crop((40, 50), 38, 60)")
  drawn = [op.output_hw((101, 202), rng) for _ in range(2000)]
  cropped = np.array([hw for hw in drawn if hw != (101, 202)])
  assert 900 < len(cropped) < 1100  # four standard deviations
  h, w = cropped.T
  # The image is 40 x 80 or 50 x 100: w is uniform, h a mixture of two.
  assert stats.chisquare(np.bincount(w - 38, minlength=23)).pvalue > 1e-3
  expected = np.array([1 / 3 + 1 / 13] * 3 + [1 / 13] * 10)
  expected *= len(h) / expected.sum()
  found = np.bincount(h - 38, minlength=13)
  assert stats.chisquare(found, expected).pvalue > 1e-3


def test_detr_crop_cuts_what_it_says():
  example = scene()
  op = ops.parse("detr_crop(60, 17, 37, p=1)")
  for seed in range(20):
    after = op(example, np.random.default_rng(seed))
    h, w = after["image"].shape[:2]
    assert 17 <= h <= 37
    assert 17 <= w <= 37
    # The image was enlarged by two, so that no edge lies inside a pixel.
    for i, box in enumerate(after["objects"]["boxes"], start=1):
      if (after["instance_mask"] == i).any():
        np.testing.assert_allclose(extents(after["instance_mask"], i), box)
    numbers = set(np.unique(after["instance_mask"]))
    assert numbers <= set(range(len(after["objects"]["label"]) + 1))


CHAINS = (
  "flip_lr|detr_crop((40, 50), 38, 60)|detr_resize((48, 52), 83)",
  "resize(29)|resize_small(31)|center_crop(17, 41)|flip_lr(1)",
  "random_crop(33)|color_jitter|random_resized_crop((21, 37))|flip_lr",
  "color_jitter|random_erasing(1)|random_crop(17)",
  "keep('objects')|resize_center_crop(19)|flip_lr|random_crop(7, 9)",
  "rand_augment(3)|detr_resize((30, 40))|rand_augment_torchvision|flip_lr",
)


def test_every_op_is_in_a_chain():
  named = "|".join(["decode", *CHAINS])
  assert all(name in named for name in ops.OPS)


@pytest.mark.parametrize("chain", CHAINS)
def test_a_dry_run_gives_the_real_size_and_draws_as_much(chain):
  op = ops.parse("decode|" + chain)
  moved = "rand_augment" not in chain  # which refuses boxes
  for seed in range(30):
    hw = np.random.default_rng([seed, 1]).integers(20, 90, 2).tolist()
    example = {"image": noise(*hw, 3, seed=seed)}
    if moved:
      boxes = np.array([[1, 2, 19, 17]], np.float32)
      example["objects"] = {"boxes": boxes, "label": np.array([3])}
    dry, real = np.random.default_rng(seed), np.random.default_rng(seed)
    if "keep" in chain:
      op = ops.parse(chain.replace("keep('objects')", "keep('image')"))
    after = op(example, real)
    assert op.output_hw(tuple(hw), dry) == after["image"].shape[:2]
    assert dry.random() == real.random()


def test_a_blank_has_no_pixels_of_its_own():
  blank = augment.blank(40_000, 30_000)
  assert blank.shape == (40_000, 30_000, 3)
  assert augment.is_blank(ops.resize(blank, 7, 9, box=(3, 4, 2000, 3000)))
  # An image of one colour is an image.
  plain = np.broadcast_to(np.uint8(7), (5, 7, 3))
  assert not augment.is_blank(plain)
  assert (ops.resize(plain, 11, 13) == 7).all()


def test_an_absurd_aspect_ratio_is_a_broken_image():
  op = ops.parse("resize_small(3000)")
  with pytest.raises(ops.BrokenImage, match="3000 x 60000000"):
    op({"image": np.zeros((1, 20_000, 3), np.uint8)}, RNG)


def boxes(n, hw, scale, ratio, seed=0):
  rng = np.random.default_rng(seed)
  return np.array([ops._random_box(rng, *hw, scale, ratio) for _ in range(n)])


def shapes_of(boxes, hw):
  """Share of the area and log aspect ratio."""
  x0, y0, x1, y1 = boxes.T
  area = (y1 - y0) * (x1 - x0) / np.prod(hw)
  return area, np.log((x1 - x0) / (y1 - y0))


def test_random_resized_crop_draws_area_and_aspect_as_published():
  # No draw is rejected here, so that the distributions are the plain ones.
  hw, scale, ratio = (997, 997), (0.08, 0.5), (3 / 4, 4 / 3)
  drawn = boxes(2000, hw, scale, ratio)
  area, log_aspect = shapes_of(drawn, hw)
  spread = np.log(ratio[1]) - np.log(ratio[0])
  x0, y0, x1, y1 = drawn.T
  uniform = {
    "area": (area - 0.08) / 0.42,
    "aspect": (log_aspect - np.log(ratio[0])) / spread,
    "x": x0 / (997 - (x1 - x0)),
    "y": y0 / (997 - (y1 - y0)),
  }
  for name, values in uniform.items():
    assert stats.kstest(values, "uniform").pvalue > 1e-3, name


@pytest.mark.parametrize(
  ("hw", "expected"),
  [
    ((1, 997), (498, 0, 499, 1)),
    ((997, 1), (0, 498, 1, 499)),
    ((20, 100), (36, 0, 63, 20)),
  ],
)
def test_random_resized_crop_falls_back_to_the_centre(hw, expected):
  drawn = boxes(1, hw, (0.99, 1.0), (3 / 4, 4 / 3))
  np.testing.assert_array_equal(drawn[0], expected)


@pytest.mark.parity
@pytest.mark.parametrize("hw", [(211, 307), (307, 97), (40, 200)])
def test_random_resized_crop_is_distributed_as_torchvisions(hw):
  import torch
  from torchvision import transforms

  scale, ratio = (0.08, 1.0), (3 / 4, 4 / 3)
  image = torch.zeros(3, *hw)
  torch.manual_seed(0)
  theirs = []
  for _ in range(2000):
    y, x, h, w = transforms.RandomResizedCrop.get_params(
      image, list(scale), list(ratio)
    )
    theirs.append((x, y, x + w, y + h))
  theirs, ours = np.array(theirs), boxes(2000, hw, scale, ratio)
  for a, b in zip(shapes_of(ours, hw), shapes_of(theirs, hw), strict=True):
    assert stats.ks_2samp(a, b).pvalue > 1e-3
  for a, b in zip(ours.T, theirs.T, strict=True):
    assert stats.ks_2samp(a, b).pvalue > 1e-3


def test_parse_is_the_ops_one_after_the_other():
  spec = "decode | random_resized_crop(23, ratio=(0.5, 2.0)) | flip_lr"
  op = pickle.loads(pickle.dumps(ops.parse(spec)))
  example = {"id": 1, "image": UNUSUAL["jpeg"](), "label": 3}
  image = ops.decode(example["image"])
  rng = np.random.default_rng(5)
  box = ops._random_box(rng, *image.shape[:2], (0.08, 1.0), (0.5, 2.0))
  expected = ops.resize(image, 23, 23, box=box)
  expected = expected[:, ::-1] if rng.random() < 0.5 else expected
  out = op(example, np.random.default_rng(5))
  np.testing.assert_array_equal(out["image"], expected)
  assert out["label"] == 3
  assert isinstance(example["image"], bytes)


def test_the_empty_string_does_nothing():
  example = {"image": b"?"}
  assert ops.parse("")(example, RNG) == example


def test_keep():
  example = {"id": 3, "image": 1, "label": 2, "caption": "a | b"}
  kept = ops.parse("keep('image', 'label')")(example, RNG)
  assert kept == {"id": 3, "image": 1, "label": 2}
  with pytest.raises(ValueError, match=r"asks for \['lable'\].*'label'"):
    ops.parse("keep('image', 'lable')")(example, RNG)


def test_ops_on_undecoded_images_say_what_is_missing():
  with pytest.raises(ValueError, match="put `decode` first"):
    ops.parse("resize(3)")({"image": b"?"}, RNG)


REFUSED = {
  "decoed": "Unknown op 'decoed'.*Did you mean 'decode'.*resize_small",
  "decode|xyz": "Unknown op 'xyz' in 'decode|xyz'. There are: decode, resize",
  "resize": r"resize\(h, w=None\): missing a required argument: 'h'",
  "resize(1, 2, 3)": r"resize\(h, w=None\): too many positional",
  "resize(size=3)": r"resize\(h, w=None\): ",
  "resize(0)": "h is a positive whole number; got 0",
  "resize(2.5)": "h is a positive whole number; got 2.5",
  "resize(True)": "h is a positive whole number; got True",
  "resize(3, 'x')": "w is a positive whole number or None; got 'x'",
  "flip_lr(2)": "p is a number from 0 to 1; got 2",
  "random_resized_crop(9, (1, 0.5))": "scale is two numbers .* got",
  "random_resized_crop(9, scale=1)": "scale is two numbers .* got 1",
  "random_resized_crop(9, ratio=(0, 1))": "ratio is two numbers .* got",
  "keep(3)": "keys is a string; got 3",
  "decode||flip_lr": "Cannot read the ops 'decode||flip_lr'",
  "decode|": "Cannot read",
  "decode,flip_lr": "Cannot read",
  "resize(n)": "Cannot read.*literal arguments",
  "resize(2**9)": "Cannot read.*literal arguments",
  "resize(__import__('os').getpid())": "Cannot read.*literal arguments",
  "resize(*[3])": "Cannot read",
  "decode(**{'a': 1})": r"decode\(\)",
  "os.getpid()": "Cannot read",
  "'decode'": "Cannot read",
  "\0": "Cannot read",
}


@pytest.mark.parametrize("spec", REFUSED)
def test_refusals(spec):
  pattern = REFUSED[spec].replace("|", r"\|")
  with pytest.raises(ValueError, match=pattern):
    ops.parse(spec)
