"""Policies made for the GRPO benchmark: what they are taught, that they are made once, and how long their answers are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from april.bench import grpo_bench
from april.bench.grpo_bench import GrpoOptions, run_grpo_bench
from april.bench.grpo_policy import habit_recipe, skill_recipe, start_policy
from april.bench.shapes import SHAPES
from april.config.warm_start import WarmStartRecipe
from april.core.errors import DataError
from april.run import warm_start as warm_start_module
from april.run.warm_start import resolve_warm_start, stage_examples
from april.text.tokenizer import Tokenizer


def test_the_skill_is_that_of_the_packaged_policy_in_another_shape() -> None:
    recipe, packaged = skill_recipe(SHAPES["3m"], 2), resolve_warm_start("sums")
    assert [stage.name for stage in recipe.stages] == ["short", "skill"]
    assert recipe.stages == packaged.stages[:2] and recipe.tokenizer == packaged.tokenizer
    assert isinstance(recipe.model, dict) and (recipe.model["hidden_size"], recipe.model["num_key_value_heads"]) == (256, 4)
    assert recipe.model["max_position_embeddings"] == 1024 and recipe.excludes == "quickstart"


def test_long_tailed_answers_have_a_median_of_about_20_tokens_and_fit_the_cap() -> None:
    recipe = habit_recipe(Path("somewhere"), 1)
    assert (recipe.model, recipe.tokenizer, [stage.name for stage in recipe.stages]) == ("somewhere", None, ["habit"])
    stage = recipe.stages[0]
    small = stage.model_copy(update={"task": stage.task.model_copy(update={"size": 1500})})
    tokenizer = Tokenizer.load(grpo_packaged())
    lengths = np.array([len(example.completion) for example in stage_examples(recipe, small, tokenizer, [], 1024)])
    assert 16 <= np.median(lengths) <= 24
    assert lengths.max() <= 512 and np.percentile(lengths, 99) > 15 * np.median(lengths)


def grpo_packaged() -> str:
    from april.run.build import model_path

    return model_path("packaged")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[WarmStartRecipe]:
    """Recipes of the warm starts that were run, none of them really."""
    recipes: list[WarmStartRecipe] = []

    def fake(recipe: WarmStartRecipe, out: Path, on_step: Any) -> dict[str, Any]:
        recipes.append(recipe)
        out.mkdir(parents=True)
        (out / "config.json").write_text("{}")
        return {"parameters": 2_800_000, "wall_s": 1.0}

    monkeypatch.setattr(warm_start_module, "warm_start", fake)
    return recipes


def test_policies_are_made_once_and_shared(tmp_path: Path, made: list[WarmStartRecipe]) -> None:
    said: list[str] = []
    even = start_policy("3m", "even", tmp_path, 1, said.append)
    long_tailed = start_policy("3m", "long-tailed", tmp_path, 1, said.append)
    assert (Path(even).name, Path(long_tailed).name) == ("3m-works", "3m-works-and-guesses")
    assert [recipe.stages[-1].name for recipe in made] == ["skill", "habit"] and made[1].model == even
    assert start_policy("3m", "long-tailed", tmp_path, 2, said.append) == long_tailed and len(made) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3m-works", "3m-works-and-guesses"]
    assert start_policy("packaged", "even", tmp_path / "none", 1, said.append) == "packaged"


def test_a_policy_of_another_warm_start_is_not_taken(tmp_path: Path, made: list[WarmStartRecipe]) -> None:
    folder = Path(start_policy("3m", "even", tmp_path, 1, print))
    (folder / "warm_start.json").write_text("{}")
    with pytest.raises(DataError, match="another warm start"):
        start_policy("3m", "even", tmp_path, 1, print)
    assert len(made) == 1


def test_a_warm_start_that_was_interrupted_begins_again(tmp_path: Path, made: list[WarmStartRecipe]) -> None:
    (tmp_path / "3m-works.part").mkdir()
    assert Path(start_policy("3m", "even", tmp_path, 1, print)).is_dir()
    assert len(made) == 1 and not (tmp_path / "3m-works.part").exists()


def test_runs_start_from_the_made_policy(tmp_path: Path, made: list[WarmStartRecipe], monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    def run(options: GrpoOptions, *_: Any) -> dict[str, Any]:
        started.append(options.model)
        return {"wall_s": 1.0, "accuracy": 0.5}

    monkeypatch.setattr(grpo_bench, "_april", run)
    monkeypatch.setattr(grpo_bench, "_trl", run)
    result = run_grpo_bench(GrpoOptions("even", "3m", seeds=1, models=tmp_path), tmp_path / "out", lambda _line: None)
    assert set(started) == {str(tmp_path / "3m-works")} and len(made) == 1
    assert result["options"]["model"] == "3m"
