"""Micro-batches: whole samples, or whole groups, under a token budget, in an order that depends on lengths only."""

from __future__ import annotations

from collections.abc import Sequence


def micro_batches(
    lengths: Sequence[int],
    budget_tokens: int,
    *,
    padded: bool = False,
    groups: Sequence[int] | None = None,
    whole: bool = False,
) -> list[list[int]]:
    """Cut samples into micro-batches, longest first; what is longer than the budget has one to itself.

    Args:
        lengths: prompt and response tokens of each sample.
        budget_tokens: tokens of a micro-batch, with padding when `padded`.
        padded: whether rows are padded to the longest of their micro-batch.
        groups: a number for each sample; those with equal numbers come one after the other, so that few prompts are in two
            micro-batches. None: samples come by length alone.
        whole: samples of a group are never in two micro-batches.

    Returns:
        Indices into `lengths`; each occurs once.
    """
    members: dict[int, list[int]] = {}
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        members.setdefault(index if groups is None else groups[index], []).append(index)
    units = members.values() if whole else [[index] for unit in members.values() for index in unit]
    out: list[list[int]] = []
    used = longest = 0
    for unit in units:
        tokens, longer = sum(lengths[index] for index in unit), max(longest, lengths[unit[0]])
        cost = longer * (len(out[-1]) + len(unit)) if out and padded else used + tokens
        if not out or cost > budget_tokens:
            out.append([])
            used, longer = 0, lengths[unit[0]]
        out[-1] += unit
        used, longest = used + tokens, longer
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
