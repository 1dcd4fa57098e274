"""Credit of sets of samples: what counts is what they achieve together."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from april.algorithms.advantages.returns import gae
from april.algorithms.columns import Layout, TokenBatch
from april.algorithms.prefix_tree import positions
from april.algorithms.steps import Steps, fingerprints, responses


def polychromic(
    tokens: TokenBatch,
    *,
    set_size: int = 4,
    num_sets: int = 4,
    seed: int = 0,
    signature: Literal["response", "last_step"] = "response",
    delimiter_ids: tuple[int, ...] = (),
    window_tokens: int | None = None,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> Tensor:
    """f(set) = mean return * share of different members; A = mean over the sample's sets of f(set) - mean f of the group.

    Which members a set has is drawn by their responses, whatever the order of the batch.

    Source: Poly-PPO (Hamid et al. 2025, arXiv 2509.25424). The only state that sets start from is the prompt.

    Args:
        tokens: needs "reward" and "token_ids"; for "last_step" also "turn" and "anchor", unless there are delimiters; for a
            window also "value" and "mask".
        set_size: members of a set; smaller groups get 0.
        num_sets: sets of each group. Each member is in as many as any other, plus or minus one.
        seed: which sets; the same at every update.
        signature: samples differ if their responses do, or if their last steps do.
        delimiter_ids: steps begin at these tokens; empty takes turns.
        window_tokens: tokens from the prompt on that get the set's credit, generalised advantage estimation the others;
            None for all.
        gamma, lam: of the estimation outside the window.

    Returns:
        (N,).
    """
    layout = tokens.layout
    reward = layout.first(tokens["reward"])
    signatures = _signatures(tokens, signature, delimiter_ids)
    advantage = torch.zeros_like(reward)
    for members in _by_size(layout, reward, responses(tokens)):
        if members.shape[1] < set_size:
            continue
        local = drawn_sets(members.shape[1], set_size, num_sets, seed).to(members.device)
        sets = members[:, local]
        gained = relative(set_scores(reward, signatures, sets))
        each = gained[:, :, None].expand(sets.shape).reshape(-1)
        total = torch.zeros_like(reward).index_add(0, sets.reshape(-1), each)
        count = torch.bincount(sets.reshape(-1), minlength=len(reward))
        advantage = advantage + total / count.clamp(min=1)
    spread = layout.spread(advantage)
    if window_tokens is None:
        return spread
    elsewhere = gae(tokens, gamma=gamma, lam=lam)["advantage"]
    return torch.where(positions(layout) < window_tokens, spread, elsewhere)


def set_scores(returns: Tensor, signatures: Tensor, sets: Tensor) -> Tensor:
    """f = mean return * number of different signatures / n.

    Args:
        returns: (S,).
        signatures: int64 (S,).
        sets: int64 (..., n), samples.

    Returns:
        (...).
    """
    ordered = signatures[sets].sort(-1).values
    different = 1 + (ordered.diff(dim=-1) != 0).sum(-1)
    return returns[sets].mean(-1) * different / sets.shape[-1]


def relative(score: Tensor) -> Tensor:
    """(..., M) -> (..., M): f minus the mean of the M sets of a group; exactly 0 where they agree but for rounding."""
    spread = score.amax(-1, keepdim=True) - score.amin(-1, keepdim=True)
    return torch.where(spread > 1e-12, score - score.mean(-1, keepdim=True), torch.zeros_like(score))


def drawn_sets(size: int, set_size: int, num_sets: int, seed: int) -> Tensor:
    """int64 (num_sets, set_size): different members of a group of `size`, cut from shuffles of all of them."""
    generator = torch.Generator().manual_seed(seed)
    sets: list[Tensor] = []
    while len(sets) < num_sets:
        order = torch.randperm(size, generator=generator)
        sets.extend(order[: size // set_size * set_size].reshape(-1, set_size))
    return torch.stack(sets[:num_sets])


def _signatures(tokens: TokenBatch, signature: str, delimiter_ids: tuple[int, ...]) -> Tensor:
    ids = tokens["token_ids"]
    if signature == "response":
        return responses(tokens)
    steps = Steps.of(tokens, delimiter_ids)
    starts = torch.searchsorted(steps.step_of_token, torch.arange(len(steps.sample), device=ids.device))
    place = torch.arange(len(ids), device=ids.device) - starts[steps.step_of_token]
    return fingerprints(ids, steps.step_of_token, place, len(steps.sample))[steps.last]


def _by_size(layout: Layout, *keys: Tensor) -> list[Tensor]:
    """Samples of the groups of each size, int64 (groups, size), each group ordered by the keys (S,), the last one first."""
    order = torch.arange(layout.num_samples, device=layout.offsets.device)
    for key in (*keys, layout.group_of_sample):
        order = order[key[order].argsort(stable=True)]
    sizes = torch.bincount(layout.group_of_sample, minlength=layout.num_groups)
    starts = sizes.cumsum(0) - sizes
    out = []
    for size in torch.unique(sizes[sizes > 0]).tolist():
        first = starts[sizes == size]
        out.append(order[first[:, None] + torch.arange(size, device=order.device)])
    return out
