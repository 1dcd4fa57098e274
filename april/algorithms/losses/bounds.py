"""Bounds of the ratio, given as ratios."""

from __future__ import annotations

import torch
from torch import Tensor

from april.algorithms.columns import TokenBatch


def constant(tokens: TokenBatch, *, low: float = 0.8, high: float = 1.2) -> tuple[Tensor, Tensor]:
    """The same bounds for every token: 1 - eps and 1 + eps of PPO, apart from each other as in DAPO's clip-higher.

    Returns:
        low (N,), high (N,).
    """
    like = tokens["advantage"]
    return torch.full_like(like, low), torch.full_like(like, high)
