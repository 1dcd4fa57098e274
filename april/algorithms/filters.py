"""Filters: which complete groups train. No torch: the driver asks them while rollouts run."""

from __future__ import annotations

import statistics
from typing import Literal

from april.algorithms.atoms import Atom, function_of
from april.core.group import Group


def zero_variance(group: Group, *, by: Literal["correct", "reward"] = "correct") -> str | None:
    """Drop a group whose rewarded members all agree, or that has fewer than two.

    Source: DAPO (Yu et al. 2025, arXiv 2503.14476), section 3.2: keep a group iff 0 < #correct < G. The test is on
    "correct" and not on a shaped reward, which differs between answers that are all right.

    Returns:
        The reason for dropping it, or None.
    """
    rewards = [reward for _, reward in group.rewarded]
    if len(rewards) < 2:
        return "fewer than two rewarded members"
    seen = {reward.correct if by == "correct" else reward.value for reward in rewards}
    if len(seen) > 1:
        return None
    if by == "correct":
        return "all correct" if seen == {True} else "none correct"
    return "equal rewards"


def first_reason(filters: tuple[Atom, ...], group: Group) -> str | None:
    """The reason of the first filter of the chain that drops the group; None when it trains."""
    for atom in filters:
        reason: str | None = function_of("filter", atom)(group, **atom.options())
        if reason is not None:
            return reason
    return None


def accuracy_range(group: Group, *, low_fraction: float = 0.2, high_fraction: float = 0.8) -> str | None:
    """Drop a group whose share of solved members lies outside a range, or that has no rewarded member.

    Source: PRIME (arXiv 2502.01456), online prompt filtering with the range 0.2 to 0.8.

    Returns:
        The reason for dropping it, or None.
    """
    solved = [reward.correct for _, reward in group.rewarded]
    if not solved:
        return "no rewarded members"
    fraction = sum(solved) / len(solved)
    if fraction < low_fraction:
        return "too few correct"
    return "too many correct" if fraction > high_fraction else None


def reward_spread(group: Group, *, min_std: float = 0.1, part: str | None = None) -> str | None:
    """Drop a group whose rewards differ too little: their standard deviation (n) is not above `min_std`.

    Source: UI-S1 (arXiv 2509.11543), dynamic sampling by the standard deviation of the advantage.

    Args:
        group: complete.
        min_std: a group trains above it.
        part: looks at this reward part instead; members without it do not count.

    Returns:
        The reason for dropping it, or None.
    """
    rewards = [reward for _, reward in group.rewarded]
    values = [reward.value if part is None else reward.parts[part] for reward in rewards if part is None or part in reward.parts]
    if len(values) < 2:
        return "fewer than two rewarded members"
    return None if statistics.pstdev(values) > min_std else "rewards too close"
