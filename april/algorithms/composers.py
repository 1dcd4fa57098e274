"""Composers: groups of a batch -> groups that train. No torch.

A member that a composer leaves out keeps its place with a failure that says so: it gives no tokens and counts in no
statistic of its group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from april.core.errors import DataError
from april.core.group import Failure, Group, Reward
from april.core.random import stream_key


def left_out(group: Group, kept: Collection[int], reason: str, values: Mapping[int, float] | None = None) -> Group:
    """The group with only some of its rewarded members.

    Args:
        group: complete.
        kept: indices of members that stay.
        reason: of the others' failure.
        values: new rewards of members that stay.
    """
    outcomes = list(group.outcomes)
    for index, outcome in enumerate(outcomes):
        if not isinstance(outcome, Reward):
            continue
        if index not in kept:
            outcomes[index] = Failure(reason)
        elif values is not None and index in values:
            outcomes[index] = dataclasses.replace(outcome, value=values[index])
    return Group(group.id, group.samples, tuple(outcomes))


def rewarded_indices(group: Group) -> list[tuple[int, Reward]]:
    """The members that have a reward, with their indices."""
    return [(index, outcome) for index, outcome in enumerate(group.outcomes) if isinstance(outcome, Reward)]


def share_of(group: Group, fraction: float) -> int:
    """A share of the group's members, failed ones included; half to even, at least one."""
    return max(1, round(fraction * len(group.samples)))


def resample_on_correct(
    groups: Sequence[Group],
    *,
    keep_fraction: float = 0.5,
    penalties: tuple[str, ...] = ("tool_error", "answer_format"),
    min_wrong: int = 2,
    min_right: int = 2,
    seed: int = 0,
) -> tuple[Group, ...]:
    """Keep a share of each group: right members with the fewest slips, wrong ones at random.

    A group whose failures leave it with no more than this share stays whole.

    Source: GRPO-RoC, rStar2-Agent (arXiv 2508.20722), section 3.2. The release takes wrong members in the order of arrival;
    under early stopping that prefers short ones, so here they are drawn, the same ones whenever the batch is composed.

    Args:
        groups: of the batch, oversampled.
        keep_fraction: share of a group's members that stays.
        penalties: reward parts whose sum orders the right members; a part that is missing counts 0.
        min_wrong, min_right: members of each kind that stay when there are as many.
        seed: of the draw.
    """
    out = []
    for group in groups:
        members, keep = rewarded_indices(group), share_of(group, keep_fraction)
        if len(members) <= keep:
            out.append(group)
            continue
        order = np.random.Generator(np.random.PCG64(stream_key(seed, "resample", group.id))).permutation(len(members)).tolist()
        chosen = roc_select(
            [reward.value for _, reward in members],
            [sum(reward.parts.get(name, 0.0) for name in penalties) for _, reward in members],
            keep,
            min_wrong=min_wrong,
            min_right=min_right,
            order=order,
        )
        out.append(left_out(group, {members[position][0] for position in chosen}, "left out by resample_on_correct"))
    return tuple(out)


def roc_select(
    rewards: Sequence[float],
    penalties: Sequence[float],
    keep: int,
    *,
    min_wrong: int,
    min_right: int,
    order: Sequence[int],
) -> list[int]:
    """Positions (ascending) of `keep` samples: both kinds in proportion, right ones by penalty, wrong ones in `order`.

    Source: rStar2-Agent release, resample of correct; numbers round half to even. What rounding leaves open is filled with
    right samples, then with wrong ones.
    """
    wrong = [index for index in order if rewards[index] <= 0]
    right = sorted((index for index in range(len(rewards)) if rewards[index] > 0), key=lambda index: penalties[index])
    num_wrong = round(len(wrong) * keep / len(rewards))
    num_wrong = max(num_wrong, min(min_wrong, len(wrong)))
    num_wrong = min(num_wrong, keep - min(min_right, len(right)))
    num_right = min(keep - num_wrong, len(right))
    return sorted(right[:num_right] + wrong[: keep - num_right])


def max_variance(groups: Sequence[Group], *, keep_fraction: float = 0.25) -> tuple[Group, ...]:
    """Keep the share of each group whose rewards vary the most together, at least two members.

    Source: PODS (arXiv 2504.13818), max-variance down-sampling.

    Args:
        groups: of the batch, oversampled.
        keep_fraction: share of a group's members that stays.
    """
    out = []
    for group in groups:
        members = rewarded_indices(group)
        keep = max(share_of(group, keep_fraction), 2)
        chosen = widest([reward.value for _, reward in members], min(keep, len(members)))
        out.append(left_out(group, {members[position][0] for position in chosen}, "left out by max_variance"))
    return tuple(out)


def widest(values: Sequence[float], count: int) -> list[int]:
    """Positions (ascending) of the `count` values of largest variance: some of the smallest and some of the largest.

    O(n log n). Among equal choices the one with the most small values; equal values go in their order.

    Source: D3S (arXiv 2509.22115), sample level; PODS (arXiv 2504.13818), theorem 1.

    Raises:
        DataError: for a count that is negative or above the number of values.
    """
    if not 0 <= count <= len(values):
        raise DataError("more values are wanted than there are", got=count, expected=f"0 to {len(values)}")
    if count == 0:
        return []
    order = np.argsort(np.asarray(values, np.float64), kind="stable")
    ordered = np.asarray(values, np.float64)[order]
    ordered = ordered - ordered.mean()  # variances do not change, and cancel less
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    squares = np.concatenate([[0.0], np.cumsum(ordered**2)])
    low = np.arange(count, -1, -1)  # how many of the smallest; the rest are the largest
    high = len(ordered) - (count - low)
    total = sums[low] + sums[-1] - sums[high]
    variance = (squares[low] + squares[-1] - squares[high]) / count - (total / count) ** 2
    best = int(np.argmax(variance > variance.max() - 1e-12 * max(variance.max(), 1e-12)))
    return sorted([*order[: low[best]].tolist(), *order[high[best] :].tolist()])


def switch_pairs(groups: Sequence[Group], *, mode: str = "reasoning") -> tuple[Group, ...]:
    """Pairs that teach when to reason: one direct and one reasoned answer of each group, rewarded 1 and 0.

    Of each mode the first solved member stands for it, else its first one. Groups that lack a mode, or solve the problem in
    neither, are left out of the batch.

    Source: EconProver (arXiv 2509.12603), preference training of the switch; the rule is reconstructed.

    Args:
        groups: of the batch.
        mode: reward part that is above 0.5 where a member reasoned, at most 0.5 where it answered directly.
    """
    out = []
    for group in groups:
        pair = {}
        for reasoned in (False, True):
            mine = [(i, r) for i, r in rewarded_indices(group) if mode in r.parts and (r.parts[mode] > 0.5) == reasoned]
            solved = [member for member in mine if member[1].correct]
            if mine:
                pair[reasoned] = (solved or mine)[0]
        if len(pair) < 2:
            continue
        chosen = preferred(pair[False][1].correct, pair[True][1].correct)
        if chosen is not None:
            values = {pair[False][0]: float(not chosen), pair[True][0]: float(chosen)}
            out.append(left_out(group, values.keys(), "left out by switch_pairs", values))
    return tuple(out)


def preferred(direct_solves: bool, reasoned_solves: bool) -> bool | None:
    """Whether reasoning is preferred: not where a direct answer is right, else where only reasoning is; None: no preference."""
    return False if direct_solves else True if reasoned_solves else None
