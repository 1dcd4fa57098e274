"""Redundancy without recycling (ROLL, arXiv 2506.06122; ROLL Flash, arXiv 2510.11345): race more than is needed, drop the losers.

Three parts. Each sample is a request of its own, and a place that frees takes the next sample, whichever group it is of (queue
scheduling, prompt replication). More groups run than a batch needs (additional prompts). Groups have spare members, and the
first to finish win (redundant samples). All data is on-policy, and it is paid for: the losers' tokens are wasted, and long
answers are trained on less often than they are given, in every step anew. `length_bias` shows it.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from april.config.schema import Config
from april.core.ids import GroupId
from april.engines.base import UpdateMode
from april.rollout.schedules.fill import waiting_up_to
from april.rollout.staleness import over_age
from april.rollout.view import Memo, Plan, View


class ReplicatedConfig(Config):
    """Run more groups and more samples than a batch needs, train on those that finish first, drop the others."""

    type: Literal["replicated"] = "replicated"
    over_provision: float = Field(1.25, ge=1.0, description="groups started over groups per step")
    refill: Literal["one", "step"] = Field(
        "one",
        description="what filters take is replaced one by one; step: by as many groups as a step starts with, as soon as fewer "
        "than a batch are left (dynamic sampling of slime)",
    )
    redundant_samples: int = Field(0, ge=0, description="spare members of each group; its first group_size finishers win")
    max_running: int | None = Field(None, ge=1, description="samples in the engine; all that are issued when left out")


class ReplicatedSchedule:
    """Fill once a step; at the cut, park what runs and evict every group that is not in the batch."""

    max_lag_steps = 0
    update_mode: UpdateMode = "drain"

    def __init__(self, config: ReplicatedConfig) -> None:
        self.config = config

    def plan(self, view: View, memo: Memo) -> tuple[Plan, Memo]:
        if spare := view.decided_samples():
            return Plan(cut=tuple((sample, "lost the race of its group") for sample in spare)), memo
        if losers := self._losers(view):
            return Plan(evict=tuple((group, "lost the race") for group in losers)), memo
        if view.updating:
            return Plan(), memo
        if view.num_ready_groups >= view.groups_per_step:
            if view.num_running:
                return Plan(park=view.running_samples()), memo
            return Plan(emit=view.ready_groups(view.groups_per_step)), memo
        if (missing := min(self._missing(view, first=memo.get("filled") != view.version), view.issuable)) > 0:
            return Plan(issue=missing, extra_samples=self.config.redundant_samples), memo
        room = None if self.config.max_running is None else self.config.max_running - view.num_running
        return Plan(start=waiting_up_to(view, room)), {**memo, "filled": view.version}

    def _missing(self, view: View, first: bool) -> int:
        """Groups to issue now.

        Args:
            first: whether this is the fill with which a step begins.
        """
        size, whole = view.groups_per_step, round(self.config.over_provision * view.groups_per_step)
        if first or self.config.refill == "one":
            return (whole if first else size) - view.num_groups
        return whole if view.num_groups < size else 0

    def _losers(self, view: View) -> list[GroupId]:
        """Groups of a step that has been cut; those still being judged go when their outcomes come."""
        groups = [*over_age(view, 0)]
        if view.updating:
            groups += [*view.waiting_groups(), *view.ready_groups()]
        return [group for group in dict.fromkeys(groups) if not view.is_active(group)]
