"""Group-relative credit: a sample against its siblings. Failed members are not in the batch, so they do not count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from april.algorithms.advantages.statistics import Scale, constant, moments, normalised
from april.algorithms.columns import TokenBatch
from april.core.errors import DataError


def group_relative(
    tokens: TokenBatch,
    *,
    std: Scale = "sample",
    eps: float = 1e-6,
    leave_one_out: bool = False,
    singleton: Literal["zero", "raw"] = "zero",
) -> Tensor:
    """A = (R - mean of the group) / (std of the group + eps); exactly 0 where all members agree.

    Source: GRPO (Shao et al. 2024, arXiv 2402.03300), section 4.1.1; without std: Dr.GRPO (Liu et al. 2025,
    arXiv 2503.20783); std of the batch: Liu et al. 2025 (arXiv 2508.08221); of the siblings: NeMo-RL 0.7.

    Args:
        tokens: needs "reward", constant within a sample.
        std: divide by the standard deviation of the group with n - 1 ("sample") or with n ("population"), of the siblings
            alone, where they differ ("siblings"), of all samples of the batch ("batch"), or by nothing ("none").
        eps: added to the standard deviation.
        leave_one_out: subtract the mean of the siblings, not of the whole group.
        singleton: what a sample without siblings gets: 0, or its reward.

    Returns:
        (N,).
    """
    layout = tokens.layout
    reward = layout.first(tokens["reward"])
    options = {"std": std, "eps": eps, "leave_one_out": leave_one_out, "singleton": singleton}
    return layout.spread(normalised(reward, layout.group_of_sample, layout.num_groups, **options))  # type: ignore[arg-type]


def leave_one_out(tokens: TokenBatch, *, singleton: Literal["zero", "raw"] = "zero") -> Tensor:
    """A = R - mean of the siblings = n / (n - 1) * (R - mean of the group).

    Source: RLOO (Ahmadian et al. 2024, arXiv 2402.14740), equation 5.

    Args:
        tokens: needs "reward".
        singleton: what a sample without siblings gets: 0, or its reward.

    Returns:
        (N,).
    """
    return group_relative(tokens, std="none", leave_one_out=True, singleton=singleton)


def optimal_baseline(tokens: TokenBatch, *, singleton: Literal["zero", "raw"] = "zero") -> Tensor:
    """A = R - sum(length * R) / sum(length): the variance-optimal baseline if the gradient's square grows with the length.

    Source: OPO (Hao et al. 2025, arXiv 2505.23585).

    Args:
        tokens: needs "reward" and "mask"; the length is the number of masked-in tokens.
        singleton: what a sample without siblings gets: 0, or its reward.

    Returns:
        (N,).
    """
    layout = tokens.layout
    reward = layout.first(tokens["reward"])
    lengths = layout.sum(tokens["mask"].to(reward.dtype))
    total = layout.group_sum(lengths).clamp(min=1)
    advantage = reward - (layout.group_sum(lengths * reward) / total)[layout.group_of_sample]
    mean, squares, count = moments(reward, layout.group_of_sample, layout.num_groups)
    advantage = torch.where(constant(mean, squares, count), torch.zeros_like(advantage), advantage)
    alone = reward if singleton == "raw" else torch.zeros_like(reward)
    return layout.spread(torch.where(count > 1, advantage, alone))


def maximum_likelihood(tokens: TokenBatch, *, eps: float = 1e-6) -> Tensor:
    """A = (R - mean) / (mean + eps); 0 in a group whose mean is not above eps, or whose members agree.

    Source: MaxRL (Tajwar et al. 2026, arXiv 2602.02710): with rewards of 0 and 1 it ascends log P(correct), expanded to as
    many terms as the group has members.

    Args:
        tokens: needs "reward", at least 0.
        eps: added to the mean.

    Returns:
        (N,).

    Raises:
        DataError: a reward is below 0, where the mean says nothing of how rare success is.
    """
    layout = tokens.layout
    reward = layout.first(tokens["reward"])
    if bool((reward < 0).any()):
        raise DataError(
            "the mean of the rewards is no rate of success",
            where="algorithm.advantage 'maximum_likelihood', algorithm.reward",
            got=f"a reward of {float(reward.min()):g}",
            expected="rewards of at least 0",
            hint="leave out reward transforms that punish, or give wrong answers 0",
        )
    mean, squares, count = moments(reward, layout.group_of_sample, layout.num_groups)
    dead = constant(mean, squares, count) | (count < 2) | (mean <= eps)
    return layout.spread(torch.where(dead, torch.zeros_like(reward), (reward - mean) / (mean.clamp(min=eps) + eps)))


def pass_at_k(tokens: TokenBatch, *, k: int = 4, eps: float = 1e-6) -> Tensor:
    """Credit of a sample for the best of k draws from its group, averaged over all subsets in closed form.

    With n members, c of them correct, and p = 1 - C(n - c, k) / C(n, k):
    A = (1 - p) / s where correct, (1 - p - C(n - c - 1, k - 1) / C(n - 1, k - 1)) / s elsewhere, s = sqrt(p (1 - p)) + eps.

    Source: Chen et al. 2025 (arXiv 2508.10751), analytical derivation.

    Args:
        tokens: needs "correct".
        k: draws.
        eps: added to the standard deviation.

    Returns:
        (N,); 0 in groups of fewer than k, and where every or no subset of k has a correct member.
    """
    layout = tokens.layout
    correct = layout.first(tokens["correct"])
    members = layout.group_sum(torch.ones_like(correct))
    wrong = members - layout.group_sum(correct)
    fail = _none_of(wrong, members, k)[layout.group_of_sample]
    fail_beside = _none_of(wrong - 1, members - 1, k - 1)[layout.group_of_sample]
    scale = ((1 - fail) * fail).sqrt() + eps
    advantage = torch.where(correct > 0, fail, fail - fail_beside) / scale
    dead = (members[layout.group_of_sample] < k) | (fail <= 0) | (fail >= 1)
    return layout.spread(torch.where(dead, torch.zeros_like(advantage), advantage))


def _none_of(wrong: Tensor, members: Tensor, k: int) -> Tensor:
    """C(wrong, k) / C(members, k): the probability that k draws are all wrong."""
    fail = torch.ones_like(wrong)
    for draw in range(k):
        fail = fail * (wrong - draw).clamp(min=0) / (members - draw).clamp(min=1)
    return fail


def decoupled(tokens: TokenBatch, *, parts: Mapping[str, float], std: Scale = "sample", eps: float = 1e-6) -> Tensor:
    """A = sum over reward parts of weight * (part - mean of the group) / (std of the group + eps).

    Source: GDPO (Liu et al. 2026, arXiv 2601.05242); followed by `whiten` there.

    Args:
        tokens: needs "part.<name>" for each name; a sample that lacks a part counts in none of its statistics.
        parts: weight of each part of the reward by name; 0 takes one away.
        std, eps: as for `group_relative`.

    Returns:
        (N,).

    Raises:
        DataError: no sample of the batch has one of the parts.
    """
    layout = tokens.layout
    credits = []
    for name, weight in _named(parts).items():
        part = _part(tokens, name)
        there = (~part.isnan()).nonzero().squeeze(1)
        credit = normalised(part[there], layout.group_of_sample[there], layout.num_groups, std=std, eps=eps)
        credits.append(torch.zeros_like(part).index_add(0, there, weight * credit))
    return layout.spread(torch.stack(credits).sum(0))


def _named(weights: Mapping[str, float]) -> dict[str, float]:
    """The weights that are not 0: what a preset names can be taken away with 0."""
    return {name: weight for name, weight in weights.items() if weight != 0}


def _part(tokens: TokenBatch, name: str) -> Tensor:
    """(S,): a named part of the rewards; nan where a sample has none."""
    part = tokens.layout.first(tokens[f"part.{name}"])
    if len(part) and bool(part.isnan().all()):
        raise DataError(
            "no reward has a part of this name",
            where=f"part.{name}",
            got=f"none of {len(part)} samples",
            expected="a named part of the reward",
            hint=f"name parts that the reward reports, and take others away with {name} = 0",
        )
    return part


def rubric(tokens: TokenBatch, *, items: Mapping[str, float], std: Scale = "none", eps: float = 1e-6) -> Tensor:
    """Group-relative credit of a rubric whose items weigh by how sure the critic is of them across the group.

    confidence_j = mean over the group; R = sum_j(w_j confidence_j score_j) / sum_j(w_j confidence_j); A = R - mean of the group.

    Source: GRAPE (Patel 2025, arXiv 2509.04501; reconstructed from the abstract; the normalisation is ours).

    Args:
        tokens: needs "part.<item>" and "part.<item>_confidence"; where either is missing its confidence is 0.
        items: weight of each item of the rubric by name; 0 takes one away.
        std, eps: as for `group_relative`.

    Returns:
        (N,).

    Raises:
        DataError: no sample of the batch has one of the items, or its confidence.
    """
    layout = tokens.layout
    _, reward = rubric_rewards(tokens, items)
    return layout.spread(normalised(reward, layout.group_of_sample, layout.num_groups, std=std, eps=eps))


def rubric_rewards(tokens: TokenBatch, items: Mapping[str, float]) -> tuple[Tensor, Tensor]:
    """Mean confidence (J, G) in each item, and the reward (S,) that they weigh; see `rubric`."""
    layout, items = tokens.layout, _named(items)
    scores = torch.stack([_part(tokens, name) for name in items])
    sure = torch.stack([_part(tokens, f"{name}_confidence") for name in items])
    absent = scores.isnan() | sure.isnan()
    scores, sure = scores.masked_fill(absent, 0), sure.masked_fill(absent, 0)
    groups, members = layout.group_of_sample, layout.group_sum(torch.ones_like(scores[0]))
    mean = torch.stack([layout.group_sum(row) for row in sure]) / members.clamp(min=1)
    mean = torch.where(mean.sum(0) > 0, mean, torch.ones_like(mean))
    weights = torch.tensor(list(items.values()), dtype=mean.dtype, device=mean.device)[:, None] * mean
    return mean, (weights[:, groups] * scores).sum(0) / weights.sum(0)[groups]


def token_weighted(tokens: TokenBatch, *, eps: float = 1e-6, limit: float = 5.0) -> Tensor:
    """A = (R - m) / (s + eps), with mean m and population std s over the tokens of the group, so that long samples weigh more.

    Where it exceeds the limit, which a single short sample among long ones can cause, the credit is that of GRPO.

    Source: HAPO (arXiv 2509.16591), token-level group average.

    Args:
        tokens: needs "reward" and "mask".
        eps: added to the standard deviation.
        limit: largest absolute credit.

    Returns:
        (N,); 0 outside the mask.
    """
    layout = tokens.layout
    reward, groups = layout.first(tokens["reward"]), layout.group_of_sample
    lengths = layout.sum(tokens["mask"].to(reward.dtype))
    total = layout.group_sum(lengths).clamp(min=1)
    mean = (layout.group_sum(lengths * reward) / total)[groups]
    variance = (layout.group_sum(lengths * (reward - mean).square()) / total)[groups]
    plain, squares, count = moments(reward, groups, layout.num_groups)
    own = (reward - mean) / (variance.sqrt() + eps)
    siblings = normalised(reward, groups, layout.num_groups, std="sample", eps=eps)
    advantage = torch.where(own.abs() >= limit, siblings, own)
    dead = constant(plain, squares, count) | (count < 2)
    spread = layout.spread(torch.where(dead, torch.zeros_like(own), advantage))
    return torch.where(tokens["mask"], spread, torch.zeros_like(spread))
