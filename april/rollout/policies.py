"""What becomes of a sample that its stage has failed: again, dropped with the reason, or the end of the run."""

from __future__ import annotations

from collections import Counter

from april.config.limits import LimitsConfig
from april.core.errors import RolloutError
from april.core.event import Broken, Judged
from april.core.group import Failure
from april.core.ids import SampleId


class LossPolicy:
    """What `limits` says of samples that lost their engine or got no reward.

    Args:
        limits: None retries a lost sample `max_losses` times and drops one without a reward.
        max_losses: how often a sample may lose its engine before it fails.
    """

    def __init__(self, limits: LimitsConfig | None, max_losses: int) -> None:
        self._on_engine = "redispatch" if limits is None else limits.on_engine_loss
        self._on_reward = "drop" if limits is None else limits.on_reward_failure
        self._reward_retries = 0 if limits is None else limits.reward_retries
        self._max_losses = 0 if self._on_engine == "drop" else max_losses
        self._judged: Counter[SampleId] = Counter()

    def generate_again(self, event: Broken, losses: int) -> bool:
        """Whether a sample that lost its engine, after `losses` earlier times, waits for another one; else it fails.

        Raises:
            RolloutError: the recipe wants the run to end.
        """
        if self._on_engine == "fail":
            raise RolloutError("a sample lost its engine", where=f"{event.id}, limits.on_engine_loss", got=event.reason)
        return losses < self._max_losses

    def judge_again(self, event: Judged) -> bool:
        """Whether a sample that got no reward is judged once more; else the failure is its outcome.

        Raises:
            RolloutError: the recipe wants the run to end.
        """
        if not isinstance(event.outcome, Failure) or self._on_reward == "drop":
            self._judged.pop(event.id, None)
            return False
        if self._on_reward == "fail":
            raise RolloutError("a sample got no reward", where=f"{event.id}, limits.on_reward_failure", got=event.outcome.reason)
        self._judged[event.id] += 1
        if self._judged[event.id] <= self._reward_retries:
            return True
        del self._judged[event.id]
        return False
