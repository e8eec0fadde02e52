"""Names of model sizes: "B/16" is row B of a table, with patches of 16."""

from collections.abc import Mapping

Sizes = dict[str, int]


def sizes(
  variant: str,
  table: Mapping[str, Sizes],
  changes: Mapping[str, int] | None = None,
) -> Sizes:
  """The row that a variant names, with its `patch` and with `changes`.

  A row may have a patch size of its own, which its bare name then stands for.

  Raises:
    ValueError: if there is no such row, or the patch is missing or no number.
  """
  name, slash, patch = variant.partition("/")
  if name not in table:
    raise ValueError(
      f"Unknown variant {variant!r}. The sizes are {', '.join(table)}, with "
      "the patch size behind a slash, as in 'B/16'."
    )
  row = dict(table[name])
  if slash:
    if not patch.isdecimal() or int(patch) == 0:
      raise ValueError(
        f"Variant {variant!r}: {patch!r} is no patch size; write {name}/16."
      )
    row["patch"] = int(patch)
  unknown = set(changes or ()) - {*row, "patch"}
  if unknown:
    raise ValueError(
      f"sizes has no {sorted(unknown)}; it may change {sorted(row)}."
    )
  row.update(changes or {})
  if "patch" not in row:
    raise ValueError(
      f"Variant {variant!r} needs a patch size, as in '{name}/16'."
    )
  return row
