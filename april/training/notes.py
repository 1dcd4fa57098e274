"""What an update says about its batch beside the loss: groups without signal, and how old tokens are in optimiser steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from april.algorithms.advice import better_group_size
from april.algorithms.columns import TokenBatch
from april.core.metric import Max, Mean, Metrics, Sum
from april.training.batch import TrainingBatch


def signal_metrics(batch: TrainingBatch) -> Metrics:
    """Groups whose members all have one reward, and the group size that would leave at most half as many.

    The advice is about right and wrong: it is left out where shaped rewards tell members apart that are equally right.
    """
    layout = batch.tokens.layout
    rewards: list[list[float]] = [[] for _ in range(layout.num_groups)]
    correct: list[int] = [0] * layout.num_groups
    for group, reward in zip(layout.group_of_sample.tolist(), batch.rewards, strict=True):
        rewards[group].append(reward.value)
        correct[group] += reward.correct
    sizes = [len(row) for row in rewards]
    silent = [len(set(row)) < 2 for row in rewards if row]
    metrics: Metrics = {
        "num_groups": Sum(len(silent)),
        "no_signal_groups": Sum(sum(silent)),
        "group_size": Mean(sum(sizes), len(silent)),
    }
    alike = [right in (0, size) for right, size in zip(correct, sizes, strict=True) if size]
    better = better_group_size(correct, sizes) if alike == silent and any(silent) else None
    if better is not None:
        metrics["advised_group_size"] = Max(better[0])
        metrics["advised_no_signal_fraction"] = Mean(better[1], 1)
    return metrics


def age_metrics(tokens: TokenBatch, version: int, steps_at: Sequence[int], num_before: int) -> Metrics:
    """How many optimiser steps lie between the weights that sampled each trained token and the step that trains it.

    Args:
        tokens: what the optimiser step trains; "lag" counts versions.
        version: weights that the batch starts from.
        steps_at: optimiser steps that the weights of each version have seen.
        num_before: optimiser steps taken on this batch already.
    """
    lag = tokens["lag"][tokens["trained"]]
    seen = torch.tensor(steps_at, dtype=torch.int64)
    now, last = seen[min(version, len(seen) - 1)] + num_before, len(seen) - 1
    ages = now - seen[(min(version, last) - lag).clamp(0, last)]
    metrics: Metrics = {"lag_optimizer_steps_mean": Mean(float(ages.sum()), float(len(ages)))}
    return metrics | {"lag_optimizer_steps_max": Max(float(ages.max())) if len(ages) else Max()}
