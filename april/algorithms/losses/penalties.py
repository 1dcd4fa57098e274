"""Penalties: divergence from an anchor policy, and entropy. Source: Schulman, "Approximating KL divergence" (2020).

d = current - anchor on tokens that the current policy would sample. Values: k1 = d and k3 = exp(-d) + d - 1 are unbiased
estimates of the divergence, k2 = d^2 / 2 is not; gradients: only that of k2 is an unbiased estimate of the divergence's
gradient. `straight_through` takes the value of one and the gradient of k2.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from april.algorithms.columns import TokenBatch
from april.algorithms.losses.ratio import LIMIT
from april.algorithms.losses.weights import token_covariance

Kind = Literal["k1", "abs", "k2", "k3"]


def k3_estimate(difference: Tensor) -> Tensor:
    """exp(-d) + d - 1, clamped to 10: unbiased and never negative for d = log p - log q with tokens drawn from p."""
    return ((-difference).clamp(-LIMIT, LIMIT).exp() + difference - 1).clamp(-10.0, 10.0)


def estimate(difference: Tensor, kind: Kind) -> Tensor:
    """One of the four estimates of the divergence (N,) from d (N,)."""
    if kind == "k1":
        return difference
    if kind == "abs":
        return difference.abs()
    return difference.square() / 2 if kind == "k2" else k3_estimate(difference)


def divergence(
    current: Tensor,
    tokens: TokenBatch,
    *,
    kind: Kind,
    against: str = "reference",
    straight_through: bool = False,
    importance: Literal["none", "behaviour", "proximal", "current"] = "none",
    importance_gradient: bool = True,
) -> Tensor:
    """(N,): estimate of the divergence of the current policy from an anchor.

    Args:
        current: (N,), with gradient.
        tokens: with the column `against`.
        kind: which estimate.
        against: the anchor's log-probs.
        straight_through: the value of `kind` with the gradient of k2.
        importance: multiply by current / behaviour or current / proximal, for tokens that another policy sampled
            (DeepSeek-V3.2, arXiv 2512.02556, the unbiased estimate); "current": by 1 with the gradient of the log-prob,
            which makes the gradient of k1 and k3 that of the divergence for tokens that the current policy sampled.
        importance_gradient: let that factor carry a gradient.
    """
    difference = current - tokens[against]
    value = estimate(difference, kind)
    if straight_through:
        slope = difference.square() / 2
        value = value.detach() + (slope - slope.detach())
    if importance == "none":
        return value
    log_ratio = current - tokens[importance]
    log_ratio = torch.where(tokens["mask"], log_ratio, torch.zeros_like(log_ratio)).clamp(-LIMIT, LIMIT)
    return value * (log_ratio if importance_gradient else log_ratio.detach()).exp()


def k3(current: Tensor, tokens: TokenBatch) -> Tensor:
    """(N,): exp(-d) + d - 1 with d = current - reference."""
    return divergence(current, tokens, kind="k3")


def k2(current: Tensor, tokens: TokenBatch) -> Tensor:
    """(N,): d^2 / 2 with d = current - reference."""
    return divergence(current, tokens, kind="k2")


def convex(
    current: Tensor,
    tokens: TokenBatch,
    *,
    kind: Kind = "k3",
    previous: Literal["behaviour", "proximal"] = "behaviour",
    start_step: int = 50,
    every_steps: int = 10,
    decay: float = 0.1,
    floor: float = 0.5,
) -> Tensor:
    """(N,): lambda KL(current, reference) + (1 - lambda) KL(current, previous policy), with lambda falling over the run.

    Source: ReMix (arXiv 2507.06892), KL-convex policy constraint.

    Args:
        current: (N,), with gradient.
        tokens: with "reference", "step" and the column `previous`.
        kind: estimate of both.
        previous: the policy before.
        start_step, every_steps, decay, floor: see `convex_share`.
    """
    share = convex_share(tokens["step"].to(current.dtype), start_step, every_steps, decay, floor)
    base, before = (estimate(current - tokens[name], kind) for name in ("reference", previous))
    return share * base + (1 - share) * before


def convex_share(step: Tensor, start_step: int, every_steps: int, decay: float, floor: float) -> Tensor:
    """lambda(step) = max(1 - decay * ceil(max(step - start, 0) / every), floor), of the shape of `step`."""
    return (1 - decay * ((step - start_step).clamp(min=0) / every_steps).ceil()).clamp(min=floor)


def entropy(current: Tensor, tokens: TokenBatch) -> Tensor:
    """(N,): minus the entropy of the current policy, so that a positive coefficient keeps it up."""
    return -tokens["current_entropy"]


def covariance(current: Tensor, tokens: TokenBatch, *, fraction: float = 0.0002) -> Tensor:
    """(N,): |current - proximal| for the share of tokens whose advantage and log-prob vary together most, else 0.

    Source: KL-Cov (arXiv 2505.22617).

    Args:
        current: (N,), with gradient.
        tokens: everything that one optimiser step trains.
        fraction: of all tokens with mask, at least one.
    """
    mask = tokens["mask"]
    spread = torch.where(mask, token_covariance(tokens), torch.full_like(tokens["advantage"], -math.inf))
    number = min(max(int(fraction * int(mask.sum())), 1), int(mask.sum()))
    chosen = torch.zeros_like(mask)
    chosen[spread.topk(number).indices] = True
    moved = (current - tokens["proximal"]).abs()
    return torch.where(chosen, moved, torch.zeros_like(moved))
