"""Diagnostics of stale data: effective sample sizes, divergences, perplexity gap, what is clipped and dropped."""

from __future__ import annotations

import math

import pytest
import torch

from april.algorithms.losses.compose import policy_loss, stage
from april.core.metric import Mean, Metrics, merge
from april.training.metrics import effective_samples, loss_metrics
from tests.unit.algorithms.loss_helpers import algorithm, batch_of, random_batch, tensor

LN2 = math.log(2)


def measured(tokens, current, **options) -> Metrics:  # type: ignore[no-untyped-def]
    atoms = algorithm(**options)
    staged = stage(atoms, tokens.with_columns(current=current))
    with torch.no_grad():
        return loss_metrics(policy_loss(atoms, current, staged), staged, None)


def value(metrics: Metrics, name: str) -> float:
    return metrics[name].value


def stale():  # type: ignore[no-untyped-def]
    """w = 2 and 1/2 in one sample, 1 in the other."""
    return batch_of(
        [2, 1],
        [0, 0],
        proximal=[-1, -1, -1],
        behaviour=[-1 - LN2, -1 + LN2, -1],
        advantage=[1, 1, -1],
        lag=torch.tensor([1, 1, 0]),
    )


def test_importance_before_any_correction() -> None:
    tokens = stale()
    metrics = measured(tokens, tokens["proximal"], weights={"tis": {"cap": 1.0}})
    assert value(metrics, "importance_mean") == pytest.approx(3.5 / 3)
    assert value(metrics, "importance_square_mean") == pytest.approx(5.25 / 3)
    assert value(metrics, "chi_square") == pytest.approx(1.25 / 3)
    assert value(metrics, "weight_mean") == pytest.approx(2.5 / 3)
    ess = effective_samples(metrics)
    assert value(ess, "importance_ess_fraction") == pytest.approx(3.5**2 / 5.25 / 3)
    assert value(ess, "sequence_ess_fraction") == pytest.approx(1), "the products of both samples are 1"
    assert value(ess, "weight_ess_fraction") == pytest.approx(2.5**2 / 2.25 / 3)


def test_divergences_both_ways_and_towards_both_policies() -> None:
    tokens = stale()
    metrics = measured(tokens, tokens["proximal"] + tensor([0, 0, LN2]))
    forward = (2 - 1 - LN2 + 0.5 - 1 + LN2) / 3
    assert value(metrics, "kl_behaviour_proximal") == pytest.approx(forward)
    assert value(metrics, "kl_proximal_behaviour") == pytest.approx((2 * LN2 - 1 - 0.5 * LN2 + 0.5) / 3)
    assert value(metrics, "kl_behaviour_current") == pytest.approx(forward + (1 - LN2) / 3)
    assert value(metrics, "kl_current_behaviour") == pytest.approx((3.5 * LN2 - 1 - 0.5) / 3)


def test_the_estimates_are_the_divergences_in_expectation() -> None:
    behaviour, proximal = tensor([0.7, 0.2, 0.1]), tensor([0.5, 0.2, 0.3])
    counts = (behaviour * 10).round().long().tolist()
    picks = [index for index, count in enumerate(counts) for _ in range(count)]
    rows = torch.tensor(picks)
    tokens = batch_of(
        [10],
        [0],
        proximal=proximal.log()[rows],
        behaviour=behaviour.log()[rows],
        advantage=torch.ones(10).double(),
        lag=torch.zeros(10).long(),
    )
    metrics = measured(tokens, tokens["proximal"])
    assert value(metrics, "kl_behaviour_proximal") == pytest.approx(float((behaviour * (behaviour / proximal).log()).sum()))
    assert value(metrics, "kl_proximal_behaviour") == pytest.approx(float((proximal * (proximal / behaviour).log()).sum()))
    assert value(metrics, "chi_square") == pytest.approx(float(((proximal - behaviour) ** 2 / behaviour).sum()))


def test_perplexity_gap_is_a_mean_over_samples() -> None:
    tokens = batch_of(
        [3, 1], [0, 0], proximal=[-2, -2, -2, -1], behaviour=[-1, -1, -1, -3], advantage=[1] * 4, lag=torch.zeros(4).long()
    )
    metrics = measured(tokens, tokens["proximal"])
    assert value(metrics, "log_perplexity_gap") == pytest.approx(-0.5) and value(
        metrics, "log_perplexity_gap_abs"
    ) == pytest.approx(1.5)


def test_clipped_below_and_above_and_dropped_by_name() -> None:
    tokens = stale()
    metrics = measured(tokens, tokens["proximal"] + tensor([1, 0.1, -1]), weights={"mask": {"low": 0.6, "high": 3.0}, "tis": {}})
    assert value(metrics, "clip_high_fraction") == pytest.approx(1 / 3) and value(metrics, "clip_low_fraction") == pytest.approx(
        1 / 3
    )
    assert value(metrics, "clip_fraction") == pytest.approx(2 / 3)
    assert value(metrics, "mask_dropped_fraction") == pytest.approx(1 / 3) and "tis_dropped_fraction" not in metrics


def test_fresh_data_are_out_of_trouble() -> None:
    tokens = random_batch(fresh=True)
    metrics = measured(tokens, tokens["proximal"], weights={"tis": {}})
    zero = (
        "chi_square",
        "kl_behaviour_proximal",
        "kl_proximal_behaviour",
        "kl_current_behaviour",
        "log_perplexity_gap_abs",
        "clip_fraction",
    )
    assert all(value(metrics, name) == 0 for name in zero)
    assert all(metric.total == metric.count for metric in effective_samples(metrics).values() if isinstance(metric, Mean))
    worse = measured(random_batch(), random_batch()["proximal"], weights={"tis": {}})
    assert all(value(worse, name) > 0.01 for name in zero[:5])


def test_parts_merge_into_the_whole() -> None:
    tokens, atoms = random_batch(), algorithm(weights={"mask": {}})
    staged = stage(atoms, tokens.with_columns(current=tokens["proximal"]))

    def part(samples: list[int]) -> Metrics:
        batch = staged.take(torch.tensor(samples))
        with torch.no_grad():
            return loss_metrics(policy_loss(atoms, batch["current"], batch), batch, None)

    whole, merged = part(list(range(6))), merge([part([5, 0]), part([1, 2, 3, 4])])
    assert whole.keys() == merged.keys()
    assert all(value(whole, name) == pytest.approx(value(merged, name), nan_ok=True) for name in whole)
    one, other = effective_samples(whole), effective_samples(merged)
    assert len(one) == 3 and all(value(one, name) == pytest.approx(value(other, name)) for name in one)
