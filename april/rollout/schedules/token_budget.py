"""A budget of tokens a step (C3PO++, Ring-1T report, arXiv 2510.18855): every step costs the same time, whatever the lengths.

The engine is kept full. When the step has generated its budget, everything unfinished is parked and every finished group
is trained on, however many those are. What was generated beyond the budget is taken off the next step's. Groups that have been
carried over too often are purged.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from april.config.schema import Config
from april.engines.base import UpdateMode
from april.rollout.schedules.fill import waiting_up_to
from april.rollout.staleness import OVER_AGE_HELP, Bound, OverAge
from april.rollout.view import Memo, Plan, View

MAX_OVERSHOOT = 0.5
"""Share of a budget that an earlier step can have used up: waiting for a first group must not empty the step after it."""


class TokenBudgetConfig(Config):
    """Cut the batch when so many tokens have been generated; park the rest, and purge what was carried over too often."""

    type: Literal["token_budget"] = "token_budget"
    tokens_per_step: int = Field(ge=1, description="response tokens generated between two cuts")
    max_lag_steps: int = Field(4, ge=1, description="how often a group may be carried over: the largest lag of a trained token")
    over_age: OverAge = Field("drop_group", description=OVER_AGE_HELP)
    max_running: int = Field(128, ge=1, description="samples in the engine")


class TokenBudgetSchedule:
    """The rule, in the order it decides: purge, cut, fill. At least one group is trained on in each step."""

    update_mode: UpdateMode = "drain"

    def __init__(self, config: TokenBudgetConfig) -> None:
        self.config = config
        self.bound = Bound(config.max_lag_steps, config.over_age, whole_batches=False)

    @property
    def max_lag_steps(self) -> int:
        return self.config.max_lag_steps

    def plan(self, view: View, memo: Memo) -> tuple[Plan, Memo]:
        if view.updating:
            return Plan(), memo
        if purge := self.bound.drop(view, "carried over too often"):
            return purge, memo
        budget = self.config.tokens_per_step - int(memo.get("overshoot", 0))
        spent = view.step_tokens >= budget
        if view.num_ready_groups and (spent or self._last(view)) and not self.bound.missing(view):
            if view.num_running:
                return Plan(park=view.running_samples()), memo
            over = min(max(0, view.step_tokens - budget), round(MAX_OVERSHOOT * self.config.tokens_per_step))
            return Plan(emit=view.ready_groups(), max_token_lag=self.bound.max_token_lag), {"overshoot": over}
        return self._fill(view), memo

    def _last(self, view: View) -> bool:
        """Whether nothing but ready groups is left and nothing more can be issued."""
        return view.num_groups == view.num_ready_groups and not view.issuable

    def _fill(self, view: View) -> Plan:
        room = self.config.max_running - view.num_running
        start = waiting_up_to(view, room, self.bound.stale(view))
        issue = min((room - len(start)) // view.group_size, view.issuable)
        return Plan(issue=max(0, issue), start=start)
