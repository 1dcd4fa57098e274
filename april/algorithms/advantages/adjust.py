"""Changes to the credit that need no current policy."""

from __future__ import annotations

import torch
from torch import Tensor

from april.algorithms.advantages.statistics import constant
from april.algorithms.columns import Layout, TokenBatch, group_moments
from april.algorithms.rewards.length import length_cosine


def whiten(advantage: Tensor, tokens: TokenBatch, *, eps: float = 1e-8, shift: bool = True) -> Tensor:
    """(A - mean) / sqrt(var + eps) over all masked-in tokens of the batch, var with n - 1; unchanged below two tokens.

    Exactly 0 where all tokens agree, unless the mean stays.

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
    squares = (inside - mean).square().sum()
    scale = torch.rsqrt(squares / (len(inside) - 1) + eps)
    white = (advantage - mean) * scale if shift else advantage * scale
    silent = shift & constant(mean, squares, mask.sum())
    return torch.where(mask & ~silent, white, torch.zeros_like(white))


def scale_signs(advantage: Tensor, tokens: TokenBatch, *, positive: float = 0.1, negative: float = 1.0) -> Tensor:
    """A * positive where A > 0, A * negative where A < 0: more or less weight on what went right.

    Source: Zhu et al. 2025 (arXiv 2506.01347): with positive 0.1 and negative 1 their weighted REINFORCE, with positive 0
    negative sample reinforcement.

    Returns:
        (N,).
    """
    return torch.where(advantage > 0, advantage * positive, advantage * negative)


def clip(advantage: Tensor, tokens: TokenBatch, *, low: float = -2.0, high: float = 2.0) -> Tensor:
    """A between two bounds. Source: ETTRL (arXiv 2508.11356), the clipped form of its reshaping.

    Returns:
        (N,).
    """
    return advantage.clamp(low, high)


def novelty(advantage: Tensor, tokens: TokenBatch, *, strength: float = 2.5, cap: float = 0.5) -> Tensor:
    """A + min(max(strength * (1 - eta), 0), cap * A) in solved samples: an unlikely right answer counts more.

    eta = exp(s - mean of s over the group), s the mean log-prob of the sample's tokens. A solved sample whose advantage
    is not positive gets nothing.

    Source: XRPO (arXiv 2510.06672), advantage sharpening by novelty.

    Args:
        advantage: (N,).
        tokens: needs "behaviour", "correct", "mask".
        strength: of the bonus.
        cap: largest bonus in units of the advantage.

    Returns:
        (N,).
    """
    eta = tokens.layout.spread(likelihood_in_group(tokens))
    bonus = torch.minimum((strength * (1 - eta)).clamp(min=0), (cap * advantage).clamp(min=0))
    return advantage + torch.where(tokens["correct"] > 0.5, bonus, torch.zeros_like(bonus))


def likelihood_in_group(tokens: TokenBatch) -> Tensor:
    """exp(s - mean of s over the group) (S,), s the sample's mean log-prob under the policy that sampled it."""
    layout = tokens.layout
    score = layout.mean(tokens["behaviour"], tokens["mask"])
    mean, _, _ = group_moments(score, layout)
    return (score - mean).exp()


def budget_gap(
    advantage: Tensor, tokens: TokenBatch, *, weight: float = 1.0, scale_tokens: int = 4096, budget: str = "item.budget"
) -> Tensor:
    """A + weight * (mean reward of the siblings with the same budget - 4 cos(pi b / (2 scale))).

    The second is what a response that uses all of its budget earns; see `april.algorithms.rewards.length.budget_reward`.

    Source: HBPO (arXiv 2507.15844), intra-budget advantage; its release adds the term twice (weight 2).

    Args:
        advantage: (N,).
        tokens: needs "reward" and the column of budgets.
        weight: of the term.
        scale_tokens: response tokens at which the cosine reaches 0.
        budget: column with each sample's budget in tokens; samples without one are left alone.

    Returns:
        (N,).
    """
    layout = tokens.layout
    budgets, reward = layout.first(tokens[budget]), layout.first(tokens["reward"])
    known = ~budgets.isnan()
    keys = torch.stack([layout.group_of_sample.to(budgets.dtype), budgets.nan_to_num(-1.0)], dim=1)
    _, part = torch.unique(keys, dim=0, return_inverse=True)
    mean, _, _ = group_moments(reward, Layout(layout.offsets, part, int(part.max()) + 1 if len(part) else 0))
    gap = mean - length_cosine(budgets, scale_tokens)
    return advantage + weight * layout.spread(torch.where(known, gap, torch.zeros_like(gap)))
