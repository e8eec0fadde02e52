"""What the pictures of objects show, read from the figures."""

import numpy as np
import pytest
from matplotlib import colors, image

from big_vision_like import object_pictures, pictures, postprocess
from big_vision_like.evaluators import detections

NAMES = ("ant", "bee", "cat")


@pytest.fixture
def figures(monkeypatch):
  saved, save = [], pictures.save_figure

  def remember(figure, path):
    saved.append(figure)
    save(figure, path)

  monkeypatch.setattr(pictures, "save_figure", remember)
  return saved


def shown(axes):
  """The image, the corners of boxes, their colours and the texts."""
  boxes = [
    [*np.min(x.get_xydata(), 0), *np.max(x.get_xydata(), 0)] for x in axes.lines
  ]
  palette = [x.get_color() for x in axes.lines]
  texts = [x.get_text() for x in axes.texts]
  return axes.images[0].get_array(), boxes, palette, texts


def batch(masks=True):
  rng = np.random.default_rng(0)
  one = {
    "image": rng.integers(0, 256, (3, 32, 64, 3), np.uint8),
    "size": np.array([[20, 40], [0, 0], [32, 64]], np.int32),
    "boxes": np.zeros((3, 2, 4), np.float32),
    "box_label": np.array([[2, -1], [-1, -1], [0, 1]], np.int32),
    "_mask": np.array([True, False, True]),
  }
  one["boxes"][0, 0] = 0.5, 0.25, 0.5, 0.5
  one["boxes"][2] = [[0.25, 0.5, 0.5, 1], [0.75, 0.5, 0.5, 1]]
  if masks:
    one["box_id_map"] = np.zeros((3, 32, 64), np.uint8)
    one["box_id_map"][0, :10, 10:30] = 1
    one["box_id_map"][2, :, :32], one["box_id_map"][2, :, 32:] = 1, 2
  return one


def test_a_training_batch_has_its_boxes(figures, tmp_path):
  path = tmp_path / "batch.png"
  object_pictures.training_batch(batch(masks=False), path)
  (figure,) = figures
  first, second = (shown(axes) for axes in figure.axes)
  np.testing.assert_array_equal(first[0], batch()["image"][0, :20, :40])
  assert first[1:] == ([[10, 0, 30, 10]], [pictures.colour_of(2)], ["2"])
  assert second[1] == [[0, 0, 32, 32], [32, 0, 64, 32]]
  assert second[3] == ["0", "1"]
  assert image.imread(path)[..., :3].std() > 0.01
  object_pictures.training_batch(batch(), path)
  # Segments are drawn on images of 400 pixels at least.
  pixels = shown(figures[1].axes[0])[0].astype(int)
  assert pixels.shape == (200, 400, 3)
  border = pixels[100, 100:300]
  pixels = pixels[5::10, 5::10]
  before = batch()["image"][0, :20, :40].astype(int)
  inside = np.s_[1:9, 11:29]
  colour = 255 * np.array(colors.to_rgb(pictures.colour_of(2)))
  half = (before[inside] + colour) / 2
  np.testing.assert_allclose(pixels[inside], half, atol=1)
  np.testing.assert_array_equal(pixels[12:], before[12:])
  assert (border == 255).all()


class Batches:
  label_names, is_thing, asked = NAMES, None, None

  def __call__(self, **asked):
    self.asked = asked
    import jax.numpy as jnp

    one = batch(masks=False)
    yield {k: jnp.asarray(x) for k, x in one.items()}, {}


def test_truth_stands_beside_what_is_found(figures, tmp_path):
  def predict(lent):
    out = {k: np.asarray(x) for k, x in lent.items()}
    logits = np.float32(9 * np.eye(4)[[[1, 3], [0, 0], [2, 2]]])
    logits[2, 1] = 0  # of all alike: not drawn
    boxes = np.full((3, 2, 4), 0.5, np.float32)
    named = {"true_boxes": out["boxes"], "mask": out["_mask"]}
    return out | named | {"logits": logits, "boxes": boxes}

  lent = Batches()
  evaluator = detections.Evaluator(images=7)
  scores = evaluator.run(predict=predict, batches=lent, folder=tmp_path)
  assert scores == {}
  assert lent.asked == {"limit": 7}
  (figure,) = figures
  assert [a.get_title("left") for a in figure.axes] == ["true", "found"] * 2
  true, found, _, last = (shown(axes) for axes in figure.axes)
  assert true[1:] == ([[10, 0, 30, 10]], [pictures.colour_of(2)], ["cat"])
  assert found[1:] == ([[10, 5, 30, 15]], [pictures.colour_of(1)], ["bee 1.00"])
  assert last[3] == ["cat 1.00"]
  assert (tmp_path / "detections.png").is_file()
  detections.draw(
    predict=predict, batches=lent, folder=tmp_path, images=0, threshold=0
  )
  assert len(figures) == 1


def test_attention_has_the_colour_of_its_box(figures, tmp_path):
  found = postprocess.Found(
    *(np.arange(2), np.array([1, 1]), np.array([0.9, 0.8])),
    np.array([[0, 0, 5, 5], [10, 0, 20, 10.0]]),
  )
  drawn = object_pictures.found_objects(found, NAMES, by_class=False)
  pixels = np.full((10, 20, 3), 100, np.uint8)
  maps = np.zeros((2, 10, 20))
  maps[0, :5, :5], maps[1, 3, 11] = 1e-3, 0.2
  path = tmp_path / "attention.png"
  object_pictures.attention(pixels, drawn, maps, path)
  left, right = (shown(axes) for axes in figures[0].axes)
  np.testing.assert_array_equal(left[0], pixels)
  assert left[3] == ["bee 0.90", "bee 0.80"]
  assert right[2] == left[2] == [pictures.colour_of(0), pictures.colour_of(1)]
  for at, colour in (((2, 2), left[2][0]), ((3, 11), left[2][1])):
    want = 255 * np.array(colors.to_rgb(colour))
    np.testing.assert_allclose(right[0][at], want, atol=1)
  assert (right[0][7, 7] == 45).all()  # dimmed
  none = postprocess.objects(
    np.zeros((1, 4)), np.zeros((1, 4)), (10, 20), threshold=0.9
  )
  drawn = object_pictures.found_objects(none, NAMES)
  object_pictures.attention(pixels, drawn, np.zeros((0, 10, 20)), path)
