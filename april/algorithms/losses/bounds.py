"""Bounds of the ratio, given as ratios. They carry no gradient."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from april.algorithms.columns import TokenBatch
from april.algorithms.losses.ratio import LIMIT


def constant(tokens: TokenBatch, *, low: float = 0.8, high: float = 1.2) -> tuple[Tensor, Tensor]:
    """The same bounds for every token: 1 - eps and 1 + eps of PPO, apart from each other as in DAPO's clip-higher.

    Returns:
        low (N,), high (N,).
    """
    like = tokens["advantage"]
    return torch.full_like(like, low), torch.full_like(like, high)


def entropy(tokens: TokenBatch, *, low: float = 0.8, high: float = 1.2, strength: float = 1.0) -> tuple[Tensor, Tensor]:
    """Room above for uncertain tokens, room below for certain ones: 1 - (1 - low)(1 + a h^-) and 1 + (high - 1)(1 + a h^+).

    Source: HAPO (arXiv 2509.16591), asymmetric adaptive clipping. h in [-1, 1] is the column "entropy_score".

    Returns:
        low (N,), not below 0, and high (N,).
    """
    score = tokens["entropy_score"]
    lower = 1 - (1 - low) * (1 + strength * (-score).clamp(min=0))
    return lower.clamp(min=0), 1 + (high - 1) * (1 + strength * score.clamp(min=0))


def second_moment(
    tokens: TokenBatch,
    *,
    budget: float = 0.04,
    low: float = 0.7,
    high: float = 1.5,
    anchor: Literal["behaviour", "proximal"] = "behaviour",
) -> tuple[Tensor, Tensor]:
    """Bounds exp(-tau), exp(tau) that keep the mean squared log-ratio of the harmful tokens near `budget`.

    Harmful are the tokens whose ratio has already moved the way their advantage pushes. Source: M2PO (arXiv 2510.01161),
    the form of its release; never tighter than low and high.

    Args:
        tokens: everything that one optimiser step trains.
        budget: second moment that is allowed.
        low, high: the tightest bounds.
        anchor: what the current policy is compared with.

    Returns:
        low (N,), high (N,), the same for all tokens.
    """
    squares, _ = harmful_squares(tokens, anchor)
    tau = second_moment_limit(squares, budget)
    like = tokens["advantage"]
    return torch.exp(-tau).clamp(max=low).to(like) * torch.ones_like(like), tau.exp().clamp(min=high).to(like) * torch.ones_like(
        like
    )


def harmful_squares(tokens: TokenBatch, anchor: Literal["behaviour", "proximal"]) -> tuple[Tensor, Tensor]:
    """Squared log-ratios (H,) of the harmful tokens, and which they are (N,)."""
    moved = (tokens["current"] - tokens[anchor]).clamp(-LIMIT, LIMIT)
    harmful = tokens["mask"] & (moved * tokens["advantage"] > 0)
    return moved[harmful].square(), harmful


def second_moment_limit(squares: Tensor, budget: float) -> Tensor:
    """tau: the root of the largest of `squares` (H,) at which capping all of them stays below a mean of `budget`.

    0 where the smallest already reaches it, or where all together do not.
    """
    if len(squares) == 0:
        return squares.new_zeros(())
    ordered = squares.double().sort().values
    rest = torch.arange(len(ordered) - 1, -1, -1, device=ordered.device, dtype=ordered.dtype)
    capped = ordered.cumsum(0) + ordered * rest
    reached = (capped >= budget * len(ordered)).nonzero().squeeze(-1)
    if len(reached) == 0 or int(reached[0]) == 0:
        return ordered.new_zeros(())
    return ordered[reached[0] - 1].sqrt()


def shifted(tokens: TokenBatch, *, width_low: float = 0.2, width_high: float = 0.2) -> tuple[Tensor, Tensor]:
    """Bounds around where the proximal policy stands: c - width_low and c + width_high, c = proximal / behaviour.

    For a ratio over the behaviour policy. Source: ReMix (arXiv 2507.06892), mix-policy proximal policy gradient.

    Returns:
        low (N,), not below 0, and high (N,).
    """
    moved = torch.where(tokens["mask"], tokens["proximal"] - tokens["behaviour"], torch.zeros_like(tokens["behaviour"]))
    centre = moved.clamp(-LIMIT, LIMIT).exp()
    return (centre - width_low).clamp(min=0), centre + width_high
