"""Captions as tokens, beside stacked images and in packed rows.

A text is cut to `length` tokens, of which the last is always the end. Those of
a packed row share `row` tokens: where they have more, the longest are cut
first, down to one length for all that are cut. So what becomes of a text
depends on its row alone, whose images are planned from random numbers.

Texts that are cut, missing, empty or wrongly encoded are flagged in the batch,
and counted on the host.
"""

import dataclasses
import hashlib
import re
import string
from typing import NamedTuple

import numpy as np
from absl import logging
from jaxtyping import Int

from big_vision_like import api
from big_vision_like.data.packing import Batch, PackSpec

# Bits of `text_flags`, and what is logged of them.
CUT, MISSING, EMPTY, BAD_ENCODING = 1, 2, 4, 8
_FLAGS = {
  CUT: "were cut: data.text.length is the most tokens of a text, and "
  "data.text.row those of all texts in a packed row",
  MISSING: "are missing: their images take no part in the loss",
  EMPTY: "are empty: their images take no part in the loss",
  BAD_ENCODING: "are not UTF-8: what cannot be read is U+FFFD",
}
_CLEAN = {
  "none": lambda text: text,
  "lower": str.lower,
  "canonical": lambda text: text.translate(_NO_PUNCTUATION).lower(),
}
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Text(NamedTuple):
  """A text that has been read: no token at all if there is none."""

  tokens: Int[np.ndarray, " n"]
  flags: int
  id: int


@dataclasses.dataclass(frozen=True)
class TextSpec:
  """How texts become tokens, and the room that they get.

  Attributes:
    tokenizer: an `api.Tokenizer`.
    length: T, the most tokens of a text, its end included.
    row: L', the tokens of a packed row of texts.
    pad: what fills up stacked texts. SigLIP has its end of text there, 1, and
      SigLIP 2 has 0.
    clean: "none"; "lower" case, as for SigLIP 2; "canonical", without
      punctuation besides, as for SigLIP. White space is always squeezed.
  """

  tokenizer: api.Tokenizer
  length: int = 64
  row: int | None = None
  pad: int = 0
  clean: str = "none"

  def __post_init__(self) -> None:
    if self.length < 1 or (self.row is not None and self.row < 1):
      raise ValueError(
        "config.data.text needs length >= 1 and row >= 1, in tokens, not "
        f"length={self.length}, row={self.row}."
      )
    if self.clean not in _CLEAN:
      raise ValueError(
        f"config.data.text.clean = {self.clean!r}; it is one of "
        f"{', '.join(_CLEAN)}."
      )
    if not 0 <= self.pad < self.tokenizer.vocab_size:
      raise ValueError(
        f"config.data.text.pad = {self.pad} is no token: the vocabulary has "
        f"{self.tokenizer.vocab_size}."
      )

  def check_pack(self, pack: PackSpec) -> None:
    """Refuses rows of texts that cannot hold one of each image."""
    if self.row is None or self.row < pack.max_images:
      raise ValueError(
        f"config.data.text.row = {self.row}: a packed row of images has up to "
        f"{pack.max_images} captions (data.pack.max_images), each of one token "
        f"at least and {self.length} at most. It takes {pack.max_images} "
        f"tokens or more; {pack.max_images * self.length} never cut."
      )

  def whole(self, pack: PackSpec) -> int:
    """How many images a row may have so that no text is cut for another."""
    return max(1, min(pack.max_images, self.row // self.length))

  def read(
    self, caption: str | list[str] | None, rng: np.random.Generator
  ) -> Text:
    """The tokens of a caption; of several, one is drawn."""
    if isinstance(caption, list):
      caption = caption[int(rng.integers(len(caption)))] if caption else None
    if caption is None:
      return Text(np.zeros(0, np.int32), MISSING, -1)
    flags = BAD_ENCODING if "\ufffd" in caption else 0
    words = re.sub(r"\s+", " ", _CLEAN[self.clean](caption)).strip()
    tokens = self.tokenizer(words)
    if not tokens:
      return Text(np.zeros(0, np.int32), flags | EMPTY, -1)
    most = self.length - 1
    flags |= CUT * (len(tokens) > most)
    tokens = np.array([*tokens[:most], self.tokenizer.eos], np.int32)
    digest = hashlib.blake2b(tokens.tobytes(), digest_size=8).digest()
    return Text(tokens, flags, int.from_bytes(digest, "big") >> 1)

  def blank(self, *shape: int) -> Batch:
    """Empty places for the texts of a stacked or a packed batch."""
    arrays = {
      "text_id": np.full(shape, -1, np.int64),
      "text_flags": np.zeros(shape, np.uint8),
    }
    if len(shape) == 1:
      return arrays | {"text": np.zeros((*shape, self.length), np.int32)}
    keys = ("text", "text_segment_ids", "text_positions")
    return arrays | {k: np.zeros((shape[0], self.row), np.int32) for k in keys}

  def write(self, batch: Batch, row: int, text: Text) -> None:
    """Writes the text of a stacked image; without one, it is masked."""
    batch["text_id"][row] = text.id
    batch["text_flags"][row] = text.flags
    n = len(text.tokens)
    batch["_mask"][row] &= n > 0
    if n:
      batch["text"][row, :n] = text.tokens
      batch["text"][row, n:] = self.pad

  def write_row(self, batch: Batch, row: int, texts: dict[int, Text]) -> None:
    """Writes the texts of a packed row, by image slot."""
    lengths = np.array([len(text.tokens) for text in texts.values()], int)
    start = 0
    for (slot, text), n in zip(texts.items(), fit(lengths, room=self.row)):
      cut = CUT * bool(n < len(text.tokens))
      batch["text_id"][row, slot] = text.id
      batch["text_flags"][row, slot] = text.flags | cut
      if not n:
        continue
      span = slice(start, start + n)
      batch["text"][row, span] = text.tokens[:n]
      batch["text"][row, start + n - 1] = self.tokenizer.eos
      batch["text_segment_ids"][row, span] = slot + 1
      batch["text_positions"][row, span] = np.arange(n)
      start += n


def fit(lengths: Int[np.ndarray, " n"], *, room: int) -> Int[np.ndarray, " n"]:
  """Shortens the longest so that all fit; none is shorter than room / n.

  Of those that are cut to one length, the first are a token longer, if room is
  left for it.
  """
  left, out = room, lengths.copy()
  if lengths.sum() <= room:
    return out
  order = np.argsort(lengths, kind="stable")
  for i, which in enumerate(order):
    share = left // (len(order) - i)
    if lengths[which] > share:
      break
    left -= lengths[which]
  over = np.sort(order[i:])
  out[over] = left // len(over)
  out[over[: left % len(over)]] += 1
  return out


class TextFaults:
  """Counts what is wrong with the texts, and says so now and then.

  Attributes:
    images: how many have been seen.
    counts: how many of their texts have each of the flags.
  """

  def __init__(self, *, required: bool, patience: int = 100):
    """`required`: without any text in `patience` images, there is no task."""
    self._required, self._patience = required, patience
    self.images = 0
    self.counts = dict.fromkeys(_FLAGS, 0)

  def update(self, host: dict[str, np.ndarray]) -> None:
    """Takes the host's part of a batch; logs at 1, 10, 100, ... of a kind.

    Raises:
      ValueError: if texts are required, and none of the first images has one.
    """
    flags = host["text_flags"][host["example_id"] >= 0]
    self.images += len(flags)
    for flag, what in _FLAGS.items():
      before = self.counts[flag]
      total = self.counts[flag] = before + int((flags & flag > 0).sum())
      if total and (before == 0 or len(str(total)) > len(str(before))):
        logging.warning("%d of %d texts %s.", total, self.images, what)
    without = self.counts[MISSING] + self.counts[EMPTY]
    if (
      self._required
      and self.images >= self._patience
      and without == self.images
    ):
      raise ValueError(
        f"None of the first {self.images} images has a text. Look at the "
        "captions of config.data.source, or set config.data.text to None."
      )
