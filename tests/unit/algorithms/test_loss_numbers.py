"""Formulas of the loss against literal numbers, each beside a variant that must differ."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from april.algorithms.check import RunFacts, check
from april.algorithms.columns import TokenBatch
from april.algorithms.losses import aggregate, bounds, objectives, pairs, penalties, ratio, surrogate, weights
from april.core.errors import DataError, RecipeError
from tests.unit.algorithms.loss_helpers import algorithm, batch_of, random_batch, tensor

LN2 = math.log(2)


def close(got: Tensor, expected: list[float], tolerance: float = 1e-6) -> bool:
    return bool(torch.allclose(got.detach().double(), tensor(expected), atol=tolerance, rtol=0))


def test_ratios_at_every_level() -> None:
    tokens = batch_of(
        [4, 2], [0, 0], mask=[1, 1, 0, 1, 1, 1], behaviour=[-2, -1, 0, -1, -1, -1], lag=torch.tensor([1, 0, 0, 0, 2, 2])
    )
    current, proximal = tensor([-1, -1, -9, -2, -1, -3]), tensor([-1.5, -1, 0, -1.5, -1, -1])
    assert close(ratio.token(current, proximal, tokens), [0.5, 0, 0, -0.5, 0, -2])
    assert close(ratio.token(current, proximal, tokens, anchor="behaviour"), [1, 0, 0, -1, 0, -2])
    assert close(ratio.sequence(current, proximal, tokens, reduce="sum"), [0, 0, 0, 0, -2, -2])
    assert close(ratio.sequence(current, proximal, tokens, anchor="behaviour"), [0, 0, 0, 0, -1, -1])
    assert close(ratio.segment(current, proximal, tokens), [0.25, 0.25, 0, -0.5, -1, -1])
    assert close(ratio.segment(current, proximal, tokens, by="lag"), [0.5, 0, 0, -0.5, -1, -1])


def test_sequence_gradient_spreads_over_the_sample_and_token_gradient_does_not() -> None:
    tokens = batch_of([2], [0])
    found = []
    for gradient in ("sequence", "token"):
        current = tensor([-1, -2]).requires_grad_()
        value = ratio.sequence(current, tensor([-1, -1]), tokens, gradient=gradient)
        found.append(torch.autograd.grad(value[0], current)[0].tolist())
    assert found == [[0.5, 0.5], [1, 0]]


def test_interpolated_proximal() -> None:
    estimate = ratio.interpolated(tensor([-1, -1, -1]), tensor([-3, -3, -3]).requires_grad_(), torch.tensor([0, 1, 3]))
    assert close(estimate, [-1, -2, -2.5]) and not estimate.requires_grad


def test_bounds() -> None:
    tokens = batch_of(
        [3], [0], advantage=[1, 1, -1], entropy_score=[1, -0.5, 0], proximal=[-1, -1, -1], behaviour=[-1 - LN2, -1, -1 + 2 * LN2]
    )
    low, high = bounds.entropy(tokens, low=0.8, high=1.2, strength=1.0)
    assert close(low, [0.8, 0.7, 0.8]) and close(high, [1.4, 1.2, 1.2])
    low, high = bounds.shifted(tokens, width_low=0.5, width_high=0.1)
    assert close(low, [1.5, 0.5, 0]) and close(high, [2.1, 1.1, 0.35])


def test_second_moment_limit() -> None:
    squares = tensor([0.64, 0.0025, 0.04, 0.16, 0.01])
    assert float(bounds.second_moment_limit(squares, 0.04)) == pytest.approx(0.2)
    assert float(bounds.second_moment_limit(squares, 1.0)) == 0 and float(bounds.second_moment_limit(squares, 1e-4)) == 0
    assert float(bounds.second_moment_limit(squares, 0.08)) == pytest.approx(0.4)
    assert float(bounds.second_moment_limit(squares[:0], 0.04)) == 0


def surrogate_of(
    name: str,
    log_ratio: list[float],
    advantage: list[float],
    limits: tuple[float, float] | None = None,
    **options: object,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, clipped, gradient by the current log-prob, with log-probs of -1."""
    count = len(advantage)
    columns = {
        "correct": [1.0] + [0.0] * (count - 1),
        "behaviour": [-1 - r for r in log_ratio],
        "entropy_score": [1.0] + [-1.0] * (count - 1),
    }
    tokens = batch_of([count], [0], **columns)
    current = torch.full((count,), -1.0, dtype=torch.float64).requires_grad_()
    low_high = None if limits is None else (torch.full((count,), limits[0]).double(), torch.full((count,), limits[1]).double())
    loss, clipped = getattr(surrogate, name)(
        current + 1 + tensor(log_ratio), current, tensor(advantage), low_high, tokens, **options
    )
    return loss, clipped, torch.autograd.grad(loss.sum(), current)[0]


def test_cispo_keeps_the_gradient_that_the_clip_loses() -> None:
    ratios = [LN2, -LN2, LN2, 0.0]
    loss, clipped, gradient = surrogate_of("cispo", ratios, [1, 1, -1, 1], (0.8, 1.28))
    assert close(loss, [1.28, 0.8, -1.28, 1]) and close(gradient, [-1.28, -0.8, 1.28, -1])
    assert clipped.tolist() == [True, True, True, False]
    _, clipped, gradient = surrogate_of("cispo", ratios, [1, 1, -1, 1], (0.8, 1.28), outside="drop_harmful")
    assert close(gradient, [0, -0.8, 1.28, -1]) and clipped.tolist() == [True, False, False, False]
    _, clipped, gradient = surrogate_of("cispo", ratios, [1, 1, -1, 1], (0.8, 1.28), outside="drop")
    assert close(gradient, [0, 0, 0, -1]) and clipped.tolist() == [True, True, True, False]
    assert close(surrogate_of("clip", ratios, [1, 1, -1, 1], (0.8, 1.28))[2], [0, -0.5, 2, -1])


def test_clip_that_keeps_the_gradient() -> None:
    loss, clipped, gradient = surrogate_of("clip_keep_gradient", [LN2, -LN2, -LN2, LN2], [1, 1, -1, -1], (0.8, 1.28))
    assert close(loss, [-1.28, -0.5, 0.8, 2.0]) and close(gradient, [-1.28, -0.5, 0, 2.0])
    assert clipped.tolist() == [True, False, True, False]
    assert close(surrogate_of("clip", [LN2, -LN2, -LN2, LN2], [1, 1, -1, -1], (0.8, 1.28))[2], [0, -0.5, 0, 2])


def test_hapo_strengthens_uncertain_tokens_off_the_band_and_weakens_certain_ones_inside() -> None:
    loss, _, _ = surrogate_of("hapo", [math.log(1.15), 0.0, math.log(1.15)], [1, 1, 1], (0.8, 1.2), strength=0.5)
    assert close(loss, [-1.15 * 1.5, -0.5, -1.15])
    assert close(
        surrogate_of("hapo", [math.log(1.15), 0.0, math.log(1.15)], [1, 1, 1], (0.8, 1.2), strength=0.0)[0], [-1.15, -1, -1.15]
    )


def test_soft_gate_mirror_importance_and_vespo() -> None:
    loss, _, gradient = surrogate_of("soft_gate", [0.0, LN2], [1, -1], temperature_positive=2.0, temperature_negative=1.0)
    assert close(loss, [-1.0, 4 / (1 + math.exp(-1))]) and float(gradient[0]) == pytest.approx(-1)
    loss, _, gradient = surrogate_of("mirror", [0.5, 0.0], [1, 1], tau=0.2)
    assert close(loss, [1 + 0.1 * 0.25, 1]) and close(gradient, [-1 + 0.1, -1])
    assert close(surrogate_of("importance", [LN2, -LN2], [1, -1])[0], [-2, 0.5])
    loss, _, gradient = surrogate_of("vespo", [LN2, -LN2], [1, -1])
    assert close(loss, [4 * math.exp(-3), -(0.5**3) * math.exp(1)]) and close(gradient, [-4 * math.exp(-3), 0.125 * math.e])
    assert surrogate_of("none", [LN2], [3])[0].tolist() == [0]


def test_topr_branches_on_the_outcome_and_not_on_the_sign() -> None:
    loss, clipped, gradient = surrogate_of("topr", [-LN2, -LN2, LN2], [-1, 1, 1], positive=2.0, negative=1.0)
    assert close(gradient, [2, -0.5, -1]) and close(loss, [-2, 0.5, 1]) and clipped.tolist() == [False, False, True]


def test_geometric_mean_clips_only_what_moved_with_its_advantage() -> None:
    loss, clipped, gradient = surrogate_of("geometric_mean", [0.9, -0.9, 0.0], [1, 1, 1], (math.exp(-0.4), math.exp(0.4)))
    expected = math.exp((0.4 - 0.9) / 3)
    assert close(loss, [-expected] * 3) and clipped.tolist() == [True, False, False]
    assert close(gradient, [0, -expected, -expected])
    arithmetic = (math.exp(0.4) + math.exp(-0.9) + 1) / 3
    assert abs(arithmetic - expected) > 0.05


def test_dppo_masks_changes_of_probability_and_not_of_ratio() -> None:
    rare, common = [-6 - LN2, -6.0], [math.log(0.3), math.log(0.75)]
    tokens = batch_of([4], [0], behaviour=[rare[0], common[0], common[0], common[1]])
    current = tensor([rare[1], common[1], common[1], common[0]])
    advantage = tensor([1, 1, -1, -1])
    loss, masked = surrogate.dppo(current - tokens["behaviour"], current, advantage, None, tokens)
    assert masked.tolist() == [False, True, False, True] and close(loss, [-2, 0, 2.5, 0])
    _, kl = surrogate.dppo(current - tokens["behaviour"], current, advantage, None, tokens, divergence="kl", low=0.5, high=0.1)
    assert kl.tolist() == [False, True, False, False]


@pytest.mark.parametrize("name", ["cispo", "clip_keep_gradient", "hapo", "geometric_mean"])
def test_surrogates_that_need_bounds_say_so(name: str) -> None:
    with pytest.raises(DataError, match="no bounds") as error:
        surrogate_of(name, [0.0], [1])
    assert name in str(error.value)


def stale() -> TokenBatch:
    return batch_of(
        [2, 2], [0, 0], proximal=[-1, -1, -1, -1], behaviour=[-1 - LN2, -1 + LN2, -1, -1 - 3 * LN2], advantage=[1, 1, -1, -1]
    )


def test_weights_by_level() -> None:
    tokens = stale()  # w = 2, 1/2 | 1, 8
    assert close(weights.truncated(tokens, cap=4.0, level="sequence_mean"), [1, 1, 2 * math.sqrt(2), 2 * math.sqrt(2)])
    assert close(weights.truncated_normalised(tokens, cap=2.0), [2 / 1.375, 0.5 / 1.375, 1 / 1.375, 2 / 1.375])
    assert close(weights.masked(tokens, low=0.9, high=2.0, level="sequence_mean"), [2, 0.5, 0, 0])
    assert close(weights.masked(tokens, low=0.0, high=3.0, level="sequence", keep="compared"), [1, 1, 0, 0])
    assert close(weights.masked(tokens, low=0.9, high=2.0, keep="one"), [1, 0, 1, 0])


def test_rejection_bounds_the_inverse_of_the_weight() -> None:
    tokens = stale()
    assert close(weights.reject(tokens, low=0.4, high=1.5), [1, 0, 1, 0])
    assert close(weights.reject(tokens, low=0.4, high=1.5, level="sequence_mean"), [1, 1, 0, 0])
    assert close(weights.reject(tokens, statistic="k2", high=0.3), [1, 1, 1, 0])
    assert close(weights.reject(tokens, statistic="k2", high=0.3, level="sequence_max"), [1, 1, 0, 0])
    assert close(weights.reject(tokens, statistic="k3", high=0.35), [1, 1, 1, 0])
    assert close(weights.reject(tokens, low=0.4, high=1.5, level="sequence"), [1, 1, 0, 0])


def test_veto_opsm_and_second_moment() -> None:
    tokens = stale()
    assert close(weights.veto(tokens, below=0.6), [0, 0, 1, 1])
    drifted = tokens.with_columns(current=tensor([-9, -9, -1.5, -1 - 3 * LN2]))
    assert close(weights.off_policy_sequences(drifted, max_divergence=0.2), [1, 1, 0, 0])
    assert close(weights.off_policy_sequences(drifted, max_divergence=0.3), [1, 1, 1, 1])
    assert close(weights.second_moment(tokens, budget=0.4), [1, 1, 1, 0])
    assert float(weights.second_moment(tokens, budget=1e-9).sum()) == 1


def test_covariance_picks_the_tokens_that_lose_entropy() -> None:
    tokens = batch_of([4], [0], advantage=[2, -2, 0, 0], current=[-0.1, -3.1, -1.6, -1.6], proximal=[-0.2, -3, -1.6, -1.6])
    tokens = tokens.with_columns(token_ids=torch.tensor([5, 6, 7, 8]), step=torch.full((4,), 3))
    assert close(weights.token_covariance(tokens), [3, 3, 0, 0])
    assert weights.clip_covariance(tokens, fraction=0.25).sum() == 3
    assert weights.clip_covariance(tokens, fraction=0.25, low=4.0).sum() == 4
    assert weights.clip_covariance(tokens, fraction=0.5).tolist() == [0, 0, 1, 1]
    assert close(penalties.covariance(tokens["current"], tokens, fraction=0.5), [0.1, 0.1, 0, 0])


def test_clip_cov_draws_among_the_tokens_between_its_bounds_others_at_every_update() -> None:
    size = 400
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(3, size, generator=generator, dtype=torch.float64)
    tokens = batch_of([4] * 100, [0] * 100, advantage=random[0], current=random[1])
    tokens = tokens.with_columns(token_ids=(9 * random[2]).abs().long(), step=torch.full((size,), 3))
    covariance = weights.token_covariance(tokens)
    between = (covariance > 0.5) & (covariance < 2.0)

    def dropped(batch: TokenBatch, seed: int = 0) -> Tensor:
        return weights.clip_covariance(batch, fraction=0.05, low=0.5, high=2.0, seed=seed) == 0

    found = dropped(tokens)
    assert int(found.sum()) == 20 and bool(between[found].all()) and int(between.sum()) > 40
    assert float(covariance[found].min()) < float(covariance[between & ~found].max()), "not the largest"
    assert not torch.equal(found, dropped(tokens.with_columns(step=tokens["step"] + 1))) and not torch.equal(
        found, dropped(tokens, 1)
    )
    backwards = tokens.take(torch.arange(99, -1, -1))
    assert torch.equal(dropped(backwards).reshape(100, 4).flip(0), found.reshape(100, 4)), "no order matters"
    often = sum(dropped(tokens.with_columns(step=torch.full((size,), step))).long() for step in range(400))
    assert float(often[between].min()) / float(often[between].float().mean()) > 0.5 and int(often[~between].sum()) == 0


def test_penalties_by_kind_anchor_and_weight() -> None:
    tokens = batch_of([2], [0], reference=[-1, -1], behaviour=[-2, -2], proximal=[-1, -1])
    current = tensor([-1.5, -0.5])
    found = {kind: penalties.divergence(current, tokens, kind=kind) for kind in ("k1", "abs", "k2", "k3")}
    assert close(found["k1"], [-0.5, 0.5]) and close(found["abs"], [0.5, 0.5]) and close(found["k2"], [0.125, 0.125])
    assert close(found["k3"], [math.exp(0.5) - 1.5, math.exp(-0.5) - 0.5])
    assert close(penalties.divergence(current, tokens, kind="k2", against="behaviour"), [0.125, 1.125])
    weighed = penalties.divergence(current, tokens, kind="k2", importance="behaviour")
    assert close(weighed, [0.125 * math.exp(0.5), 0.125 * math.exp(1.5)])


def test_the_convex_share_falls_in_steps() -> None:
    steps = tensor([0, 50, 51, 60, 61, 500])
    assert close(penalties.convex_share(steps, 50, 10, 0.1, 0.5), [1, 1, 0.9, 0.9, 0.8, 0.5])
    tokens = batch_of([1], [0], reference=[-2], behaviour=[-1], step=torch.tensor([60]))
    assert close(penalties.convex(tensor([-1]), tokens, kind="k2"), [0.9 * 0.5])


def test_aggregates_count_what_they_say() -> None:
    tokens = batch_of([3, 1, 2], [0, 0, 1], mask=[1, 1, 0, 1, 0, 0])
    loss = tensor([1, 3, 9, 5, 9, 9])

    def total(share: Tensor) -> float:
        return float((share * loss).sum())

    assert total(aggregate.sequence_mean(tokens)) == pytest.approx(3.5)
    assert total(aggregate.sequence_mean(tokens, count_empty=True)) == pytest.approx(7 / 3)
    assert total(aggregate.group_mean(tokens)) == pytest.approx(3.0) and total(aggregate.constant(tokens, constant=2.0)) == 4.5
    other = batch_of([3, 1, 2], [0, 1, 1], mask=[1, 1, 0, 1, 0, 0])
    assert total(aggregate.group_mean(other)) == pytest.approx(3.5)
    solved = tokens.with_columns(correct=tensor([0, 0, 0, 1, 1, 1]))
    assert total(aggregate.solved_token_mean(solved)) == 5


def pair_batch() -> TokenBatch:
    """Two groups; rewards 1, 0, 0.5 | 0.3, 0.3."""
    reward = tensor([1, 1, 0, 0.5, 0.3, 0.3])
    return batch_of(
        [2, 1, 1, 1, 1],
        [0, 0, 0, 1, 1],
        reward=reward,
        correct=(reward > 0.4).double(),
        behaviour=[-1.0] * 6,
        reference=[-1.0] * 6,
    )


def test_pairs_of_a_group() -> None:
    tokens = pair_batch()
    chosen, rejected = pairs.select(tokens, "best_worst")
    assert (chosen.tolist(), rejected.tolist()) == ([0], [1]) and int(pairs.num_pairs(tokens, "best_worst")) == 1
    chosen, rejected = pairs.select(tokens, "all")
    assert sorted(zip(chosen.tolist(), rejected.tolist(), strict=True)) == [(0, 1), (2, 1)]
    assert int(pairs.num_pairs(tokens, "all")) == 2
    untrained = tokens.with_columns(trained=torch.tensor([0, 0, 1, 1, 1, 1]).bool())
    assert pairs.select(untrained, "best_worst")[0].tolist() == [2]


def test_a_pair_objective_is_the_mean_over_pairs() -> None:
    tokens = pair_batch()
    current = tensor([-0.5, -0.5, -2, -1, -1, -1])
    loss = objectives.pair_loss(current, tokens, kind="dpo", beta=1.0, label_smoothing=0.0)
    expected = math.log(1 + math.exp(-2))  # c = 1, j = -1
    assert float((loss * aggregate.pair_mean(tokens)).sum()) == pytest.approx(expected)
    every = objectives.pair_loss(current, tokens, kind="dpo", pairs="all", beta=1.0)
    both = (expected + math.log(1 + math.exp(-1))) / 2
    assert float((every * aggregate.pair_mean(tokens, pairs="all")).sum()) == pytest.approx(both)
    averaged = objectives.pair_loss(current, tokens, kind="dpo", beta=1.0, length_average=True)
    assert float((averaged * aggregate.pair_mean(tokens)).sum()) == pytest.approx(math.log(1 + math.exp(-1.5)))


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("dpo", {"label_smoothing": 0.2}, 0.8 * 0.20141328 + 0.2 * 1.70141328),
        ("robust", {"label_smoothing": 0.1}, (0.9 * 0.20141328 - 0.1 * 1.70141328) / 0.8),
        ("hinge", {}, 0.0),
        ("ipo", {}, 1.0),
        ("simpo", {"margin": 0.5}, math.log(1 + math.exp(-1))),
        ("nca", {}, 0.31326169 + 0.5 * 1.31326169 + 0.5 * 0.47407698),
        ("bco", {"centre": 0.5}, 0.47407698 + 0.31326169),
        ("sppo", {}, 0.25 + 0.0),
        ("apo_zero", {}, 1 - 0.73105858 + 0.37754067),
        ("apo_down", {}, 0.73105858 + 1 - 0.81757448),
        ("discopop", {}, 0.22313016),
        ("aot", {}, 0.20141328),
        ("rpo", {"eta": 2.0}, 0.25),
    ],
)
def test_what_a_pair_costs(kind: str, options: dict[str, float], expected: float) -> None:
    margins = pairs.Margins(tensor([1.0]), tensor([-0.5]), tensor([1.0]))
    assert float(pairs.LOSSES[kind](margins, beta=1.0, **options)) == pytest.approx(expected, abs=1e-6)
    swapped = pairs.Margins(tensor([-0.5]), tensor([1.0]), tensor([1.0]))
    assert float(pairs.LOSSES[kind](swapped, beta=1.0, **options)) != pytest.approx(expected, abs=1e-2)


def test_exo_is_the_divergence_from_the_smoothed_label() -> None:
    margins = pairs.Margins(tensor([math.log(9)]), tensor([0.0]), tensor([1.0]))  # the model says 0.9
    assert float(pairs.exo(margins, beta=1.0, label_smoothing=0.1)) == pytest.approx(0, abs=1e-9)
    assert float(pairs.exo(margins, beta=1.0, label_smoothing=0.4)) > 0.1


def test_aot_compares_ranks() -> None:
    margins = pairs.Margins(tensor([2.0, 0.0]), tensor([-1.0, 1.0]), tensor([1.0, 1.0]))
    sorted_margins = pairs.Margins(tensor([0.0, 2.0]), tensor([-1.0, 1.0]), tensor([1.0, 1.0]))
    assert torch.equal(pairs.aot(margins, beta=1.0), pairs.dpo(sorted_margins, beta=1.0))
    assert not torch.equal(pairs.aot(margins, beta=1.0), pairs.dpo(margins, beta=1.0))


def test_value_loss_is_the_larger_of_free_and_clipped() -> None:
    tokens = batch_of([2], [0], **{"value": [0.0, 0.0], "return": [1.0, 0.0]}, finished=torch.tensor([False, False]))
    assert close(objectives.value(tensor([0.9, 0.5]), tokens, clip=0.2), [0.5 * 0.64, 0.5 * 0.25])
    assert close(objectives.value(tensor([0.9, 0.5]), tokens, clip=None), [0.5 * 0.01, 0.5 * 0.25])
    assert close(objectives.value(tensor([0.9, 0.5]), tokens, clip=0.2, finished_only=True), [0, 0])


def test_configs_that_contradict_themselves_are_refused() -> None:
    for options, words in (
        ({"weights": {"tis": {"low": 3.0, "cap": 2.0}}}, "low, cap"),
        ({"weights": {"mask": {"low": 3.0, "high": 2.0}}}, "low, high"),
        ({"objectives": {"dpo": {"pairs": "all", "aggregate": {"type": "pair_mean"}}}}, "pairs, aggregate.pairs"),
        ({"ratio": {"type": "token", "anchor": "reference"}}, "algorithm.ratio.anchor"),
    ):
        with pytest.raises(RecipeError) as error:
            algorithm(**options)
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"surrogate": "soft_gate"}, ("algorithm.bounds", "algorithm.surrogate", "no effect")),
        ({"surrogate": "cispo", "bounds": False}, ("algorithm.surrogate", "algorithm.bounds", "no bounds")),
        ({"surrogate": {"type": "clip_keep_gradient", "dual_clip": 3.0}, "bounds": False}, ("algorithm.surrogate", "no bounds")),
        ({"penalties": {"entropy": {}}}, ("algorithm.weights", "schedule.max_lag_steps")),
    ],
)
def test_check_refuses_what_has_no_effect_or_no_correction(options: dict[str, object], words: tuple[str, ...]) -> None:
    with pytest.raises(RecipeError) as error:
        check(algorithm(**options).config, RunFacts(8, stale_tokens=True, records_entropy=True, has_reference=True))
    assert all(word in str(error.value) for word in words)


def test_check_takes_a_ratio_over_the_sampler_as_a_correction() -> None:
    facts = RunFacts(8, stale_tokens=True)
    anchored = algorithm(ratio={"type": "token", "anchor": "behaviour"}).config
    check(anchored, facts)
    check(algorithm(surrogate="none", bounds=False, objectives={"simpo": {}}).config, facts)
    check(algorithm(ratio="sequence", aggregate="sequence_sum", weights={"tis": {}}).config, facts)
    assert anchored.ratio.needs == {"behaviour"}


def test_needs_follow_the_options() -> None:
    config = algorithm(ratio={"type": "segment", "by": "lag", "anchor": "behaviour"}, objectives={"simpo": {}}).config
    assert config.ratio.needs == {"behaviour", "lag"} and "reference" not in config.objectives["simpo"].needs
    other = algorithm(penalties={"k1": {"against": "proximal", "importance": "behaviour"}}, objectives={"dpo": {}}).config
    assert other.penalties["k1"].needs == {"proximal", "behaviour"} and "reference" in other.objectives["dpo"].needs
    assert random_batch().layout.num_samples == 6
