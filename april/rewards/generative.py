"""A reward that asks a language model: prompt from a template, verdict from its answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from april.config.schema import Config
from april.core.group import Reward
from april.core.pattern import checked_pattern, last_match
from april.core.sample import Sample
from april.core.template import fill
from april.rewards.base import Verifier
from april.rewards.endpoint import ChatEndpoint, Model

TEMPLATE = """Question:
{question}

Expected answer:
{answer}

Response to judge:
{response}

Is the response correct? Think it through, then end with the single word yes or no."""


class NoVerdict(ValueError):
    """The judge's answer holds no verdict."""


class JudgeReward(Config):
    """What a language model says of the response: its verdict as a number."""

    type: Literal["judge"] = "judge"
    url: str | None = Field(None, description='OpenAI-compatible endpoint up to the version: "http://127.0.0.1:8000/v1".')
    model: str = Field("default", description="Name of the model at the endpoint.")
    api_key_env: str | None = Field(None, description="Environment variable that holds the endpoint's key.")
    path: str | None = Field(None, description='In place of url: "module:function" or "file.py:function", prompt -> answer.')
    template: str = Field(TEMPLATE, description="The prompt: gaps for the response ({response}) and for fields of the item.")
    verdict_pattern: str = Field(r"(?i)\b(yes|no)\b", description="Regular expression that finds the verdict (last match).")
    scores: dict[str, float] = Field(
        default_factory=lambda: {"yes": 1.0, "no": 0.0},
        description="Verdict, in lower case, -> score; empty: the verdict is a number itself.",
    )
    unparsed: float | None = Field(None, description="Score when no verdict is found; left out, the sample fails.")
    timeout_s: float = Field(30.0, gt=0, description="Of one request; scoring.timeout_s bounds the whole judgement.")
    retries: int = Field(1, ge=0, description="Further attempts when the endpoint is busy or does not answer.")
    max_tokens: int = Field(1024, gt=0, description="Of the judge's answer.")
    temperature: float = Field(0.0, ge=0, description="Of the judge's answer.")

    @field_validator("verdict_pattern")
    @classmethod
    def _pattern_compiles(cls, value: str) -> str:
        return checked_pattern(value) or value

    @model_validator(mode="after")
    def _one_model(self) -> JudgeReward:
        if (self.url is None) == (self.path is None):
            raise ValueError("a judge needs either a url or a path")
        return self

    def asks(self) -> Model:
        """The model.

        Raises:
            RecipeError: when the function of `path` is not there.
        """
        if self.path is not None:
            from april.rewards.python import ImportedModel

            return ImportedModel(self.path)
        return ChatEndpoint(
            str(self.url), self.model, self.api_key_env, self.timeout_s, self.retries, self.max_tokens, self.temperature
        )

    def build(self) -> Verifier:
        """The verifier."""
        return Judge(self.asks(), self.template, self.verdict_pattern, dict(self.scores), self.unparsed)


@dataclass(frozen=True, slots=True)
class Judge:
    """Asks a model about a response. Correct from a score of 1."""

    model: Model
    template: str
    verdict_pattern: str
    scores: Mapping[str, float]
    unparsed: float | None = None

    def score(self, text: str, item: Mapping[str, Any]) -> float:
        """The verdict as a number.

        Raises:
            NoVerdict: there is none.
        """
        answer = self.model(fill(self.template, {**item, "response": text}, "reward.template"))
        return parsed_verdict(answer, self.verdict_pattern, self.scores)

    def __call__(self, text: str, sample: Sample, item: Mapping[str, Any]) -> Reward:
        try:
            score, judged = self.score(text, item), 1.0
        except NoVerdict:
            if self.unparsed is None:
                raise
            score, judged = self.unparsed, 0.0
        return Reward(score, score >= 1, {"score": score, "judged": judged})


def parsed_verdict(answer: str, pattern: str, scores: Mapping[str, float]) -> float:
    """The last verdict in an answer as a number.

    Args:
        answer: of the judge.
        pattern: finds the verdict.
        scores: verdict in lower case -> number; empty: the verdict is the number.

    Raises:
        NoVerdict: nothing matches, or what matches has no score.
    """
    verdict = last_match(answer, pattern)
    if verdict is None:
        raise NoVerdict(f"no verdict in the judge's answer {answer[-60:]!r}")
    if scores:
        if verdict.lower() not in scores:
            raise NoVerdict(f"the verdict {verdict[:40]!r} has no score")
        return scores[verdict.lower()]
    try:
        return float(verdict)
    except ValueError:
        raise NoVerdict(f"the verdict {verdict[:40]!r} is no number") from None
