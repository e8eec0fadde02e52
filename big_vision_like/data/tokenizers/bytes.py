"""The embedded tokenizer: a token is a byte of UTF-8, as in ByT5.

Xue et al., arXiv 2105.13626: ids 0, 1 and 2 are padding, end and unknown, and
bytes follow. It knows every text of every language and needs no file.
"""

import dataclasses
from typing import ClassVar

_FIRST = 3


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """Bytes as an `api.Tokenizer`."""

  vocab_size: ClassVar[int] = 256 + _FIRST
  eos: ClassVar[int] = 1
  fingerprint: ClassVar[str] = "bytes"

  def __call__(self, text: str) -> list[int]:
    # Halves of surrogate pairs are no text: they become question marks.
    return [byte + _FIRST for byte in text.encode(errors="replace")]
