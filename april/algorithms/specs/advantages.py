"""Configs of the built-in advantages. No torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from april.algorithms.atoms import Atom, Info, builtin


@builtin("advantage", "april.algorithms.advantages.group:group_relative")
class GroupRelative(Atom):
    """Reward minus the group's mean, over its standard deviation (GRPO; `std = "none"`: Dr.GRPO)."""

    info: ClassVar[Info] = Info(
        paper="GRPO (arXiv 2402.03300), section 4.1.1; Dr.GRPO (arXiv 2503.20783)",
        formula="(R - mean_g) / (std_g + eps)",
        golden=("grpo_advantage_std", "grpo_advantage_no_std", "grpo_degenerate_zero_std_and_singleton"),
    )
    requires: ClassVar[frozenset[str]] = frozenset({"reward"})
    type: Literal["group"] = "group"
    std: Literal["sample", "population", "none"] = Field(
        default="sample", description="scale: standard deviation with n - 1, with n, or none"
    )
    eps: float = Field(default=1e-6, ge=0, description="added to the standard deviation")


@builtin("advantage", "april.algorithms.advantages.group:leave_one_out")
class LeaveOneOut(Atom):
    """Reward minus the mean of the siblings (RLOO)."""

    info: ClassVar[Info] = Info(
        paper="RLOO (arXiv 2402.14740), equation 5",
        formula="R - mean of the siblings",
        golden=("rloo_advantage",),
    )
    requires: ClassVar[frozenset[str]] = frozenset({"reward"})
    type: Literal["leave_one_out"] = "leave_one_out"
