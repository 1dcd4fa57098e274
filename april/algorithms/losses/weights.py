"""Corrections from the policy that sampled to the proximal policy, and masks. Weights carry no gradient.

w = exp(proximal - behaviour) is 1 for a fresh token of an engine that agrees with the trainer; stale tokens and other
numerics move it. Denominators keep the tokens whose weight is 0, unless the weight says otherwise.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from april.algorithms.columns import TokenBatch
from april.algorithms.losses.ratio import LIMIT
from april.algorithms.prefix_tree import mixed, positions
from april.algorithms.steps import responses

Level = Literal["token", "sequence", "sequence_mean"]


def log_weight(tokens: TokenBatch) -> Tensor:
    """(N,): proximal - behaviour where the policy sampled the token, else 0."""
    difference = (tokens["proximal"] - tokens["behaviour"]).detach()
    return torch.where(tokens["mask"], difference, torch.zeros_like(difference))


def at_level(values: Tensor, tokens: TokenBatch, level: Level) -> Tensor:
    """(N,): each token's own value, the sum over its sample (of a log-weight: the product), or the mean."""
    if level == "token":
        return values
    layout, mask = tokens.layout, tokens["mask"]
    return layout.spread(layout.mean(values, mask) if level == "sequence_mean" else layout.sum(values))


def _weight(tokens: TokenBatch, level: Level) -> Tensor:
    return at_level(log_weight(tokens), tokens, level).clamp(-LIMIT, LIMIT).exp()


def truncated(tokens: TokenBatch, *, cap: float = 2.0, low: float = 0.0, level: Level = "token") -> Tensor:
    """Truncated importance sampling: w clamped to [low, cap], of the token, of the whole sample, or its geometric mean.

    Source: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"; decoupled
    objective: AReaL (Fu et al. 2025, arXiv 2505.24298), section 5.2.

    Returns:
        (N,).
    """
    return _weight(tokens, level).clamp(low, cap)


def truncated_normalised(tokens: TokenBatch, *, cap: float = 2.0, low: float = 0.0, level: Level = "token") -> Tensor:
    """Truncated weights over their mean: the size of the step does not depend on how stale the batch is.

    Source: self-normalised importance sampling, as in verl's rollout correction; the mean is over all tokens with mask.

    Args:
        tokens: everything that one optimiser step trains.
    """
    weight = truncated(tokens, cap=cap, low=low, level=level)
    mask = tokens["mask"]
    mean = torch.where(mask, weight, torch.zeros_like(weight)).sum() / mask.sum().clamp(min=1)
    return weight / mean.clamp(min=1e-9)


def masked(
    tokens: TokenBatch,
    *,
    low: float = 0.5,
    high: float = 5.0,
    level: Level = "token",
    keep: Literal["token", "compared", "one"] = "token",
) -> Tensor:
    """Weights outside [low, high] drop to 0; compared is w of the token, of the whole sample, or its geometric mean.

    Source: IcePop (Ling team 2025, arXiv 2510.18855), section on the training-inference gap; on samples: masked
    importance sampling (Liu et al. 2025, "When speed kills stability").

    Args:
        keep: what a kept token weighs: its own w, the w that was compared, or 1.

    Returns:
        (N,).
    """
    compared = _weight(tokens, level)
    weight = compared if keep == "compared" else _weight(tokens, "token") if keep == "token" else torch.ones_like(compared)
    return torch.where((compared >= low) & (compared <= high), weight, torch.zeros_like(weight))


def reject(
    tokens: TokenBatch,
    *,
    statistic: Literal["k1", "k2", "k3"] = "k1",
    level: Literal["token", "sequence", "sequence_mean", "sequence_max"] = "token",
    low: float = 0.5,
    high: float = 2.0,
) -> Tensor:
    """1 where a divergence of the sampler from the proximal policy is inside its bounds, else 0.

    With d = behaviour - proximal: k1 is exp(d) = 1 / w, bounded on both sides; k2 = d^2 / 2 and k3 = exp(-d) + d - 1 are
    never negative and bounded above only. Source: rejection sampling of verl's rollout correction.

    Args:
        level: of the token, or the sum, mean or largest over its sample (k1: of |d|).
    """
    d = -log_weight(tokens)
    value = {"k1": d, "k2": d.square() / 2, "k3": (-d).clamp(-LIMIT, LIMIT).exp() + d - 1}[statistic]
    if level == "sequence_max":
        layout = tokens.layout
        largest = value.new_zeros(layout.num_samples).scatter_reduce(0, layout.sample_of_token, value.abs(), "amax")
        value = layout.spread(largest)
    else:
        value = at_level(value, tokens, level)
    value = value.clamp(-LIMIT, LIMIT).exp() if statistic == "k1" else value
    return ((value <= high) & ((value >= low) | (statistic != "k1"))).to(d.dtype)


def veto(tokens: TokenBatch, *, below: float = 1e-4) -> Tensor:
    """0 for all tokens of a sample that has one with w < below, else 1: one impossible token condemns its sample.

    Source: masked importance sampling (Liu et al. 2025, "When speed kills stability").
    """
    weight = _weight(tokens, "token")
    found = tokens.layout.sum((tokens["mask"] & (weight < below)).to(weight.dtype))
    return tokens.layout.spread((found == 0).to(weight.dtype))


def uncorrected(tokens: TokenBatch) -> Tensor:
    """(N,): 1 everywhere; the plain loss on tokens of whatever age."""
    return torch.ones_like(tokens["advantage"])


def off_policy_sequences(
    tokens: TokenBatch, *, max_divergence: float = 0.1, against: Literal["behaviour", "proximal"] = "behaviour"
) -> Tensor:
    """0 for tokens of negative advantage in samples that the current policy has left, else 1.

    Left: mean of (against - current) over the sample above `max_divergence`, in nats. Source: DeepSeek-V3.2
    (arXiv 2512.02556), off-policy sequence masking, equation 9.
    """
    divergence = mean_divergence(tokens, against)
    dropped = (tokens["advantage"] < 0) & (tokens.layout.spread(divergence) > max_divergence)
    return (~dropped).to(divergence.dtype)


def mean_divergence(tokens: TokenBatch, against: Literal["behaviour", "proximal"]) -> Tensor:
    """(S,): mean of (against - current) over the tokens with mask, nats."""
    return tokens.layout.mean((tokens[against] - tokens["current"]).detach(), tokens["mask"])


def second_moment(tokens: TokenBatch, *, budget: float = 0.04) -> Tensor:
    """0 for the fewest tokens, by (behaviour - proximal)^2, without which its mean is below `budget`; else 1.

    Source: M2PO (arXiv 2510.01161), the form of AReaL. One token is always kept.

    Args:
        tokens: everything that one optimiser step trains.
        budget: second moment of the log-weights that is allowed.
    """
    mask = tokens["mask"]
    squares = log_weight(tokens).double().square()
    ordered, order = squares[mask].sort(descending=True)
    keep = torch.ones_like(squares)
    if len(ordered) == 0:
        return keep.to(tokens["behaviour"].dtype)
    left = torch.arange(len(ordered), 0, -1, device=ordered.device, dtype=ordered.dtype)
    mean_left = ordered.flip(0).cumsum(0).flip(0) / left
    fine = (mean_left < budget).nonzero().squeeze(-1)
    num_dropped = int(fine[0]) if len(fine) else len(ordered) - 1
    rows = mask.nonzero().squeeze(-1)[order[:num_dropped]]
    keep[rows] = 0.0
    return keep.to(tokens["behaviour"].dtype)


def clip_covariance(
    tokens: TokenBatch, *, fraction: float = 0.0002, low: float = 1.0, high: float = 5.0, seed: int = 0
) -> Tensor:
    """0 for a few random ones of the tokens whose covariance of advantage and log-prob lies between low and high, else 1.

    These tokens bring entropy down most. The draw is a function of the response, the place in it, the update and the seed, so
    that it depends on no order.

    Source: Clip-Cov (arXiv 2505.22617).

    Args:
        tokens: everything that one optimiser step trains.
        fraction: of all tokens with mask; at least one token when any is between the bounds.
        low, high: of (A - mean A) (log p - mean log p).
        seed: which of them.
    """
    covariance = token_covariance(tokens)
    between = (tokens["mask"] & (covariance > low) & (covariance < high)).nonzero().squeeze(-1)
    number = min(max(int(fraction * int(tokens["mask"].sum())), 1), len(between))
    between = between[covariance[between].argsort(stable=True)]  # decides between equal places of equal responses
    keep = torch.ones_like(covariance)
    keep[between[_drawn(tokens, seed)[between].argsort(stable=True)[:number]]] = 0.0
    return keep


def _drawn(tokens: TokenBatch, seed: int) -> Tensor:
    """int64 (N,): a random number for each token of this update."""
    place = positions(tokens.layout)
    return mixed(tokens.layout.spread(responses(tokens)), mixed(place, mixed(tokens["step"], torch.full_like(place, seed))))


def token_covariance(tokens: TokenBatch) -> Tensor:
    """(N,): (A - mean A) (log p - mean log p) with means over the mask; 0 outside it."""
    mask = tokens["mask"]
    count = mask.sum().clamp(min=1)
    parts = []
    for name in ("advantage", "current"):
        inside = torch.where(mask, tokens[name].detach(), torch.zeros_like(tokens[name]))
        parts.append(torch.where(mask, inside - inside.sum() / count, torch.zeros_like(inside)))
    return parts[0] * parts[1]
