"""Rewards that depend on how long a response is. Lengths are those of whole responses, over all segments of a resumed sample."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from april.algorithms.columns import TokenBatch
from april.algorithms.rewards.values import of_samples


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


def shorter_is_better(
    tokens: TokenBatch,
    *,
    strength: float = 1.2,
    floor: float = 0.05,
    correct_weight: float = 0.9,
    format_weight: float = 0.1,
    format_part: str | None = None,
) -> Tensor:
    """R = correct_weight * correct + format_weight * format + length reward of right answers.

    Source: JET (arXiv 2509.23392), quality-controlled length reward; see `length_reward`.

    Args:
        tokens: needs "reward", "correct".
        strength, floor: of the length reward.
        correct_weight, format_weight: of the rest.
        format_part: column that is 1 where the format is right; without one it always is.

    Returns:
        (N,).
    """
    correct = tokens.layout.first(tokens["correct"])
    well_formed = torch.ones_like(correct) if format_part is None else of_samples(tokens, format_part, default=0.0)
    reward = correct_weight * correct + format_weight * well_formed + length_reward(tokens, strength, floor)
    return tokens.layout.spread(reward)


def length_reward(tokens: TokenBatch, strength: float, floor: float, eps: float = 1e-8) -> Tensor:
    """strength * (1 - floor) * (longest - length) / (longest - shortest + eps) + floor for right answers (S,), else 0;
    longest and shortest among the right answers of the group. Source: JET (arXiv 2509.23392)."""
    layout, correct = tokens.layout, tokens.layout.first(tokens["correct"])
    right, length = correct > 0.5, layout.lengths.to(correct.dtype)
    group, ends = layout.group_of_sample, []
    for fill, reduce in ((-math.inf, "amax"), (math.inf, "amin")):
        inside = torch.where(right, length, torch.full_like(length, fill))
        ends.append(length.new_full((layout.num_groups,), fill).scatter_reduce(0, group, inside, reduce)[group])
    longest, shortest = ends
    value = strength * (1 - floor) * (longest - length) / (longest - shortest + eps) + floor
    return torch.where(right, value, torch.zeros_like(value))


def budget_reward(
    tokens: TokenBatch, *, scale_tokens: int = 4096, budget: str = "item.budget", format_part: str | None = None
) -> Tensor:
    """Right answers earn min(c(length) - |budget - length| / scale, c(budget)), c(x) = 4 cos(pi x / (2 scale)); wrong ones 0.

    Without a budget c(length) alone; a format error -1.

    Source: HBPO (arXiv 2507.15844), budget-aware reward.

    Args:
        tokens: needs "reward", "correct", the column of budgets.
        scale_tokens: response tokens at which the cosine reaches 0.
        budget: column with each sample's budget in tokens; nan for none.
        format_part: column that is 1 where the format is right; without one it always is.

    Returns:
        (N,).
    """
    layout, correct = tokens.layout, tokens.layout.first(tokens["correct"])
    length, budgets = layout.lengths.to(correct.dtype), layout.first(tokens[budget])
    earned = length_cosine(length, scale_tokens)
    capped = torch.minimum(earned - (budgets - length).abs() / scale_tokens, length_cosine(budgets, scale_tokens))
    reward = torch.where(correct > 0.5, torch.where(budgets.isnan(), earned, capped), torch.zeros_like(earned))
    if format_part is not None:
        reward = torch.where(of_samples(tokens, format_part, default=0.0) > 0.5, reward, -torch.ones_like(reward))
    return layout.spread(reward)


def length_cosine(length_tokens: Tensor, scale_tokens: int) -> Tensor:
    """4 cos(pi * length / (2 * scale)), 0 beyond the scale; nan stays nan. Source: HBPO (arXiv 2507.15844)."""
    value = 4 * torch.cos(math.pi * length_tokens / (2 * scale_tokens))
    return torch.where(length_tokens > scale_tokens, torch.zeros_like(value), value)
