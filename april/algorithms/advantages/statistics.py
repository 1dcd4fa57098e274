"""Statistics over rows that share an id, the one primitive of group, step and tree credit; sums that decay along a segment."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Scale = Literal["sample", "population", "siblings", "batch", "none"]


def joined(*keys: Tensor) -> tuple[Tensor, int]:
    """Rows that agree in every key get one id.

    Args:
        keys: int64 (R,) each.

    Returns:
        int64 (R,) with values below the number of different rows, and that number.
    """
    ids = torch.zeros_like(keys[0])
    for key in keys:
        values, ranks = torch.unique(key, return_inverse=True)
        ids = torch.unique(ids * len(values) + ranks, return_inverse=True)[1]
    return ids, int(ids.max()) + 1 if len(ids) else 0


def moments(values: Tensor, ids: Tensor, num: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, sum of squared deviations and number of the rows with the same id, for each row.

    Args:
        values: (R,).
        ids: int64 (R,), below `num`.
    """
    count = torch.bincount(ids, minlength=num).to(values.dtype)[ids]
    mean = values.new_zeros(num).index_add(0, ids, values)[ids] / count
    squares = values.new_zeros(num).index_add(0, ids, (values - mean).square())[ids]
    return mean, squares, count


def constant(mean: Tensor, squares: Tensor, count: Tensor) -> Tensor:
    """bool: values are equal but for rounding. They must give exactly 0, not the rounding of their mean over eps."""
    tolerance = max(1e-12, 8 * torch.finfo(mean.dtype).eps)
    return squares <= (tolerance * mean.abs().clamp(min=1e-12)).square() * count


def normalised(
    values: Tensor,
    ids: Tensor,
    num: int,
    *,
    std: Scale = "none",
    eps: float = 1e-6,
    leave_one_out: bool = False,
    singleton: Literal["zero", "raw"] = "zero",
) -> Tensor:
    """(value - mean) / (std + eps) among the rows with the same id; exactly 0 where they all agree.

    Args:
        values: (R,).
        ids: int64 (R,), below `num`.
        num: number of ids.
        std: with n - 1 ("sample"), with n ("population"), of the other rows alone ("siblings", see `siblings_std`), that of all
            rows together with n - 1 ("batch"), or 1 ("none").
        eps: added to the standard deviation.
        leave_one_out: subtract the mean of the other rows, not of all.
        singleton: what a row without siblings gets: 0, or its value as if mean were 0 and std 1.
    """
    mean, squares, count = moments(values, ids, num)
    centred = values - mean
    if leave_one_out:
        centred = centred * count / (count - 1).clamp(min=1)
    if std == "batch":
        centred = centred / (values.std(correction=min(1, len(values) - 1)) + eps)
    elif std == "siblings":
        deviation = siblings_std(values - mean, squares, count)
        centred = torch.where(deviation > 0, centred / (deviation + eps), centred)
    elif std != "none":
        free = (count - 1).clamp(min=1) if std == "sample" else count
        centred = centred / ((squares / free).sqrt() + eps)
    centred = torch.where(constant(mean, squares, count), torch.zeros_like(centred), centred)
    alone = values / (1 + eps) if std != "none" else values
    return torch.where(count > 1, centred, alone if singleton == "raw" else torch.zeros_like(alone))


def siblings_std(centred: Tensor, squares: Tensor, count: Tensor) -> Tensor:
    """(R,): standard deviation of the other rows with the same id, with n - 2; exactly 0 where they agree or are fewer than two.

    Source: NeMo-RL 0.7, `calculate_baseline_and_std_per_prompt` with a leave-one-out baseline.

    Args:
        centred: value - mean (R,).
        squares, count: as `moments` gives them.
    """
    others = squares - centred.square() * count / (count - 1).clamp(min=1)
    rounding = 8 * torch.finfo(squares.dtype).eps * count * squares
    return torch.where((count > 2) & (others > rounding), others.clamp(min=0) / (count - 2).clamp(min=1), 0 * others).sqrt()


def decayed_sums(values: Tensor, decay: Tensor, longest: int) -> Tensor:
    """x_i = value_i + decay_i * x_(i + 1), all segments at once, in log2(longest) passes.

    Args:
        values: (R,), segments one after another.
        decay: (R,), 0 at the last row of each segment.
        longest: rows of the longest segment.
    """
    total, factor, hop = values, decay, 1
    while hop < longest:
        total = torch.cat([torch.addcmul(total[:-hop], factor[:-hop], total[hop:]), total[-hop:]])
        factor = torch.cat([factor[:-hop] * factor[hop:], factor[-hop:]])
        hop *= 2
    return total
