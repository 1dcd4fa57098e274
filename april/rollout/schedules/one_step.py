"""One step off: the next batch is generated while the present one is trained on.

The batch is still waited for as a whole, so the longest sample holds up every step; what is gained is the time of the update.
"""

from __future__ import annotations

from typing import Literal

from april.config.schema import Config
from april.engines.base import UpdateMode
from april.rollout.schedules.fill import all_waiting
from april.rollout.view import Memo, Plan, View


class OneStepConfig(Config):
    """Generate batch k + 1 under the old weights while batch k is trained on; each token is one update old at most."""

    type: Literal["one_step"] = "one_step"


class OneStepSchedule:
    """The synchronous rule, but for not waiting for the trainer before a batch is started."""

    max_lag_steps = 1
    overlaps = True
    update_mode: UpdateMode = "drain"

    def __init__(self, config: OneStepConfig) -> None:
        self.config = config

    def plan(self, view: View, memo: Memo) -> tuple[Plan, Memo]:
        if not view.updating and view.num_ready_groups >= view.groups_per_step:
            return Plan(emit=view.ready_groups(view.groups_per_step)), memo
        missing = min(view.groups_per_step - view.num_groups, view.issuable)
        return Plan(issue=max(0, missing), start=all_waiting(view)), memo
