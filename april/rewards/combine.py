"""Several rewards as one, each with its weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from april import registry
from april.config.schema import Config
from april.core.errors import nearest
from april.core.group import Reward
from april.core.sample import Sample
from april.rewards.base import Verifier, as_reward


def _part(value: object) -> Config:
    return registry.parse("reward", value, "reward.verifier.rewards")


class CombinedReward(Config):
    """A weighted sum of named rewards; one of them decides whether the sample is correct."""

    type: Literal["combine"] = "combine"
    rewards: dict[str, Annotated[SerializeAsAny[Config], BeforeValidator(_part)]] = Field(
        min_length=1, description="Name -> a reward, by name or as a table with `type`."
    )
    weights: dict[str, float] = Field(default_factory=dict, description="Name -> weight; 1 where none is given.")
    correct_by: str | None = Field(None, description="Name of the reward that decides correctness; the first one by default.")

    @model_validator(mode="after")
    def _names_exist(self) -> CombinedReward:
        for name in (*self.weights, *([] if self.correct_by is None else [self.correct_by])):
            if name not in self.rewards:
                raise ValueError(f"no reward is named {name!r}; {nearest(name, self.rewards)}")
        return self

    def build(self) -> Verifier:
        """The verifier."""
        from april.rewards.build import build_reward

        parts = {name: build_reward(config) for name, config in self.rewards.items()}
        return Combined(parts, self.weights, self.correct_by)


class Combined:
    """The weighted sum. A part that fails fails the sample: half a judgement is none.

    Args:
        verifiers: name -> reward.
        weights: name -> weight, 1 by default.
        correct_by: the part that decides correctness; the first one by default.
    """

    def __init__(
        self, verifiers: Mapping[str, Verifier], weights: Mapping[str, float] | None = None, correct_by: str | None = None
    ) -> None:
        self.verifiers, self.weights = dict(verifiers), dict(weights or {})
        self.correct_by = correct_by if correct_by is not None else next(iter(self.verifiers))

    def __call__(self, text: str, sample: Sample, item: Mapping[str, Any]) -> Reward:
        total, correct = 0.0, False
        parts: dict[str, float] = {}
        for name, verifier in self.verifiers.items():
            reward = as_reward(verifier(text, sample, item))
            total += self.weights.get(name, 1.0) * reward.value
            parts[name] = reward.value
            parts.update({f"{name}/{part}": value for part, value in reward.parts.items()})
            if name == self.correct_by:
                correct = reward.correct
        return Reward(total, correct, parts)
