"""Mathematical equality of answers, decided by math-verify."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal

from pydantic import Field, field_validator

from april.config.schema import Config
from april.core.group import Reward
from april.core.pattern import checked_pattern, last_match
from april.core.sample import Sample
from april.rewards.base import UNANSWERED, Verifier, graded


class MathReward(Config):
    """1 when the answer equals the expected one as mathematics (1/2, 0.5, \\frac{1}{2}), else 0."""

    type: Literal["math"] = "math"
    answer_pattern: str | None = Field(
        None,
        description="Regular expression that finds the answer (last match); without it a box, else the last formula or number.",
    )

    @field_validator("answer_pattern")
    @classmethod
    def _pattern_compiles(cls, value: str | None) -> str | None:
        return checked_pattern(value)

    def build(self) -> Verifier:
        """The verifier."""
        return MathEquality(self.answer_pattern)


class MathEquality:
    """Compares the answer in a response with the item's answer as mathematics.

    math-verify is imported when the verifier is made, so that no judgement pays for it; its own alarms are switched off:
    the deadline of the judgement is the only one.
    """

    def __init__(self, answer_pattern: str | None = None) -> None:
        self.answer_pattern = answer_pattern
        _import_math_verify()

    def __reduce__(self) -> tuple[Any, ...]:
        return (MathEquality, (self.answer_pattern,))

    def __call__(self, text: str, sample: Sample, item: Mapping[str, Any]) -> Reward:
        gold = parsed_answer(str(item["answer"]))
        if not gold:
            raise ValueError(f"the expected answer {str(item['answer'])[:60]!r} is no mathematics; use the reward `exact`")
        answer = last_match(text, self.answer_pattern)
        if answer is None:
            return UNANSWERED
        parsed = parsed_text(answer) if self.answer_pattern is None else parsed_answer(answer)
        if not parsed:
            return UNANSWERED
        from math_verify import verify

        return graded(float(verify(list(gold), list(parsed), timeout_seconds=None)))


@lru_cache(maxsize=4096)
def parsed_answer(answer: str) -> tuple[Any, ...]:
    """A short answer as mathematics: taken as a formula unless it contains words, marked-up formulas or boxes."""
    bare = re.sub(r"\\text\{[^{}]*\}|\\[a-zA-Z]+", "", answer)
    if not answer or "$" in answer.replace("\\$", "") or "\\boxed" in answer or re.search(r"[A-Za-z]{2,}", bare):
        return parsed_text(answer)
    return parsed_text(f"${answer}$") or parsed_text(answer)


def parsed_text(text: str) -> tuple[Any, ...]:
    """The answer that math-verify finds in a text: a box, else the last formula or number; empty where there is none."""
    _import_math_verify()
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    targets = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    return tuple(parse(text, targets, fallback_mode="no_fallback", parsing_timeout=None))


@lru_cache(maxsize=1)
def _import_math_verify() -> None:
    import math_verify  # noqa: F401

    def worth_saying(record: logging.LogRecord) -> bool:
        return "Timeout is disabled" not in record.getMessage()

    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).addFilter(worth_saying)
