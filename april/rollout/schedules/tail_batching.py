"""Tail batching (RollPacker, arXiv 2509.21009): short steps race, and what loses is generated again in steps of its own.

A short step starts more groups than a batch needs and trains on the first to finish. The losers give up their tokens and wait.
When they fill a batch, a long step generates all of it and waits for every sample. So all data is on-policy, no group is lost,
and most steps do not wait for the longest sample.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from april.config.schema import Config
from april.core.ids import SampleId
from april.engines.base import UpdateMode
from april.rollout.view import Memo, Plan, View


class TailBatchingConfig(Config):
    """Race in short steps; collect the losers and generate them again in long steps."""

    type: Literal["tail_batching"] = "tail_batching"
    over_provision: float = Field(1.25, ge=1.0, description="groups started over groups per step, in a short step")


class TailBatchingSchedule:
    """The rule, in the order it decides: set the losers back, choose the kind of step, cut, fill."""

    max_lag_steps = 0
    update_mode: UpdateMode = "drain"

    def __init__(self, config: TailBatchingConfig) -> None:
        self.config = config

    def plan(self, view: View, memo: Memo) -> tuple[Plan, Memo]:
        if losers := self._losers(view):
            return Plan(restart=losers), memo
        if view.updating:
            return Plan(), memo
        if memo.get("step") != view.version:
            memo = {**memo, "step": view.version, "long": self._is_long(view), "filled": False}
        if view.num_ready_groups >= view.groups_per_step:
            if view.num_running:
                return Plan(park=view.running_samples()), memo
            return Plan(emit=view.ready_groups(view.groups_per_step)), memo
        plan = self._fill(view, memo["long"], memo["filled"])
        return plan, memo if plan.issue else {**memo, "filled": True}

    def _losers(self, view: View) -> tuple[SampleId, ...]:
        """What has tokens of a step that was cut; groups still being judged follow when their outcomes come."""
        old = [age.version for age in view.ages() if view.updating or age.version < view.version]
        groups = [group for version in old for group in view.groups_of(version) if not view.is_active(group)]
        return tuple(sample for group in groups for sample in view.spent_samples(group))

    def _is_long(self, view: View) -> bool:
        fresh = view.issuable + view.num_groups - view.num_restarted_groups
        return view.num_restarted_groups >= view.groups_per_step or fresh < view.groups_per_step

    def _fill(self, view: View, is_long: bool, filled: bool) -> Plan:
        """In a long step the losers, in a short step new groups, and of the other kind what is missing."""
        wanted = view.groups_per_step if is_long or filled else round(self.config.over_provision * view.groups_per_step)
        losers, in_flight = view.num_restarted_groups, view.num_groups - view.num_restarted_groups
        missing = max(0, wanted - in_flight)
        lacking = missing if is_long else max(0, view.groups_per_step - in_flight - view.issuable)
        again = min(lacking, losers)
        if (issue := min(missing - again, view.issuable)) > 0:
            return Plan(issue=issue)
        groups = [*view.restarted_groups(again)]
        if view.num_waiting_groups > losers:
            waiting_again = set(view.restarted_groups())
            groups += [group for group in view.waiting_groups() if group not in waiting_again]
        return Plan(start=tuple(sample for group in sorted(groups) for sample in view.waiting_samples(group)))
