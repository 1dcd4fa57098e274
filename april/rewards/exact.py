"""The answer, character by character."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, field_validator

from april.config.schema import Config
from april.core.group import Reward
from april.core.pattern import checked_pattern, last_match
from april.core.sample import Sample
from april.rewards.base import UNANSWERED, Verifier, graded


class ExactReward(Config):
    """1 when the answer is the expected text, else 0."""

    type: Literal["exact"] = "exact"
    answer_pattern: str | None = Field(None, description="Regular expression that finds the answer in a response (last match).")
    ignore_case: bool = Field(False, description="Whether upper and lower case are the same.")

    @field_validator("answer_pattern")
    @classmethod
    def _pattern_compiles(cls, value: str | None) -> str | None:
        return checked_pattern(value)

    def build(self) -> Verifier:
        """The verifier."""
        return Exact(self.answer_pattern, self.ignore_case)


@dataclass(frozen=True, slots=True)
class Exact:
    """Compares the answer with the item's; runs of white space count as one blank."""

    answer_pattern: str | None = None
    ignore_case: bool = False

    def __call__(self, text: str, sample: Sample, item: Mapping[str, Any]) -> Reward:
        answer = last_match(text, self.answer_pattern)
        if answer is None:
            return UNANSWERED
        return graded(float(self._normal(answer) == self._normal(str(item["answer"]))))

    def _normal(self, text: str) -> str:
        text = " ".join(text.split())
        return text.casefold() if self.ignore_case else text
