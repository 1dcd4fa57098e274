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
        ({"recipe": "quickstart", "arm": {}, "arms": {"a": []}}, "did you mean 'arms'"),
        ({"recipe": "quickstart", "seeds": 0, "arms": {"a": []}}, "april list comparison"),
        ({"recipe": "quickstart", "arms": {}}, "at least 1"),
        ({"recipe": "quickstart", "arms": {"sync": []}, "baseline": "sinc"}, "sync"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_a_way_out(tree: dict[str, object], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_comparison(tree, "x.toml")
    assert said in str(caught.value) and "x.toml: " in str(caught.value)
    assert None not in (caught.value.got, caught.value.expected, caught.value.hint)


@pytest.mark.parametrize("name", recipe_names("comparison"))
def test_every_arm_of_a_packaged_comparison_passes_the_checks(name: str) -> None:
    comparison = find_comparison(name)
    assert isinstance(comparison, Comparison) and comparison.against in comparison.arms
    for extra in comparison.arms.values():
        assert check_recipe(resolve(comparison.recipe, overrides=[*comparison.overrides, *extra]).recipe)


def test_the_comparison_of_presets_differs_in_the_algorithm_only() -> None:
    comparison = find_comparison("presets")
    assert comparison is not None and len(comparison.arms) == 12 and comparison.baseline == "grpo" and not comparison.times
    recipes = {
        name: resolve(comparison.recipe, overrides=[*comparison.overrides, *extra]).recipe
        for name, extra in comparison.arms.items()
    }
    assert len({recipe.algorithm.model_dump_json() for recipe in recipes.values()}) == 12
    assert {(r.batch, r.steps, r.sampling, r.schedule, r.training.lr) for r in recipes.values()} == {  # type: ignore[attr-defined]
        (r.batch, r.steps, r.sampling, r.schedule, r.training.lr)
        for r in [recipes["grpo"]]  # type: ignore[attr-defined]
    }
    single = {name for name, recipe in recipes.items() if recipe.training.num_optimizer_steps == 1}  # type: ignore[attr-defined]
    assert single == {name for name, recipe in recipes.items() if recipe.algorithm.surrogate.type == "plain"} == {"rloo", "opo"}  # type: ignore[attr-defined]


def test_the_comparison_of_stale_data_is_of_each_correction_at_each_age() -> None:
    comparison = find_comparison("stale")
    assert comparison is not None and comparison.measures
    seen = {}
    for name, extra in comparison.arms.items():
        recipe = resolve(comparison.recipe, overrides=[*comparison.overrides, *extra]).recipe
        kind, _, lag = name.partition(" lag ")
        assert recipe.schedule.type == "delayed" and recipe.schedule.delay_steps == int(lag)  # type: ignore[attr-defined]
        assert recipe.training.num_optimizer_steps == 2  # type: ignore[attr-defined]
        seen.setdefault(kind, set()).add((int(lag), recipe.algorithm.model_dump_json()))
    assert set(seen) == {"uncorrected", "tis", "icepop", "decoupled", "m2po"}
    for found in seen.values():
        assert {lag for lag, _ in found} == {0, 1, 4, 8} and len({algorithm for _, algorithm in found}) == 1
    assert len({next(iter(found))[1] for found in seen.values()}) == 5


def test_the_keys_that_comparisons_measure_are_those_that_runs_write() -> None:
    written = "".join(path.read_text(encoding="utf-8") for path in (Path(__file__).parents[3] / "docs").glob("*.md"))
    for name in recipe_names("comparison"):
        comparison = find_comparison(name)
        assert comparison is not None
        assert [key for key in comparison.measures if f"`{key}`" not in written] == []
