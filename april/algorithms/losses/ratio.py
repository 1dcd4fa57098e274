"""Ratios of the policy being trained to the proximal policy, in logs and clamped to [-20, 20]."""

from __future__ import annotations

from torch import Tensor

from april.algorithms.columns import TokenBatch

LIMIT = 20.0


def token(current: Tensor, proximal: Tensor, tokens: TokenBatch) -> Tensor:
    """(N,): log-ratio of each token. Source: PPO (Schulman et al. 2017, arXiv 1707.06347), section 3."""
    return (current - proximal).clamp(-LIMIT, LIMIT)


def sequence(current: Tensor, proximal: Tensor, tokens: TokenBatch) -> Tensor:
    """(N,): mean log-ratio of the token's sample in value, the token's own log-prob in gradient (GSPO-token).

    Source: GSPO (Zheng et al. 2025, arXiv 2507.18071), equations 7 and 14.
    """
    mean = tokens.layout.mean((current - proximal).detach(), tokens["mask"])
    return tokens.layout.spread(mean.clamp(-LIMIT, LIMIT)) + (current - current.detach())
