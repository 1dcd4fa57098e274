"""Ratios of the policy being trained to its anchor, in logs and clamped to [-20, 20].

The anchor is the proximal policy (the weights before the update), or the behaviour policy itself: then the ratio is also the
correction for stale tokens and other numerics, and a weight that corrects from behaviour to proximal would do it twice.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from april.algorithms.columns import Layout, TokenBatch

LIMIT = 20.0

Anchor = Literal["proximal", "behaviour"]


def _log_ratio(current: Tensor, proximal: Tensor, tokens: TokenBatch, anchor: Anchor) -> Tensor:
    """(N,): current over its anchor where the policy sampled the token, else 0."""
    difference = current - (tokens["behaviour"] if anchor == "behaviour" else proximal)
    return torch.where(tokens["mask"], difference, torch.zeros_like(difference))


def token(current: Tensor, proximal: Tensor, tokens: TokenBatch, *, anchor: Anchor = "proximal") -> Tensor:
    """(N,): log-ratio of each token. Source: PPO (Schulman et al. 2017, arXiv 1707.06347), section 3."""
    return _log_ratio(current, proximal, tokens, anchor).clamp(-LIMIT, LIMIT)


def sequence(
    current: Tensor,
    proximal: Tensor,
    tokens: TokenBatch,
    *,
    anchor: Anchor = "proximal",
    reduce: Literal["mean", "sum"] = "mean",
    gradient: Literal["token", "sequence"] = "token",
) -> Tensor:
    """(N,): one log-ratio for all tokens of a sample.

    Source: GSPO (Zheng et al. 2025, arXiv 2507.18071): the mean with the gradient of the whole sample is equation 7, with
    that of the token equation 14 (GSPO-token). Both give the same gradient while advantage, weight and clipping are the
    same for all tokens of a sample.

    Args:
        current, proximal: (N,).
        tokens: whole samples.
        anchor: the denominator.
        reduce: mean (geometric mean of the ratios) or sum (their product) over the tokens with mask.
        gradient: "token": each row has the gradient of its own token; "sequence": of the mean or sum.
    """
    each = _log_ratio(current, proximal, tokens, anchor)
    each = each if gradient == "sequence" else each.detach()
    layout = tokens.layout
    whole = layout.mean(each, tokens["mask"]) if reduce == "mean" else layout.sum(each)
    spread = layout.spread(whole.clamp(-LIMIT, LIMIT))
    return spread if gradient == "sequence" else spread + (current - current.detach())


def segment(
    current: Tensor, proximal: Tensor, tokens: TokenBatch, *, anchor: Anchor = "proximal", by: Literal["lag", "turn"] = "turn"
) -> Tensor:
    """(N,): mean log-ratio of the token's segment in value, the token's own log-prob in gradient.

    Between token and sequence: a turn of a conversation, or what one version of the weights sampled. Source: the segment
    level of ROLL Flash (arXiv 2510.11345).

    Args:
        current, proximal: (N,).
        tokens: whole samples.
        anchor: the denominator.
        by: a segment ends where the mask changes ("turn") or where the lag or the mask changes ("lag").
    """
    segments = segment_layout(tokens, by)
    mean = segments.mean(_log_ratio(current, proximal, tokens, anchor).detach(), tokens["mask"])
    return segments.spread(mean.clamp(-LIMIT, LIMIT)) + (current - current.detach())


def segment_layout(tokens: TokenBatch, by: Literal["lag", "turn"]) -> Layout:
    """The same tokens with segments in the place of samples."""
    layout = tokens.layout
    starts = torch.ones(layout.num_tokens, dtype=torch.bool, device=layout.offsets.device)
    changed = layout.sample_of_token.diff() != 0
    for name in ("mask", "lag") if by == "lag" else ("mask",):
        changed = changed | (tokens[name][1:] != tokens[name][:-1])
    starts[1:] = changed
    offsets = torch.cat([starts.nonzero().squeeze(-1), layout.offsets[-1:]])
    return Layout(offsets, layout.group_of_sample[layout.sample_of_token[offsets[:-1]]], layout.num_groups)


def interpolated(behaviour: Tensor, current: Tensor, lag: Tensor) -> Tensor:
    """An estimate of the proximal log-probs without a forward pass: behaviour + lag / (lag + 1) * (current - behaviour).

    It takes log-probs to move linearly with the version: a token of lag l was sampled l + 1 versions before the weights
    that this update makes, and the proximal policy is one version before them. A fresh token keeps its behaviour log-prob.

    Source: AReaL (Fu et al. 2025, arXiv 2505.24298), the log-linear approximation of its release.

    Args:
        behaviour, current: (N,).
        lag: int64 (N,), versions between the token's weights and the batch.

    Returns:
        (N,), detached.
    """
    share = lag.to(behaviour.dtype) / (lag + 1).to(behaviour.dtype)
    return (behaviour + share * (current - behaviour)).detach()
