"""Redundancy without recycling (ROLL's additional prompts, arXiv 2506.06122): race more groups than needed, drop the losers.

Stays on-policy, and pays for it: the tokens of the losers are wasted, and long answers are trained on less often than they are
given, in every step anew. `length_bias` shows it; the april schedule is what to use instead.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from april.config.schema import Config
from april.core.ids import GroupId
from april.engines.base import UpdateMode
from april.rollout.staleness import over_age
from april.rollout.view import Memo, Plan, View


class RedundantConfig(Config):
    """Run more groups than a batch needs, train on those that finish first, drop the others."""

    type: Literal["redundant"] = "redundant"
    over_provision: float = Field(1.25, ge=1.0, description="groups started over groups per step")


class RedundantSchedule:
    """Fill once a step; at the cut, park what runs and evict every group that is not in the batch."""

    max_lag_steps = 0
    update_mode: UpdateMode = "drain"

    def __init__(self, config: RedundantConfig) -> None:
        self.config = config

    def plan(self, view: View, memo: Memo) -> tuple[Plan, Memo]:
        if losers := self._losers(view):
            return Plan(evict=tuple((group, "lost the race") for group in losers)), memo
        if view.updating:
            return Plan(), memo
        if view.num_ready_groups >= view.groups_per_step:
            if view.num_running:
                return Plan(park=view.running_samples()), memo
            return Plan(emit=view.ready_groups(view.groups_per_step)), memo
        first = memo.get("filled") != view.version
        wanted = round(self.config.over_provision * view.groups_per_step) if first else view.groups_per_step
        if (missing := min(wanted - view.num_groups, view.issuable)) > 0:
            return Plan(issue=missing), memo
        start = tuple(sample for group in view.waiting_groups() for sample in view.waiting_samples(group))
        return Plan(start=start), {**memo, "filled": view.version}

    def _losers(self, view: View) -> list[GroupId]:
        """Groups of a step that has been cut; those still being judged go when their outcomes come."""
        groups = [*over_age(view.groups_by_version(), view.version, 0)]
        if view.updating:
            groups += [*view.waiting_groups(), *view.ready_groups()]
        return [group for group in dict.fromkeys(groups) if not view.is_active(group)]
