"""How well a policy knows itself: its predictions about its own solutions, against those solutions (MASA)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from pydantic import Field, field_validator

from april.config.schema import Config
from april.core.group import Reward
from april.core.pattern import checked_pattern, last_match
from april.core.sample import Sample
from april.rewards.base import UNANSWERED, Verifier


class Prediction(NamedTuple):
    """What a policy says of its solutions to a problem.

    Attributes:
        notions: concepts that right solutions use.
        length_tokens: of a right solution.
        num_passes: how many of `num_rollouts` will be right.
    """

    notions: Sequence[str]
    length_tokens: float
    num_passes: float


class Rollouts(NamedTuple):
    """What its solutions were: for each its text, whether it was right, and its length."""

    problem: str
    responses: Sequence[str]
    correct: Sequence[bool]
    lengths_tokens: Sequence[float]


class MetaPredictionReward(Config):
    """Agreement of a prediction about own solutions with the solutions that the item recorded (MASA)."""

    type: Literal["meta_prediction"] = "meta_prediction"
    answer_pattern: str = Field(r"(?s)\{.*\}", description="Regular expression that finds the prediction, as JSON (last match).")
    base: float = Field(0.01, gt=0, lt=1, description="Reward of a pass rate that is wrong by 1.")
    num_rollouts: int = Field(8, gt=0, description="Solutions that the predicted number of passes is out of.")

    @field_validator("answer_pattern")
    @classmethod
    def _pattern_compiles(cls, value: str) -> str:
        return checked_pattern(value) or value

    def build(self) -> Verifier:
        """The verifier."""
        return MetaPrediction(self.answer_pattern, self.base, self.num_rollouts)


@dataclass(frozen=True, slots=True)
class MetaPrediction:
    """Judges a prediction, JSON with "notions", "length_tokens" and "num_passes".

    The item holds "question" and, as a list of {"response", "correct", "length_tokens"}, "rollouts". Without those the
    reward is 0 and its parts are the predicted numbers, for the reward transform `self_prediction`.
    """

    answer_pattern: str
    base: float = 0.01
    num_rollouts: int = 8

    def __call__(self, text: str, sample: Sample, item: Mapping[str, Any]) -> Reward:
        prediction = parsed_prediction(last_match(text, self.answer_pattern))
        if prediction is None:
            return UNANSWERED
        made = item.get("rollouts")
        if made is None:
            said = {"num_passes": prediction.num_passes, "length_tokens": prediction.length_tokens}
            return Reward(0.0, False, {"answered": 1.0, **said})
        rollouts = Rollouts(
            str(item.get("question", "")),
            [str(one["response"]) for one in made],
            [bool(one["correct"]) for one in made],
            [float(one["length_tokens"]) for one in made],
        )
        parts = meta_parts(prediction, rollouts, base=self.base, num_rollouts=self.num_rollouts)
        value = sum(parts.values()) / len(parts)
        return Reward(value, value >= 1, {"answered": 1.0, **parts})


def parsed_prediction(text: str | None) -> Prediction | None:
    """The prediction in a JSON text; None when it has another shape."""
    try:
        data = json.loads(text or "")
        notions = [str(notion) for notion in data["notions"]] if isinstance(data["notions"], list) else None
        return None if notions is None else Prediction(notions, float(data["length_tokens"]), float(data["num_passes"]))
    except (ValueError, LookupError, TypeError):
        return None


def meta_parts(prediction: Prediction, rollouts: Rollouts, *, base: float = 0.01, num_rollouts: int = 8) -> dict[str, float]:
    """The three parts of the reward, each in [0, 1]; the reward is their mean.

    notion: share of the predicted notions that occur in more right than wrong solutions and not in the problem
    pass_rate: base ** |predicted - true pass rate|
    length: 1 where the predicted length lies strictly between those of the right solutions, else 0

    Source: MASA (arXiv 2510.03259).
    """
    right = [text for text, correct in zip(rollouts.responses, rollouts.correct, strict=True) if correct]
    wrong = [text for text, correct in zip(rollouts.responses, rollouts.correct, strict=True) if not correct]

    def useful(notion: str) -> bool:
        return notion not in rollouts.problem and sum(notion in text for text in right) > sum(notion in text for text in wrong)

    lengths = [length for length, correct in zip(rollouts.lengths_tokens, rollouts.correct, strict=True) if correct]
    notions = prediction.notions
    rate = len(right) / max(len(rollouts.correct), 1)
    return {
        "notion": sum(map(useful, notions)) / len(notions) if notions else 0.0,
        "pass_rate": base ** abs(prediction.num_passes / num_rollouts - rate),
        "length": float(bool(lengths) and min(lengths) < prediction.length_tokens < max(lengths)),
    }
