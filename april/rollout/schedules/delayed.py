"""Data that is exactly so many updates old: for measuring what staleness does, not for speed.

Every batch is generated as a whole under one version, as in the synchronous schedule, and then waits in stock until it is
`delay_steps` updates old. So the lag of every trained token is known beforehand, and algorithms can be compared at equal lag.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from april.config.schema import Config
from april.engines.base import UpdateMode
from april.rollout.schedules.fill import all_waiting
from april.rollout.view import Memo, Plan, View


class DelayedConfig(Config):
    """Train every token exactly so many updates late (studies of stale data)."""

    type: Literal["delayed"] = "delayed"
    delay_steps: int = Field(1, ge=0, description="updates between generating a batch and training on it; 0 is synchronous")


class DelayedSchedule:
    """The synchronous rule with a stock: fill up to one batch more than the delay, train on the oldest."""

    update_mode: UpdateMode = "drain"

    def __init__(self, config: DelayedConfig) -> None:
        self.config = config

    @property
    def max_lag_steps(self) -> int:
        return self.config.delay_steps

    def plan(self, view: View, memo: Memo) -> tuple[Plan, Memo]:
        if view.updating:
            return Plan(), memo
        wanted = (self.config.delay_steps + 1) * view.groups_per_step
        missing = max(0, min(wanted - view.num_groups, view.issuable))
        if not missing and view.num_ready_groups == view.num_groups >= view.groups_per_step:
            return Plan(emit=tuple(sorted(view.ready_groups())[: view.groups_per_step])), memo
        return Plan(issue=missing, start=all_waiting(view)), memo
