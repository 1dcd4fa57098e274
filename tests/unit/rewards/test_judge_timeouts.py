"""A judge's requests fit into the time of a judgement, or the recipe is refused."""

from __future__ import annotations

from typing import Any

import pytest

from april.config.resolve import resolve
from april.core.errors import RecipeError
from april.run.checks import check_recipe

URL = "http://127.0.0.1:9/v1"
JUDGE = {"type": "judge", "url": URL}


@pytest.mark.parametrize(
    ("reward", "path"),
    [
        (JUDGE, "reward.timeout_s"),
        ({"type": "flaw_check", "reward": "math", "judge": {"url": URL}}, "reward.judge.timeout_s"),
        ({"type": "combine", "rewards": {"style": JUDGE}}, "reward.rewards.style.timeout_s"),
    ],
)
def test_a_request_may_not_outlive_its_judgement(reward: dict[str, Any], path: str) -> None:
    recipe = {"base": "quickstart", "reward": reward}
    with pytest.raises(RecipeError) as caught:
        check_recipe(resolve(recipe).recipe)
    assert f"{path}, scoring.timeout_s" in str(caught.value) and "60" in str(caught.value.hint)
    assert check_recipe(resolve(recipe, overrides=["scoring.timeout_s=60"]).recipe)


def test_a_function_of_ones_own_has_no_requests() -> None:
    assert check_recipe(resolve({"base": "quickstart", "reward": {"type": "judge", "path": "some_module:ask"}}).recipe)
