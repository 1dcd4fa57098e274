"""Aggregates: the share of each token in the loss, so that loss = sum(share_N * loss_N).

Shares are computed once over everything an optimiser step trains, before the first backward. They hold the exact
global denominators, so any split into micro-batches adds up to the same gradient. Denominators count the original
mask; samples without any masked-in token do not count.
"""

from __future__ import annotations

import torch
from torch import Tensor

from april.algorithms.columns import TokenBatch


def _counts(tokens: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Mask as numbers (N,), masked-in tokens of each sample (S,), and number of samples that have any."""
    mask = tokens["mask"].to(torch.float64)
    per_sample = tokens.layout.sum(mask)
    return mask, per_sample, (per_sample > 0).sum().clamp(min=1)


def token_mean(tokens: TokenBatch) -> Tensor:
    """1 / tokens. Source: DAPO (arXiv 2503.14476), section 3.3."""
    mask, _, _ = _counts(tokens)
    return mask / mask.sum().clamp(min=1)


def sequence_mean(tokens: TokenBatch) -> Tensor:
    """1 / (samples * tokens of the sample). Source: GRPO (arXiv 2402.03300), equation 3."""
    mask, per_sample, num_samples = _counts(tokens)
    return mask / (tokens.layout.spread(per_sample).clamp(min=1) * num_samples)


def sequence_sum(tokens: TokenBatch) -> Tensor:
    """1 / samples. Source: RLOO (arXiv 2402.14740): the whole response is one action."""
    mask, _, num_samples = _counts(tokens)
    return mask / num_samples


def fixed_length(tokens: TokenBatch, *, constant: int) -> Tensor:
    """1 / (samples * constant). Source: Dr.GRPO (arXiv 2503.20783), section 3.2."""
    mask, _, num_samples = _counts(tokens)
    return mask / (num_samples * constant)
