"""Tokenizers against transformers', with a vocabulary that is trained here."""

import pickle

import numpy as np
import pytest

from big_vision_like.data import text
from big_vision_like.data.tokenizers import bytes as bytes_lib
from big_vision_like.data.tokenizers import sentencepiece as pieces

pytestmark = pytest.mark.parity
WORDS = "a large small white red green four two on grass coins cat dog".split()
TEXTS = (
  "a large white four on grass",
  "  Two SMALL, red dogs!  (on a cat's coins)\n",
  "größe 象",
  "x" * 50,
)


@pytest.fixture(scope="module")
def make_model(tmp_path_factory):
  """Trains a vocabulary of T5's form, with changes; returns its file."""
  import sentencepiece

  folder = tmp_path_factory.mktemp("vocabulary")
  rng = np.random.default_rng(0)
  lines = [" ".join(rng.choice(WORDS, 7)) for _ in range(500)]
  (folder / "captions.txt").write_text("\n".join(lines))

  def make(name, **changes):
    sentencepiece.SentencePieceTrainer.train(
      input=str(folder / "captions.txt"),
      model_prefix=str(folder / name),
      vocab_size=70,
      hard_vocab_limit=False,
      minloglevel=2,
      **dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1) | changes,
    )
    return folder / f"{name}.model"

  return make


def test_siglip_s_tokens_are_those_of_transformers(make_model):
  import transformers

  file = make_model("t5")
  theirs = transformers.SiglipTokenizer(str(file))
  spec = text.TextSpec(pieces.Tokenizer(file), 16, pad=1, clean="canonical")
  for caption in TEXTS:
    batch = spec.blank(1) | {"_mask": np.ones(1, bool)}
    spec.write(batch, 0, spec.read(caption, np.random.default_rng(0)))
    expected = theirs(
      caption, padding="max_length", truncation=True, max_length=16
    )
    assert batch["text"][0].tolist() == expected["input_ids"], caption


def test_bytes_are_those_of_byt5():
  import transformers

  theirs = transformers.ByT5Tokenizer(extra_ids=0)
  ours = bytes_lib.Tokenizer()
  for caption in (*TEXTS[:2], "größe 象 \x00"):
    assert [*ours(caption), ours.eos] == theirs(caption)["input_ids"]


def test_a_tokenizer_is_pickled_and_known_by_its_file(make_model):
  ours = pieces.Tokenizer(make_model("one"))
  again = pickle.loads(pickle.dumps(ours))
  assert again(TEXTS[0]) == ours(TEXTS[0])
  assert again.fingerprint == ours.fingerprint
  other = pieces.Tokenizer(make_model("other", character_coverage=0.98))
  assert other.fingerprint != ours.fingerprint


@pytest.mark.parametrize(
  "changes", [dict(eos_id=-1), dict(pad_id=-1, unk_id=2, bos_id=3, eos_id=1)]
)
def test_vocabularies_without_an_end_or_a_place_for_nothing(
  make_model, changes
):
  file = make_model("wrong", **changes)
  with pytest.raises(ValueError, match=r"no end of text.*pad_id=0, eos_id=1"):
    pieces.Tokenizer(file)


def test_a_file_that_is_none(tmp_path):
  for path, content in (("missing", None), ("text.model", b"not a model")):
    if content:
      (tmp_path / path).write_bytes(content)
    with pytest.raises(ValueError, match=r"is no file of a sentencepiece"):
      pieces.Tokenizer(tmp_path / path)
