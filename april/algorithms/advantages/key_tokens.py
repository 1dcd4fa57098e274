"""Which tokens go with right answers: a weight for every token of a group's vocabulary, from counts alone (KTAE)."""

from __future__ import annotations

import torch
from torch import Tensor

from april.algorithms.columns import TokenBatch

TOLERANCE = 1e-6
"""A p-value this close to 1 says nothing."""


def key_tokens(
    advantage: Tensor,
    tokens: TokenBatch,
    *,
    scale: float = 1.0,
    fisher: float = 1.0,
    gain: float = 1.0,
    frequency: bool = True,
    ignore_token_ids: tuple[int, ...] = (),
) -> Tensor:
    """A + the association of the token with right answers in its group.

    Source: KTAE (arXiv 2505.16826); see `association`.

    Args:
        advantage: (N,).
        tokens: needs "token_ids", "correct", "mask".
        scale: bound on the addition.
        fisher, gain: weights of Fisher's exact test and of the information gain.
        frequency: how often a token occurs counts too.
        ignore_token_ids: get 0, such as the end of text.

    Returns:
        (N,).
    """
    ids = tokens["token_ids"]
    ignored = torch.isin(ids, torch.tensor(ignore_token_ids, dtype=ids.dtype))
    value = association(tokens, scale=scale, fisher=fisher, gain=gain, frequency=frequency)
    return advantage + torch.where(ignored, torch.zeros_like(value), value).to(advantage.dtype)


def association(tokens: TokenBatch, *, scale: float, fisher: float, gain: float, frequency: bool) -> Tensor:
    """k (N,) in [-scale, scale]: how much the token's occurrence goes with right (above 0) or wrong answers of its group.

        k = scale * tanh((fisher * F + gain * IG) * x / (fisher + gain) / 2)
        F = exp(-2 p) with the two-sided p of Fisher's exact test, 0 where p = 1; IG information gain in bits
        x = asin sqrt(share of right samples with the token) - asin sqrt(share of wrong ones)
            + s_right / s_wrong - s_wrong / s_right, s its saturated frequency in all right and all wrong tokens

    0 outside the mask, and in groups that are all right or all wrong.

    Source: KTAE (arXiv 2505.16826), sections 3.2 and 3.3; constants of the saturation 2 and 0.5.
    """
    layout, mask = tokens.layout, tokens["mask"]
    out = torch.zeros(layout.num_tokens, dtype=torch.float64)
    sample = layout.sample_of_token[mask]
    if len(sample) == 0:
        return out
    right_of_sample = layout.first(tokens["correct"]) > 0.5
    group = layout.group_of_sample[sample]
    right = right_of_sample[sample].double()
    size = int(tokens["token_ids"].max()) + 1
    keys, key = torch.unique(group * size + tokens["token_ids"][mask], return_inverse=True)
    owner = keys // size  # group of each (group, token id)
    occurrences = torch.unique(sample * len(keys) + key)  # each (sample, key) once
    present, with_it = occurrences % len(keys), right_of_sample[occurrences // len(keys)].double()
    a = torch.zeros(len(keys), dtype=torch.float64).index_add(0, present, with_it)
    b = torch.zeros(len(keys), dtype=torch.float64).index_add(0, present, 1 - with_it)
    label = right_of_sample.double()
    num_right, num_wrong = layout.group_sum(label)[owner], layout.group_sum(1 - label)[owner]
    x = torch.asin((a / num_right.clamp(min=1)).sqrt()) - torch.asin((b / num_wrong.clamp(min=1)).sqrt())
    if frequency:
        x = x + _frequency_term(key, right, group, owner, layout.num_groups)
    p = fisher_p(a, b, num_right - a, num_wrong - b)
    f = torch.where(p >= 1 - TOLERANCE, torch.zeros_like(p), (-2 * p).exp())
    strength = fisher * f + gain * _information_gain(a, b, num_right - a, num_wrong - b)
    value = scale * torch.tanh(strength * x / (fisher + gain) / 2)
    out[mask] = torch.where((num_right > 0) & (num_wrong > 0), value, torch.zeros_like(value))[key]
    return out


def _frequency_term(key: Tensor, right: Tensor, group: Tensor, owner: Tensor, num_groups: int) -> Tensor:
    """s_right / s_wrong - s_wrong / s_right of every (group, token id)."""
    totals = [torch.zeros(num_groups, dtype=torch.float64).index_add(0, group, which)[owner] for which in (right, 1 - right)]
    counts = [torch.zeros(len(owner), dtype=torch.float64).index_add(0, key, which) for which in (right, 1 - right)]
    mean = ((totals[0] + totals[1]) / 2).clamp(min=1)
    scores = []
    for count, total in zip(counts, totals, strict=True):
        share = count / total.clamp(min=1)
        scores.append(share * 3.0 / (share + 2.0 * (0.5 + 0.5 * total / mean)))
    return scores[0] / (scores[1] + 1e-5) - scores[1] / (scores[0] + 1e-5)


def _information_gain(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Bits that knowing a token's presence tells about the answer; a, b with it (right, wrong), c, d without."""
    total = a + b + c + d
    split = (a + b) / total * _entropy(a, a + b) + (c + d) / total * _entropy(c, c + d)
    return _entropy(a + c, total) - split


def _entropy(part: Tensor, whole: Tensor) -> Tensor:
    """Of a yes/no question with `part` of `whole` yes, in bits; 0 for an empty whole."""
    share = part / whole.clamp(min=1)
    return -(torch.xlogy(share, share) + torch.xlogy(1 - share, 1 - share)) / torch.log(share.new_tensor(2.0))


def fisher_p(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Two-sided p (K,) of Fisher's exact test on tables [[a, b], [c, d]] of whole numbers (K,): the total probability of all
    tables with these margins that are at most as likely. Each distinct table is computed once."""
    base = int(torch.stack([a, b, c, d]).max()) + 1
    code = ((a.long() * base + b.long()) * base + c.long()) * base + d.long()
    codes, index = torch.unique(code, return_inverse=True)
    a, b, c, d = ((codes // base**place % base).double() for place in (3, 2, 1, 0))
    x = torch.arange(int((a + c).max()) + 1, dtype=torch.float64)  # possible values of a, (K, X)
    others = [a[:, None] + b[:, None] - x, a[:, None] + c[:, None] - x, d[:, None] - a[:, None] + x]
    possible = (others[0] >= 0) & (others[1] >= 0) & (others[2] >= 0)
    log_p = -torch.lgamma(x + 1) - sum(torch.lgamma(other.clamp(min=0) + 1) for other in others)
    log_p = torch.where(possible, log_p, torch.full_like(log_p, -torch.inf))
    log_p = log_p - log_p.logsumexp(1, keepdim=True)
    seen = log_p.gather(1, a.long()[:, None])
    p = torch.where(log_p <= seen + 1e-7, log_p.exp(), torch.zeros_like(log_p)).sum(1)
    return p.clamp(max=1)[index]
