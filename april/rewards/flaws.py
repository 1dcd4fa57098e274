"""Right answers for the wrong reasons: finding them, and training a judge to find them (FAPO)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, field_validator

from april import registry
from april.config.schema import Config
from april.core.group import Reward
from april.core.pattern import checked_pattern, last_match
from april.core.sample import Sample
from april.rewards.base import UNANSWERED, Verifier, as_reward
from april.rewards.endpoint import EndpointFailed
from april.rewards.generative import Judge, JudgeReward, NoVerdict

FLAW_TEMPLATE = """Problem:
{question}

Solution, whose final answer is right:
{response}

Does the reasoning contain a mistake, an unjustified step or a guess? End with the single word yes or no."""


def inner(value: object) -> Config:
    """The reward that another one builds on."""
    return registry.parse("reward", value, "reward.verifier.reward")


Inner = Annotated[SerializeAsAny[Config], BeforeValidator(inner)]


def _judge(value: object) -> object:
    return {"template": FLAW_TEMPLATE, **value} if isinstance(value, Mapping) else value


class FlawCheckReward(Config):
    """Another reward, with a judge that looks for flaws in right answers: the part "flawed" is 1 where it finds one."""

    type: Literal["flaw_check"] = "flaw_check"
    reward: Inner = Field(description="The reward that decides correctness.")
    judge: Annotated[JudgeReward, BeforeValidator(_judge)] = Field(
        description="Asked about right answers only; a score above 0.5 is a flaw."
    )
    on_failure: Literal["sound", "fail"] = Field(
        "sound", description="An answer that the judge gives no verdict on counts as sound, or fails its sample."
    )

    def build(self) -> Verifier:
        """The verifier."""
        from april.rewards.build import build_reward

        judge = self.judge
        model = Judge(judge.asks(), judge.template, judge.verdict_pattern, dict(judge.scores), judge.unparsed)
        return FlawCheck(build_reward(self.reward), model, self.on_failure)


@dataclass(frozen=True, slots=True)
class FlawCheck:
    """Adds the part "flawed" to right answers, and "unjudged" where there was no verdict. The reward itself stays.

    Source: FAPO (arXiv 2510.22543), section 3: only right answers are sent to the detector.
    """

    verifier: Verifier
    judge: Judge
    on_failure: Literal["sound", "fail"] = "sound"

    def __call__(self, text: str, sample: Sample, item: Mapping[str, Any]) -> Reward:
        reward = as_reward(self.verifier(text, sample, item))
        if not reward.correct:
            return reward
        try:
            found = {"flawed": float(self.judge.score(text, item) > 0.5), "unjudged": 0.0}
        except (NoVerdict, EndpointFailed):
            if self.on_failure == "fail":
                raise
            found = {"flawed": 0.0, "unjudged": 1.0}
        return dataclasses.replace(reward, parts={**reward.parts, **found})


class ErrorStepReward(Config):
    """For training a judge: how close the named step is to the first wrong one of the solution in the item (FAPO)."""

    type: Literal["error_step"] = "error_step"
    answer_pattern: str = Field(r"\\boxed\{(-?\d+)\}", description="Finds the index of the first wrong step; -1 for none.")

    @field_validator("answer_pattern")
    @classmethod
    def _pattern_compiles(cls, value: str) -> str:
        return checked_pattern(value) or value

    def build(self) -> Verifier:
        """The verifier."""
        return ErrorStep(self.answer_pattern)


@dataclass(frozen=True, slots=True)
class ErrorStep:
    """Judges a judge. The item holds "error_step" (-1: the solution is sound) and "num_steps"."""

    answer_pattern: str

    def __call__(self, text: str, sample: Sample, item: Mapping[str, Any]) -> Reward:
        found = last_match(text, self.answer_pattern)
        if found is None:
            return dataclasses.replace(UNANSWERED, value=-1.0)
        value = process_reward(int(found), int(item["error_step"]), int(item["num_steps"]))
        return Reward(value, value >= 1, {"answered": 1.0, "score": value})


def process_reward(predicted: int | None, true: int, num_steps: int) -> float:
    """1 or -1 for a sound solution; for a flawed one -1 when it is called sound, else 1 - |predicted - true| / steps.

    Source: FAPO (arXiv 2510.22543), training of the generative reward model.

    Args:
        predicted: index of the first wrong step, -1 for none; None for no verdict.
        true: the right one.
        num_steps: of the solution.
    """
    if predicted is None:
        return -1.0
    if true < 0:
        return 1.0 if predicted < 0 else -1.0
    return -1.0 if predicted < 0 else 1.0 - abs(predicted - true) / num_steps
