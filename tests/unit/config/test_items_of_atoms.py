"""Numbers of items that an algorithm reads must be in the data set."""

from __future__ import annotations

from typing import Any

import pytest

from april.config.resolve import resolve
from april.core.errors import DataError
from april.core.prompt import Prompt
from april.run.checks import check_items


def prompts(**numbers: Any) -> list[Prompt]:
    return [Prompt(f"p{i}", [1], item={"question": "?", **(numbers if i else {})}) for i in range(3)]


@pytest.mark.parametrize(
    ("overrides", "name", "path"),
    [
        (["algorithm.preset=pvpo"], "baseline", "algorithm.advantage"),
        (["algorithm.preset=acecode"], "reference_time_s", "algorithm.reward[0]"),
        (["algorithm.preset=ps_grpo"], "query", "algorithm.reward[0]"),
        (["batch.together=question_number"], "question_number", "batch.together"),
    ],
)
def test_a_number_that_no_problem_has_is_refused(overrides: list[str], name: str, path: str) -> None:
    recipe = resolve("quickstart", overrides=overrides).recipe
    with pytest.raises(DataError) as caught:
        check_items(recipe, prompts())
    assert f"{path}, task" in str(caught.value) and repr(name) in str(caught.value)
    check_items(recipe, prompts(**{name: 1.0}))


def test_a_preset_that_reads_no_numbers_needs_none() -> None:
    recipe = resolve("quickstart").recipe
    check_items(recipe, prompts())
    assert not any(column.startswith("item.") for column in recipe.algorithm.requires)  # type: ignore[attr-defined]
