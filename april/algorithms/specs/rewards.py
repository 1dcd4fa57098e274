"""Configs of the built-in reward transforms. No torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from april.algorithms.atoms import Atom, Info, builtin
from april.core.errors import RecipeError


@builtin("reward", "april.algorithms.rewards:overlong")
class Overlong(Atom):
    """Linear penalty on responses near the length limit (DAPO soft overlong punishment)."""

    info: ClassVar[Info] = Info(
        paper="DAPO (arXiv 2503.14476), section 3.4",
        formula="R - factor * clip((len - (max - buffer)) / buffer, 0, 1)",
        golden=("dapo_overlong_soft_punishment",),
    )
    requires: ClassVar[frozenset[str]] = frozenset({"reward"})
    type: Literal["overlong"] = "overlong"
    max_tokens: int = Field(gt=0, description="response tokens at which the penalty reaches `factor`")
    buffer_tokens: int = Field(gt=0, description="the penalty starts this many tokens before max_tokens")
    factor: float = Field(1.0, ge=0, description="penalty at max_tokens and beyond")

    @model_validator(mode="after")
    def _buffer_fits(self) -> Overlong:
        if self.buffer_tokens > self.max_tokens:
            raise RecipeError(
                "the buffer is longer than the limit",
                where="algorithm.reward.overlong: buffer_tokens, max_tokens",
                got=f"{self.buffer_tokens} > {self.max_tokens}",
            )
        return self
