"""Changes to the credit that need no current policy."""

from __future__ import annotations

import torch
from torch import Tensor

from april.algorithms.columns import TokenBatch


def whiten(advantage: Tensor, tokens: TokenBatch, *, eps: float = 1e-8, shift: bool = True) -> Tensor:
    """(A - mean) / sqrt(var + eps) over all masked-in tokens of the batch, var with n - 1; unchanged below two tokens.

    Source: REINFORCE++ (Hu et al. 2025, arXiv 2501.03262), global batch normalisation.

    Args:
        advantage: (N,).
        tokens: needs "mask".

    Returns:
        (N,); 0 outside the mask.
    """
    mask = tokens["mask"]
    inside = advantage[mask]
    if len(inside) < 2:
        return advantage
    mean = inside.mean()
    scale = torch.rsqrt(inside.var(correction=1) + eps)
    white = (advantage - mean) * scale if shift else advantage * scale
    return torch.where(mask, white, torch.zeros_like(white))
