"""What the numbers of a step say about the recipe: groups without signal, and other signs of trouble. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

MAX_GROUP_SIZE = 64


class Note(NamedTuple):
    """A sentence for the user; `kind` says what it is about, so that it is not repeated at every step."""

    kind: str
    text: str


def expected_no_signal(num_correct: Sequence[int], sizes: Sequence[int], group_size: int) -> float:
    """Share of groups of `group_size` whose members would all be right or all be wrong, at the pass rates of these groups.

    The pass rates of prompts are taken to follow a beta distribution with the mean and the spread of the groups seen
    (method of moments on pairs of members, so that the chance within a group is not taken for a difference between
    prompts). With p ~ Beta(a, b) the share is E[p^G] + E[(1 - p)^G].

    Args:
        num_correct, sizes: right and all members of each group; groups of fewer than two tell nothing.
        group_size: G.

    Returns:
        From 0 to 1; nan when there is no group of two.
    """
    pairs = [(right, size) for right, size in zip(num_correct, sizes, strict=True) if size > 1]
    if not pairs:
        return math.nan
    mean = sum(right / size for right, size in pairs) / len(pairs)
    both = sum(right * (right - 1) / (size * (size - 1)) for right, size in pairs) / len(pairs)
    whole = mean * (1 - mean)
    if whole <= 0:
        return 1.0
    spread = min(max((both - mean**2) / whole, 0.0), 1.0)  # 0: all prompts alike; 1: each always right or always wrong
    if spread >= 1 - 1e-9:
        return 1.0
    if spread <= 1e-9:
        return mean**group_size + (1 - mean) ** group_size
    a, b = mean * (1 / spread - 1), (1 - mean) * (1 / spread - 1)
    return _rising(a, a + b, group_size) + _rising(b, a + b, group_size)


def _rising(a: float, total: float, count: int) -> float:
    """E[p^count] for p ~ Beta(a, total - a)."""
    return math.prod((a + i) / (total + i) for i in range(count))


def better_group_size(num_correct: Sequence[int], sizes: Sequence[int]) -> tuple[int, float] | None:
    """The smallest doubling of the group size that leaves at most half as many groups without signal.

    Returns:
        That size and the expected share without signal; None where no size up to 64 does.
    """
    size = max(sizes, default=0)
    present = expected_no_signal(num_correct, sizes, size) if size > 1 else math.nan
    candidate = 2 * size
    while not math.isnan(present) and candidate <= MAX_GROUP_SIZE:
        share = expected_no_signal(num_correct, sizes, candidate)
        if share <= present / 2:
            return candidate, share
        candidate *= 2
    return None


def notes(
    row: Mapping[str, float],
    *,
    clips_samples: bool = False,
    many_silent: float = 0.5,
    low_ess: float = 0.5,
    high_clip: float = 0.3,
) -> list[Note]:
    """What to tell about a step.

    Args:
        row: its metrics.
        clips_samples: whether bounds take or leave whole samples: then many clipped tokens are usual (GSPO).
        many_silent: share of groups without signal from which it is told.
        low_ess: effective sample share of the weights below which it is told.
        high_clip: share of clipped tokens above which it is told.
    """
    out = []
    silent, groups = row.get("no_signal_groups", math.nan), row.get("num_groups", math.nan)
    if groups and silent / groups >= many_silent:
        out.append(Note("no_signal", _silent(row, round(silent), round(groups))))
    ess, clipped = row.get("weight_ess_fraction", math.nan), row.get("clip_fraction", math.nan)
    if ess < low_ess:
        out.append(
            Note(
                "weight_ess", f"the weights' effective sample share is {ess:.0%}: the data is far from the policy; allow less lag"
            )
        )
    if clipped > high_clip and not clips_samples:
        out.append(
            Note("clip", f"{clipped:.0%} of the tokens are clipped: lower training.lr, or take fewer optimiser steps a batch")
        )
    return out


def _silent(row: Mapping[str, float], silent: int, groups: int) -> str:
    size = round(row.get("group_size", 0))
    text = f"{silent} of {groups} groups carry no signal at this pass rate with group size {size}"
    if not math.isnan(row.get("advised_group_size", math.nan)):
        left = round(row["advised_no_signal_fraction"] * groups)
        return f"{text}; {round(row['advised_group_size'])} would leave {left}"
    return f"{text}; larger groups would not help: the prompts are too easy or too hard"
