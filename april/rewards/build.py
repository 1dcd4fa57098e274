"""From what a recipe or a notebook says to a verifier."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from april import registry
from april.config.schema import Config
from april.core.errors import RecipeError
from april.rewards.base import Verifier


def build_reward(value: str | Mapping[str, Any] | Config | Callable[..., Any], where: str = "reward.verifier") -> Verifier:
    """The verifier for a reward's name, a table with `type` and options, its config, or a function given directly.

    Raises:
        RecipeError: for an unknown type or option, a value of the wrong type, or something that is none of these.
    """
    if isinstance(value, str | Mapping | Config):
        config: Any = registry.parse("reward", value, where)
        return config.build()  # type: ignore[no-any-return]  # every reward config has it
    if not callable(value):
        got = f"{type(value).__name__} {str(value)[:40]!r}"
        raise RecipeError(
            "a reward is not callable", where=where, got=got, expected="a function (text, sample, item), or a table with `type`"
        )
    return value
