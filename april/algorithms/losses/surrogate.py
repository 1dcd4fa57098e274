"""Surrogates: the loss of each token, to be minimised, and whether its bound was active."""

from __future__ import annotations

import torch
from torch import Tensor

Bounds = tuple[Tensor, Tensor] | None


def clip(
    log_ratio: Tensor, current: Tensor, advantage: Tensor, bounds: Bounds, *, dual_clip: float | None = None
) -> tuple[Tensor, Tensor]:
    """max(-A r, -A clip(r, low, high)), and at most -c A where A < 0.

    Source: PPO (Schulman et al. 2017, arXiv 1707.06347), equation 7; dual clip: Ye et al. 2020, arXiv 1912.09729.

    Args:
        log_ratio, current, advantage: (N,).
        bounds: low (N,) and high (N,) as ratios; None leaves the ratio unclipped.
        dual_clip: c > 1, or None.

    Returns:
        loss (N,) and clipped (N,), True where the token gives no gradient because of a bound.
    """
    ratio = log_ratio.exp()
    free = -advantage * ratio
    if bounds is None:
        loss, clipped = free, torch.zeros_like(free, dtype=torch.bool)
    else:
        bounded = -advantage * torch.minimum(torch.maximum(ratio, bounds[0]), bounds[1])
        loss, clipped = torch.maximum(free, bounded), bounded > free
    if dual_clip is not None:
        limit = -dual_clip * advantage
        over = (advantage < 0) & (loss > limit)
        loss, clipped = torch.where(over, limit, loss), clipped | over
    return loss, clipped


def plain(log_ratio: Tensor, current: Tensor, advantage: Tensor, bounds: Bounds) -> tuple[Tensor, Tensor]:
    """-A log p: the policy gradient. Source: REINFORCE (Williams 1992).

    Returns:
        loss (N,) and clipped (N,), which is nowhere True.
    """
    return -advantage * current, torch.zeros_like(current, dtype=torch.bool)
