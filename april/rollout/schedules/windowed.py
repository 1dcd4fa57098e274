"""A window over the order of issue (MiniMax Forge): asynchronous, and neither first come first served nor strictly in turn.

A finished group is trained on only when it was issued less than a window after the oldest group that is still unfinished. Inside
the window the first to finish go first, so one long group does not stop the trainer at once; beyond it they wait, so
easy and short groups of far later cannot push ahead of the hard ones, which bounds how far batches lean towards short answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from april.core.ids import GroupId
from april.rollout.schedules.bounded_async import AsyncConfig, AsyncRule
from april.rollout.view import View


class WindowedConfig(AsyncConfig):
    """Keep generating through updates; train only on groups issued shortly after the oldest unfinished one."""

    type: Literal["windowed"] = "windowed"
    max_lag_steps: int = Field(3, ge=0, description="largest lag of a trained token, in updates; 0 is the synchronous schedule")
    window: float = Field(
        0.3, gt=0, le=1, description="how far ahead of the oldest unfinished group, as a fraction of the groups the bound admits"
    )
    update_mode: Literal["recompute", "keep_kv"] = Field(
        "recompute", description="how running samples take new weights: on KV made again by them, or on the KV they have"
    )


class WindowedSchedule(AsyncRule):
    """`bounded_async` with a narrower choice at the cut."""

    config: WindowedConfig

    def __init__(self, config: WindowedConfig) -> None:
        super().__init__(config, config.update_mode)

    def _deliverable(self, view: View) -> Sequence[GroupId]:
        oldest = view.oldest_unready()
        if oldest is not None:
            admitted = (self.config.max_lag_steps + 1) * view.groups_per_step
            end = oldest.serial + math.ceil(self.config.window * admitted)
            if view.num_ready_before(end) < view.groups_per_step:
                return ()
        return sorted(view.ready_groups())  # those past the window last: only a deadline takes them
