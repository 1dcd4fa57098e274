"""Options of low-rank adapters. No torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from april.config.schema import Config


class LoraConfig(Config):
    """Low-rank adapters on a frozen policy: W x + alpha / rank B A x (Hu et al. 2021). Only A and B are trained and published."""

    rank: int = Field(16, ge=1, description="rows of A and columns of B")
    alpha: float = Field(32.0, gt=0, description="adapters are scaled by alpha / rank")
    targets: Literal["all"] | tuple[str, ...] = Field(
        "all",
        min_length=1,
        description="names of the linear layers that get adapters, such as q_proj; all: every one but the output layer",
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="share of an adapter's inputs that is left out of a training forward; the engine never does"
    )
    seed: int = Field(0, ge=0, description="of the first A, and of what is left out; the first B is 0")

    @field_validator("targets", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) and value != "all" else value

    @property
    def scaling(self) -> float:
        """What the product B A is multiplied by."""
        return self.alpha / self.rank
