"""Objectives: losses beside the policy's surrogate. Each gives loss (N,), which the objective's own aggregate adds up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from april.algorithms.columns import TokenBatch
from april.algorithms.losses.pairs import LOSSES, Margins, Pairs, select


def value(predicted: Tensor, tokens: TokenBatch, *, clip: float | None = 0.2, finished_only: bool = False) -> Tensor:
    """Half the squared error of a value model, the larger of free and clipped around its estimate before the update.

    Source: PPO2 (OpenAI baselines); T-PPO (arXiv 2506.15050) trains it on finished responses only.

    Args:
        predicted: (N,), with gradient.
        tokens: with "value" and "return".
        clip: how far a prediction may move, or None.
        finished_only: 0 for samples that ended at their token budget.

    Returns:
        (N,).
    """
    target, before = tokens["return"], tokens["value"]
    loss = (predicted - target).square()
    if clip is not None:
        near = torch.minimum(torch.maximum(predicted, before - clip), before + clip)
        loss = torch.maximum(loss, (near - target).square())
    return 0.5 * (torch.where(tokens["finished"], loss, torch.zeros_like(loss)) if finished_only else loss)


def imitate(current: Tensor, tokens: TokenBatch) -> Tensor:
    """(N,): -log p on solved samples, else 0. Source: VAPO (arXiv 2504.05118), equation 10."""
    return torch.where(tokens["correct"] > 0, -current, torch.zeros_like(current))


def pair_loss(
    current: Tensor,
    tokens: TokenBatch,
    *,
    kind: str,
    pairs: Pairs = "best_worst",
    length_average: bool = False,
    with_reference: bool = True,
    **options: Any,
) -> Tensor:
    """(N,): what the pairs that a sample is the chosen one of cost together, the same for all its tokens.

    Args:
        current: (N,), with gradient.
        tokens: whole groups.
        kind: a name of `april.algorithms.losses.pairs.LOSSES`.
        pairs: which samples of a group make pairs.
        length_average: mean in place of the sum over a sample's tokens.
        with_reference: log-ratios to the reference in place of log-probs.
        options: of the kind.
    """
    chosen, rejected = select(tokens, pairs)
    margins = margins_of(current, tokens, chosen, rejected, length_average=length_average, with_reference=with_reference)
    per_pair = LOSSES[kind](margins, **options)
    per_sample = per_pair.new_zeros(tokens.layout.num_samples).index_add(0, chosen, per_pair)
    return tokens.layout.spread(per_sample)


def margins_of(
    current: Tensor, tokens: TokenBatch, chosen: Tensor, rejected: Tensor, *, length_average: bool, with_reference: bool
) -> Margins:
    """The log-ratios and rewards of pairs (P,) of samples."""
    layout, mask = tokens.layout, tokens["mask"]
    each = current - tokens["reference"] if with_reference else current
    each = torch.where(mask, each, torch.zeros_like(each))
    whole = layout.mean(each, mask) if length_average else layout.sum(each)
    reward = layout.first(tokens["reward"])
    return Margins(whole[chosen], whole[rejected], reward[chosen] - reward[rejected])
