"""Names in configs: unknown ones list what exists."""

import pytest

from big_vision_like import resolve


def test_a_name_is_a_file():
  from big_vision_like.tasks import classification

  assert resolve.resolve("tasks", "classification", "Task") is (
    classification.Task
  )
  assert "classification" in resolve.available("tasks")
  assert "digit_scenes" in resolve.available("data/sources")


def test_a_dotted_name_imports_from_outside():
  import collections

  found = resolve.resolve("models", "collections.abc", "Hashable")
  assert found is collections.abc.Hashable
  with pytest.raises(ValueError, match=r"Cannot import 'my_lab\.missing'"):
    resolve.resolve("models", "my_lab.missing", "Model")


@pytest.mark.parametrize(
  ("folder", "name", "sentence"),
  [
    (
      "models",
      "navti",
      r"Unknown name 'navti' in models. Did you mean 'navit'",
    ),
    ("data/sources", "floder", r"Did you mean 'folder'.*There are: .*tfds"),
    ("evaluators", "nothing", r"There are: .*classification"),
  ],
)
def test_unknown_names_list_those_that_exist(folder, name, sentence):
  with pytest.raises(ValueError, match=sentence):
    resolve.resolve(folder, name, "Model")


def test_a_wrong_keyword_names_its_section_and_the_nearest():
  settings = dict(name="classification", num_classes=3, loss_nam="sigmoid")
  with pytest.raises(
    ValueError, match=r"config\.task: .*Did you mean 'loss_name'"
  ):
    resolve.make("tasks", "Task", "config.task", settings)
  with pytest.raises(ValueError, match=r"config\.task: .*num_classes"):
    resolve.make("tasks", "Task", "config.task", dict(name="classification"))
  with pytest.raises(ValueError, match=r"config\.task needs a `name`"):
    resolve.make("tasks", "Task", "config.task", {})
