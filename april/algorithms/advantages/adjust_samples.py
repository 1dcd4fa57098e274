"""Which samples keep their credit after the statistics were taken: the survivors' advantages do not change."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from april.algorithms.advantages.adjust_entropy import kept_tokens
from april.algorithms.columns import TokenBatch
from april.algorithms.composers import widest


def overlong_filter(advantage: Tensor, tokens: TokenBatch, *, renormalise: bool = True) -> dict[str, Tensor]:
    """Samples that ended at their token budget give no gradient: they are neither right nor wrong.

    They stay in the statistics of their group.

    Source: DAPO (arXiv 2503.14476), section 3.4, overlong filtering.

    Args:
        advantage: (N,).
        tokens: needs "finished", "mask", "trained".
        renormalise: their tokens leave the denominators too.

    Returns:
        "advantage" and, with `renormalise`, "mask" and "trained" (N,).
    """
    return kept_tokens(advantage, tokens, tokens["finished"].bool(), renormalise=renormalise)


def max_variance_samples(
    advantage: Tensor, tokens: TokenBatch, *, fraction: float = 0.5, renormalise: bool = True
) -> dict[str, Tensor]:
    """Only the samples of the batch whose advantages vary the most together keep theirs.

    Source: D3S (arXiv 2509.22115), sample level: across groups; baselines are not computed again.

    Args:
        advantage: (N,).
        tokens: needs "mask", "trained".
        fraction: share of the samples that is kept, at least one.
        renormalise: the others' tokens leave the denominators too.

    Returns:
        "advantage" and, with `renormalise`, "mask" and "trained" (N,).
    """
    layout = tokens.layout
    score = layout.mean(advantage, tokens["mask"])
    count = min(max(math.ceil(fraction * len(score) - 1e-9), 1), len(score))
    keep = torch.zeros(layout.num_samples, dtype=torch.bool)
    keep[widest(score.tolist(), count)] = True
    return kept_tokens(advantage, tokens, layout.spread(keep), renormalise=renormalise)
