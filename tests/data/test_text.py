"""Captions as tokens: tokenizers, rows that fit, what is wrong with texts."""

import dataclasses
import logging
import sys
from typing import ClassVar

import numpy as np
import pytest

from big_vision_like import api
from big_vision_like.data import batches, packing, pipeline, text
from big_vision_like.data.budgets import Drop, Sizes
from big_vision_like.data.text import TextSpec
from big_vision_like.data.tokenizers import bytes as bytes_lib
from big_vision_like.data.tokenizers import sentencepiece as sentencepiece_lib

EOS = bytes_lib.Tokenizer.eos
PACK = packing.PackSpec(length=61, patch=5, max_images=7)
CAPTIONS = (
  "a cat",
  None,
  "",
  "  \n ",
  "an owl that is so long that there is no room for all of its bytes",
  "\ufffdcaf",
  ["one", "another"],
  "a cat",
  "dog",
)


@dataclasses.dataclass(frozen=True)
class Pairs:
  """Noise with captions, of which some are wrong."""

  size: int = 90
  captions: tuple = CAPTIONS
  label_names: ClassVar[tuple[str, ...]] = ("a", "b")

  def __len__(self):
    return self.size

  def hw(self, index):
    return (7 + index % 11, 23 - index % 13)

  def __getitem__(self, index):
    image = np.random.default_rng(index).integers(0, 256, (*self.hw(index), 3))
    example = {"id": index, "image": image.astype(np.uint8), "label": index % 2}
    caption = self.captions[index % len(self.captions)]
    return example if caption is None else example | {"caption": caption}

  def name(self, index):
    return f"pair {index}"


def spec(**kwargs):
  return TextSpec(bytes_lib.Tokenizer(), **dict(length=19, row=48) | kwargs)


def decode(tokens):
  return bytes(t - 3 for t in tokens if t > 2).decode(errors="replace")


def read(caption, **kwargs):
  return spec(**kwargs).read(caption, np.random.default_rng(0))


def test_bytes_are_tokens():
  tokenizer = bytes_lib.Tokenizer()
  words = "Größe 象 \x00\x7f"
  assert decode(tokenizer(words)) == words
  assert max(tokenizer("\U0010ffff")) < tokenizer.vocab_size
  assert decode(tokenizer("a\ud83db")) == "a?b"  # half a surrogate pair


def test_a_tokenizer_from_a_file_needs_its_library(monkeypatch):
  monkeypatch.setitem(sys.modules, "sentencepiece", None)
  with pytest.raises(ValueError, match=r"big-vision-like\[text\]"):
    sentencepiece_lib.Tokenizer("spiece.model")


def test_a_text_ends_and_is_cut_before_its_end():
  assert read("abc").tokens.tolist() == [100, 101, 102, EOS]
  for n, cut in ((18, 0), (19, text.CUT), (300, text.CUT)):
    found = read("x" * n)
    assert found.flags == cut
    assert found.tokens.tolist() == [123] * 18 + [EOS]
    assert found.tokens.dtype == np.int32


def test_equal_texts_have_equal_ids():
  assert read("a  cat\n").id == read("a cat").id >= 0
  assert read("a cat").id != read("a cap").id
  assert read("A cat, here.").id != read("a cat here").id
  for clean, other in (("lower", "a cat, here."), ("canonical", "a cat here")):
    assert read("A cat, here.", clean=clean).id == read(other).id
  # What lies beyond the room of a text, the model never sees.
  assert read("x" * 40).id == read("x" * 41).id


@pytest.mark.parametrize(
  ("caption", "flags"),
  [
    (None, text.MISSING),
    ([], text.MISSING),
    ("", text.EMPTY),
    (" \n\t", text.EMPTY),
    ("caf\ufffd", text.BAD_ENCODING),
    ("a cat", 0),
  ],
)
def test_what_is_wrong_is_flagged(caption, flags):
  found = read(caption)
  assert found.flags == flags
  nothing = bool(flags & (text.MISSING | text.EMPTY))
  assert (len(found.tokens) == 0) == (found.id == -1) == nothing


def test_rows_cut_the_longest_first():
  """Against the definition, one token at a time."""
  rng = np.random.default_rng(0)
  for _ in range(200):
    lengths = rng.integers(0, 23, rng.integers(1, 9))
    room = int(rng.integers(len(lengths), 90))
    wanted = lengths.copy()
    while wanted.sum() > room:
      wanted[len(wanted) - 1 - wanted[::-1].argmax()] -= 1
    np.testing.assert_array_equal(text.fit(lengths, room=room), wanted)


def packed(source, **kwargs):
  settings = dict(
    ops="decode",
    pack=PACK,
    sizes=Sizes("side", "uniform", 12, 22),
    drop=Drop("beta", max=0.5, mean=0.2),
    text=spec(row=30),
    batch_size=6,
    total_steps=40,
    seed=3,
    num_classes=2,
  )
  return pipeline.train_data(source, **settings | kwargs)


def test_packed_captions_belong_to_their_images():
  data, crowded = packed(Pairs()), 0
  for step in range(3):
    batch = data[step]
    for key in ("text", "text_segment_ids", "text_positions"):
      assert key not in api.HOST_KEYS
      assert (batch[key].shape, batch[key].dtype) == ((6, 30), np.int32)
    for row in range(6):
      ids, tokens = batch["text_segment_ids"][row], batch["text"][row]
      assert (tokens[ids == 0] == 0).all()
      assert (np.diff(ids[: (ids > 0).sum()]) >= 0).all()
      for slot, index in enumerate(batch["example_id"][row]):
        caption = CAPTIONS[index % len(CAPTIONS)] if index >= 0 else None
        own = tokens[ids == slot + 1]
        flags = batch["text_flags"][row, slot]
        if caption is None or (
          isinstance(caption, str) and not caption.strip()
        ):
          assert own.size == 0
          assert batch["text_id"][row, slot] == -1
          continue
        assert own[-1] == EOS
        options = caption if isinstance(caption, list) else [caption]
        assert any(o.startswith(decode(own[:-1])) for o in options)
        whole = any(decode(own[:-1]) == o for o in options)
        assert whole == (not flags & text.CUT)
        crowded += bool(flags & text.CUT) and len(own) < 19
        np.testing.assert_array_equal(
          batch["text_positions"][row, ids == slot + 1], np.arange(len(own))
        )
  assert crowded  # Some rows had less room than their captions wanted.


def test_rows_of_texts_are_a_function_of_seed_and_row():
  data, hosts = packed(Pairs()), []
  for index in range(2):
    hosts.append(packed(Pairs(), parts=(index,), part_count=2))
  iterator = pipeline.open_iterator(data, start=2, threads=2)
  try:
    batch = next(iterator)
  finally:
    iterator.close()
  parts = [host[2] for host in hosts]
  for key, value in data[2].items():
    np.testing.assert_array_equal(batch[key], value)
    np.testing.assert_array_equal(
      np.concatenate([part[key] for part in parts]), value
    )


def test_stacked_texts_and_images_without_one():
  source = Pairs()
  data = pipeline.eval_data(
    source,
    ops="decode|resize(10)",
    text=spec(pad=1, row=None),
    batch_size=9,
    num_classes=2,
  )
  batch = data[0]
  assert batch["text"].shape == (9, 19)
  there = [c is not None and bool("".join(c).strip()) for c in CAPTIONS]
  np.testing.assert_array_equal(batch["_mask"], there)
  np.testing.assert_array_equal((batch["text"] == 0).all(1), ~batch["_mask"])
  np.testing.assert_array_equal(batch["example_id"], np.arange(9))
  assert batch["text"][0].tolist() == [100, 35, 102, 100, 119] + [EOS] * 14


def test_an_evaluation_cuts_no_text_for_another():
  data = pipeline.eval_data(
    Pairs(), ops="decode", pack=PACK, text=spec(), batch_size=4, num_classes=2
  )
  seen = []
  for step in range(len(data)):
    batch = data[step]
    assert (batch["example_mask"].sum(1) <= 48 // 19).all()
    seen += batch["example_id"][batch["example_id"] >= 0].tolist()
    for row, slot in np.argwhere(batch["text_flags"] & text.CUT):
      assert (batch["text_segment_ids"][row] == slot + 1).sum() == 19
  assert sorted(seen) == list(range(90))


@pytest.mark.parametrize("pack", [PACK, None])
def test_texts_alone_have_the_shapes_of_pairs(pack):
  ops = "decode" if pack else "decode|resize(10)"
  like = pipeline.eval_data(
    Pairs(), ops=ops, pack=pack, text=spec(), batch_size=4, num_classes=2
  )
  prompts = [f"prompt {i}" for i in range(11)]
  parts = pipeline.text_data(prompts, like=like)
  found = {}
  for step in range(len(parts)):
    batch = parts[step]
    for key, value in like[0].items():
      assert (batch[key].shape, batch[key].dtype) == (value.shape, value.dtype)
    assert not batch["_mask"].any()
    for at in map(tuple, np.argwhere(batch["example_id"] >= 0)):
      own = batch["text"][at[0]]
      if pack:
        own = own[batch["text_segment_ids"][at[0]] == at[1] + 1]
      found[int(batch["example_id"][at])] = decode(own)
  assert [found[i] for i in range(11)] == prompts


def test_faults_are_counted_and_a_run_without_texts_ends(caplog):
  logger = logging.getLogger("absl")
  faults = text.TextFaults(required=True, patience=12)
  host = {
    "example_id": np.arange(6),
    "text_flags": np.array([1, 1, 2, 8, 0, 0]),
  }
  with caplog.at_level(logging.WARNING, logger=logger.name):
    for _ in range(6):
      faults.update(host)
  assert faults.counts == {1: 12, 2: 6, 4: 0, 8: 6}
  said = [
    r.getMessage() for r in caplog.records if "were cut" in r.getMessage()
  ]
  assert [m.split()[0] for m in said] == ["2", "10"]
  nothing = {"example_id": np.arange(7), "text_flags": np.full(7, 2)}
  faults = batches.Faults(Pairs().name, max_broken=0.1, training=True)
  faults.texts._patience = 12
  host = nothing | {"broken_id": np.full(7, -1)}
  faults.update(host)
  with pytest.raises(
    ValueError, match="None of the first 14 images has a text"
  ):
    faults.update(host)
  evaluation = text.TextFaults(required=False, patience=1)
  evaluation.update(nothing)


@pytest.mark.parametrize(
  ("make", "sentence"),
  [
    (lambda: spec(length=0), "length >= 1"),
    (lambda: spec(clean="upper"), r"clean = 'upper'.*none, lower, canonical"),
    (lambda: spec(pad=259), "pad = 259 is no token: the vocabulary has 259"),
    (lambda: packed(Pairs(), text=spec(row=6)), r"row = 6:.*7 captions.*133"),
    (lambda: packed(Pairs(), text=spec(row=None)), "row = None"),
    (
      lambda: pipeline.text_data(
        ["a"],
        like=pipeline.eval_data(
          Pairs(), ops="decode", pack=PACK, batch_size=1, num_classes=2
        ),
      ),
      r"set config\.data\.text",
    ),
  ],
)
def test_refusals(make, sentence):
  with pytest.raises(ValueError, match=sentence):
    make()
