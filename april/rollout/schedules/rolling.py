"""Rolling updates (DART): workers of an engine take new weights one after the other while the others serve.

Rollouts go on through the update, and a sample ends on the worker and under the weights it began with. What is lost is one
worker's throughput at a time instead of all of it.
"""

from __future__ import annotations

from typing import Literal

from april.rollout.schedules.bounded_async import AsyncConfig
from april.rollout.schedules.multi_version import PinnedRule


class RollingConfig(AsyncConfig):
    """Keep generating through updates, which reach one engine of several (`engine.replicas`) at a time."""

    type: Literal["rolling"] = "rolling"


class RollingSchedule(PinnedRule):
    """The pinned rule over an engine of several workers."""

    def __init__(self, config: RollingConfig) -> None:
        super().__init__(config, "rolling")
