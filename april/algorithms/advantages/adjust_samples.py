"""Which samples keep their credit after the statistics were taken: the survivors' advantages do not change."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from april.algorithms.advantages.adjust_entropy import kept_tokens, share_of_step
from april.algorithms.columns import TokenBatch
from april.algorithms.composers import widest
from april.algorithms.steps import responses


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
    advantage: Tensor,
    tokens: TokenBatch,
    *,
    fraction: float = 0.5,
    final_fraction: float | None = None,
    over_steps: int | None = None,
    renormalise: bool = True,
) -> dict[str, Tensor]:
    """Only the samples of the batch whose advantages vary the most together keep theirs.

    Among equal ones their responses decide, whatever the order of the batch.

    Source: D3S (arXiv 2509.22115), sample level: across groups; baselines are not computed again.

    Args:
        advantage: (N,).
        tokens: needs "mask", "trained", "token_ids", and "step" where the share follows it.
        fraction: share of the samples that is kept, at least one.
        final_fraction, over_steps: see `share_of_step`.
        renormalise: the others' tokens leave the denominators too.

    Returns:
        "advantage" and, with `renormalise`, "mask" and "trained" (N,).
    """
    layout = tokens.layout
    score = layout.mean(advantage, tokens["mask"]).round(decimals=9)  # equal but for rounding is equal
    share = share_of_step(tokens, fraction, final_fraction, over_steps)
    count = min(max(math.ceil(share * len(score) - 1e-9), 1), len(score))
    order = responses(tokens).argsort(stable=True)
    keep = torch.zeros(layout.num_samples, dtype=torch.bool)
    keep[order[widest(score[order].tolist(), count)]] = True
    return kept_tokens(advantage, tokens, layout.spread(keep), renormalise=renormalise)
