"""Configs of the built-in ratios, bounds and surrogates. No torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from april.algorithms.atoms import Atom, Info, builtin


@builtin("ratio", "april.algorithms.losses.ratio:token")
class TokenRatio(Atom):
    """Current over proximal probability, token by token."""

    info: ClassVar[Info] = Info(
        paper="PPO (arXiv 1707.06347), section 3",
        formula="log r = current - proximal",
        golden=("ppo_clip_loss",),
    )
    requires: ClassVar[frozenset[str]] = frozenset({"proximal"})
    type: Literal["token"] = "token"


@builtin("ratio", "april.algorithms.losses.ratio:sequence")
class SequenceRatio(Atom):
    """Geometric mean of the token ratios of a sample, with the gradient of each token kept (GSPO)."""

    info: ClassVar[Info] = Info(
        paper="GSPO (arXiv 2507.18071), section 4",
        formula="log s = mean over the sample of (current - proximal)",
        golden=("gspo_loss", "gspo_token_gradient"),
    )
    requires: ClassVar[frozenset[str]] = frozenset({"proximal"})
    type: Literal["sequence"] = "sequence"


@builtin("bounds", "april.algorithms.losses.bounds:constant")
class ConstantBounds(Atom):
    """Fixed bounds of the ratio."""

    info: ClassVar[Info] = Info(
        paper="PPO (arXiv 1707.06347); DAPO (arXiv 2503.14476), section 3.1",
        formula="low <= r <= high",
        golden=("dapo_clip_higher_token_mean",),
    )
    type: Literal["constant"] = "constant"
    low: float = Field(
        default=0.8, ge=0, le=1, description="smallest ratio that still gives a gradient when the advantage is negative"
    )
    high: float = Field(default=1.2, ge=1, description="largest ratio that still gives a gradient when the advantage is positive")


@builtin("surrogate", "april.algorithms.losses.surrogate:clip")
class Clip(Atom):
    """PPO's clipped surrogate: the larger of -A r and -A clip(r, low, high)."""

    info: ClassVar[Info] = Info(
        paper="PPO (arXiv 1707.06347), equation 7",
        formula="max(-A r, -A clip(r, low, high))",
        golden=("ppo_clip_loss", "ppo_dual_clip"),
    )
    requires: ClassVar[frozenset[str]] = frozenset({"advantage"})
    type: Literal["clip"] = "clip"
    dual_clip: float | None = Field(default=None, gt=1, description="bound on the loss of a negative advantage, in units of |A|")


@builtin("surrogate", "april.algorithms.losses.surrogate:plain")
class Plain(Atom):
    """The policy gradient itself, -A log p; no ratio and no bounds (REINFORCE)."""

    info: ClassVar[Info] = Info(
        paper="REINFORCE (Williams 1992)",
        formula="-A log p",
        golden=("reinforce_loss_token_mean",),
    )
    requires: ClassVar[frozenset[str]] = frozenset({"advantage"})
    type: Literal["plain"] = "plain"
