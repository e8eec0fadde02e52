"""Texts to token ids: one file, and one `Tokenizer`, a kind."""


def settings(spec: str) -> dict[str, str]:
  """ "sentencepiece:/path" as the part of config.data.text that it means."""
  name, _, path = spec.partition(":")
  return {"name": name, "path": path} if path else {"name": name}
