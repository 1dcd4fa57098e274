"""Configs of the built-in filters: which complete groups train. No torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from april.algorithms.atoms import Atom, Info, Siblings, builtin
from april.core.errors import RecipeError


@builtin("filter", "april.algorithms.filters:zero_variance")
class ZeroVariance(Siblings):
    """Drop groups whose members all agree: they give no group-relative gradient (DAPO dynamic sampling)."""

    info: ClassVar[Info] = Info(
        paper="DAPO (arXiv 2503.14476), section 3.2",
        formula="keep a group iff 0 < #correct < G",
        certainty="B",
        golden=("dapo_dynamic_sampling_mask",),
    )
    type: Literal["zero_variance"] = "zero_variance"
    by: Literal["correct", "reward"] = Field("correct", description="what must differ: solved or not, or the reward itself")


@builtin("filter", "april.algorithms.filters:accuracy_range")
class AccuracyRange(Atom):
    """Drop groups that are too easy or too hard: their share of solved members lies outside a range (PRIME)."""

    info: ClassVar[Info] = Info(
        paper="PRIME (arXiv 2502.01456)", formula="keep a group iff low <= #correct / G <= high", certainty="B"
    )
    type: Literal["accuracy_range"] = "accuracy_range"
    low_fraction: float = Field(0.2, ge=0, le=1, description="smallest share of solved members that trains")
    high_fraction: float = Field(0.8, ge=0, le=1, description="largest share of solved members that trains")

    @property
    def min_group_size(self) -> int:
        """A single sample is all or nothing."""
        return 1 if self.low_fraction == 0 or self.high_fraction == 1 else 2

    @model_validator(mode="after")
    def _range(self) -> AccuracyRange:
        if self.low_fraction > self.high_fraction:
            raise RecipeError(
                "no accuracy lies in the range",
                where="algorithm.filter.accuracy_range: low_fraction, high_fraction",
                got=f"{self.low_fraction} > {self.high_fraction}",
            )
        return self


@builtin("filter", "april.algorithms.filters:reward_spread")
class RewardSpread(Siblings):
    """Drop groups whose rewards differ too little (UI-S1)."""

    info: ClassVar[Info] = Info(
        paper="UI-S1 (arXiv 2509.11543)",
        formula="keep a group iff std(R) > min_std",
        certainty="B",
    )
    type: Literal["reward_spread"] = "reward_spread"
    min_std: float = Field(0.1, ge=0, description="standard deviation (n) above which a group trains")
    part: str | None = Field(None, description="name of a reward part to look at instead of the reward")
