"""Synchronous rollouts: issue a batch, wait for all of it, train, repeat. The baseline of every claim."""

from __future__ import annotations

from typing import Literal

from april.config.schema import Config
from april.engines.base import UpdateMode
from april.rollout.schedules.fill import all_waiting
from april.rollout.view import Memo, Plan, View


class SyncConfig(Config):
    """Wait for every sample of the batch; on-policy, and idle while the longest one runs."""

    type: Literal["sync"] = "sync"


class SyncSchedule:
    """Keeps exactly one batch of groups open. What a filter drops is replaced at once."""

    max_lag_steps = 0
    update_mode: UpdateMode = "drain"

    def __init__(self, config: SyncConfig) -> None:
        self.config = config

    def plan(self, view: View, memo: Memo) -> tuple[Plan, Memo]:
        if view.updating:
            return Plan(), memo
        if view.num_ready_groups >= view.groups_per_step:
            return Plan(emit=view.ready_groups(view.groups_per_step)), memo
        missing = min(view.groups_per_step - view.num_groups, view.issuable)
        return Plan(issue=max(0, missing), start=all_waiting(view)), memo
