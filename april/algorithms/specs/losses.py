"""Configs of the built-in ratios and bounds. No torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from april.algorithms.atoms import Atom, Info, Scope, builtin


class Ratio(Atom):
    """Base of the ratios: what the current policy is divided by."""

    whole_samples: ClassVar[bool] = False
    """Whether all tokens of a sample have one ratio."""
    anchor: Literal["proximal", "behaviour"] = Field(
        "proximal",
        description="the denominator: weights before the update, or the policy that sampled (then no correction is needed)",
    )

    @property
    def needs(self) -> frozenset[str]:
        """The anchor's log-probs."""
        return self.requires | {self.anchor}


@builtin("ratio", "april.algorithms.losses.ratio:token")
class TokenRatio(Ratio):
    """Current over proximal probability, token by token."""

    info: ClassVar[Info] = Info(
        paper="PPO (arXiv 1707.06347), section 3",
        formula="log r = current - anchor",
        certainty="A",
        golden=("ppo_clip_loss",),
    )
    type: Literal["token"] = "token"


@builtin("ratio", "april.algorithms.losses.ratio:sequence")
class SequenceRatio(Ratio):
    """Geometric mean of the token ratios of a sample, with the gradient of each token kept (GSPO)."""

    info: ClassVar[Info] = Info(
        paper="GSPO (arXiv 2507.18071), equations 7 and 14",
        formula="log s = mean over the sample of (current - anchor)",
        certainty="A",
        golden=("gspo_loss", "gspo_token_gradient"),
    )
    whole_samples: ClassVar[bool] = True
    type: Literal["sequence"] = "sequence"
    reduce: Literal["mean", "sum"] = Field("mean", description="geometric mean of the token ratios, or their product")
    gradient: Literal["token", "sequence"] = Field(
        "token", description="each token has its own gradient (GSPO-token), or that of the whole sample (GSPO)"
    )


@builtin("ratio", "april.algorithms.losses.ratio:segment")
class SegmentRatio(Ratio):
    """Geometric mean over a turn, or over what one version of the weights sampled; between token and sequence."""

    info: ClassVar[Info] = Info(
        paper="ROLL Flash (arXiv 2510.11345), segment level",
        formula="log s = mean over the segment of (current - anchor)",
        certainty="B",
    )
    type: Literal["segment"] = "segment"
    by: Literal["lag", "turn"] = Field("turn", description="segments end where the mask changes, or where lag or mask change")

    @property
    def needs(self) -> frozenset[str]:
        """The anchor, and "lag" where it ends segments."""
        return frozenset({self.anchor, "lag"}) if self.by == "lag" else frozenset({self.anchor})


@builtin("bounds", "april.algorithms.losses.bounds:constant")
class ConstantBounds(Atom):
    """Fixed bounds of the ratio."""

    info: ClassVar[Info] = Info(
        paper="PPO (arXiv 1707.06347); DAPO (arXiv 2503.14476), section 3.1",
        formula="low <= r <= high",
        certainty="A",
        golden=("dapo_clip_higher_token_mean",),
    )
    type: Literal["constant"] = "constant"
    low: float = Field(
        default=0.8, ge=0, le=1, description="smallest ratio that still gives a gradient when the advantage is negative"
    )
    high: float = Field(default=1.2, ge=1, description="largest ratio that still gives a gradient when the advantage is positive")


@builtin("bounds", "april.algorithms.losses.bounds:entropy")
class EntropyBounds(Atom):
    """Bounds that are wider above for uncertain tokens and wider below for certain ones (HAPO)."""

    info: ClassVar[Info] = Info(
        paper="HAPO (arXiv 2509.16591), asymmetric adaptive clipping",
        formula="h <= 0: 1 - (1 - low)(1 - a h), high; h > 0: low, 1 + (high - 1)(1 + a h)",
        certainty="A",
        golden=("hapo_adaptive_clip",),
    )
    requires: ClassVar[frozenset[str]] = frozenset({"entropy_score"})
    type: Literal["entropy"] = "entropy"
    low: float = Field(0.8, ge=0, le=1, description="lower bound of a token of middling entropy")
    high: float = Field(1.2, ge=1, description="upper bound of a token of middling entropy")
    strength: float = Field(1.0, ge=0, description="a; 1 doubles the room of the most extreme tokens")


@builtin("bounds", "april.algorithms.losses.bounds:second_moment")
class SecondMomentBounds(Atom):
    """Bounds that keep the mean squared log-ratio of the harmful tokens of a step within a budget (M2PO)."""

    info: ClassVar[Info] = Info(
        paper="M2PO (arXiv 2510.01161), form of its release",
        formula="exp(-tau), exp(tau): tau from the largest squared log-ratios of {A (r - 1) > 0}",
        certainty="A",
        golden=("m2po_harmful_quadrant_bounds",),
    )
    scope: ClassVar[Scope] = "batch"
    requires: ClassVar[frozenset[str]] = frozenset({"advantage", "current"})
    type: Literal["second_moment"] = "second_moment"
    budget: float = Field(0.04, gt=0, description="second moment of the log-ratio that is allowed")
    low: float = Field(0.7, ge=0, le=1, description="the bound below is never tighter than this ratio")
    high: float = Field(1.5, ge=1, description="the bound above is never tighter than this ratio")
    anchor: Literal["behaviour", "proximal"] = Field("behaviour", description="as the ratio's anchor")

    @property
    def needs(self) -> frozenset[str]:
        """With the anchor's log-probs."""
        return self.requires | {self.anchor}


@builtin("bounds", "april.algorithms.losses.bounds:shifted")
class ShiftedBounds(Atom):
    """Bounds around the ratio of the proximal policy, for a ratio over the behaviour policy (ReMix)."""

    info: ClassVar[Info] = Info(
        paper="ReMix (arXiv 2507.06892), mix-policy proximal policy gradient",
        formula="c - width_low <= r <= c + width_high, c = proximal / behaviour",
        certainty="B",
        golden=("remix_mix_ppg_shifted_clip",),
    )
    requires: ClassVar[frozenset[str]] = frozenset({"proximal", "behaviour"})
    anchor: ClassVar[str] = "behaviour"
    type: Literal["shifted"] = "shifted"
    width_low: float = Field(0.2, ge=0, description="room below the centre, in units of the ratio")
    width_high: float = Field(0.2, ge=0, description="room above the centre, in units of the ratio")
