"""Causal attention over packed sequences of unequal length.

Linear layers run on packed rows without padding. Attention wants rectangles, so sequences are sorted by length and cut into
groups whose padding is bounded; the rows of a sequence stay together and padding stands behind them, where a causal mask
hides it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from april.core.errors import DataError

_MAX_WASTE_FRACTION = 0.15
_FREE_WASTE_TOKENS = 64


@dataclass(frozen=True)
class Block:
    """Sequences of similar length, attended in one call.

    Attributes:
        start, end: rows of the sorted packed tokens.
        num_sequences: s.
        max_tokens: L, the longest of them.
        pad_index: int64 (s * L,), row within the block for each place of the rectangle; None when nothing is padded.
        keep_index: int64 (end - start,), place of the rectangle for each row; None when nothing is padded.
    """

    start: int
    end: int
    num_sequences: int
    max_tokens: int
    pad_index: torch.Tensor | None
    keep_index: torch.Tensor | None


@dataclass(frozen=True)
class PackedLayout:
    """Where the tokens of S sequences stand once they are sorted by length.

    Attributes:
        blocks: in ascending order of length; together they cover all M rows.
        order: int64 (M,), original row of each sorted row; None when the order is unchanged.
        inverse: int64 (M,), sorted row of each original row; None when the order is unchanged.
        positions: int64 (M,), position of each sorted row within its sequence; (U,) where prefixes are shared.
        starts: first sorted row of each sequence, in original order.
        keep: int64 (U,), the sorted row that stands for each row that is computed; None when all are.
        expand: int64 (M,), the computed row of each sorted row; None when all are computed.
    """

    blocks: tuple[Block, ...]
    order: torch.Tensor | None
    inverse: torch.Tensor | None
    positions: torch.Tensor
    starts: tuple[int, ...]
    keep: torch.Tensor | None = None
    expand: torch.Tensor | None = None


def group_lengths(ascending: Sequence[int]) -> list[tuple[int, int]]:
    """Cut ascending lengths into runs [first, last) whose padding stays below a fixed fraction."""
    runs: list[tuple[int, int]] = []
    first, total = 0, 0
    for index, length in enumerate(ascending):
        waste = (index + 1 - first) * length - (total + length)
        if index > first and waste > _MAX_WASTE_FRACTION * (total + length) + _FREE_WASTE_TOKENS:
            runs.append((first, index))
            first, total = index, 0
        total += length
    if ascending:
        runs.append((first, len(ascending)))
    return runs


def shared_prefixes(layout: PackedLayout, lengths: Sequence[int], prefixes: Sequence[tuple[int, int]]) -> PackedLayout:
    """The same layout with the rows of a common prefix computed once: all but attention sees each of them once.

    Args:
        layout: of `lengths`.
        lengths: tokens of each sequence, in original order.
        prefixes: for each sequence the number of its prefix (equal numbers are equal tokens) and its length.
    """
    device = layout.positions.device
    size, start = torch.tensor(list(lengths)), torch.tensor(layout.starts)
    number, length = torch.tensor(list(prefixes), dtype=torch.int64).unbind(1)
    rank = torch.argsort(start)
    owner = torch.full((int(number.max()) + 1,), len(size))
    owner.scatter_reduce_(0, number[rank], torch.arange(len(size)), "amin")  # the first of the sorted sequences
    sequence = torch.repeat_interleave(rank, size[rank])  # of each sorted row, by its original number
    position = layout.positions.cpu()
    source = start[rank[owner[number]]][sequence] + position
    source = torch.where(position < length[sequence], source, torch.arange(len(sequence)))
    keep = torch.nonzero(source == torch.arange(len(sequence))).squeeze(1)
    if len(keep) == len(sequence):
        return layout
    computed = torch.empty(len(sequence), dtype=torch.int64)
    computed[keep] = torch.arange(len(keep))
    kept = keep.to(device)
    return replace(layout, positions=layout.positions[kept], keep=kept, expand=computed[source].to(device))


def packed_layout(lengths: Sequence[int], device: torch.device | str = "cpu") -> PackedLayout:
    """Plan attention for sequences of these lengths, packed one behind the other.

    Raises:
        DataError: when a sequence is empty.
    """
    if not lengths or min(lengths) < 1:
        raise DataError("packed sequences need at least one token each", got=list(lengths))
    size = torch.tensor(list(lengths), dtype=torch.int64)
    rank = torch.argsort(size, stable=True)
    ascending = size[rank].tolist()
    begin = torch.cumsum(size, 0) - size
    sorted_begin = torch.zeros(len(ascending) + 1, dtype=torch.int64)
    sorted_begin[1:] = torch.cumsum(size[rank], 0)
    positions = _ranges(size[rank])
    order = positions + torch.repeat_interleave(begin[rank], size[rank])
    unchanged = bool((rank[1:] > rank[:-1]).all())
    starts = torch.empty(len(ascending), dtype=torch.int64)
    starts[rank] = sorted_begin[:-1]
    blocks = tuple(_block(ascending[a:b], int(sorted_begin[a]), device) for a, b in group_lengths(ascending))
    return PackedLayout(
        blocks,
        None if unchanged else order.to(device),
        None if unchanged else torch.argsort(order).to(device),
        positions.to(device),
        tuple(starts.tolist()),
    )


def _ranges(sizes: torch.Tensor) -> torch.Tensor:
    """0..n-1 for each n, one behind the other."""
    begin = torch.cumsum(sizes, 0) - sizes
    return torch.arange(int(sizes.sum())) - torch.repeat_interleave(begin, sizes)


def _block(lengths: list[int], start: int, device: torch.device | str) -> Block:
    count, longest, total = len(lengths), lengths[-1], sum(lengths)
    if lengths[0] == longest:
        return Block(start, start + total, count, longest, None, None)
    size = torch.tensor(lengths)
    begin = torch.cumsum(size, 0) - size
    column = torch.arange(longest)
    inside = column[None] < size[:, None]
    pad_index = torch.where(inside, begin[:, None] + column[None], begin[:, None]).reshape(-1)
    keep_index = torch.nonzero(inside.reshape(-1)).squeeze(1)
    return Block(start, start + total, count, longest, pad_index.to(device), keep_index.to(device))


def packed_causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
    """Scaled dot-product attention within each sequence.

    Args:
        query: (M, H, d), rows sorted as `layout` says; (U, H, d) where prefixes are shared.
        key, value: (M, H_kv, d); H is a multiple of H_kv.

    Returns:
        (M, H * d), in the same row order.
    """
    if layout.expand is not None:
        query, key, value = (x.index_select(0, layout.expand) for x in (query, key, value))
    outputs = [_attend_block(query, key, value, block) for block in layout.blocks]
    rows = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return rows if layout.keep is None else rows.index_select(0, layout.keep)


def _attend_block(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, block: Block) -> torch.Tensor:
    q, k, v = (_rectangle(x[block.start : block.end], block) for x in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=block.max_tokens > 1, enable_gqa=q.shape[1] != k.shape[1])
    rows = out.transpose(1, 2).reshape(block.num_sequences * block.max_tokens, -1)
    return rows if block.keep_index is None else rows.index_select(0, block.keep_index)


def _rectangle(rows: torch.Tensor, block: Block) -> torch.Tensor:
    """(rows, H, d) -> (s, H, L, d)."""
    full = rows if block.pad_index is None else rows.index_select(0, block.pad_index)
    return full.view(block.num_sequences, block.max_tokens, *rows.shape[1:]).transpose(1, 2)
