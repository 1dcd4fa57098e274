"""Aggregates: the share of each token in the loss, so that loss = sum(share_N * loss_N).

Shares are computed once over everything an optimiser step trains, before the first backward. They hold the exact
global denominators, so any split into micro-batches adds up to the same gradient. Denominators count the original
mask; samples without any masked-in token do not count unless `count_empty`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from april.algorithms.columns import TokenBatch
from april.algorithms.losses.pairs import Pairs, num_pairs


def _counts(tokens: TokenBatch, count_empty: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Mask as numbers (N,), masked-in tokens of each sample (S,), and number of samples that have any, or of all."""
    mask = tokens["mask"].to(torch.float64)
    per_sample = tokens.layout.sum(mask)
    num_samples = torch.ones_like(per_sample).sum() if count_empty else (per_sample > 0).sum()
    return mask, per_sample, num_samples.clamp(min=1)


def token_mean(tokens: TokenBatch) -> Tensor:
    """1 / tokens. Source: DAPO (arXiv 2503.14476), section 3.3."""
    mask, _, _ = _counts(tokens)
    return mask / mask.sum().clamp(min=1)


def sequence_mean(tokens: TokenBatch, *, count_empty: bool = False) -> Tensor:
    """1 / (samples * tokens of the sample). Source: GRPO (arXiv 2402.03300), equation 3."""
    mask, per_sample, num_samples = _counts(tokens, count_empty)
    return mask / (tokens.layout.spread(per_sample).clamp(min=1) * num_samples)


def sequence_sum(tokens: TokenBatch, *, count_empty: bool = False) -> Tensor:
    """1 / samples. Source: RLOO (arXiv 2402.14740): the whole response is one action."""
    mask, _, num_samples = _counts(tokens, count_empty)
    return mask / num_samples


def fixed_length(tokens: TokenBatch, *, constant: int, count_empty: bool = False) -> Tensor:
    """1 / (samples * constant). Source: Dr.GRPO (arXiv 2503.20783), section 3.2."""
    mask, _, num_samples = _counts(tokens, count_empty)
    return mask / (num_samples * constant)


def group_mean(tokens: TokenBatch) -> Tensor:
    """1 / (groups * tokens of the group): every prompt counts the same. Source: DAPO (arXiv 2503.14476), equation 8."""
    mask, per_sample, _ = _counts(tokens)
    layout = tokens.layout
    per_group = layout.group_sum(per_sample)
    share = 1 / (per_group.clamp(min=1) * (per_group > 0).sum().clamp(min=1))
    return mask * layout.spread(share[layout.group_of_sample])


def constant(tokens: TokenBatch, *, constant: float = 1.0) -> Tensor:
    """1 / constant, whatever the batch holds; with 1 the plain sum."""
    return tokens["mask"].to(torch.float64) / constant


def pair_mean(tokens: TokenBatch, *, pairs: Pairs = "best_worst") -> Tensor:
    """1 / (pairs * trained tokens of the sample), for objectives that give all tokens of a sample one loss."""
    trained = tokens["trained"].to(torch.float64)
    per_sample = tokens.layout.sum(trained)
    return trained / (tokens.layout.spread(per_sample).clamp(min=1) * num_pairs(tokens, pairs).clamp(min=1))


def solved_token_mean(tokens: TokenBatch) -> Tensor:
    """1 / tokens of solved samples; others have no share."""
    counted = (tokens["mask"] & (tokens["correct"] > 0)).to(torch.float64)
    return counted / counted.sum().clamp(min=1)
