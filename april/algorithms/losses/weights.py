"""Corrections from the policy that sampled to the proximal policy. Weights carry no gradient.

w = exp(proximal - behaviour) is 1 for a fresh token of an engine that agrees with the trainer; stale tokens and other
numerics move it. Denominators keep the tokens whose weight is 0.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from april.algorithms.columns import TokenBatch
from april.algorithms.losses.ratio import LIMIT


def log_weight(tokens: TokenBatch) -> Tensor:
    """(N,): proximal - behaviour where the policy sampled the token, else 0."""
    difference = (tokens["proximal"] - tokens["behaviour"]).detach()
    return torch.where(tokens["mask"], difference, torch.zeros_like(difference))


def truncated(tokens: TokenBatch, *, cap: float = 2.0, low: float = 0.0, level: Literal["token", "sequence"] = "token") -> Tensor:
    """Truncated importance sampling: w clamped to [low, cap], of the token or of the whole sample (product).

    Source: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"; decoupled
    objective: AReaL (Fu et al. 2025, arXiv 2505.24298), section 5.2.

    Returns:
        (N,).
    """
    log_w = log_weight(tokens)
    if level == "sequence":
        log_w = tokens.layout.spread(tokens.layout.sum(log_w))
    return log_w.clamp(-LIMIT, LIMIT).exp().clamp(low, cap)


def masked(
    tokens: TokenBatch, *, low: float = 0.5, high: float = 5.0, level: Literal["token", "sequence_mean"] = "token"
) -> Tensor:
    """w where low <= w <= high, else 0; at level "sequence_mean" the sample's geometric mean is compared.

    Source: IcePop (Ling team 2025, arXiv 2510.18855), section on the training-inference gap.

    Returns:
        (N,).
    """
    log_w = log_weight(tokens)
    weight = log_w.clamp(-LIMIT, LIMIT).exp()
    compared = weight
    if level == "sequence_mean":
        compared = tokens.layout.spread(tokens.layout.mean(log_w, tokens["mask"])).clamp(-LIMIT, LIMIT).exp()
    return torch.where((compared >= low) & (compared <= high), weight, torch.zeros_like(weight))
