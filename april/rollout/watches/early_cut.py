"""An early cut of rollouts that are unlikely to succeed (MASA): those that have run far beyond the length of a correct answer.

How long a correct answer is expected to be comes from the group's own correct members, or from a field of the item (a model's
own prediction, or a statistic of the data set). A share of samples is never cut, so that the forecast cannot confirm itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from april.config.schema import Config
from april.core.group import Reward
from april.core.prompt import Prompt
from april.core.random import stream_key
from april.core.sample import Sample
from april.rollout.watch import Siblings, Verdict


class EarlyCutConfig(Config):
    """End samples that have run far beyond the length of a correct answer."""

    type: Literal["early_cut"] = "early_cut"
    factor: float = Field(2.0, gt=1, description="times the expected length of a correct answer")
    min_tokens: int = Field(256, ge=1, description="nothing shorter is ended")
    min_correct: int = Field(2, ge=1, description="correct members that a group must have before it forecasts")
    item_key: str | None = Field(
        None, description="field of the item with the expected response tokens; without it, siblings tell"
    )
    exempt_fraction: float = Field(0.1, ge=0, le=1, description="samples that are never ended early")
    how: Literal["stop", "cut"] = Field(
        "stop", description="stop: judged as it is, and trained on; cut: no reward, no gradient, counted as failed"
    )


class EarlyCut:
    """Asked whenever a sample has new tokens or a sibling was judged; engines report every `report_every_tokens`."""

    def __init__(self, config: EarlyCutConfig) -> None:
        self.config = config

    def budgets(self, prompt: Prompt, group_size: int, max_new_tokens: int) -> Sequence[int] | None:
        return None

    def look(self, sample: Sample, siblings: Siblings) -> Verdict | None:
        expected = self.expected_tokens(sample.prompt, siblings)
        if expected is None or len(sample) <= max(self.config.min_tokens, self.config.factor * expected):
            return None
        if self.is_exempt(sample):
            return None
        return Verdict(self.config.how, f"beyond {self.config.factor:g} times the expected length")

    def expected_tokens(self, prompt: Prompt, siblings: Siblings) -> float | None:
        """Response tokens of a correct answer: the largest that is known; None when nothing is known."""
        if self.config.item_key is not None:
            value = prompt.item.get(self.config.item_key)
            return None if value is None else float(value)
        correct = [
            len(siblings.samples[member])
            for member, outcome in siblings.outcomes.items()
            if isinstance(outcome, Reward) and outcome.correct
        ]
        return float(max(correct)) if len(correct) >= self.config.min_correct else None

    def is_exempt(self, sample: Sample) -> bool:
        """Whether this sample is one of those that are never ended early; the same answer at any time."""
        return stream_key(sample.spec.seed, "early_cut", sample.id) < self.config.exempt_fraction * 2**64
