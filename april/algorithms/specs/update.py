"""Configs of what makes optimiser steps out of a batch. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from april.algorithms.atoms import Atom, Info, builtin


@builtin("update", "april.algorithms.update:plain")
class PlainUpdate(Atom):
    """One ordinary optimiser step on each mini-batch."""

    info: ClassVar[Info] = Info(
        paper="-",
        formula="one optimiser step a mini-batch",
        certainty="B",
        golden=(),
    )
    type: Literal["plain"] = "plain"


@builtin("update", "april.algorithms.update:slow_fast")
class SlowFast(Atom):
    """Fast steps on one mini-batch, partly taken back, then one slow step (SFPO)."""

    info: ClassVar[Info] = Info(
        paper="SFPO (arXiv 2510.04072)",
        formula="K steps to theta_K; theta_0 + alpha (theta_K - theta_0); one more step",
        certainty="B",
        golden=("sfpo_quadratic_step", "sfpo_entropy_trigger"),
    )
    requires: ClassVar[frozenset[str]] = frozenset({"proximal"})
    type: Literal["slow_fast"] = "slow_fast"
    fast_steps: int = Field(3, ge=1, description="optimiser steps before the weights are put back")
    alpha: float = Field(0.8, ge=0, le=1, description="share of the fast steps' way that is kept")
    window_steps: int = Field(10, ge=2, description="batches whose entropy is watched, the present one included")
    threshold: float = Field(
        2.0, gt=0, description="standard deviations of the entropy from its mean that end the fast steps for good"
    )


@builtin("update", "april.algorithms.update:bandit_epochs")
class BanditEpochs(Atom):
    """As many passes over each batch as a bandit chooses (ADEPT)."""

    info: ClassVar[Info] = Info(
        paper="ADEPT (arXiv 2501.12620)",
        formula="argmax over arms of Q + c sqrt(ln t / n); Q = mean of the last rewards of the arm",
        certainty="B",
        golden=(),
    )
    requires: ClassVar[frozenset[str]] = frozenset({"proximal"})
    own_epochs: ClassVar[bool] = True
    """Whether it decides by itself on the number of passes."""
    type: Literal["bandit_epochs"] = "bandit_epochs"
    arms: tuple[int, ...] = Field((1, 2, 3, 5), min_length=1, description="numbers of passes to choose from")
    rule: Literal["ucb", "thompson", "round_robin"] = Field("ucb", description="how an arm is chosen")
    exploration: float = Field(0.2, ge=0, description="c of UCB, in units of the reward")
    window_trials: int = Field(10, ge=1, description="last rewards of an arm that count")
    min_trials: int = Field(2, ge=1, description="trials of every arm before the rule chooses")
    noise: float = Field(0.05, gt=0, description="standard deviation that Thompson sampling adds")
    baseline_decay: float = Field(0.9, ge=0, lt=1, description="of the average that rewards are compared with, a batch")
    max_kl: float | None = Field(None, gt=0, description="kl_proximal of a batch after which the fewest passes are taken")

    @property
    def idle_options(self) -> Mapping[str, str]:
        """What only another rule reads."""
        rules = {"ucb": {"noise"}, "thompson": {"exploration"}, "round_robin": {"noise", "exploration", "min_trials"}}
        return dict.fromkeys(sorted(rules[self.rule]), "rule")

    @field_validator("arms")
    @classmethod
    def _positive(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if min(value) < 1 or len(set(value)) < len(value):
            raise ValueError("different numbers of 1 or more")
        return value
