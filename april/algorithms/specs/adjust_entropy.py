"""Configs of the built-in changes to the advantage by recorded entropies. No torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from april.algorithms.atoms import Atom, Info, Siblings, builtin
from april.algorithms.specs.adjust import Selection

ENTROPY = frozenset({"entropy", "mask"})


@builtin("adjust", "april.algorithms.advantages.adjust_entropy:normalised_entropy")
class NormalisedEntropy(Atom):
    """Changes no advantage; adds the column "entropy_score" that adaptive bounds and surrogates read (HAPO)."""

    info: ClassVar[Info] = Info(
        paper="HAPO (arXiv 2509.16591)",
        formula="h = z / max(z) or z / |min(z)|, z = log H - its quantile",
        certainty="A",
        golden=("hapo_normalised_entropy",),
    )
    requires: ClassVar[frozenset[str]] = ENTROPY
    provides: ClassVar[frozenset[str]] = frozenset({"entropy_score"})
    type: Literal["normalised_entropy"] = "normalised_entropy"
    pivot_quantile: float = Field(0.8, gt=0, lt=1, description="share of the tokens that are less uncertain than the pivot")
    signed: bool = Field(True, description="negative below the pivot; false reproduces the release")


@builtin("adjust", "april.algorithms.advantages.adjust_entropy:entropy_scale")
class EntropyScale(Atom):
    """Uncertain tokens of the batch count more, certain ones less (AEPO's advantage)."""

    info: ClassVar[Info] = Info(
        paper="AEPO (arXiv 2510.14545)",
        formula="A max(1 + a z(H), 0) over the batch",
        certainty="A",
        golden=("aepo_entropy_balanced_loss_and_gradient",),
    )
    requires: ClassVar[frozenset[str]] = ENTROPY
    type: Literal["entropy_scale"] = "entropy_scale"
    strength: float = Field(0.2, ge=0, description="factor per standard deviation of entropy")


@builtin("adjust", "april.algorithms.advantages.adjust_entropy:entropy_reshape")
class EntropyReshape(Siblings):
    """Samples that are less certain than their siblings count less (ETTRL)."""

    info: ClassVar[Info] = Info(
        paper="ETTRL (arXiv 2508.11356)",
        formula="A max(1 + (mean_g H - H) / mean_g H, 0), H the sample's mean entropy",
        certainty="B",
        golden=("ettrl_advantage_reshape",),
    )
    requires: ClassVar[frozenset[str]] = ENTROPY
    type: Literal["entropy_reshape"] = "entropy_reshape"


@builtin("adjust", "april.algorithms.advantages.adjust_entropy:entropy_bonus")
class EntropyBonus(Atom):
    """Uncertain tokens gain advantage, up to a share of what they have."""

    info: ClassVar[Info] = Info(
        paper="Cheng et al. 2025 (arXiv 2506.14758), section 3",
        formula="A + min(a H, cap |A|)",
        certainty="B",
    )
    requires: ClassVar[frozenset[str]] = ENTROPY
    type: Literal["entropy_bonus"] = "entropy_bonus"
    strength: float = Field(0.4, ge=0, description="bonus per nat of entropy")
    cap: float = Field(0.5, ge=0, description="largest bonus in units of |A|; below 1 no sign changes")


@builtin("adjust", "april.algorithms.advantages.adjust_entropy:top_tokens")
class TopTokens(Selection):
    """Only the most uncertain tokens of the batch train (80/20 rule), or those of largest |A| H (D3S, token level)."""

    info: ClassVar[Info] = Info(
        paper="Wang et al. 2025 (arXiv 2506.01939); D3S (arXiv 2509.22115)",
        formula="A if key >= its k-th largest else 0, key = H or |A| H",
        certainty="B",
        golden=("d3s_selection", "d3s_schedule"),
    )
    requires: ClassVar[frozenset[str]] = ENTROPY | {"trained"}
    type: Literal["top_tokens"] = "top_tokens"
    fraction: float = Field(0.2, gt=0, le=1, description="share of the batch's tokens that trains; ties train too")
    by: Literal["entropy", "advantage_entropy"] = Field("entropy", description="the key")
    renormalise: bool = Field(False, description="the other tokens leave the denominators too")
