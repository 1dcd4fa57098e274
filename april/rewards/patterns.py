"""Marks of a response's form: whether it reasoned, kept a format, called a tool."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, field_validator

from april.config.schema import Config
from april.core.group import Reward
from april.core.pattern import checked_pattern
from april.core.sample import Sample
from april.rewards.base import Verifier, as_reward
from april.rewards.flaws import Inner


class PatternsReward(Config):
    """Another reward, with parts that are 1 where a regular expression occurs in the response, else 0."""

    type: Literal["patterns"] = "patterns"
    reward: Inner = Field(description="The reward that decides correctness.")
    patterns: dict[str, str] = Field(min_length=1, description='Name of the part -> regular expression: reasoning = "<think>".')

    @field_validator("patterns")
    @classmethod
    def _patterns_compile(cls, value: dict[str, str]) -> dict[str, str]:
        return {name: checked_pattern(pattern) or pattern for name, pattern in value.items()}

    def build(self) -> Verifier:
        """The verifier."""
        from april.rewards.build import build_reward

        return Patterns(build_reward(self.reward), self.patterns)


@dataclass(frozen=True, slots=True)
class Patterns:
    """Adds its parts to those of another reward, which stays."""

    verifier: Verifier
    patterns: Mapping[str, str]

    def __call__(self, text: str, sample: Sample, item: Mapping[str, Any]) -> Reward:
        reward = as_reward(self.verifier(text, sample, item))
        found = {name: float(re.search(pattern, text) is not None) for name, pattern in self.patterns.items()}
        return dataclasses.replace(reward, parts={**reward.parts, **found})
