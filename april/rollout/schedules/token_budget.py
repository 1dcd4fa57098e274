"""A budget of tokens a step (C3PO++, Ring-1T report, arXiv 2510.18855): every step costs the same time, whatever the lengths.

The engine is kept full. When the step has generated its budget, everything unfinished is parked and every finished group
is trained on, however many those are. Groups that have been carried over too often are purged.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from april.config.schema import Config
from april.core.ids import GroupId, SampleId
from april.engines.base import UpdateMode
from april.rollout.staleness import over_age
from april.rollout.view import Memo, Plan, View


class TokenBudgetConfig(Config):
    """Cut the batch when so many tokens have been generated; park the rest, and purge what was carried over too often."""

    type: Literal["token_budget"] = "token_budget"
    tokens_per_step: int = Field(ge=1, description="response tokens generated between two cuts")
    max_lag_steps: int = Field(4, ge=1, description="a group is purged when its oldest token would pass this lag")
    max_running: int = Field(128, ge=1, description="samples in the engine")


class TokenBudgetSchedule:
    """The rule, in the order it decides: purge, cut, fill. At least one group is trained on in each step."""

    update_mode: UpdateMode = "drain"

    def __init__(self, config: TokenBudgetConfig) -> None:
        self.config = config

    @property
    def max_lag_steps(self) -> int:
        return self.config.max_lag_steps

    def plan(self, view: View, memo: Memo) -> tuple[Plan, Memo]:
        if view.updating:
            return Plan(), memo
        stale = over_age(view.groups_by_version(), view.version, self.config.max_lag_steps)
        if gone := [group for group in stale if not view.is_active(group)]:
            return Plan(evict=tuple((group, "carried over too often") for group in gone)), memo
        spent = view.step_tokens >= self.config.tokens_per_step
        if view.num_ready_groups and (spent or self._last(view)):
            if view.num_running:
                return Plan(park=view.running_samples()), memo
            return Plan(emit=view.ready_groups()), memo
        return self._fill(view, frozenset(stale)), memo

    def _last(self, view: View) -> bool:
        """Whether nothing but ready groups is left and nothing more can be issued."""
        return view.num_groups == view.num_ready_groups and not view.issuable

    def _fill(self, view: View, stale: frozenset[GroupId]) -> Plan:
        room = self.config.max_running - view.num_running
        start: list[SampleId] = []
        for group in view.waiting_groups():
            if group not in stale:
                start.extend(view.waiting_samples(group)[: max(0, room - len(start))])
        issue = min((room - len(start)) // view.group_size, view.issuable)
        return Plan(issue=max(0, issue), start=tuple(start))
