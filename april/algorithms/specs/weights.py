"""Configs of the built-in corrections and masks. No torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from april.algorithms.atoms import Atom, Info, builtin


@builtin("weights", "april.algorithms.losses.weights:truncated")
class Truncated(Atom):
    """Truncated importance sampling from the sampler to the proximal policy: min(w, cap)."""

    info: ClassVar[Info] = Info(
        paper="TIS (Yao et al. 2025); AReaL (arXiv 2505.24298), section 5.2",
        formula="clip(exp(proximal - behaviour), low, cap)",
        golden=("tis_token_truncated", "tis_sequence_and_normalised"),
    )
    requires: ClassVar[frozenset[str]] = frozenset({"behaviour", "proximal"})
    type: Literal["tis"] = "tis"
    cap: float = Field(2.0, gt=0, description="largest weight of a token")
    low: float = Field(0.0, ge=0, description="smallest weight of a token")
    level: Literal["token", "sequence"] = Field("token", description="weight of each token, or the product over its sample")


@builtin("weights", "april.algorithms.losses.weights:masked")
class Mask(Atom):
    """Weights outside the band drop to 0, others stay (IcePop; MIS): denominators keep the original tokens."""

    info: ClassVar[Info] = Info(
        paper="IcePop (arXiv 2510.18855)",
        formula="w if low <= w <= high else 0, w = exp(proximal - behaviour)",
        golden=("icepop_weight",),
    )
    requires: ClassVar[frozenset[str]] = frozenset({"behaviour", "proximal"})
    type: Literal["mask"] = "mask"
    low: float = Field(0.5, ge=0, description="smallest weight that is kept")
    high: float = Field(5.0, gt=0, description="largest weight that is kept")
    level: Literal["token", "sequence_mean"] = Field(
        "token", description="what is compared: the token's weight, or its sample's geometric mean"
    )
