"""Configs of the built-in surrogates. No torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from april.algorithms.atoms import Atom, Info, builtin

BoundsUse = Literal["needed", "optional", "unused"]
RatioUse = Literal["differentiated", "weight", "unused"]


class Surrogate(Atom):
    """Base of the surrogates."""

    requires: ClassVar[frozenset[str]] = frozenset({"advantage"})
    bounds_use: ClassVar[BoundsUse] = "unused"
    """Whether its function reads the bounds."""
    ratio_use: ClassVar[RatioUse] = "differentiated"
    """What the ratio is to it: what gives the gradient, a detached weight, or nothing."""
    whole_samples: ClassVar[bool] = False
    """Whether the tokens of a sample have one loss in common."""
    product_of_sample: ClassVar[bool] = False
    """Whether its formula is about the product of the sample's ratios."""
    fades: ClassVar[bool] = False
    """Whether the gradient fades with the distance from the ratio's anchor, as a correction for stale tokens would."""
    zero_without_advantage: ClassVar[bool] = True
    """Whether a sample whose tokens all have advantage 0 gets no gradient; a surrogate of one's own may say so, too."""


class Clipping(Surrogate):
    """Base of the surrogates that clip as PPO does."""

    bounds_use: ClassVar[BoundsUse] = "needed"
    dual_clip: float | None = Field(default=None, gt=1, description="bound on the loss of a negative advantage, in units of |A|")


@builtin("surrogate", "april.algorithms.losses.surrogate:clip")
class Clip(Clipping):
    """PPO's clipped surrogate: the larger of -A r and -A clip(r, low, high)."""

    info: ClassVar[Info] = Info(
        paper="PPO (arXiv 1707.06347), equation 7; dual clip: arXiv 1912.09729",
        formula="max(-A r, -A clip(r, low, high))",
        certainty="A",
        golden=("ppo_clip_loss", "ppo_dual_clip"),
    )
    type: Literal["clip"] = "clip"


@builtin("surrogate", "april.algorithms.losses.surrogate:clip_keep_gradient")
class ClipKeepGradient(Clipping):
    """The clipped surrogate whose tokens above the upper bound keep a gradient of its size (AEPO)."""

    info: ClassVar[Info] = Info(
        paper="AEPO (arXiv 2510.14545), entropy-balanced clipping",
        formula="max(-A r', -A max(r', low)), r' = min(r, r high / sg(r))",
        certainty="A",
        golden=("aepo_entropy_balanced_loss_and_gradient",),
    )
    type: Literal["clip_keep_gradient"] = "clip_keep_gradient"


@builtin("surrogate", "april.algorithms.losses.surrogate:hapo")
class Hapo(Clipping):
    """The clipped surrogate with an advantage that follows the entropy where the ratio says something (HAPO)."""

    info: ClassVar[Info] = Info(
        paper="HAPO (arXiv 2509.16591), differential advantage redistribution",
        formula="clip with A (1 + b h), outside the neutral band for h > 0, inside it for h <= 0",
        certainty="A",
        golden=("hapo_differential_advantage",),
    )
    requires: ClassVar[frozenset[str]] = frozenset({"advantage", "entropy_score"})
    type: Literal["hapo"] = "hapo"
    strength: float = Field(1.0, ge=0, description="b; 0 leaves the advantage as it is")


@builtin("surrogate", "april.algorithms.losses.surrogate:plain")
class Plain(Surrogate):
    """The policy gradient itself, -A log p; no ratio and no bounds (REINFORCE)."""

    info: ClassVar[Info] = Info(
        paper="REINFORCE (Williams 1992); GPG (arXiv 2504.02546)",
        formula="-A log p",
        certainty="A",
        golden=("reinforce_loss_token_mean",),
    )
    ratio_use: ClassVar[RatioUse] = "unused"
    type: Literal["plain"] = "plain"


@builtin("surrogate", "april.algorithms.losses.surrogate:importance")
class Importance(Surrogate):
    """The importance-weighted policy gradient without bounds."""

    info: ClassVar[Info] = Info(paper="importance sampling", formula="-A r", certainty="B")
    type: Literal["importance"] = "importance"


@builtin("surrogate", "april.algorithms.losses.surrogate:none")
class NoSurrogate(Surrogate):
    """No policy loss: penalties and objectives alone train."""

    info: ClassVar[Info] = Info(paper="-", formula="0", certainty="B")
    requires: ClassVar[frozenset[str]] = frozenset()
    ratio_use: ClassVar[RatioUse] = "unused"
    type: Literal["none"] = "none"


@builtin("surrogate", "april.algorithms.losses.surrogate:cispo")
class Cispo(Surrogate):
    """The policy gradient with a bounded, detached importance weight: bounded tokens keep a gradient (CISPO)."""

    info: ClassVar[Info] = Info(
        paper="CISPO, MiniMax-M1 (arXiv 2506.13585), equations 4 and 5; truncated policy gradient: ROLL Flash (arXiv 2510.11345)",
        formula="-sg(clip(r, low, high)) A log p",
        certainty="A",
        golden=("cispo_loss", "cispo_gradient", "cispo_unified_mask", "roll_tis_loss"),
    )
    bounds_use: ClassVar[BoundsUse] = "needed"
    ratio_use: ClassVar[RatioUse] = "weight"
    type: Literal["cispo"] = "cispo"
    outside: Literal["clip", "drop_harmful", "drop"] = Field(
        "clip", description="tokens outside the bounds: clip their weight, drop those that PPO clips (unified mask), or drop all"
    )


@builtin("surrogate", "april.algorithms.losses.surrogate:soft_gate")
class SoftGate(Surrogate):
    """A sigmoid gate in place of the clip; no bounds (SAPO)."""

    info: ClassVar[Info] = Info(
        paper="SAPO (arXiv 2511.20347)",
        formula="-(4 / tau) sigmoid(tau (r - 1)) A",
        certainty="A",
        golden=("sapo_soft_gate",),
    )
    fades: ClassVar[bool] = True
    type: Literal["soft_gate"] = "soft_gate"
    temperature_positive: float = Field(1.0, gt=0, description="tau of tokens with positive advantage")
    temperature_negative: float = Field(1.05, gt=0, description="tau of the others")


@builtin("surrogate", "april.algorithms.losses.surrogate:geometric_mean")
class GeometricMean(Surrogate):
    """Geometric mean of the clipped token ratios of a sample (GMPO)."""

    info: ClassVar[Info] = Info(
        paper="GMPO (arXiv 2507.20673)",
        formula="-A exp(mean over the sample of clipped log r)",
        certainty="B",
    )
    bounds_use: ClassVar[BoundsUse] = "needed"
    whole_samples: ClassVar[bool] = True
    type: Literal["geometric_mean"] = "geometric_mean"


@builtin("surrogate", "april.algorithms.losses.surrogate:topr")
class Topr(Surrogate):
    """Full weight for solved samples, tapered weight for the others (TOPR)."""

    info: ClassVar[Info] = Info(
        paper="TOPR (arXiv 2503.14286); ROLL Flash (arXiv 2510.11345)",
        formula="solved: -A log p; else -sg(clip(r, low, high)) A log p",
        certainty="A",
        golden=("topr_loss",),
    )
    requires: ClassVar[frozenset[str]] = frozenset({"advantage", "correct"})
    bounds_use: ClassVar[BoundsUse] = "optional"
    ratio_use: ClassVar[RatioUse] = "weight"
    type: Literal["topr"] = "topr"
    positive: float = Field(1.0, ge=0, description="factor of solved samples")
    negative: float = Field(1.0, ge=0, description="factor of the others")


@builtin("surrogate", "april.algorithms.losses.surrogate:mirror")
class Mirror(Surrogate):
    """The policy gradient with a squared log-ratio towards the anchor (Kimi k1.5)."""

    info: ClassVar[Info] = Info(
        paper="Kimi k1.5 (arXiv 2501.12599), section 2.3",
        formula="-A log p + (tau / 2) (log r)^2",
        certainty="A",
        golden=("kimi15_loss",),
    )
    zero_without_advantage: ClassVar[bool] = False
    type: Literal["mirror"] = "mirror"
    tau: float = Field(0.1, ge=0, description="strength of the pull towards the anchor")


@builtin("surrogate", "april.algorithms.losses.surrogate:dppo")
class Dppo(Surrogate):
    """The importance-weighted gradient, masked where the divergence from the behaviour policy has grown (DPPO)."""

    info: ClassVar[Info] = Info(
        paper="DPPO (arXiv 2602.04879), equations 13 and 14",
        formula="-A r, 0 where D(current, behaviour) is past its bound the way A pushes",
        certainty="B",
    )
    requires: ClassVar[frozenset[str]] = frozenset({"advantage", "behaviour"})
    type: Literal["dppo"] = "dppo"
    divergence: Literal["tv", "kl"] = Field("tv", description="|p - q|, or KL of the two events: this token or another")
    low: float = Field(0.2, ge=0, description="bound where the probability fell and A < 0")
    high: float = Field(0.2, ge=0, description="bound where it rose and A > 0")

    @property
    def corrects(self) -> bool:
        """It masks what has left the sampler and leaves the size of the rest to the ratio's anchor."""
        return False


@builtin("surrogate", "april.algorithms.losses.surrogate:vespo")
class Vespo(Surrogate):
    """The policy gradient under a smooth window around a sequence ratio of 1 (VESPO)."""

    info: ClassVar[Info] = Info(
        paper="VESPO (arXiv 2602.10693)",
        formula="-sg(w^k exp(lambda (1 - w))) A log p, w the product of the sample's ratios",
        certainty="B",
    )
    ratio_use: ClassVar[RatioUse] = "weight"
    product_of_sample: ClassVar[bool] = True
    type: Literal["vespo"] = "vespo"
    power_positive: float = Field(2.0, ge=0, description="k where A >= 0")
    rate_positive: float = Field(3.0, ge=0, description="lambda where A >= 0")
    power_negative: float = Field(3.0, ge=0, description="k where A < 0")
    rate_negative: float = Field(2.0, ge=0, description="lambda where A < 0")
