"""A batch as 1-D columns over N packed response tokens, and the layout that says whose they are.

sample          0  0  0 | 1  1 | 2  2          offsets (S + 1)      [0, 3, 5, 7]
group           0  0  0 | 0  0 | 1  1          group_of_sample (S)  [0, 0, 1]
reward          1  1  1 | 0  0 | 1  1          one value a token; here that of its sample
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from april.core.errors import DataError, nearest


@dataclass(frozen=True)
class Layout:
    """Token -> sample -> group.

    Attributes:
        offsets: int64 (S + 1,), token row where each sample starts; the last is N.
        group_of_sample: int64 (S,), values below `num_groups`.
        num_groups: G, groups without any sample included.
    """

    offsets: Tensor
    group_of_sample: Tensor
    num_groups: int

    @property
    def num_samples(self) -> int:
        """S."""
        return len(self.group_of_sample)

    @property
    def num_tokens(self) -> int:
        """N."""
        return int(self.offsets[-1])

    @cached_property
    def lengths(self) -> Tensor:
        """int64 (S,): response tokens of each sample, trainable or not."""
        return self.offsets.diff()

    @cached_property
    def sample_of_token(self) -> Tensor:
        """int64 (N,)."""
        index = torch.arange(self.num_samples, device=self.offsets.device)
        return torch.repeat_interleave(index, self.lengths, output_size=self.num_tokens)

    def sum(self, values: Tensor) -> Tensor:
        """(N,) -> (S,): sum over the tokens of each sample."""
        return values.new_zeros(self.num_samples).index_add(0, self.sample_of_token, values)

    def mean(self, values: Tensor, mask: Tensor) -> Tensor:
        """(N,) -> (S,): mean over the tokens with mask; 0 for a sample that has none."""
        total = self.sum(torch.where(mask, values, torch.zeros_like(values)))
        return total / self.sum(mask.to(values.dtype)).clamp(min=1)

    def first(self, values: Tensor) -> Tensor:
        """(N,) -> (S,): the value at each sample's first token, for columns that are constant in a sample."""
        return values[self.offsets[:-1]]

    def spread(self, values: Tensor) -> Tensor:
        """(S,) -> (N,): a value of the sample to each of its tokens."""
        return values[self.sample_of_token]

    def group_sum(self, values: Tensor) -> Tensor:
        """(S,) -> (G,): sum over the samples of each group."""
        return values.new_zeros(self.num_groups).index_add(0, self.group_of_sample, values)

    def take(self, samples: Tensor) -> tuple[Layout, Tensor]:
        """The layout of some whole samples, and the token rows they own in this one."""
        lengths = self.lengths[samples]
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        local = Layout(offsets, self.group_of_sample[samples], self.num_groups)
        within = torch.arange(local.num_tokens, device=offsets.device) - local.spread(offsets[:-1])
        return local, local.spread(self.offsets[samples]) + within

    def to(self, device: torch.device) -> Layout:
        """The same layout on another device."""
        return Layout(self.offsets.to(device), self.group_of_sample.to(device), self.num_groups)


@dataclass(frozen=True)
class TokenBatch:
    """Columns (N,) by name (see `april.algorithms.atoms.COLUMNS`) over one layout.

    Raises:
        DataError: a column that is not (N,), or one that is asked for and is not there.
    """

    layout: Layout
    columns: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        for name, column in self.columns.items():
            if column.shape != (self.layout.num_tokens,):
                raise DataError(
                    "a column does not fit the batch",
                    where=name,
                    got=tuple(column.shape),
                    expected=f"({self.layout.num_tokens},)",
                )

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.columns:
            raise DataError("a column is not there", where=name, expected="one of the batch", hint=nearest(name, self.columns))
        return self.columns[name]

    def __contains__(self, name: object) -> bool:
        return name in self.columns

    def with_columns(self, **columns: Tensor) -> TokenBatch:
        """The batch with columns added or replaced."""
        return TokenBatch(self.layout, {**self.columns, **columns})

    def take(self, samples: Tensor) -> TokenBatch:
        """Some whole samples, in the given order."""
        layout, rows = self.layout.take(samples)
        return TokenBatch(layout, {name: column[rows] for name, column in self.columns.items()})

    def to(self, device: torch.device, dtype: torch.dtype) -> TokenBatch:
        """The batch on another device, its floating columns in `dtype`."""
        moved = {
            name: column.to(device, dtype) if column.is_floating_point() else column.to(device)
            for name, column in self.columns.items()
        }
        return TokenBatch(self.layout.to(device), moved)


def group_moments(values: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics of the group that each sample belongs to.

    Args:
        values: (S,).

    Returns:
        Mean (S,), sum of squared deviations (S,), and number of members (S,).
    """
    ones = torch.ones_like(values)
    count = layout.group_sum(ones)[layout.group_of_sample]
    mean = layout.group_sum(values)[layout.group_of_sample] / count
    squares = layout.group_sum((values - mean).square())[layout.group_of_sample]
    return mean, squares, count
