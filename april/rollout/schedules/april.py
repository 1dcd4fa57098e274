"""APRIL: active partial rollouts (arXiv 2509.18521).

More groups run than a batch needs; when enough have finished, the rest are parked with their tokens and resumed first in
the next step. Beyond the paper: a bound on lag is required, recycling may count samples instead of groups, room may be
refilled continuously, the ratio may steer itself, and surplus groups are always kept.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from april.config.schema import Config
from april.core.ids import SampleId
from april.engines.base import UpdateMode
from april.rollout.schedules.adaptive import Steering, steer, steering
from april.rollout.staleness import OVER_AGE_HELP, Bound, OverAge
from april.rollout.view import Memo, Plan, View


class AprilConfig(Config):
    """Over-provision, stop when enough groups have finished, recycle the unfinished ones."""

    type: Literal["april"] = "april"
    over_provision: float | Literal["adaptive"] = Field(
        2.5,
        description="groups in flight over groups per step (alpha = M / N), 1 or more; the mean lag is about alpha - 1; "
        "adaptive: steered by measured throughput, pass rate and KV memory",
    )
    max_lag_steps: int = Field(ge=0, description="largest lag of a trained token, in updates")
    over_age: OverAge = Field("finish_first", description=OVER_AGE_HELP)
    refill: Literal["step", "continuous"] = Field(
        "step",
        description="step: fill once, and again by M groups when filters leave fewer than N, as in APRIL's code; "
        "continuous: replace each group that finishes",
    )
    refill_before_scoring: bool = Field(
        False, description="with continuous refill: a place is free when the last sample has ended, not when it has been judged"
    )
    granularity: Literal["group", "sample"] = Field(
        "group",
        description="what fills a place in flight: a group until its last sample is done, or each unfinished sample by itself",
    )

    @field_validator("over_provision")
    @classmethod
    def _check_ratio(cls, value: float | str) -> float | str:
        if isinstance(value, float) and value < 1:
            raise ValueError("a ratio below 1 cannot fill a batch")
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.refill_before_scoring and (self.refill != "continuous" or self.granularity == "sample"):
            raise ValueError("refill_before_scoring has an effect with refill = continuous and granularity = group only")
        return self


class AprilSchedule:
    """The rule, in the order it decides: drop over-age groups, cut the batch, fill the room."""

    update_mode: UpdateMode = "drain"

    def __init__(self, config: AprilConfig) -> None:
        self.config, self.bound = config, Bound(config.max_lag_steps, config.over_age)

    @property
    def max_lag_steps(self) -> int:
        return self.config.max_lag_steps

    def plan(self, view: View, memo: Memo) -> tuple[Plan, Memo]:
        if view.updating:
            return Plan(), memo
        if gone := self.bound.drop(view):
            return gone, memo
        if self.config.over_provision == "adaptive":
            if memo.get("steered", {}).get("step") != view.version:
                memo = {**memo, "steered": steer(memo.get("steered"), view, self.max_lag_steps)}
            steered = steering(memo["steered"], view, self.max_lag_steps)
        else:
            steered = Steering(self.config.over_provision, None)
        if plan := self._cut(view) or self._resume(view):
            return plan, memo
        plan = self._fill(view, steered, first=memo.get("filled") != view.version)
        return plan, memo if plan.issue else {**memo, "filled": view.version}

    def _cut(self, view: View) -> Plan | None:
        """Stop and emit, once enough groups are ready."""
        if view.num_ready_groups < view.groups_per_step:
            return None
        if self.bound.missing(view):
            return Plan(start=self.bound.late_samples(view))
        if view.num_running:
            return Plan(park=view.running_samples())
        return Plan(emit=self.bound.choose(view, view.ready_groups()), max_token_lag=self.bound.max_token_lag)

    def _resume(self, view: View) -> Plan | None:
        """Start what lost its engine: its group has its place, unless each sample has a place of its own."""
        if self.config.granularity == "sample" and self.config.refill == "continuous":
            return None
        stale = frozenset(self.bound.stale(view))
        lost = (group for group in view.interrupted_groups() if group not in stale)
        return Plan(start=tuple(sample for group in lost for sample in view.waiting_samples(group)))

    def _fill(self, view: View, steered: Steering, first: bool) -> Plan:
        """Start waiting groups, the oldest first, then issue new ones, up to the room in flight.

        Args:
            first: whether this is the fill with which a step begins.
        """
        stale = frozenset(self.bound.stale(view))
        by_sample = self.config.granularity == "sample"
        room = self._room(view, steered, first)
        start: list[SampleId] = []
        for group in view.waiting_groups(max(0, room) + len(stale)):  # each group takes one place at least
            if group in stale or room <= 0:
                continue
            waiting = view.waiting_samples(group)
            start.extend(waiting)
            room -= len(waiting) if by_sample else view.group_size
        wanted = min(room // view.group_size, view.issuable)
        issue = min(wanted, self.bound.admissible(view))
        # Issue first and start together afterwards: the room is decided once, before anything of it is active.
        return Plan(issue=issue) if issue > 0 else Plan(start=tuple(start))

    def _room(self, view: View, steered: Steering, first: bool) -> int:
        """Samples that may be started now."""
        size = view.group_size
        target = round(steered.ratio * view.groups_per_step)
        places = view.num_generating_groups if self.config.refill_before_scoring else view.num_active_groups
        active = view.num_running if self.config.granularity == "sample" else places * size
        in_flight = view.num_active_groups + view.num_ready_groups
        if self.config.refill == "continuous":
            room = target * size - active
        elif first or not view.num_active_groups or self.config.over_provision == "adaptive":
            room = (target - in_flight) * size  # groups still being scored since the last step have their place
        else:
            room = target * size if in_flight < view.groups_per_step else 0
        return room if steered.max_running is None else min(room, max(0, steered.max_running - view.num_running))
