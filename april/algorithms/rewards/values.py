"""Named numbers of a batch's samples, as reward transforms read them."""

from __future__ import annotations

import torch
from torch import Tensor

from april.algorithms.columns import TokenBatch
from april.core.errors import DataError


def of_samples(tokens: TokenBatch, column: str, default: float | None = None, *, needed: Tensor | None = None) -> Tensor:
    """The column's value for each sample (S,).

    Args:
        tokens: the batch.
        column: one that is constant in a sample, such as "part.cost" or "item.budget".
        default: for samples without a value; None refuses them.
        needed: bool (S,), samples that must have a value whatever the default; none when left out.

    Raises:
        DataError: a sample that needs a value has none.
    """
    reward = tokens.layout.first(tokens["reward"])
    values = tokens.layout.first(tokens[column]) if column in tokens else torch.full_like(reward, torch.nan)
    missing = values.isnan()
    lacking = missing if default is None else missing & needed if needed is not None else torch.zeros_like(missing)
    if bool(lacking.any()):
        raise DataError(
            "samples lack a number that a reward transform reads",
            where=column,
            got=f"{int(lacking.sum())} of {len(values)} samples without it",
            expected="a part of every reward (part.*) or a number of every item (item.*)",
        )
    return values if default is None else values.nan_to_num(default)
