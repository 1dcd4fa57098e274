"""The reward section of a recipe."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field, SerializeAsAny

from april import registry
from april.config.schema import Config


def _verifier(value: object) -> Config | None:
    return None if value is None else registry.parse("reward", value, "reward.verifier")


class RewardConfig(Config):
    """How finished samples are judged."""

    verifier: Annotated[SerializeAsAny[Config] | None, BeforeValidator(_verifier)] = Field(
        None, description="the reward, by name or as a table with `type`; without it the task's own"
    )
    timeout_s: float | None = Field(
        5.0, gt=0, description="how long one judgement may take before it costs its sample; None for ever"
    )
    workers: int = Field(
        0, ge=0, description="child processes that judge, and that can be killed; 0 judges in the run's own process"
    )
