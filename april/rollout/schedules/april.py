"""APRIL: active partial rollouts (arXiv 2509.18521).

More groups run than a batch needs; when enough have finished, the rest are parked with their tokens and resumed first in
the next step. Beyond the paper: a bound on lag is required, recycling may count samples instead of groups, room may be
refilled continuously, and surplus groups are always kept.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from april.config.schema import Config
from april.core.ids import GroupId, SampleId
from april.engines.base import UpdateMode
from april.rollout.staleness import OverAge, admissible, due_now, over_age
from april.rollout.view import Memo, Plan, View


class AprilConfig(Config):
    """Over-provision, stop when enough groups have finished, recycle the unfinished ones."""

    type: Literal["april"] = "april"
    over_provision: float = Field(
        1.5, ge=1.0, description="groups in flight over groups per step (alpha = M / N); the mean lag is about alpha - 1"
    )
    max_lag_steps: int = Field(ge=0, description="largest lag of a trained token, in updates")
    over_age: OverAge = Field(
        "finish_first",
        description="what becomes of data at the bound: finish_first waits for it, drop_group evicts it, mask_tokens trains "
        "the group without its old tokens",
    )
    refill: Literal["step", "continuous"] = Field(
        "step",
        description="step: fill once, and again by M groups when filters leave fewer than N, as in APRIL's code; "
        "continuous: replace each group that finishes",
    )
    granularity: Literal["group", "sample"] = Field(
        "group",
        description="what fills a place in flight: a group until its last sample is done, or each unfinished sample by itself",
    )


class AprilSchedule:
    """The rule, in the order it decides: drop over-age groups, cut the batch, fill the room."""

    update_mode: UpdateMode = "drain"

    def __init__(self, config: AprilConfig) -> None:
        self.config = config

    @property
    def max_lag_steps(self) -> int:
        return self.config.max_lag_steps

    def plan(self, view: View, memo: Memo) -> tuple[Plan, Memo]:
        if view.updating:
            return Plan(), memo
        stale: tuple[GroupId, ...] = ()
        if self.config.over_age == "drop_group":
            stale = over_age(view.groups_by_version(), view.version, self.config.max_lag_steps)
            # One whose members are still being scored is never started again, and goes when the last outcome is there.
            if gone := [group for group in stale if not view.is_active(group)]:
                return Plan(evict=tuple((group, "over the lag bound") for group in gone)), memo
        if plan := self._cut(view):
            return plan, memo
        plan = self._fill(view, frozenset(stale), first=memo.get("filled") != view.version)
        return plan, memo if plan.issue else {**memo, "filled": view.version}

    def _cut(self, view: View) -> Plan | None:
        """Stop and emit, once enough groups are ready."""
        if view.num_ready_groups < view.groups_per_step:
            return None
        due = self._due(view)
        late = [group for group in due if not view.is_ready(group)]
        if late:
            return Plan(start=tuple(sample for group in late for sample in view.waiting_samples(group)))
        if view.num_running:
            return Plan(park=view.running_samples())
        first = [group for group in view.ready_groups() if group not in set(due)]
        chosen = (*due, *first)[: view.groups_per_step]
        masked = self.config.max_lag_steps if self.config.over_age == "mask_tokens" else None
        return Plan(emit=chosen, max_token_lag=masked)

    def _due(self, view: View) -> tuple[GroupId, ...]:
        if self.config.over_age != "finish_first":
            return ()
        return due_now(view.groups_by_version(), view.version, view.groups_per_step, self.config.max_lag_steps)

    def _fill(self, view: View, stale: frozenset[GroupId], first: bool) -> Plan:
        """Start waiting groups, the oldest first, then issue new ones, up to the room in flight.

        Args:
            stale: groups that must not be started.
            first: whether this is the fill with which a step begins.
        """
        room = self._room(view, first)
        by_sample = self.config.granularity == "sample"
        counts_samples = by_sample and self.config.refill == "continuous"
        start: list[SampleId] = []
        for group in view.waiting_groups():
            placed = not counts_samples and view.is_active(group)  # a member that lost its engine: the group has its place
            if group in stale or (room <= 0 and not placed):
                continue
            waiting = view.waiting_samples(group)
            start.extend(waiting)
            if not placed:
                room -= len(waiting) if by_sample else view.group_size
        wanted = min(room // view.group_size, view.issuable)
        issue = min(wanted, admissible(view.num_groups, view.groups_per_step, self.config.max_lag_steps))
        # Issue first and start together afterwards: the room is decided once, before anything of it is active.
        return Plan(issue=issue) if issue > 0 else Plan(start=tuple(start))

    def _room(self, view: View, first: bool) -> int:
        """Samples that may be started now."""
        target = round(self.config.over_provision * view.groups_per_step)
        size = view.group_size
        active = view.num_running if self.config.granularity == "sample" else view.num_active_groups * size
        if self.config.refill == "continuous":
            return target * size - active
        in_flight = view.num_active_groups + view.num_ready_groups
        if first or not view.num_active_groups:  # groups that are still being scored since the last step have their place
            return (target - in_flight) * size
        return target * size if in_flight < view.groups_per_step else 0
