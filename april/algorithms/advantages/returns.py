"""Credit from what comes after a token: rewards to go, and generalised advantage estimation with a value model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from april.algorithms.advantages.statistics import decayed_sums
from april.algorithms.columns import TokenBatch
from april.core.errors import DataError


@dataclass(frozen=True)
class Actions:
    """The R masked-in tokens of a batch: what the policy did. Tokens of environments are no steps of their own.

    Attributes:
        token: int64 (R,), row of each among the N tokens.
        sample: int64 (R,).
        last: bool (R,), the last one of its sample.
        longest: most actions of one sample.
    """

    token: Tensor
    sample: Tensor
    last: Tensor
    longest: int

    @staticmethod
    def of(tokens: TokenBatch) -> Actions:
        """The actions of a batch."""
        token = tokens["mask"].nonzero().squeeze(1)
        sample = tokens.layout.sample_of_token[token]
        last = torch.ones_like(sample, dtype=torch.bool)
        last[:-1] = sample[1:] != sample[:-1]
        longest = int(torch.bincount(sample).max()) if len(sample) else 0
        return Actions(token, sample, last, longest)

    def rewards(self, tokens: TokenBatch, *, unfinished: bool = True) -> Tensor:
        """(R,): "token_reward" where the batch has it, plus the sample's reward at its last action.

        What lies on a token that is no action counts for the action before it.

        Args:
            tokens: needs "reward".
            unfinished: whether samples that ended at their budget have their reward, too; else needs "finished".
        """
        reward = tokens["reward"][self.token]
        keep = self.last if unfinished else self.last & tokens["finished"][self.token]
        rewards = torch.where(keep, reward, torch.zeros_like(reward))
        if "token_reward" not in tokens or len(self.token) == 0:
            return rewards
        before = tokens["mask"].cumsum(0) - 1
        inside = before >= 0
        before = before.clamp(min=0)
        own = inside & (self.sample[before] == tokens.layout.sample_of_token)
        extra = torch.where(own, tokens["token_reward"], torch.zeros_like(tokens["token_reward"]))
        return rewards.index_add(0, before, extra)

    def spread(self, values: Tensor, tokens: TokenBatch) -> Tensor:
        """(R,) -> (N,); 0 elsewhere."""
        return values.new_zeros(tokens.layout.num_tokens).index_copy(0, self.token, values)


def reward_to_go(tokens: TokenBatch, *, gamma: float = 1.0, baseline: str | None = None) -> Tensor:
    """A_t = sum over s >= t of gamma^(s - t) * reward_s, minus a baseline that the data bring.

    Source: REINFORCE (Williams 1992); greedy baseline: ReMax (Li et al. 2023, arXiv 2310.10505), algorithm 1; anchor of a
    reference policy: PVPO (arXiv 2508.21104).

    Args:
        tokens: needs "reward" and "mask"; takes "token_reward" where it is there, and the column `baseline`.
        gamma: discount from token to token.
        baseline: column to subtract, such as "baseline" or "item.baseline".

    Returns:
        (N,); 0 outside the mask.

    Raises:
        DataError: a sample has no number in the column `baseline`.
    """
    actions = Actions.of(tokens)
    decay = gamma * (~actions.last).to(tokens["reward"].dtype)
    returns = decayed_sums(actions.rewards(tokens), decay, actions.longest)
    if baseline is not None:
        known = tokens[baseline][actions.token]
        if bool(known.isnan().any()):
            raise DataError(
                "samples have no baseline",
                where=baseline,
                got=f"{len(torch.unique(actions.sample[known.isnan()]))} of {tokens.layout.num_samples} samples without one",
                expected="a number for each prompt",
                hint="let every item bring it, or take algorithm.advantage.baseline away",
            )
        returns = returns - known
    return actions.spread(returns, tokens)


def gae(
    tokens: TokenBatch,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    value_lam: float | None = None,
    unfinished: Literal["reward", "hold"] = "reward",
) -> dict[str, Tensor]:
    """d_t = reward_t + gamma V_(t + 1) - V_t;  A_t = d_t + gamma lam A_(t + 1);  return_t = A_t + V_t.

    V after the last action is 0. With unfinished = "hold" it is V of the last action where a sample ended at its budget, whose
    reward then does not count: nobody knows how it would have ended.

    Source: GAE (Schulman et al. 2015, arXiv 1506.02438), equation 16; held value: T-PPO (arXiv 2506.15050), EGAE.

    Args:
        tokens: needs "reward", "value" and "mask", with "hold" also "finished"; takes "token_reward" where it is there.
        gamma: discount from token to token.
        lam: 0 trusts the value model, 1 the rewards.
        value_lam: lam of "return", what the value model is trained towards; None takes `lam`.
        unfinished: what follows the last action of a sample that ended at its budget.

    Returns:
        "advantage" and "return", (N,) each; 0 outside the mask.
    """
    actions = Actions.of(tokens)
    value = tokens["value"][actions.token]
    following = torch.cat([value[1:], value[:1]])
    end = torch.zeros_like(value)
    if unfinished == "hold":
        end = torch.where(tokens["finished"][actions.token], end, value)
    following = torch.where(actions.last, end, following)
    delta = actions.rewards(tokens, unfinished=unfinished == "reward") + gamma * following - value
    decay = gamma * (~actions.last).to(value.dtype)
    advantage = decayed_sums(delta, lam * decay, actions.longest)
    same = value_lam is None or value_lam == lam
    towards = advantage if same else decayed_sums(delta, float(value_lam or 0.0) * decay, actions.longest)
    return {"advantage": actions.spread(advantage, tokens), "return": actions.spread(towards + value, tokens)}
