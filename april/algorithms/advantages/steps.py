"""Credit of single steps: against siblings that were in the same state, or at the same step."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from april.algorithms.advantages.statistics import Scale, decayed_sums, joined, normalised
from april.algorithms.columns import Layout, TokenBatch
from april.algorithms.steps import Steps


def step_rewards(tokens: TokenBatch, steps: Steps) -> Tensor:
    """(R,): "token_reward" of the step's tokens where the batch has it, plus the sample's reward at its last step."""
    reward = tokens.layout.first(tokens["reward"])[steps.sample]
    rewards = torch.where(steps.last, reward, torch.zeros_like(reward))
    return rewards + steps.sum(tokens["token_reward"]) if "token_reward" in tokens else rewards


def step_returns(rewards: Tensor, goes_on: Tensor, gamma: float, longest: int) -> Tensor:
    """g_t = r_t + gamma * g_(t + 1) while it goes on, else r_t; (R,).

    Args:
        rewards: (R,), of each step.
        goes_on: bool (R,), False at the last step of a sample.
        gamma: discount from step to step.
        longest: most steps of one sample.
    """
    return decayed_sums(rewards, gamma * goes_on.to(rewards.dtype), longest)


def episode_rewards(tokens: TokenBatch) -> Tensor:
    """(S,): the sample's reward plus its "token_reward" where the batch has it."""
    reward = tokens.layout.first(tokens["reward"])
    return reward + tokens.layout.sum(tokens["token_reward"]) if "token_reward" in tokens else reward


def anchored(
    tokens: TokenBatch,
    *,
    gamma: float = 0.95,
    omega: float = 1.0,
    std: Scale = "none",
    eps: float = 1e-6,
    delimiter_ids: tuple[int, ...] = (),
) -> Tensor:
    """A = (R - mean of the group) / scale + omega * (g - mean over the group's steps from the same state) / scale.

    Source: GiGPO (Feng et al. 2025, arXiv 2505.10978), episode and step relative advantage; scale 1 or the standard deviation.

    Args:
        tokens: needs "reward", and "turn" and "anchor" or, with delimiters, "token_ids".
        gamma: discount from step to step.
        omega: weight of the credit of steps.
        std: scale of both; samples count once in the first.
        eps: added to the standard deviation.
        delimiter_ids: steps begin at these tokens and start from the text of the step before; empty takes turns.

    Returns:
        (N,). A step from a state that no other step starts from has only the credit of its sample.
    """
    layout = tokens.layout
    steps = Steps.of(tokens, delimiter_ids)
    episode = normalised(episode_rewards(tokens), layout.group_of_sample, layout.num_groups, std=std, eps=eps)
    returns = step_returns(step_rewards(tokens, steps), ~steps.last, gamma, steps.longest)
    ids, num = joined(layout.group_of_sample[steps.sample], steps.anchor)
    credit = episode[steps.sample] + omega * normalised(returns, ids, num, std=std, eps=eps)
    return credit[steps.step_of_token]


def same_step(
    tokens: TokenBatch,
    *,
    gamma: float = 0.5,
    episode_weight: float = 1.0,
    step_weight: float = 1.0,
    eps: float = 1e-6,
    match: str | None = None,
    count_episodes: Literal["each_step", "once"] = "each_step",
    delimiter_ids: tuple[int, ...] = (),
) -> Tensor:
    """A = w_e * z(R in the group) + w_s * z(g among the group's steps of the same index), z = (x - mean) / (std + eps).

    Source: UI-S1 (Lu et al. 2025, arXiv 2509.11543), advantages of steps and episodes.

    Args:
        tokens: needs "reward", the column `match` when given, and "turn" and "anchor" or, with delimiters, "token_ids".
        gamma: discount from step to step.
        episode_weight: w_e.
        step_weight: w_s.
        eps: added to the standard deviation.
        match: bool column that is True in steps that agree with a demonstration; returns do not reach over others.
        count_episodes: whether a sample counts once in the group's statistics or, as published, at each of its steps.
        delimiter_ids: steps begin at these tokens; empty takes turns.

    Returns:
        (N,).
    """
    layout = tokens.layout
    steps = Steps.of(tokens, delimiter_ids)
    goes_on = ~steps.last
    if match is not None:
        begins = torch.searchsorted(steps.step_of_token, torch.arange(len(goes_on), device=goes_on.device))
        goes_on = goes_on & tokens[match].bool()[begins]
    returns = step_returns(step_rewards(tokens, steps), goes_on, gamma, steps.longest)
    episode = episode_rewards(tokens)
    once = count_episodes == "once"
    relative = episode_credit(episode, steps, layout, once=once, eps=eps)
    credit = episode_weight * relative + step_weight * index_credit(returns, steps, layout, eps=eps)
    return credit[steps.step_of_token]


def episode_credit(episode: Tensor, steps: Steps, layout: Layout, *, once: bool = False, eps: float = 1e-6) -> Tensor:
    """(R,): z of each sample's reward (S,) in its group, where samples count once or at each of their steps."""
    groups, num = layout.group_of_sample, layout.num_groups
    if once:
        return normalised(episode, groups, num, std="sample", eps=eps)[steps.sample]
    return normalised(episode[steps.sample], groups[steps.sample], num, std="sample", eps=eps)


def index_credit(returns: Tensor, steps: Steps, layout: Layout, *, eps: float = 1e-6) -> Tensor:
    """(R,): z of each step's return (R,) among the group's steps of the same index."""
    ids, num = joined(layout.group_of_sample[steps.sample], steps.index)
    return normalised(returns, ids, num, std="sample", eps=eps)
