"""Configs of the built-in penalties. No torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, SerializeAsAny, field_validator

from april.algorithms.atoms import Atom, Info, builtin, parse


class Term(Atom):
    """Base of additive terms: own coefficient and, where given, own aggregate."""

    not_options: ClassVar[frozenset[str]] = frozenset({"coefficient", "aggregate"})
    coefficient: float = Field(1.0, ge=0, description="factor of the term")
    aggregate: SerializeAsAny[Atom] | None = Field(None, description="how its tokens add up; the algorithm's own when left out")

    @field_validator("aggregate", mode="before")
    @classmethod
    def _aggregate(cls, value: object) -> object:
        return None if value is None or value is False else parse("aggregate", value, where="aggregate")


@builtin("penalties", "april.algorithms.losses.penalties:k3")
class K3(Term):
    """Penalty on the divergence from the reference: exp(-d) + d - 1 with d = current - reference."""

    info: ClassVar[Info] = Info(
        paper="Schulman 2020, Approximating KL divergence",
        formula="exp(-d) + d - 1, d = current - reference",
        golden=("kl_estimators",),
    )
    requires: ClassVar[frozenset[str]] = frozenset({"reference"})
    type: Literal["k3"] = "k3"
    coefficient: float = Field(0.001, ge=0, description="factor of the penalty")


@builtin("penalties", "april.algorithms.losses.penalties:k2")
class K2(Term):
    """Penalty on the divergence from the reference: d^2 / 2, whose gradient is that of the divergence itself."""

    info: ClassVar[Info] = Info(
        paper="Schulman 2020, Approximating KL divergence",
        formula="d^2 / 2, d = current - reference",
        golden=("kl_estimators",),
    )
    requires: ClassVar[frozenset[str]] = frozenset({"reference"})
    type: Literal["k2"] = "k2"
    coefficient: float = Field(0.001, ge=0, description="factor of the penalty")
