"""Configs of the built-in penalties. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, SerializeAsAny, field_validator

from april.algorithms.atoms import Atom, Info, Scope, builtin, parse

KL = "Schulman 2020, Approximating KL divergence"


class Term(Atom):
    """Base of additive terms: own coefficient and, where given, own aggregate."""

    not_options: ClassVar[frozenset[str]] = frozenset({"coefficient", "aggregate"})
    coefficient: float = Field(1.0, ge=0, description="factor of the term")
    aggregate: SerializeAsAny[Atom] | None = Field(None, description="how its tokens add up; the algorithm's own when left out")

    @field_validator("aggregate", mode="before")
    @classmethod
    def _aggregate(cls, value: object) -> object:
        return None if value is None or value is False else parse("aggregate", value, where="aggregate")


class Divergence(Term):
    """Base of the penalties on the divergence from an anchor, d = current - anchor."""

    requires: ClassVar[frozenset[str]] = frozenset({"reference"})
    coefficient: float = Field(0.001, ge=0, description="factor of the penalty")
    against: str = Field("reference", description='column of the anchor: "reference", "behaviour", "proximal" or one of your own')
    straight_through: bool = Field(False, description="keep the value, take the gradient of k2, that of the divergence itself")
    importance: Literal["none", "behaviour", "proximal", "current"] = Field(
        "none", description="weigh by current / behaviour or current / proximal; current: by 1 with the gradient of log p"
    )
    importance_gradient: bool = Field(True, description="that weight carries a gradient")

    @property
    def idle_options(self) -> Mapping[str, str]:
        """No weight, no gradient of it."""
        return {"importance_gradient": "importance"} if self.importance == "none" else {}

    @property
    def needs(self) -> frozenset[str]:
        """Log-probs of the anchor and of the policy that tokens are weighed by."""
        return frozenset({self.against, self.importance} - {"none"})

    def options(self) -> dict[str, Any]:
        """With the estimate's name."""
        return {**super().options(), "kind": self.type}


@builtin("penalties", "april.algorithms.losses.penalties:divergence")
class K1(Divergence):
    """Penalty on d itself: its gradient is noise without `straight_through` or `importance`."""

    info: ClassVar[Info] = Info(paper=KL, formula="d, d = current - reference", certainty="A", golden=("kl_estimators",))
    type: Literal["k1"] = "k1"


@builtin("penalties", "april.algorithms.losses.penalties:divergence")
class Absolute(Divergence):
    """Penalty on |d|."""

    info: ClassVar[Info] = Info(paper="-", formula="|d|, d = current - reference", certainty="B")
    type: Literal["abs"] = "abs"


@builtin("penalties", "april.algorithms.losses.penalties:divergence")
class K2(Divergence):
    """Penalty on the divergence from the reference: d^2 / 2, whose gradient is that of the divergence itself."""

    info: ClassVar[Info] = Info(paper=KL, formula="d^2 / 2, d = current - reference", certainty="A", golden=("kl_estimators",))
    type: Literal["k2"] = "k2"


@builtin("penalties", "april.algorithms.losses.penalties:divergence")
class K3(Divergence):
    """Penalty on the divergence from the reference: exp(-d) + d - 1 with d = current - reference."""

    info: ClassVar[Info] = Info(
        paper=KL, formula="exp(-d) + d - 1, d = current - reference", certainty="A", golden=("kl_estimators",)
    )
    type: Literal["k3"] = "k3"


@builtin("penalties", "april.algorithms.losses.penalties:convex")
class Convex(Term):
    """Divergence from the reference and from the previous policy, mixed by a share that falls over the run (ReMix)."""

    info: ClassVar[Info] = Info(
        paper="ReMix (arXiv 2507.06892), KL-convex",
        formula="l KL(reference) + (1 - l) KL(previous), l = max(1 - decay ceil(max(t - start, 0) / every), floor)",
        certainty="B",
        golden=("remix_kl_convex",),
    )
    type: Literal["kl_convex"] = "kl_convex"
    coefficient: float = Field(0.001, ge=0, description="factor of the penalty")
    kind: Literal["k1", "abs", "k2", "k3"] = Field("k3", description="estimate of both divergences")
    previous: Literal["behaviour", "proximal"] = Field("behaviour", description="the policy before")
    start_step: int = Field(50, ge=0, description="update from which the reference's share falls")
    every_steps: int = Field(10, gt=0, description="updates between two falls")
    decay: float = Field(0.1, ge=0, description="share that is lost at each fall")
    floor: float = Field(0.5, ge=0, le=1, description="smallest share of the reference")

    @property
    def needs(self) -> frozenset[str]:
        """The reference, the previous policy and the number of the update."""
        return frozenset({"reference", "step", self.previous})


@builtin("penalties", "april.algorithms.losses.penalties:entropy")
class EntropyBonus(Term):
    """Minus the entropy of the current policy: keeps it exploring."""

    info: ClassVar[Info] = Info(paper="A3C (arXiv 1602.01783), section 4", formula="-H(current)", certainty="B")
    requires: ClassVar[frozenset[str]] = frozenset({"current_entropy"})
    type: Literal["entropy"] = "entropy"
    coefficient: float = Field(0.001, ge=0, description="factor of the bonus")


@builtin("penalties", "april.algorithms.losses.penalties:covariance")
class KlCovariance(Term):
    """|current - proximal| on the few tokens whose advantage and log-prob vary together most (KL-Cov)."""

    info: ClassVar[Info] = Info(
        paper="KL-Cov (arXiv 2505.22617)",
        formula="|current - proximal| where (A - mean A)(log p - mean log p) is largest",
        certainty="B",
    )
    scope: ClassVar[Scope] = "batch"
    requires: ClassVar[frozenset[str]] = frozenset({"advantage", "current", "proximal"})
    type: Literal["kl_cov"] = "kl_cov"
    fraction: float = Field(0.0002, gt=0, le=1, description="tokens that are held back, at least one")
