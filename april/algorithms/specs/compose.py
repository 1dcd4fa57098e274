"""Configs of the built-in composers: groups of a batch -> groups that train. No torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from april.algorithms.atoms import Info, Siblings, builtin


class Composer(Siblings):
    """Base of the composers that leave members of a group out."""

    def kept(self, group_size: int) -> int:
        """Members that train of a group of this size."""
        return max(1, round(getattr(self, "keep_fraction", 1.0) * group_size))


@builtin("compose", "april.algorithms.composers:resample_on_correct")
class ResampleOnCorrect(Composer):
    """Of an oversampled group, right members with the fewest slips and random wrong ones train (GRPO-RoC)."""

    info: ClassVar[Info] = Info(
        paper="rStar2-Agent (arXiv 2508.20722), section 3.2",
        formula="right members by lowest penalty, wrong ones at random, both in proportion",
        certainty="B",
        golden=("grpo_roc_selection", "grpo_roc_penalties"),
    )
    type: Literal["resample_on_correct"] = "resample_on_correct"
    keep_fraction: float = Field(0.5, gt=0, le=1, description="share of a group's members that trains")
    penalties: tuple[str, ...] = Field(
        ("tool_error", "answer_format"), description="reward parts whose sum orders the right members; a missing one counts 0"
    )
    min_wrong: int = Field(2, ge=0, description="wrong members that train at least, when there are as many")
    min_right: int = Field(2, ge=0, description="right members that train at least, when there are as many")
    seed: int = Field(0, description="of the draw of wrong members")


@builtin("compose", "april.algorithms.composers:max_variance")
class MaxVariance(Composer):
    """Of an oversampled group, the members whose rewards vary the most together train (PODS)."""

    info: ClassVar[Info] = Info(
        paper="PODS (arXiv 2504.13818)",
        formula="the subset of n members with the largest variance of R",
        certainty="B",
        golden=("d3s_selection",),
    )
    type: Literal["max_variance"] = "max_variance"
    keep_fraction: float = Field(0.25, gt=0, le=1, description="share of a group's members that trains; at least two do")

    def kept(self, group_size: int) -> int:
        """At least two."""
        return max(2, super().kept(group_size))


@builtin("compose", "april.algorithms.composers:switch_pairs")
class SwitchPairs(Composer):
    """Pairs of a direct and a reasoned answer, rewarded 1 and 0, that teach when to reason (EconProver)."""

    info: ClassVar[Info] = Info(
        paper="EconProver (arXiv 2509.12603)",
        formula="prefer the direct answer if it is right, else the reasoned one if that is, else no pair",
        certainty="C",
        golden=("econprover_switch_pairs",),
    )
    type: Literal["switch_pairs"] = "switch_pairs"
    mode: str = Field("reasoning", description="reward part above 0.5 where a member reasoned before it answered")

    def kept(self, group_size: int) -> int:
        """One pair."""
        return min(2, group_size)
