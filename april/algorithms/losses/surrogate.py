"""Surrogates: the loss of each token, to be minimised, and whether its bound acted.

All get (log_ratio, current, advantage, bounds, tokens): (N,) each, bounds as ratios (low, high) or None. They return loss
(N,) and clipped (N,), True where a bound changed what the token would have got.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from april.algorithms.advantages.adjust_entropy import differential_factor
from april.algorithms.columns import TokenBatch
from april.core.errors import DataError

Bounds = tuple[Tensor, Tensor] | None
Surrogate = tuple[Tensor, Tensor]


def _bounded(bounds: Bounds, surrogate: str) -> tuple[Tensor, Tensor]:
    if bounds is None:
        raise DataError("the surrogate has no bounds", where=f"algorithm.surrogate {surrogate!r}, algorithm.bounds", got="false")
    return bounds


def _nowhere(like: Tensor) -> Tensor:
    return torch.zeros_like(like, dtype=torch.bool)


def clip(
    log_ratio: Tensor, current: Tensor, advantage: Tensor, bounds: Bounds, tokens: TokenBatch, *, dual_clip: float | None = None
) -> Surrogate:
    """max(-A r, -A clip(r, low, high)), and at most -c A where A < 0; without bounds the ratio is not clipped.

    Source: PPO (Schulman et al. 2017, arXiv 1707.06347), equation 7; dual clip: Ye et al. 2020, arXiv 1912.09729.

    Args:
        dual_clip: c > 1, or None.
    """
    ratio = log_ratio.exp()
    free = -advantage * ratio
    if bounds is None:
        loss, clipped = free, _nowhere(free)
    else:
        bounded = -advantage * torch.minimum(torch.maximum(ratio, bounds[0]), bounds[1])
        loss, clipped = torch.maximum(free, bounded), bounded > free
    return _dual(loss, clipped, advantage, dual_clip)


def _dual(loss: Tensor, clipped: Tensor, advantage: Tensor, dual_clip: float | None) -> Surrogate:
    if dual_clip is None:
        return loss, clipped
    limit = -dual_clip * advantage
    over = (advantage < 0) & (loss > limit)
    return torch.where(over, limit, loss), clipped | over


def clip_keep_gradient(
    log_ratio: Tensor, current: Tensor, advantage: Tensor, bounds: Bounds, tokens: TokenBatch, *, dual_clip: float | None = None
) -> Surrogate:
    """The clipped surrogate whose tokens above the upper bound keep its gradient: value high, gradient high * A.

    Source: AEPO (arXiv 2510.14545), entropy-balanced clipping. Below the lower bound it is PPO.
    """
    low, high = _bounded(bounds, "clip_keep_gradient")
    ratio = log_ratio.exp()
    capped = torch.where(ratio > high, ratio * (high / ratio).detach(), ratio)
    free, bounded = -advantage * ratio, -advantage * torch.maximum(capped, low)
    return _dual(torch.maximum(free, bounded), bounded > free, advantage, dual_clip)


def hapo(
    log_ratio: Tensor,
    current: Tensor,
    advantage: Tensor,
    bounds: Bounds,
    tokens: TokenBatch,
    *,
    strength: float = 1.0,
    dual_clip: float | None = None,
) -> Surrogate:
    """The clipped surrogate with an advantage that grows with "entropy_score" where the ratio says something.

    Source: HAPO (arXiv 2509.16591), differential advantage redistribution.

    Args:
        strength: b; 0 leaves the advantage as it is.
        dual_clip: c > 1, or None.
    """
    low, high = _bounded(bounds, "hapo")
    factor = differential_factor(tokens["entropy_score"], log_ratio.exp(), low, high, strength=strength)
    return clip(log_ratio, current, advantage * factor.detach(), bounds, tokens, dual_clip=dual_clip)


def importance(log_ratio: Tensor, current: Tensor, advantage: Tensor, bounds: Bounds, tokens: TokenBatch) -> Surrogate:
    """-A r: the importance-weighted policy gradient, without any bound."""
    loss = -advantage * log_ratio.exp()
    return loss, _nowhere(loss)


def plain(log_ratio: Tensor, current: Tensor, advantage: Tensor, bounds: Bounds, tokens: TokenBatch) -> Surrogate:
    """-A log p: the policy gradient. Source: REINFORCE (Williams 1992)."""
    return -advantage * current, _nowhere(current)


def none(log_ratio: Tensor, current: Tensor, advantage: Tensor, bounds: Bounds, tokens: TokenBatch) -> Surrogate:
    """0: only penalties and objectives train."""
    return 0 * current, _nowhere(current)


def cispo(
    log_ratio: Tensor,
    current: Tensor,
    advantage: Tensor,
    bounds: Bounds,
    tokens: TokenBatch,
    *,
    outside: Literal["clip", "drop_harmful", "drop"] = "clip",
) -> Surrogate:
    """-clip(r, low, high) A log p with the weight detached: bounded tokens keep a gradient.

    Source: CISPO, MiniMax-M1 (arXiv 2506.13585), equations 4 and 5, and its unified mask; "drop": GLM-5
    (arXiv 2602.15763), section 4.1.2. With low 0 and high 1 it is the truncated policy gradient of ROLL Flash.

    Args:
        outside: what becomes of tokens outside the bounds: their weight is clipped; the ones that PPO clips are dropped as
            well; or all of them are dropped.
    """
    low, high = _bounded(bounds, "cispo")
    ratio = log_ratio.exp().detach()
    beyond = (ratio < low) | (ratio > high)
    weight = torch.minimum(torch.maximum(ratio, low), high)
    if outside != "clip":
        harmful = ((advantage > 0) & (ratio > high)) | ((advantage < 0) & (ratio < low))
        beyond = harmful if outside == "drop_harmful" else beyond
        weight = torch.where(beyond, torch.zeros_like(weight), weight)
    return -weight * advantage * current, beyond


def soft_gate(
    log_ratio: Tensor,
    current: Tensor,
    advantage: Tensor,
    bounds: Bounds,
    tokens: TokenBatch,
    *,
    temperature_positive: float = 1.0,
    temperature_negative: float = 1.05,
) -> Surrogate:
    """-(4 / tau) sigmoid(tau (r - 1)) A: a smooth gate in place of the clip; its gradient at r = 1 is the plain one.

    Source: SAPO, soft adaptive policy optimization (arXiv 2511.20347).
    """
    tau = torch.where(advantage > 0, temperature_positive, temperature_negative).to(log_ratio.dtype)
    loss = -(4 / tau) * torch.sigmoid(tau * (log_ratio.exp() - 1)) * advantage
    return loss, _nowhere(loss)


def geometric_mean(log_ratio: Tensor, current: Tensor, advantage: Tensor, bounds: Bounds, tokens: TokenBatch) -> Surrogate:
    """-A exp(mean of the sample's clipped log-ratios), the same for all its tokens.

    A token's log-ratio is clipped only where it has moved the way its advantage pushes. Source: GMPO (arXiv 2507.20673),
    with the mean advantage of the sample.
    """
    low, high = (bound.clamp(min=1e-9).log() for bound in _bounded(bounds, "geometric_mean"))
    capped = torch.where(
        advantage > 0, torch.minimum(log_ratio, high), torch.where(advantage < 0, torch.maximum(log_ratio, low), log_ratio)
    )
    layout, mask = tokens.layout, tokens["mask"]
    loss = -layout.mean(advantage, mask) * layout.mean(capped, mask).exp()
    return layout.spread(loss), capped != log_ratio


def topr(
    log_ratio: Tensor,
    current: Tensor,
    advantage: Tensor,
    bounds: Bounds,
    tokens: TokenBatch,
    *,
    positive: float = 1.0,
    negative: float = 1.0,
) -> Surrogate:
    """-A log p for solved samples; -clip(r, low, high) A log p, weight detached, for the others.

    Source: TOPR (arXiv 2503.14286): full weight for positives, tapered for negatives; the branch is the outcome, not the
    sign of a centred advantage. Bounds default to [0, 1].

    Args:
        positive, negative: factors of the two branches.
    """
    low, high = bounds if bounds is not None else (torch.zeros_like(log_ratio), torch.ones_like(log_ratio))
    ratio = log_ratio.exp().detach()
    tapered = torch.minimum(torch.maximum(ratio, low), high)
    solved = tokens["correct"] > 0
    weight = torch.where(solved, positive * torch.ones_like(ratio), negative * tapered)
    return -weight * advantage * current, ~solved & (tapered != ratio)


def mirror(
    log_ratio: Tensor, current: Tensor, advantage: Tensor, bounds: Bounds, tokens: TokenBatch, *, tau: float = 0.1
) -> Surrogate:
    """-A log p + (tau / 2) (log r)^2: mirror descent towards the anchor. Source: Kimi k1.5 (arXiv 2501.12599), section 2.3."""
    return -advantage * current + tau / 2 * log_ratio.square(), _nowhere(current)


def dppo(
    log_ratio: Tensor,
    current: Tensor,
    advantage: Tensor,
    bounds: Bounds,
    tokens: TokenBatch,
    *,
    divergence: Literal["tv", "kl"] = "tv",
    low: float = 0.2,
    high: float = 0.2,
) -> Surrogate:
    """-A r, and 0 where the divergence from the behaviour policy has grown past a bound the way the advantage pushes.

    Source: DPPO (arXiv 2602.04879), equations 13 (total variation) and 14 (KL), on the two events "this token" and "another".

    Args:
        divergence: what is bounded: |p - q|, or KL(q || p), with p current and q behaviour.
        low: bound where the probability fell and A < 0.
        high: bound where it rose and A > 0.
    """
    p, q = current.detach().exp(), tokens["behaviour"].exp()
    size = (p - q).abs() if divergence == "tv" else _binary_kl(q, p)
    risen = (advantage > 0) & (p > q) & (size > high)
    fallen = (advantage < 0) & (p < q) & (size > low)
    masked = risen | fallen
    loss = -advantage * log_ratio.exp()
    return torch.where(masked, torch.zeros_like(loss), loss), masked


def _binary_kl(q: Tensor, p: Tensor) -> Tensor:
    tiny = 1e-8
    return q * ((q + tiny) / (p + tiny)).log() + (1 - q) * ((1 - q + tiny) / (1 - p + tiny)).log()


def vespo(
    log_ratio: Tensor,
    current: Tensor,
    advantage: Tensor,
    bounds: Bounds,
    tokens: TokenBatch,
    *,
    power_positive: float = 2.0,
    rate_positive: float = 3.0,
    power_negative: float = 3.0,
    rate_negative: float = 2.0,
) -> Surrogate:
    """-phi(w) A log p with phi(w) = w^k exp(lambda (1 - w)) detached: a smooth window around w = 1.

    Source: VESPO (arXiv 2602.10693). w is the product of the sample's ratios: `ratio = { type = "sequence", reduce = "sum" }`.
    """
    log_w = log_ratio.detach()
    power = torch.where(advantage >= 0, power_positive, power_negative).to(log_w.dtype)
    rate = torch.where(advantage >= 0, rate_positive, rate_negative).to(log_w.dtype)
    phi = (power * log_w + rate * (1 - log_w.exp())).exp()
    return -phi * advantage * current, _nowhere(current)
