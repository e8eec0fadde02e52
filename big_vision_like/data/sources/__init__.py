"""Random access to undecoded examples: one file, and one `Source`, a format."""

# The setting that stands behind the colon of "name:setting".
_ARGUMENTS = {
  "digit_scenes": "level",
  "folder": "path",
  "tar": "path",
  "tfds": "dataset",
}


def settings(spec: str) -> dict[str, str]:
  """ "folder:/path" as the section config.data.source that it stands for."""
  name, _, argument = spec.partition(":")
  if not argument:
    return {"name": name}
  return {"name": name, _ARGUMENTS.get(name, "path"): argument}
