"""Columns over samples of given lengths, for the tests of advantages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from april.algorithms.columns import Layout, TokenBatch

F64 = torch.float64


def ragged(lengths: Sequence[int], groups: Sequence[int], mask: Sequence[int] | None = None, **columns: Any) -> TokenBatch:
    """Columns over samples; a column of one number a sample is spread over its tokens."""
    size = torch.tensor(lengths)
    layout = Layout(torch.cat([size.new_zeros(1), size.cumsum(0)]), torch.tensor(groups), max(groups) + 1)
    inside = torch.ones(layout.num_tokens).bool() if mask is None else torch.tensor(mask).bool()
    full: dict[str, Tensor] = {"mask": inside, "trained": inside}
    for name, values in columns.items():
        column = torch.as_tensor(values)
        column = torch.as_tensor(values, dtype=F64) if column.is_floating_point() else column
        full[name] = column if len(column) == layout.num_tokens else layout.spread(column)
    return TokenBatch(layout, full)


def of_samples(advantage: Tensor, tokens: TokenBatch) -> list[float]:
    return [round(value, 6) for value in tokens.layout.first(advantage).tolist()]
