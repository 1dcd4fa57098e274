"""Micro-batches: whole samples under a token budget, in an order that depends on lengths only."""

from __future__ import annotations

from collections.abc import Sequence


def micro_batches(lengths: Sequence[int], budget_tokens: int, *, padded: bool = False) -> list[list[int]]:
    """Cut samples into micro-batches, longest first; a sample longer than the budget has one to itself.

    Args:
        lengths: prompt and response tokens of each sample.
        budget_tokens: tokens of a micro-batch, with padding when `padded`.
        padded: whether rows are padded to the longest of their micro-batch.

    Returns:
        Indices into `lengths`; each occurs once.
    """
    out: list[list[int]] = []
    used = longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        cost = longest * (len(out[-1]) + 1) if out and padded else used + lengths[index]
        if not out or cost > budget_tokens:
            out.append([])
            used, longest = 0, lengths[index]
        out[-1].append(index)
        used += lengths[index]
    return out


def mini_batches(group_of_sample: Sequence[int], num_parts: int) -> list[list[int]]:
    """Cut samples into at most `num_parts` runs of whole groups, in order, as even in groups as can be.

    Returns:
        Indices into `group_of_sample` for each part; no part is empty.
    """
    groups = sorted(set(group_of_sample))
    parts = min(num_parts, len(groups))
    part_of = {group: rank * parts // len(groups) for rank, group in enumerate(groups)}
    out: list[list[int]] = [[] for _ in range(parts)]
    for index, group in enumerate(group_of_sample):
        out[part_of[group]].append(index)
    return out
