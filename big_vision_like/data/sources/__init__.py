"""Random access to undecoded examples: one file, and one `Source`, a format."""

# The setting that stands behind the colon of "name:setting".
_ARGUMENTS = {
  "coco": "path",
  "digit_scenes": "level",
  "folder": "path",
  "tar": "path",
  "tfds": "dataset",
}


def settings(spec: str) -> dict[str, str]:
  """ "folder:/path" as the section config.data.source that it stands for.

  Behind the level of digit_scenes may stand a target, as in
  "digit_scenes:photo/color".
  """
  name, _, argument = spec.partition(":")
  if not argument:
    return {"name": name}
  if name == "digit_scenes" and "/" in argument:
    level, _, target = argument.partition("/")
    return {"name": name, "level": level, "target": target}
  return {"name": name, _ARGUMENTS.get(name, "path"): argument}
