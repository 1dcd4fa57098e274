"""Slips in a response with tool calls: failed calls, answers given twice or not at all (GRPO-RoC)."""

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

TOOL_RESPONSE = r"(?s)<tool_response>.*?</tool_response>"
TURN = r"(?s)<\|im_start\|>assistant.*?<\|im_end\|>"


class ToolTraceReward(Config):
    """Another reward, with the parts "tool_error" and "answer_format" that a resampling of right answers reads."""

    type: Literal["tool_trace"] = "tool_trace"
    reward: Inner = Field(description="The reward that decides correctness.")
    tool_pattern: str = Field(TOOL_RESPONSE, description="Regular expression that finds the answers of tools.")
    error_pattern: str = Field("(?i)error", description="Regular expression that marks an answer of a tool as a failure.")
    answer_tag: str = Field("answer", min_length=1, description="Name of the tag around the final answer.")
    turn_pattern: str = Field(TURN, description="Regular expression that finds the policy's turns; none found count as one.")

    @field_validator("tool_pattern", "error_pattern", "turn_pattern")
    @classmethod
    def _pattern_compiles(cls, value: str) -> str:
        return checked_pattern(value) or value

    def build(self) -> Verifier:
        """The verifier."""
        from april.rewards.build import build_reward

        return ToolTrace(build_reward(self.reward), self.tool_pattern, self.error_pattern, self.answer_tag, self.turn_pattern)


@dataclass(frozen=True, slots=True)
class ToolTrace:
    """Adds the penalties of a response to its reward's parts; the reward itself stays."""

    verifier: Verifier
    tool_pattern: str = TOOL_RESPONSE
    error_pattern: str = "(?i)error"
    answer_tag: str = "answer"
    turn_pattern: str = TURN

    def __call__(self, text: str, sample: Sample, item: Mapping[str, Any]) -> Reward:
        reward = as_reward(self.verifier(text, sample, item))
        slips = {
            "tool_error": error_share(text, self.tool_pattern, self.error_pattern),
            "answer_format": answer_slips(text, self.answer_tag, self.turn_pattern),
        }
        return dataclasses.replace(reward, parts={**reward.parts, **slips})


def error_share(text: str, tool_pattern: str = TOOL_RESPONSE, error_pattern: str = "(?i)error") -> float:
    """Share of tool calls that failed; 0.5 where there were none. Source: rStar2-Agent (arXiv 2508.20722), section 3.2."""
    calls = [match.group(0) for match in re.finditer(tool_pattern, text)]
    if not calls:
        return 0.5
    return sum(re.search(error_pattern, call) is not None for call in calls) / len(calls)


def answer_slips(text: str, tag: str = "answer", turn_pattern: str = TURN) -> float:
    """0 for one closed answer, 1 for none or for tags that do not pair; repeated ones count by the number of turns, up to 1.

    Source: rStar2-Agent (arXiv 2508.20722), section 3.2.
    """
    opened, closed = text.count(f"<{tag}>"), text.count(f"</{tag}>")
    pairs = len(re.findall(f"(?s)<{re.escape(tag)}>.*?</{re.escape(tag)}>", text))
    if pairs == 0 or opened != pairs or closed != pairs:
        return 1.0
    turns = max(1, len(re.findall(turn_pattern, text)))
    return min((pairs - 1) / turns, 1.0)
