"""The longest first, by forecast (Seer, arXiv 2511.14617): synchronous, with the long answers begun early.

Where a batch has more samples than the engine has places, the order of starting decides how long the last one is waited for;
to start the longest first is within 4/3 of the best order (Graham, 1969). Lengths are not known, but members of a group
resemble each other. So the first member of each group is a probe, started before everything else; when it has ended, its
length is the forecast for its siblings. A group whose probe still runs is taken to be long.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from april.config.schema import Config
from april.core.ids import SampleId
from april.engines.base import UpdateMode
from april.rollout.view import Memo, Plan, View


class LongestFirstConfig(Config):
    """Wait for every sample of the batch, and start those first that are expected to take longest; on-policy."""

    type: Literal["longest_first"] = "longest_first"
    max_running: int | None = Field(None, ge=1, description="samples in the engine; as many as it has places when left out")


class LongestFirstSchedule:
    """`sync` with an order; what has been submitted is not ordered any more, so no more than the places are submitted."""

    max_lag_steps = 0
    update_mode: UpdateMode = "drain"

    def __init__(self, config: LongestFirstConfig) -> None:
        self.config = config

    def plan(self, view: View, memo: Memo) -> tuple[Plan, Memo]:
        if view.updating:
            return Plan(), memo
        if view.num_ready_groups >= view.groups_per_step:
            return Plan(emit=view.ready_groups(view.groups_per_step)), memo
        if (missing := min(view.groups_per_step - view.num_groups, view.issuable)) > 0:
            return Plan(issue=missing), memo
        room = (self.config.max_running or view.caps.max_running) - view.num_running
        return Plan(start=self._first(view, room)), memo

    def _first(self, view: View, room: int) -> tuple[SampleId, ...]:
        """All probes that wait, or else the siblings of the groups that are expected to be longest."""
        start: list[SampleId] = []
        for group in view.longest_groups(max(0, room)):
            waiting = view.waiting_samples(group)
            is_probe = view.forecast(group) is None and waiting[0].member == 0
            if len(start) >= room or (start and not is_probe and start[0].member == 0 and view.forecast(start[0].group) is None):
                break  # siblings are ordered when the probes are on their way
            start.extend(waiting[:1] if is_probe else waiting[: room - len(start)])
        return tuple(start)
