"""Named numbers of a batch's samples, as reward transforms read them."""

from __future__ import annotations

from torch import Tensor

from april.algorithms.columns import TokenBatch
from april.core.errors import DataError


def of_samples(tokens: TokenBatch, column: str, default: float | None = None) -> Tensor:
    """The column's value for each sample (S,).

    Args:
        tokens: the batch.
        column: one that is constant in a sample, such as "part.cost" or "item.budget".
        default: for samples without a value, and for all when no sample of the batch has one; None refuses them.

    Raises:
        DataError: a sample has no value and there is no default.
    """
    if default is not None and column not in tokens:
        reward = tokens.layout.first(tokens["reward"])
        return reward.new_full(reward.shape, default)
    values = tokens.layout.first(tokens[column])
    missing = values.isnan()
    if bool(missing.any()):
        if default is None:
            raise DataError(
                "samples lack a number that a reward transform reads",
                where=column,
                got=f"{int(missing.sum())} of {len(values)} samples without it",
                expected="a part of every reward (part.*) or a number of every item (item.*)",
            )
        values = values.nan_to_num(default)
    return values
