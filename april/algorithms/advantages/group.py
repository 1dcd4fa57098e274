"""Group-relative credit: a sample against its siblings. Failed members are not in the batch, so they do not count."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from april.algorithms.columns import TokenBatch, group_moments


def group_relative(tokens: TokenBatch, *, std: Literal["sample", "population", "none"] = "sample", eps: float = 1e-6) -> Tensor:
    """A = (R - mean of the group) / (std of the group + eps); 0 in a group of one.

    Source: GRPO (Shao et al. 2024, arXiv 2402.03300), section 4.1.1; without std: Dr.GRPO (Liu et al. 2025,
    arXiv 2503.20783).

    Args:
        tokens: needs "reward", constant within a sample.
        std: divide by the standard deviation with n - 1 ("sample"), with n ("population"), or by nothing.
        eps: added to the standard deviation.

    Returns:
        (N,).
    """
    reward = tokens.layout.first(tokens["reward"])
    mean, squares, count = group_moments(reward, tokens.layout)
    advantage = reward - mean
    if std != "none":
        free = count - 1 if std == "sample" else count
        advantage = advantage / ((squares / free.clamp(min=1)).sqrt() + eps)
    # equal rewards must give exactly 0, not the rounding of their mean over eps
    constant = squares <= (1e-12 * mean.abs().clamp(min=1e-12)).square() * count
    advantage = torch.where(constant | (count < 2), torch.zeros_like(advantage), advantage)
    return tokens.layout.spread(advantage)


def leave_one_out(tokens: TokenBatch) -> Tensor:
    """A = R - mean of the siblings = n / (n - 1) * (R - mean of the group); 0 in a group of one.

    Source: RLOO (Ahmadian et al. 2024, arXiv 2402.14740), equation 5.

    Returns:
        (N,).
    """
    reward = tokens.layout.first(tokens["reward"])
    mean, _, count = group_moments(reward, tokens.layout)
    scale = torch.where(count > 1, count / (count - 1).clamp(min=1), torch.zeros_like(count))
    return tokens.layout.spread((reward - mean) * scale)
