"""What an update reports; sums carry their counts, so parts merge exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from april.algorithms.columns import TokenBatch, group_moments
from april.algorithms.losses.compose import Loss
from april.algorithms.losses.penalties import k3_estimate
from april.algorithms.losses.ratio import LIMIT
from april.algorithms.losses.weights import log_weight
from april.core.metric import Max, Mean, Metrics, Sum
from april.training.batch import TrainingBatch


def masked_mean(values: Tensor, mask: Tensor) -> Mean:
    """Mean of `values` (N,) where `mask`."""
    return Mean(float(torch.where(mask, values, torch.zeros_like(values)).sum(dtype=torch.float64)), float(mask.sum()))


def masked_max(values: Tensor, mask: Tensor) -> Max:
    """Largest of `values` (N,) where `mask`; nan when there is none."""
    inside = values[mask]
    return Max(float(inside.max())) if len(inside) else Max()


def batch_metrics(batch: TrainingBatch, tokens: TokenBatch) -> Metrics:
    """Credit of a batch; what its samples are like, `april.rollout.measure.describe_batch` says.

    Args:
        batch: as judged.
        tokens: with credit; its "reward" has gone through the reward transforms.
    """
    mask, advantage = tokens["mask"], tokens["advantage"]
    metrics: Metrics = {
        "num_failed_samples": Sum(batch.num_failed),
        "num_left_out_samples": Sum(batch.num_left_out),
        "num_tokens_trained": Sum(float(tokens["trained"].sum())),
        "zero_variance_fraction": _zero_variance(tokens),
        "advantage_mean": masked_mean(advantage, mask),
        "advantage_abs_mean": masked_mean(advantage.abs(), mask),
        "advantage_abs_max": masked_max(advantage.abs(), mask),
        "too_stale_fraction": masked_mean((~tokens["trained"]).double(), mask),
        # -log p of a sampled token is an unbiased estimate of the entropy of the distribution it came from
        "entropy_estimate": masked_mean(-tokens["behaviour"], mask),
    }
    if "entropy" in tokens:
        metrics["sampling_entropy"] = masked_mean(tokens["entropy"], mask & ~tokens["entropy"].isnan())
    return metrics


def _zero_variance(tokens: TokenBatch) -> Mean:
    layout = tokens.layout
    if layout.num_samples == 0:
        return Mean()
    reward = layout.first(tokens["reward"])
    _, squares, count = group_moments(reward, layout)
    constant = layout.group_sum((squares <= 1e-24 * count).double() / count)
    return Mean(float((constant > 0.5).sum()), float((layout.group_sum(torch.ones_like(reward)) > 0).sum()))


def loss_metrics(loss: Loss, tokens: TokenBatch, entropies: Tensor | None) -> Metrics:
    """Ratios, corrections and train/engine mismatch over the trained tokens of a micro-batch.

    `mismatch_*` compare trainer and engine on tokens that both evaluate under the same weights (lag 0).
    """
    trained = tokens["trained"]
    moved = loss.current - loss.proximal
    metrics: Metrics = {
        "clip_fraction": masked_mean(loss.clipped.double(), trained),
        "clip_low_fraction": masked_mean((loss.clipped & (loss.log_ratio < 0)).double(), trained),
        "clip_high_fraction": masked_mean((loss.clipped & (loss.log_ratio > 0)).double(), trained),
        "ratio_mean": masked_mean(loss.log_ratio.exp(), trained),
        "ratio_max": masked_max(loss.log_ratio.exp(), trained),
        "kl_proximal": masked_mean(k3_estimate(-moved), trained),
    }
    log_w = log_weight(tokens.with_columns(proximal=loss.proximal))
    fresh = trained & (tokens["lag"] == 0)
    metrics |= {
        "mismatch_abs_mean": masked_mean(log_w.abs(), fresh),
        "mismatch_abs_max": masked_max(log_w.abs(), fresh),
        "mismatch_kl": masked_mean(k3_estimate(-log_w), fresh),
        "weight_mean": masked_mean(loss.weight, trained),
        "weight_square_mean": masked_mean(loss.weight.double().square(), trained),
        "weight_changed_fraction": masked_mean(_changed(loss.weight, log_w).double(), trained),
    }
    metrics |= {f"{name}_dropped_fraction": masked_mean(gone.double(), trained) for name, gone in loss.dropped.items()}
    metrics |= off_policy_metrics(loss, tokens, log_w)
    if "reference" in tokens:
        metrics["kl_reference"] = masked_mean(k3_estimate(loss.current - tokens["reference"]), trained)
    if entropies is not None:
        metrics["entropy"] = masked_mean(entropies.detach(), trained)
    return metrics


def off_policy_metrics(loss: Loss, tokens: TokenBatch, log_w: Tensor) -> Metrics:
    """How far the data are from the policy, before any correction: w = proximal / behaviour on behaviour's tokens.

    `kl_a_b` estimates KL(a || b) from tokens of the behaviour policy: with r = b / behaviour, E[r - 1 - log r] one way and
    E[r log r - r + 1] the other; neither is ever negative.

    Args:
        loss: of a micro-batch.
        tokens: whole samples.
        log_w: log w (N,), 0 outside the mask.
    """
    trained, layout = tokens["trained"], tokens.layout
    log_w = log_w.double().clamp(-LIMIT, LIMIT)
    log_r = torch.where(trained, loss.current - tokens["behaviour"], torch.zeros_like(loss.current)).double().clamp(-LIMIT, LIMIT)
    ratio, sequence = log_w.exp(), layout.sum(torch.where(trained, log_w, torch.zeros_like(log_w))).clamp(-LIMIT, LIMIT).exp()
    gap, there = -layout.mean(log_w, trained), layout.sum(trained.double()) > 0
    return {
        "importance_mean": masked_mean(ratio, trained),
        "importance_square_mean": masked_mean(ratio.square(), trained),
        "importance_max": masked_max(ratio, trained),
        "chi_square": masked_mean((ratio - 1).square(), trained),
        "kl_behaviour_proximal": masked_mean(ratio - 1 - log_w, trained),
        "kl_proximal_behaviour": masked_mean(ratio * log_w - ratio + 1, trained),
        "kl_behaviour_current": masked_mean(log_r.exp() - 1 - log_r, trained),
        "kl_current_behaviour": masked_mean(log_r.exp() * (log_r - 1) + 1, trained),
        "sequence_importance_mean": masked_mean(sequence, there),
        "sequence_importance_square_mean": masked_mean(sequence.square(), there),
        "log_perplexity_gap": masked_mean(gap, there),
        "log_perplexity_gap_abs": masked_mean(gap.abs(), there),
    }


def _changed(weight: Tensor, log_w: Tensor) -> Tensor:
    """Where the correction is not the plain importance weight: truncated, masked, or of another level."""
    plain = log_w.exp()
    return (weight - plain).abs() > 1e-6 * plain


def effective_samples(metrics: Metrics) -> Metrics:
    """Kish's effective sample size, (sum w)^2 / sum w^2 over the number of them: of the corrections, and before them.

    Returns:
        "weight_ess_fraction" of the tokens' corrections, "importance_ess_fraction" of the tokens' plain importance weights,
        "sequence_ess_fraction" of the products of these over samples.
    """
    found: Metrics = {}
    keys = {
        "weight": "weight_ess_fraction",
        "importance": "importance_ess_fraction",
        "sequence_importance": "sequence_ess_fraction",
    }
    for name, key in keys.items():
        mean, square = metrics.get(f"{name}_mean"), metrics.get(f"{name}_square_mean")
        if isinstance(mean, Mean) and isinstance(square, Mean) and square.total > 0:
            found[key] = Mean(mean.total**2 / square.total, mean.count)
    return found
