"""Bounded asynchrony: rollouts never stop, not even for an update; admission keeps the data fresh (AReaL, arXiv 2505.24298).

New groups are admitted as long as (max_lag_steps + 1) batches have room for them, groups in training included. Weights
change under running samples, which continue on the new ones ("recompute" or "keep_kv"). AReaL's rule bounds the lag of the
version a sample starts with; here the earliest due groups are also trained first, which makes the bound strict for every
token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from april.config.schema import Config
from april.core.ids import GroupId, SampleId
from april.engines.base import UpdateMode
from april.rollout.schedules.fill import waiting_up_to
from april.rollout.staleness import OVER_AGE_HELP, Bound, OverAge
from april.rollout.view import Memo, Plan, View


class AsyncConfig(Config):
    """What all schedules that generate through updates share."""

    max_lag_steps: int = Field(1, ge=0, description="largest lag of a trained token, in updates; 0 is the synchronous schedule")
    over_age: OverAge = Field("finish_first", description=OVER_AGE_HELP)
    max_running: int | None = Field(None, ge=1, description="samples in the engine; as many as are admitted when left out")


class BoundedAsyncConfig(AsyncConfig):
    """Keep generating through updates, and admit no more than the lag bound allows."""

    type: Literal["bounded_async"] = "bounded_async"
    update_mode: Literal["recompute", "keep_kv"] = Field(
        "recompute", description="how running samples take new weights: on KV made again by them, or on the KV they have"
    )


class AsyncRule:
    """Cut a batch whenever the trainer is free and one is ready; keep the engine full at all times."""

    def __init__(self, config: AsyncConfig, update_mode: UpdateMode) -> None:
        self.config, self.update_mode = config, update_mode
        self.bound = Bound(config.max_lag_steps, config.over_age)

    @property
    def max_lag_steps(self) -> int:
        return self.config.max_lag_steps

    @property
    def overlaps(self) -> bool:
        return self.config.max_lag_steps > 0

    def plan(self, view: View, memo: Memo) -> tuple[Plan, Memo]:
        return (self.bound.drop(view) or self._cut(view) or self._fill(view)), memo

    def _cut(self, view: View) -> Plan | None:
        if view.updating or view.num_ready_groups < view.groups_per_step or self.bound.missing(view):
            return None
        ready = self._deliverable(view)
        if len(ready) < view.groups_per_step:
            return None
        return Plan(emit=self.bound.choose(view, ready), max_token_lag=self.bound.max_token_lag)

    def _deliverable(self, view: View) -> Sequence[GroupId]:
        """Ready groups that may be trained on, the preferred first."""
        return view.ready_groups()

    def _fill(self, view: View) -> Plan:
        room = None if self.config.max_running is None else self.config.max_running - view.num_running
        start = self._startable(view, room)
        admitted = self.bound.admissible(view)
        left = admitted if room is None else max(0, (room - len(start)) // view.group_size)
        return Plan(issue=min(admitted, view.issuable, left), start=start)

    def _startable(self, view: View, room: int | None) -> tuple[SampleId, ...]:
        return waiting_up_to(view, room, self.bound.stale(view))


class BoundedAsyncSchedule(AsyncRule):
    """The rule with in-flight updates."""

    def __init__(self, config: BoundedAsyncConfig) -> None:
        super().__init__(config, config.update_mode)
