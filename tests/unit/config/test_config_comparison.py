"""Comparisons: what a file of arms means, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from april.config.comparison import Comparison, find_comparison, parse_comparison
from april.config.load import recipe_names
from april.config.resolve import resolve
from april.core.errors import RecipeError
from april.run.checks import check_recipe


def test_a_file_with_arms_is_a_comparison_and_a_plain_recipe_is_none(tmp_path: Path) -> None:
    (tmp_path / "arms.toml").write_text('recipe = "quickstart"\nseeds = 2\n[arms]\na = []\nb = ["steps=3"]\n')
    (tmp_path / "plain.toml").write_text('name = "x"\n')
    found = find_comparison(str(tmp_path / "arms.toml"))
    assert found is not None and found.arms == {"a": (), "b": ("steps=3",)} and found.against == "b" and found.seeds == 2
    assert find_comparison("quickstart") is None and find_comparison(str(tmp_path / "plain.toml")) is None


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"recipe": "quickstart", "arm": {}, "arms": {"a": []}}, "arms"),
        ({"recipe": "quickstart", "arms": {}}, "at least 1"),
        ({"recipe": "quickstart", "arms": {"sync": []}, "baseline": "sinc"}, "sync"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_a_way_out(tree: dict[str, object], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_comparison(tree, "x.toml")
    assert said in str(caught.value) and "x.toml" in str(caught.value)


@pytest.mark.parametrize("name", recipe_names("comparison"))
def test_every_arm_of_a_packaged_comparison_passes_the_checks(name: str) -> None:
    comparison = find_comparison(name)
    assert isinstance(comparison, Comparison) and comparison.against in comparison.arms
    for extra in comparison.arms.values():
        assert check_recipe(resolve(comparison.recipe, overrides=[*comparison.overrides, *extra]).recipe)
