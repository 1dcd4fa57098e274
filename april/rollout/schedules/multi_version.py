"""Several versions at once (DORA of LongCat-Flash-Thinking): each sample is written by one version of the weights.

New samples get the newest weights; running ones stay on those they began with until they end. Nothing that is healthy is
dropped, and since a group is trained within the bound, at most max_lag_steps + 1 versions are alive. A sample whose weights are
gone when it has to go on (its engine died, an evaluation parked it) starts again from nothing.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from april.core.ids import SampleId
from april.rollout.schedules.bounded_async import AsyncConfig, AsyncRule
from april.rollout.schedules.fill import waiting_up_to
from april.rollout.view import Memo, Plan, View


class MultiVersionConfig(AsyncConfig):
    """Keep generating through updates; a sample is never continued by other weights than it began with."""

    type: Literal["multi_version"] = "multi_version"
    max_lag_steps: int = Field(
        2, ge=0, description="largest lag of a trained token, in updates; versions alive besides the newest"
    )
    update_mode: Literal["next_request", "drain"] = Field(
        "next_request",
        description="next_request: running samples stay on their weights while new ones get the newest, for engines that hold "
        "several versions; drain: for engines with one set, which let running samples finish before they swap",
    )


class PinnedRule(AsyncRule):
    """`bounded_async` in which a sample with tokens is resumed under the version of those tokens, or restarted."""

    def plan(self, view: View, memo: Memo) -> tuple[Plan, Memo]:
        if not view.updating and (orphans := tuple(s for s in self._waiting(view) if self._is_orphan(view, s))):
            return Plan(restart=orphans), memo
        return super().plan(view, memo)

    def _is_orphan(self, view: View, sample: SampleId) -> bool:
        return view.newest_version(sample) not in (None, view.version)

    def _waiting(self, view: View) -> tuple[SampleId, ...]:
        room = None if self.config.max_running is None else self.config.max_running - view.num_running
        return waiting_up_to(view, room, self.bound.stale(view))

    def _startable(self, view: View, room: int | None) -> tuple[SampleId, ...]:
        waiting = super()._startable(view, room)
        if not view.updating:
            return waiting
        # The version that will serve a resumed sample is not known until the update is live.
        return tuple(sample for sample in waiting if view.newest_version(sample) is None)


class MultiVersionSchedule(PinnedRule):
    """The pinned rule over an engine that keeps old versions, or drains."""

    def __init__(self, config: MultiVersionConfig) -> None:
        super().__init__(config, config.update_mode)
