"""Reward transforms: reward_N -> reward_N, before any group statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from april.algorithms.columns import TokenBatch


def overlong(tokens: TokenBatch, *, max_tokens: int, buffer_tokens: int, factor: float = 1.0) -> Tensor:
    """Soft overlong punishment: R + min(-(len - (max - buffer)) / buffer * factor, 0), not below R - factor.

    Source: DAPO (Yu et al. 2025, arXiv 2503.14476), section 3.4. The length is that of the whole response, over all
    segments of a resumed sample.

    Returns:
        (N,): the changed rewards.
    """
    excess = (tokens.layout.lengths - (max_tokens - buffer_tokens)).to(tokens["reward"].dtype)
    penalty = -(excess / buffer_tokens).clamp(0, 1) * factor
    return tokens["reward"] + tokens.layout.spread(torch.where(excess > 0, penalty, torch.zeros_like(penalty)))
