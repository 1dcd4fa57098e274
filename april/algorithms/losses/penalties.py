"""Penalties on the divergence from the reference policy. Source: Schulman, "Approximating KL divergence" (2020)."""

from __future__ import annotations

from torch import Tensor

from april.algorithms.columns import TokenBatch
from april.algorithms.losses.ratio import LIMIT


def k3_estimate(difference: Tensor) -> Tensor:
    """exp(-d) + d - 1, clamped to 10: unbiased and never negative for d = log p - log q with tokens drawn from p."""
    return ((-difference).clamp(-LIMIT, LIMIT).exp() + difference - 1).clamp(-10.0, 10.0)


def k3(current: Tensor, tokens: TokenBatch) -> Tensor:
    """(N,): exp(-d) + d - 1 with d = current - reference."""
    return k3_estimate(current - tokens["reference"])


def k2(current: Tensor, tokens: TokenBatch) -> Tensor:
    """(N,): d^2 / 2 with d = current - reference."""
    return (current - tokens["reference"]).square() / 2
