"""The scorers that reasoning-gym's tasks bring along."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal

from pydantic import Field, field_validator

from april.config.schema import Config
from april.core.group import Reward
from april.core.pattern import checked_pattern, last_match
from april.core.sample import Sample
from april.rewards.base import UNANSWERED, Verifier, graded


class ReasoningGymReward(Config):
    """The task's own score of the answer: 1 is correct, less is partial credit."""

    type: Literal["reasoning_gym"] = "reasoning_gym"
    answer_pattern: str | None = Field(
        None,
        description="Regular expression that finds the answer (last match), such as <answer>(.*?)</answer>; no match earns 0.",
    )
    only_correct: bool = Field(False, description="Whether partial credit is taken away: 1 for a correct answer, else 0.")

    @field_validator("answer_pattern")
    @classmethod
    def _pattern_compiles(cls, value: str | None) -> str | None:
        return checked_pattern(value)

    def build(self) -> Verifier:
        """The verifier."""
        return TaskScorer(self.answer_pattern, self.only_correct)


class TaskScorer:
    """Scores by the task that made the item, which the item names: item["task"] = {"name": ..., "options": ...}.

    reasoning-gym is imported when the verifier is made, so that no judgement pays for it.
    """

    def __init__(self, answer_pattern: str | None = None, only_correct: bool = False) -> None:
        import reasoning_gym  # noqa: F401

        self.answer_pattern, self.only_correct = answer_pattern, only_correct

    def __reduce__(self) -> tuple[Any, ...]:
        return (TaskScorer, (self.answer_pattern, self.only_correct))

    def __call__(self, text: str, sample: Sample, item: Mapping[str, Any]) -> Reward:
        task = item.get("task")
        if not isinstance(task, Mapping) or "name" not in task:
            raise ValueError("the item was not made by a reasoning_gym task; use another reward")
        answer = last_match(text, self.answer_pattern)
        if answer is None:
            return UNANSWERED
        scorer = _scorer(str(task["name"]), json.dumps(task.get("options", {}), sort_keys=True))
        return graded(float(scorer.score_answer(answer, dict(item))), only_correct=self.only_correct)


@lru_cache(maxsize=256)
def _scorer(name: str, options: str) -> Any:
    """The generator of this task with these options (JSON); some scorers depend on them."""
    import reasoning_gym

    return reasoning_gym.create_dataset(name, **{"size": 1, "seed": 0, **json.loads(options)})
