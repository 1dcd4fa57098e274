"""Changes to the credit by the entropy of the distribution that each token was sampled from.

"entropy" is as the engine recorded it. A token without a recorded entropy (nan) is left alone and counts in no statistic.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from april.algorithms.columns import TokenBatch

SMALLEST_ENTROPY = 1e-8
"""Below it a token is deterministic; keeps logarithms finite."""


def known_entropy(tokens: TokenBatch) -> tuple[Tensor, Tensor]:
    """Entropies (N,) with 0 where unknown, and bool (N,): inside the mask and recorded."""
    entropy = tokens["entropy"]
    known = tokens["mask"] & ~entropy.isnan()
    return torch.where(known, entropy, torch.zeros_like(entropy)), known


def normalised_entropy(
    advantage: Tensor, tokens: TokenBatch, *, pivot_quantile: float = 0.8, signed: bool = True
) -> dict[str, Tensor]:
    """The column "entropy_score": h in [-1, 1], 0 at the pivot, 1 at the most and -1 at the least uncertain token.

    z = log H - (quantile of log H over the batch); h = z / max(z) where z > 0, z / |min(z)| where z < 0. All entropies
    equal: 0. The quantile is the smallest entropy that at least this share of tokens does not exceed.

    Source: HAPO (arXiv 2509.16591), normalised log-entropy. Its release loses the sign (`signed = False`).

    Args:
        advantage: (N,), left as it is.
        tokens: needs "entropy", "mask".
        pivot_quantile: share of tokens below the pivot.
        signed: negative below the pivot.

    Returns:
        "entropy_score" (N,).
    """
    entropy, known = known_entropy(tokens)
    if not bool(known.any()):
        return {"entropy_score": torch.zeros_like(entropy)}
    logs = entropy.clamp(min=SMALLEST_ENTROPY).log()
    z = logs - quantile(logs[known], pivot_quantile)
    high, low = z[known].max(), z[known].min()
    down = z / (-low if signed else low).where(low < 0, torch.ones_like(low))
    score = torch.where(z > 0, z / high.where(high > 0, torch.ones_like(high)), down)
    return {"entropy_score": torch.where(known & (z != 0), score, torch.zeros_like(score))}


def quantile(values: Tensor, share: float) -> Tensor:
    """The smallest of `values` (N,) that at least `share` of them do not exceed; `torch.quantile` refuses large inputs."""
    return values.kthvalue(_count(share, len(values))).values


def _count(share: float, total: int) -> int:
    """A share of `total` things, rounded up, at least one; forgives the rounding of the product: 0.2 of 15 is 3."""
    return min(max(math.ceil(share * total - 1e-9), 1), total)


def differential_factor(score: Tensor, ratio: Tensor, low: Tensor, high: Tensor, *, strength: float = 1.0) -> Tensor:
    """Factor of the advantage (N,): 1 + strength * h where a token of its kind should be changed, else 1; never below 0.

    Neutral is a ratio in the inner half of its bounds. Uncertain tokens (h > 0) are strengthened outside of it, where they
    explore; certain ones (h <= 0) are weakened inside.

    Source: HAPO (arXiv 2509.16591), differential advantage redistribution.

    Args:
        score: "entropy_score" (N,).
        ratio: current over proximal probability (N,).
        low, high: bounds of the ratio (N,), as adapted to the token's entropy.
        strength: of the change.
    """
    neutral = (ratio > (1 + low) / 2) & (ratio < (1 + high) / 2)
    changed = torch.where(score > 0, ~neutral, neutral)
    return torch.where(changed, 1 + strength * score, torch.ones_like(score)).clamp(min=0)


def entropy_scale(advantage: Tensor, tokens: TokenBatch, *, strength: float = 0.2) -> Tensor:
    """A * max(1 + strength * z, 0), z the entropy's deviation from the batch in standard deviations (n - 1).

    Source: AEPO (arXiv 2510.14545), entropy-aware advantage.

    Returns:
        (N,); unchanged when fewer than two entropies are known or all are equal.
    """
    entropy, known = known_entropy(tokens)
    inside = entropy[known]
    spread = inside.std(correction=1) if len(inside) > 1 else inside.new_zeros(())
    if not bool(spread > 0):
        return advantage
    factor = (1 + strength * (entropy - inside.mean()) / spread).clamp(min=0)
    return torch.where(known, advantage * factor, advantage)


def entropy_reshape(advantage: Tensor, tokens: TokenBatch) -> Tensor:
    """A * max(1 + (mean of the group - H) / mean of the group, 0), H the sample's mean entropy: trust the certain answers.

    Source: ETTRL (arXiv 2508.11356), entropy-based advantage reshaping.

    Returns:
        (N,); unchanged in samples without known entropies and in groups of mean entropy 0.
    """
    return advantage * tokens.layout.spread(reshape_factor(tokens))


def reshape_factor(tokens: TokenBatch) -> Tensor:
    """The factor of `entropy_reshape` for each sample (S,)."""
    layout = tokens.layout
    entropy, known = known_entropy(tokens)
    mean = layout.mean(entropy, known)
    usable = (layout.sum(known.to(mean.dtype)) > 0).to(mean.dtype)
    count = layout.group_sum(usable).clamp(min=1)
    group = (layout.group_sum(mean * usable) / count)[layout.group_of_sample]
    factor = (2 - mean / group.where(group > 0, torch.ones_like(group))).clamp(min=0)
    return torch.where((usable > 0) & (group > 0), factor, torch.ones_like(factor))


def entropy_bonus(advantage: Tensor, tokens: TokenBatch, *, strength: float = 0.4, cap: float = 0.5) -> Tensor:
    """A + min(strength * H, cap * |A|): uncertain tokens gain, and no advantage changes its sign while cap < 1.

    Source: Cheng et al. 2025 (arXiv 2506.14758), section 3: strength 0.4 with GRPO, 1 / cap = 2.

    Returns:
        (N,).
    """
    entropy, _ = known_entropy(tokens)
    return advantage + torch.minimum(strength * entropy, cap * advantage.abs())


def top_tokens(
    advantage: Tensor,
    tokens: TokenBatch,
    *,
    fraction: float = 0.2,
    final_fraction: float | None = None,
    over_steps: int | None = None,
    by: Literal["entropy", "advantage_entropy"] = "entropy",
    renormalise: bool = False,
) -> dict[str, Tensor]:
    """Only the tokens with the largest key keep their advantage; ties are kept.

    Source: "Beyond the 80/20 Rule" (Wang et al. 2025, arXiv 2506.01939) with key H; D3S (arXiv 2509.22115), token level,
    with key |A| * H.

    Args:
        advantage: (N,).
        tokens: needs "entropy", "mask", "trained", and "step" where the share follows it. A token without a known entropy has
            key 0.
        fraction: share of the batch's tokens inside the mask that is kept.
        final_fraction, over_steps: see `share_of_step`.
        by: the key.
        renormalise: the others leave the denominators too.

    Returns:
        "advantage" and, with `renormalise`, "mask" and "trained" (N,).
    """
    entropy, _ = known_entropy(tokens)
    key = entropy * advantage.abs() if by == "advantage_entropy" else entropy
    share = share_of_step(tokens, fraction, final_fraction, over_steps)
    return kept_tokens(advantage, tokens, top_keys(key, tokens["mask"], share), renormalise=renormalise)


def share_of_step(tokens: TokenBatch, first: float, last: float | None, over_steps: int | None) -> float:
    """A share that goes in a straight line from `first` at update 0 to `last` at update `over_steps`, and stays there.

    Source: D3S (arXiv 2509.22115), dynamic schedule; its end points are not published.

    Args:
        tokens: needs "step", unless the share stays.
        first, last, over_steps: `first` all the time without the others.
    """
    if last is None or over_steps is None or len(tokens["step"]) == 0:
        return first
    return first + (last - first) * min(int(tokens["step"][0]) / over_steps, 1.0)


def top_keys(key: Tensor, mask: Tensor, fraction: float) -> Tensor:
    """bool (N,): tokens inside the mask whose key is at least the k-th largest, k = fraction of them, at least one."""
    inside = key[mask]
    if len(inside) == 0:
        return mask
    return mask & (key >= inside.kthvalue(len(inside) - _count(fraction, len(inside)) + 1).values)


def kept_tokens(advantage: Tensor, tokens: TokenBatch, keep: Tensor, *, renormalise: bool) -> dict[str, Tensor]:
    """The columns after all tokens but `keep` (N,) lost their credit, and with `renormalise` their place in denominators."""
    columns = {"advantage": torch.where(keep, advantage, torch.zeros_like(advantage))}
    if renormalise:
        columns |= {"mask": tokens["mask"] & keep, "trained": tokens["trained"] & keep}
    return columns
