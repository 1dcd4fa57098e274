"""Bounded asynchrony: rollouts never stop, not even for an update; admission keeps the data fresh (AReaL, arXiv 2505.24298).

New groups are admitted as long as (max_lag_steps + 1) batches have room for them, groups in training included. Weights
change under running samples, which continue on the new ones ("recompute" or "keep_kv"). AReaL's rule bounds the lag of the
version a sample starts with; here the earliest due groups are also trained first, which makes the bound strict for every
token.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from april.config.schema import Config
from april.core.ids import GroupId, SampleId
from april.engines.base import UpdateMode
from april.rollout.staleness import due_now
from april.rollout.view import Memo, Plan, View


class BoundedAsyncConfig(Config):
    """Keep generating through updates, and admit no more than the lag bound allows."""

    type: Literal["bounded_async"] = "bounded_async"
    max_lag_steps: int = Field(1, ge=0, description="largest lag of a trained token, in updates; 0 is the synchronous schedule")
    max_running: int | None = Field(None, ge=1, description="samples in the engine; as many as are admitted when left out")
    update_mode: Literal["recompute", "keep_kv"] = Field(
        "recompute", description="how running samples take new weights: on KV made again by them, or on the KV they have"
    )


class BoundedAsyncSchedule:
    """Cut a batch whenever the trainer is free and one is ready; keep the engine full at all times."""

    def __init__(self, config: BoundedAsyncConfig) -> None:
        self.config = config

    @property
    def max_lag_steps(self) -> int:
        return self.config.max_lag_steps

    @property
    def update_mode(self) -> UpdateMode:
        return self.config.update_mode

    def plan(self, view: View, memo: Memo) -> tuple[Plan, Memo]:
        return (self._cut(view) or self._fill(view)), memo

    def _cut(self, view: View) -> Plan | None:
        if view.updating or view.num_ready_groups < view.groups_per_step:
            return None
        due = due_now(view.groups_by_version(), view.version, view.groups_per_step, self.config.max_lag_steps)
        if not all(view.is_ready(group) for group in due):
            return None
        chosen: dict[GroupId, None] = dict.fromkeys(due)
        for group in view.ready_groups():
            if len(chosen) == view.groups_per_step:
                break
            chosen[group] = None
        return Plan(emit=tuple(chosen))

    def _fill(self, view: View) -> Plan:
        room = None if self.config.max_running is None else self.config.max_running - view.num_running
        start: list[SampleId] = []
        for group in view.waiting_groups():
            waiting = view.waiting_samples(group)
            start.extend(waiting if room is None else waiting[: max(0, room - len(start))])
        left = None if room is None else (room - len(start)) // view.group_size
        open_groups = view.num_groups + view.num_training_groups
        admitted = max(0, (self.config.max_lag_steps + 1) * view.groups_per_step - open_groups)
        issue = min(admitted, view.issuable, admitted if left is None else max(0, left))
        return Plan(issue=issue, start=tuple(start))
