"""Configs of the built-in changes to the advantage. No torch."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from april.algorithms.atoms import Atom, Info, Siblings, builtin
from april.algorithms.specs.named import NamesColumns, column
from april.core.errors import RecipeError


@builtin("adjust", "april.algorithms.advantages.adjust:whiten")
class Whiten(Atom):
    """Zero mean and unit variance over all maskable tokens of the batch (REINFORCE++)."""

    info: ClassVar[Info] = Info(
        paper="REINFORCE++ (arXiv 2501.03262)",
        formula="(A - mean) / sqrt(var + eps) over the batch",
        certainty="A",
        golden=("reinforce_pp_baseline_advantage",),
    )
    type: Literal["whiten"] = "whiten"
    eps: float = Field(1e-8, ge=0, description="added to the variance")
    shift: bool = Field(True, description="subtract the mean; false only scales")


@builtin("adjust", "april.algorithms.advantages.adjust:scale_signs")
class ScaleSigns(Atom):
    """More or less weight on what went right than on what went wrong (weighted REINFORCE)."""

    info: ClassVar[Info] = Info(
        paper="Zhu et al. 2025 (arXiv 2506.01347)",
        formula="A * positive if A > 0 else A * negative",
        certainty="B",
    )
    type: Literal["scale_signs"] = "scale_signs"
    positive: float = Field(0.1, ge=0, description="factor of positive advantages")
    negative: float = Field(1.0, ge=0, description="factor of negative advantages")


@builtin("adjust", "april.algorithms.advantages.adjust:clip")
class ClipAdvantage(Atom):
    """Advantages between two bounds (ETTRL's clipped form)."""

    info: ClassVar[Info] = Info(
        paper="ETTRL (arXiv 2508.11356)",
        formula="clip(A, low, high)",
        certainty="B",
        golden=("ettrl_advantage_reshape",),
    )
    type: Literal["clip"] = "clip"
    low: float = Field(-2.0, le=0, description="smallest advantage")
    high: float = Field(2.0, ge=0, description="largest advantage")


@builtin("adjust", "april.algorithms.advantages.adjust:novelty")
class Novelty(Siblings):
    """Right answers that are unlikely among their siblings count more (XRPO)."""

    info: ClassVar[Info] = Info(
        paper="XRPO (arXiv 2510.06672)",
        formula="A + min(max(s (1 - eta), 0), cap A) if correct, eta = exp(mean log p - its group mean)",
        certainty="B",
        golden=("xrpo_novelty_sharpening",),
    )
    requires: ClassVar[frozenset[str]] = frozenset({"behaviour", "correct", "mask"})
    type: Literal["novelty"] = "novelty"
    strength: float = Field(2.5, ge=0, description="of the bonus")
    cap: float = Field(0.5, ge=0, description="largest bonus in units of the advantage")


@builtin("adjust", "april.algorithms.advantages.adjust:budget_gap")
class BudgetGap(NamesColumns):
    """Adds how far the siblings with the same budget are from what using all of it earns (HBPO)."""

    info: ClassVar[Info] = Info(
        paper="HBPO (arXiv 2507.15844)",
        formula="A + w (mean R of the budget's siblings - 4 cos(pi b / 2L))",
        certainty="A",
        golden=("hbpo_reward_and_advantage",),
    )
    requires: ClassVar[frozenset[str]] = frozenset({"reward"})
    column_options: ClassVar[tuple[str, ...]] = ("budget",)
    type: Literal["budget_gap"] = "budget_gap"
    weight: float = Field(1.0, ge=0, description="of the term; 2 reproduces the release")
    scale_tokens: int = Field(4096, gt=0, description="response tokens at which the reward reaches 0")
    budget: str = column("item.budget", "column with the budget in tokens; samples without one are left alone")


@builtin("adjust", "april.algorithms.advantages.key_tokens:key_tokens")
class KeyTokens(Siblings):
    """Adds how much the occurrence of a token goes with right answers in its group (KTAE)."""

    info: ClassVar[Info] = Info(
        paper="KTAE (arXiv 2505.16826)",
        formula="A + scale tanh((f F + g IG) x / (f + g) / 2)",
        certainty="A",
        golden=("ktae_token_weights",),
    )
    requires: ClassVar[frozenset[str]] = frozenset({"token_ids", "correct", "mask"})
    type: Literal["key_tokens"] = "key_tokens"
    scale: float = Field(1.0, ge=0, description="largest addition; below 1 for groups of fewer than 8")
    fisher: float = Field(1.0, ge=0, description="weight of Fisher's exact test")
    gain: float = Field(1.0, gt=0, description="weight of the information gain")
    frequency: bool = Field(True, description="whether how often a token occurs counts too")
    ignore_token_ids: tuple[int, ...] = Field((), description="tokens that get nothing, such as the end of text")


@builtin("adjust", "april.algorithms.advantages.adjust_samples:overlong_filter")
class OverlongFilter(Atom):
    """Samples that ended at their token budget give no gradient (DAPO overlong filtering)."""

    info: ClassVar[Info] = Info(paper="DAPO (arXiv 2503.14476), section 3.4", formula="A if finished else 0", certainty="B")
    requires: ClassVar[frozenset[str]] = frozenset({"finished", "mask", "trained"})
    type: Literal["overlong_filter"] = "overlong_filter"
    renormalise: bool = Field(True, description="their tokens leave the denominators too")


class Selection(Atom):
    """Base of the adjusts that keep a share, which may grow or fall over the run (D3S)."""

    fraction: float
    final_fraction: float | None = Field(None, gt=0, le=1, description="the share at the end of `over_steps`; null: as fraction")
    over_steps: int | None = Field(None, ge=1, description="updates over which the share goes from fraction to final_fraction")

    @property
    def needs(self) -> frozenset[str]:
        """With the number of the update, where the share follows it."""
        return self.requires | ({"step"} if self.over_steps is not None else set())

    @model_validator(mode="after")
    def _both_or_neither(self) -> Self:
        if (self.final_fraction is None) != (self.over_steps is None):
            raise RecipeError(
                "a share that changes has an end and a number of updates",
                where=f"algorithm.adjust.{self.type}: final_fraction, over_steps",
                got=f"{self.final_fraction}, {self.over_steps}",
                hint="give both, or leave both out",
            )
        return self


@builtin("adjust", "april.algorithms.advantages.adjust_samples:max_variance_samples")
class MaxVarianceSamples(Selection):
    """Only the samples whose advantages vary the most together train (D3S, sample level)."""

    info: ClassVar[Info] = Info(
        paper="D3S (arXiv 2509.22115)",
        formula="the subset of n samples of the batch with the largest variance of A, n from first to last in a straight line",
        certainty="B",
        golden=("d3s_selection", "d3s_schedule"),
    )
    requires: ClassVar[frozenset[str]] = frozenset({"mask", "trained", "token_ids"})
    type: Literal["max_variance_samples"] = "max_variance_samples"
    fraction: float = Field(0.5, gt=0, le=1, description="share of the batch's samples that trains")
    renormalise: bool = Field(True, description="the tokens of the others leave the denominators too")
