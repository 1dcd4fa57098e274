"""Credit against all samples of a query, when several prompts ask the same (with other budgets, in other words)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from april.algorithms.advantages.group import group_relative
from april.algorithms.columns import Layout, TokenBatch


def query_relative(
    tokens: TokenBatch,
    *,
    query: str = "item.query",
    std: Literal["sample", "population", "none"] = "sample",
    eps: float = 1e-6,
) -> Tensor:
    """A = (R - mean) / (std + eps) over all groups with one query number; a group without a number is its own query.

    Source: HBPO (arXiv 2507.15844), inter-budget advantage.

    Args:
        tokens: needs "reward" and the column of queries.
        query: column with a number that prompts asking the same have in common.
        std, eps: as for `april.algorithms.advantages.group.group_relative`.

    Returns:
        (N,).
    """
    layout = tokens.layout
    names = layout.first(tokens[query])
    alone = names.isnan()
    keys = torch.stack([alone.to(names.dtype), torch.where(alone, layout.group_of_sample.to(names.dtype), names)], dim=1)
    _, segment = torch.unique(keys, dim=0, return_inverse=True)
    merged = Layout(layout.offsets, segment, int(segment.max()) + 1 if len(segment) else 0)
    return group_relative(TokenBatch(merged, {"reward": tokens["reward"]}), std=std, eps=eps)
