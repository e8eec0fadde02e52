"""Retrieval and zero-shot classification, on embeddings made by hand."""

import numpy as np
import pytest

from big_vision_like.evaluators import retrieval, zeroshot

E = 7


def unit(x):
  return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def recalls_by_definition(zimg, ztxt, text_id, k):
  """Loops over queries: equal texts are one, the best of its images counts."""
  texts = {i: ztxt[list(text_id).index(i)] for i in set(text_id)}
  to_text = []
  for z, own in zip(zimg, text_id):
    wrong = sum(t @ z >= texts[own] @ z for i, t in texts.items() if i != own)
    to_text.append(wrong < k)
  to_image = []
  for i, t in texts.items():
    best = max(z @ t for z, own in zip(zimg, text_id) if own == i)
    wrong = sum(z @ t >= best for z, own in zip(zimg, text_id) if own != i)
    to_image.append(wrong < k)
  return np.mean(to_text), np.mean(to_image)


def place(x, empty=0):
  """Up to four arrays in two rows of three slots."""
  out = np.full((6, *x.shape[1:]), empty, x.dtype)
  out[[0, 2, 3, 5][: len(x)]] = x
  return out.reshape(2, 3, *x.shape[1:])


class Data:
  """Lends pairs in packed batches of two rows with three slots each."""

  label_names = ("zero", "one", "two")

  def __init__(self, zimg, ztxt, text_id, label=None, prompts=None):
    self.arrays = dict(zimg=zimg, ztxt=ztxt)
    self.text_id, self.label, self.prompts = text_id, label, prompts

  def __call__(self, **overrides):
    for at in range(0, len(self.text_id), 4):
      part = slice(at, at + 4)
      n = len(self.text_id[part])
      batch = {k: place(x[part]) for k, x in self.arrays.items()}
      host = dict(
        text_id=place(np.asarray(self.text_id)[part], -1),
        example_id=place(np.arange(at, at + n), -1),
      )
      batch["mask"] = host["text_id"] >= 0
      if self.label is not None:
        batch["label"] = place(self.label[part], -1)
      yield batch, host

  def texts(self, texts):
    order = np.random.default_rng(0).permutation(len(texts))
    for i in order:
      z = np.zeros((2, 3, E), np.float32)
      ids = np.full((2, 3), -1)
      ids[1, 2], z[1, 2] = i, self.prompts.get(texts[i], np.ones(E))
      text_id = np.where(ids >= 0, i if texts[i].strip() else -1, -1)
      batch = dict(zimg=z * 0, ztxt=z, mask=ids < -1)
      yield batch, dict(example_id=ids, text_id=text_id)


def run(evaluator, data):
  return evaluator.run(predict=lambda x: x, batches=data, folder=None)


@pytest.mark.parametrize("block", [1024, 5])
def test_recall_is_that_of_the_definition(block, monkeypatch):
  monkeypatch.setattr(retrieval, "_BLOCK", block)
  rng = np.random.default_rng(0)
  text_id = rng.integers(0, 11, 31)
  ztxt = unit(rng.normal(size=(11, E)))[text_id]
  zimg = unit(ztxt + 0.5 * rng.normal(size=(31, E)))
  # Integers: sums in any order are equal, and so are ties.
  zimg, ztxt = np.round(4 * zimg), np.round(4 * ztxt)
  scores = run(retrieval.Evaluator(), Data(zimg, ztxt, text_id))
  assert scores["examples"] == 31
  assert scores["texts"] == len(set(text_id))
  for k in (1, 5, 10):
    found = scores[f"image_to_text_r{k}"], scores[f"text_to_image_r{k}"]
    expected = recalls_by_definition(zimg, ztxt, text_id, k)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
  assert 0.2 < scores["image_to_text_r1"] < 0.9


@pytest.mark.parametrize("value", [1.0, np.nan])
def test_a_model_that_says_the_same_of_all_finds_nothing(value):
  z = np.full((12, E), value, np.float32)
  scores = run(retrieval.Evaluator(ks=(1, 5)), Data(z, z, np.arange(12)))
  assert all(v == 0 for k, v in scores.items() if "_r" in k)


def test_images_without_a_text_are_left_out():
  z = unit(np.random.default_rng(0).normal(size=(9, E)))
  text_id = np.array([3, -1, 5, 6, -1, 8, 9, -1, 11])
  scores = run(retrieval.Evaluator(), Data(z, z, text_id))
  assert scores["examples"] == scores["texts"] == 6
  assert scores["image_to_text_r1"] == scores["text_to_image_r1"] == 1
  with pytest.raises(ValueError, match=r"images with texts.*none"):
    run(retrieval.Evaluator(), Data(z, z, np.full(9, -1)))


def test_zero_shot_takes_the_mean_of_prompts():
  rng = np.random.default_rng(0)
  templates, names = ("a {}", "the {} there"), Data.label_names
  prompts = {
    t.replace("{}", n): unit(rng.normal(size=E))
    for n in names
    for t in templates
  }
  zimg = unit(rng.normal(size=(23, E)))
  label = rng.integers(-1, 3, 23).astype(np.int32)
  # Without a text: an image needs a label only.
  data = Data(zimg, zimg * 0, np.full(23, -1), label, prompts)
  scores = run(zeroshot.Evaluator(templates=templates), data)
  mean = [prompts[f"a {n}"] + prompts[f"the {n} there"] for n in names]
  predicted = (zimg @ unit(np.stack(mean)).T).argmax(1)
  there = label >= 0
  assert scores["examples"] == there.sum() < 23
  assert scores["accuracy"] == (predicted == label)[there].mean()
  named = zeroshot.Evaluator(templates=templates, class_names=names[::-1])
  assert run(named, data)["accuracy"] == (
    (predicted == 2 - label)[there].mean()
  )


@pytest.mark.parametrize(
  ("kwargs", "label", "sentence"),
  [
    (dict(templates=("a photo",)), 0, r"sentences with \{\}.*'a photo'"),
    (dict(templates=()), 0, r"sentences with \{\}"),
    (dict(class_names=("a", "")), 0, r"prompt '' is an empty text"),
    (dict(class_names=("a",)), 2, r"label 2, but the model's logits.*1 class"),
    ({}, -1, "No image of the evaluation data carries a label"),
  ],
)
def test_zero_shot_refusals(kwargs, label, sentence):
  z = np.ones((2, E), np.float32)
  data = Data(z, z, np.arange(2), np.full(2, label, np.int32), {})
  with pytest.raises(ValueError, match=sentence):
    run(zeroshot.Evaluator(**dict(templates=("{}",)) | kwargs), data)
