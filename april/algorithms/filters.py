"""Filters: which complete groups train. No torch: the driver asks them while rollouts run."""

from __future__ import annotations

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
