"""A sentencepiece model from a file, such as the 32k vocabulary of T5.

Files are `spiece.model` of T5 and of SigLIP (T5's C4 vocabulary of 32,000),
and `tokenizer.model` of Gemma for SigLIP 2 (256,000). Needs the extra `text`.
"""

import hashlib
import os
from pathlib import Path


class Tokenizer:
  """A sentencepiece model as an `api.Tokenizer`.

  Args:
    path: of the .model file.

  Raises:
    ValueError: if sentencepiece is not installed, the file cannot be read or
      is no such model, or its vocabulary has no end of text, or a token at 0.
  """

  def __init__(self, path: str | os.PathLike[str]):
    try:
      import sentencepiece
    except ImportError as e:
      raise ValueError(
        f"The tokenizer {path} is read with sentencepiece, which is not "
        "installed: pip install 'big-vision-like[text]'. The tokenizer 'bytes' "
        "needs nothing."
      ) from e
    try:
      model = Path(path).expanduser().read_bytes()
      self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except (OSError, RuntimeError) as e:
      raise ValueError(
        f"config.data.text.path: {path} is no file of a sentencepiece model: "
        f"{e}."
      ) from e
    self.vocab_size = self._processor.vocab_size()
    self.eos = self._processor.eos_id()
    self.fingerprint = hashlib.sha256(model).hexdigest()[:12]
    is_text = not self._processor.is_control(
      0
    ) and not self._processor.is_unknown(0)
    if self.eos < 0 or is_text:
      raise ValueError(
        f"The sentencepiece model {path} has no end of text (eos_id), or a "
        "token of texts at id 0, which stands for none here. Train it with "
        "pad_id=0, eos_id=1, unk_id=2, as T5's."
      )

  def __call__(self, text: str) -> list[int]:
    return self._processor.encode(text.encode(errors="replace").decode())
