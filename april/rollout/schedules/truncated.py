"""Windows of tokens (T-PPO, arXiv 2506.15050; the output cap of Kimi k1.5, arXiv 2501.12599): no step waits for a whole answer.

In each window every sample in flight generates at most `window_tokens`; what has not ended goes on in the next window. A
batch is cut between two windows, so nothing is ever aborted, and a step takes a whole number of windows, one where enough
groups end in each. A group is trained on when all its members have ended.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from april.config.schema import Config
from april.engines.base import UpdateMode
from april.rollout.schedules.fill import waiting_up_to
from april.rollout.staleness import OVER_AGE_HELP, Bound, OverAge
from april.rollout.view import Memo, Plan, View


class TruncatedConfig(Config):
    """Generate in windows of tokens; cut batches only between windows."""

    type: Literal["truncated"] = "truncated"
    window_tokens: int = Field(ge=1, description="response tokens that a sample may generate in one window")
    over_provision: float = Field(2.0, ge=1.0, description="groups in flight over groups per step")
    max_lag_steps: int = Field(ge=0, description="largest lag of a trained token, in updates")
    over_age: OverAge = Field("finish_first", description=OVER_AGE_HELP)


class TruncatedSchedule:
    """Decides only when the engine is empty: cut, or open the next window."""

    update_mode: UpdateMode = "drain"

    def __init__(self, config: TruncatedConfig) -> None:
        self.config, self.bound = config, Bound(config.max_lag_steps, config.over_age)

    @property
    def max_lag_steps(self) -> int:
        return self.config.max_lag_steps

    def plan(self, view: View, memo: Memo) -> tuple[Plan, Memo]:
        if view.updating or view.num_running:
            return Plan(), memo
        return (self.bound.drop(view) or self._cut(view) or self._open(view)), memo

    def _cut(self, view: View) -> Plan | None:
        if view.num_ready_groups < view.groups_per_step or self.bound.missing(view):
            return None
        return Plan(emit=self.bound.choose(view, view.ready_groups()), max_token_lag=self.bound.max_token_lag)

    def _open(self, view: View) -> Plan:
        lacking = view.groups_per_step - view.num_ready_groups
        lacking = max(lacking, *(count for _, count in self.bound.missing(view)), 0)
        if view.num_active_groups >= lacking:  # enough are being scored: the next cut needs no further window
            return Plan()
        wanted = round(self.config.over_provision * view.groups_per_step) - view.num_groups
        issue = min(wanted, view.issuable, self.bound.admissible(view))
        if issue > 0:
            return Plan(issue=issue)
        return Plan(start=waiting_up_to(view, None, self.bound.stale(view)), window_tokens=self.config.window_tokens)
