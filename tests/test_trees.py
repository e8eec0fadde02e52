"""Rules over parameter paths."""

import numpy as np
import pytest

from big_vision_like import trees

TREE = {
  "blocks": {"fc1": {"kernel": np.zeros((2, 3)), "bias": np.zeros(3)}},
  "head": {"kernel": np.zeros((3, 5))},
}


def test_first_match_of_the_whole_path_wins():
  rules = [("head/.*", "h"), (".*/kernel", "k"), ("bias", "no"), (".*", "r")]
  assert trees.flatten(trees.map_rules(TREE, rules, "config.x")) == {
    "blocks/fc1/bias": "r",
    "blocks/fc1/kernel": "k",
    "head/kernel": "h",
  }


def test_an_uncovered_parameter_is_refused_by_name():
  with pytest.raises(ValueError, match=r"config\.x covers .*fc1/bias"):
    trees.map_rules(TREE, [(".*/kernel", 1)], "config.x")


def test_flatten_and_unflatten_are_inverse():
  flat = trees.flatten(TREE)
  assert trees.flatten(trees.unflatten(flat)).keys() == flat.keys()
  assert trees.unflatten(flat)["head"]["kernel"].shape == (3, 5)


def test_overview_counts():
  assert trees.count(TREE) == 6 + 3 + 15
  assert trees.overview(TREE).splitlines()[-1].split() == ["total", "24"]
