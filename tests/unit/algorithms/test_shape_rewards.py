"""Reward transforms by hand, beside variants that must differ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from shape_cases import F64, atoms_of, random_tokens, tensor, tokens_of

from april.algorithms.atoms import function_of
from april.algorithms.rewards import length, parts, siblings
from april.core.errors import DataError, RecipeError

REWARDS = atoms_of("reward")


def run(atom, tokens):
    return function_of("reward", atom)(tokens, **atom.options())


def changed(result, tokens):
    return result if isinstance(result, torch.Tensor) else result["token_reward"]


def per_sample(values, tokens) -> list[float]:
    return tokens.layout.first(values).tolist()


# -- all of them ---------------------------------------------------------------------------------------------------------


def test_they_are_all_here() -> None:
    assert {atom.type for atom in REWARDS} >= {"overlong", "shorter_is_better", "budget", "reference_kl", "group_similarity"}
    assert {atom.type for atom in atoms_of("adjust")} >= {"whiten", "key_tokens", "novelty", "top_tokens", "overlong_filter"}


@pytest.mark.parametrize("atom", REWARDS, ids=lambda atom: atom.type)
def test_order_of_samples_and_groups_does_not_matter(atom) -> None:
    tokens = random_tokens()
    order = torch.tensor([9, 4, 0, 11, 2, 7, 5, 1, 10, 3, 8, 6])
    _, rows = tokens.layout.take(order)
    moved = changed(run(atom, tokens.take(order)), tokens)
    assert torch.allclose(moved, changed(run(atom, tokens), tokens)[rows], atol=1e-12)
    assert not torch.allclose(changed(run(atom, tokens), tokens), tokens["reward"]), "it does nothing on this batch"


@pytest.mark.parametrize("atom", REWARDS, ids=lambda atom: atom.type)
def test_empty_batches_and_masked_samples_stay_finite(atom) -> None:
    tokens = random_tokens()
    masked = tokens.with_columns(mask=torch.zeros_like(tokens["mask"]), trained=torch.zeros_like(tokens["mask"]))
    assert bool(changed(run(atom, masked), tokens).isfinite().all())
    assert len(changed(run(atom, tokens.take(torch.zeros(0, dtype=torch.int64))), tokens)) == 0


@pytest.mark.parametrize("atom", REWARDS, ids=lambda atom: atom.type)
def test_what_is_read_is_declared(atom) -> None:
    tokens = random_tokens()
    only = type(tokens)(tokens.layout, {name: column for name, column in tokens.columns.items() if name in atom.needs})
    assert torch.equal(changed(run(atom, only), tokens), changed(run(atom, tokens), tokens))


# -- length --------------------------------------------------------------------------------------------------------------


def test_jet_compares_lengths_within_each_group() -> None:
    lengths, groups, correct = [2, 6, 4, 10, 20], [0, 0, 0, 1, 1], [1.0, 1.0, 0.0, 1.0, 1.0]
    tokens = tokens_of(lengths, groups, correct=correct)
    earned = length.length_reward(tokens, strength=1.0, floor=0.1).tolist()
    assert earned == pytest.approx([1.0, 0.1, 0.0, 1.0, 0.1])
    together = length.length_reward(tokens_of(lengths, [0] * 5, correct=correct), strength=1.0, floor=0.1).tolist()
    assert together != pytest.approx(earned, abs=0.1), "over the whole batch the numbers are others"


def test_jet_one_right_answer_gets_the_floor_and_none_gets_nothing() -> None:
    tokens = tokens_of([3, 5, 4, 4], [0, 0, 1, 1], correct=[1.0, 0.0, 0.0, 0.0])
    assert length.length_reward(tokens, strength=1.2, floor=0.05).tolist() == pytest.approx([0.05, 0, 0, 0])


def test_jet_takes_the_format_from_its_column() -> None:
    tokens = tokens_of([2, 2], [0, 0], correct=[1.0, 1.0], **{"part.format": [1.0, float("nan")]})
    with_format = per_sample(length.shorter_is_better(tokens, format_part="part.format"), tokens)
    assert with_format == pytest.approx([0.9 + 0.1 + 0.05, 0.9 + 0.05])
    assert per_sample(length.shorter_is_better(tokens), tokens) == pytest.approx([1.05, 1.05])


def test_hbpo_without_a_budget_only_the_length_counts_and_format_errors_cost_one() -> None:
    nan = float("nan")
    columns = {"item.budget": [nan, 2.0, 2.0, nan], "part.format": [1.0, 1.0, 0.0, 1.0]}
    tokens = tokens_of([2, 2, 2, 9], [0, 0, 0, 0], correct=[1.0, 1.0, 1.0, 1.0], **columns)
    reward = per_sample(length.budget_reward(tokens, scale_tokens=4, format_part="part.format"), tokens)
    c2 = 4 * 2**-0.5  # 4 cos(pi / 4)
    assert reward == pytest.approx([c2, c2, -1.0, 0.0])


def test_hbpo_cosine_does_not_fall_below_zero() -> None:
    assert length.length_cosine(tensor([0, 4, 5, float("nan")]), 4)[:3].tolist() == pytest.approx([4, 0, 0], abs=1e-12)


# -- parts ---------------------------------------------------------------------------------------------------------------


def test_fapo_without_any_verdict_is_a_signed_reward() -> None:
    tokens = tokens_of([1, 1], [0, 0], correct=[1.0, 0.0])
    assert per_sample(parts.flaw_penalty(tokens), tokens) == [1.0, -1.0]
    flawed = tokens.with_columns(**{"part.flawed": tensor([1.0, 1.0])})
    assert per_sample(parts.flaw_penalty(flawed), tokens) == [0.0, -1.0]


def test_a_cost_that_nobody_measured_is_refused() -> None:
    tokens = tokens_of([1, 1], [0, 0], reward=[1.0, 1.0], **{"part.cost": [0.1, float("nan")]})
    with pytest.raises(DataError, match=r"part\.cost"):
        parts.cost_discount(tokens)
    whole = tokens.with_columns(**{"part.cost": tensor([0.1, 0.2])})
    assert per_sample(parts.cost_discount(whole), tokens) == pytest.approx([0.7, 0.4])


def test_router_r1_cheapest_and_dearest_of_the_batch() -> None:
    prices = tensor([1, 4, 9, 16, 25])
    assert parts.cheapness(prices, prices, 0.0, 1.0).tolist() == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    assert parts.cheapness(prices, tensor([4, 4]), 0.0, 1.0).tolist() == [0.5] * 5
    linear = 1 - (prices - 1) / 24
    assert float((parts.cheapness(prices, prices, 0.0, 1.0) - linear).abs().max()) > 0.1, "the root of the price is ranked"


def test_acecode_ladder() -> None:
    nan = float("nan")
    columns = {
        "part.time_s": [0.5, nan, nan, nan],
        "item.reference_time_s": [1.0] * 4,
        "part.compiled": [1.0, nan, 1.0, 0.0],
        "part.ran": [1.0, nan, 0.0, 0.0],
    }
    tokens = tokens_of([1] * 4, [0] * 4, correct=[1.0, 0.0, 0.0, 0.0], **columns)
    assert per_sample(parts.speed_ladder(tokens), tokens) == pytest.approx([1.0, -0.3, -0.6, -1.0])
    assert per_sample(parts.speed_ladder(tokens, cap=2.0), tokens)[0] == pytest.approx(1.5)


@pytest.mark.parametrize("shaped", [parts.speed_ladder, parts.improvement])
def test_a_right_program_without_its_time_is_refused(shaped: Callable[..., Any]) -> None:
    items = {"item.reference_time_s": [1.0] * 2, "item.baseline_passes": [1.0] * 2, "item.baseline_time_s": [1.0] * 2}
    tokens = tokens_of([1, 1], [0, 0], correct=[1.0, 0.0], **{"part.time_s": [0.5, float("nan")]}, **items)
    shaped(tokens)
    with pytest.raises(DataError, match="1 of 2 samples without it"):
        shaped(tokens.with_columns(correct=tensor([1.0, 1.0])))


def test_afterburner_a_failing_program_counts_as_the_longest_time() -> None:
    columns = {"part.time_s": [0.1], "item.baseline_time_s": [10.0], "item.baseline_passes": [1.0]}
    tokens = tokens_of([1], [0], correct=[0.0], **columns)
    assert per_sample(parts.improvement(tokens), tokens) == pytest.approx([0.5 * -1 + 0.2])
    passing = tokens.with_columns(correct=tensor([1.0]))
    gain = float(torch.tanh(tensor([0.99])))
    assert per_sample(parts.improvement(passing), tokens) == pytest.approx([0.5 * (0.5 + 0.5 * gain) + 0.2])


def test_afterburner_a_failing_baseline_counts_as_the_longest_time() -> None:
    nan = float("nan")
    columns = {"part.time_s": [20.0] * 3, "item.baseline_passes": [0.0] * 3, "item.baseline_time_s": [5.0, nan, 90.0]}
    tokens = tokens_of([1] * 3, [0] * 3, correct=[1.0] * 3, **columns)
    assert per_sample(parts.improvement(tokens), tokens) == pytest.approx([0.862857] * 3, abs=1e-6)
    passing = tokens.with_columns(**{"item.baseline_passes": torch.ones(3, dtype=F64)})
    with pytest.raises(DataError, match="1 of 3 samples"):
        parts.improvement(passing)


def test_weighted_parts_names_columns_and_counts_missing_ones_as_zero() -> None:
    from april.algorithms.specs.rewards_parts import WeightedParts

    tokens = tokens_of([1, 1], [0, 0], reward=[10.0, 20.0], **{"part.a": [1.0, float("nan")]})
    assert per_sample(parts.weighted_parts(tokens, weights={"part.a": 2.0, "part.b": 5.0}, keep=0.1), tokens) == [3.0, 2.0]
    with pytest.raises(ValueError, match=r"part\.NAME"):
        WeightedParts(weights={"a": 1.0})
    assert WeightedParts(weights={"part.a": 1.0}).needs == {"reward", "part.a"}


def test_options_that_name_no_column_are_refused() -> None:
    from april.algorithms.spec import AlgorithmConfig

    with pytest.raises(RecipeError, match="cost"):
        AlgorithmConfig.model_validate({"reward": [{"type": "cost_discount", "cost": "cost"}]})
    config = AlgorithmConfig.model_validate({"reward": [{"type": "cost_discount", "cost": "item.price"}]})
    assert "item.price" in config.requires


# -- the reference policy, and other prompts -----------------------------------------------------------------------------


def test_kl_in_the_reward_sums_over_trainable_tokens_only() -> None:
    tokens = tokens_of(
        [2, 2], [0, 0], mask=[1, 1, 1, 0], reward=[1.0, 1.0], behaviour=[-1.0, -2, -1, -5], reference=[-2.0, -2, 0, 0]
    )
    assert per_sample(siblings.reference_kl(tokens, coefficient=0.1), tokens) == pytest.approx([1 - 0.1, 1 + 0.1])
    wrong = tokens["reward"] + 0.1 * tokens.layout.spread(tokens.layout.sum(tokens["behaviour"] - tokens["reference"]))
    assert per_sample(wrong, tokens) != pytest.approx([0.9, 1.1], abs=0.05)


@pytest.mark.parametrize(
    ("kind", "paid"),
    [("k1", [0.693147, -0.693147]), ("abs", [0.693147] * 2), ("k2", [0.240227] * 2), ("k3", [0.193147, 0.306853])],
)
def test_kl_in_the_reward_by_each_estimate(kind, paid) -> None:
    half = float(np.log(0.5))
    tokens = tokens_of([2, 1], [0, 0], behaviour=[-1.0, -1.0, -2.0], reference=[-1.0 + half, 5.0, -2.0 - half], mask=[1, 0, 1])
    each = siblings.reference_kl(tokens, coefficient=1.0, level="token", kind=kind)["token_reward"]
    assert each.tolist() == pytest.approx([-paid[0], 0.0, -paid[1]], abs=1e-6)
    whole = siblings.reference_kl(tokens, coefficient=1.0, kind=kind) - tokens["reward"]
    assert per_sample(whole, tokens) == pytest.approx([-paid[0], -paid[1]], abs=1e-6)


def test_kl_by_token_adds_up_to_kl_by_sample() -> None:
    tokens = random_tokens()
    each = siblings.reference_kl(tokens, coefficient=0.3, level="token")
    whole = siblings.reference_kl(tokens, coefficient=0.3)
    assert set(each) == {"token_reward"} and torch.allclose(
        tokens.layout.sum(each["token_reward"]), tokens.layout.first(whole - tokens["reward"])
    )
    again = siblings.reference_kl(tokens.with_columns(**each), coefficient=0.3, level="token")
    assert torch.allclose(again["token_reward"], 2 * each["token_reward"]), "two parts add up"


def test_overlap_of_ngrams() -> None:
    texts = [np.array(ids, np.int64) for ids in ([1, 2, 3], [1, 2, 4], [7, 8], [1, 1], [])]
    got = siblings.overlaps(texts, 2)
    assert np.array_equal(got, got.T) and np.diag(got).tolist() == [1.0] * 5
    assert got[0, 1] == pytest.approx((2 / 3 + 1 / 2) / 2) and got[0, 2] == 0.0 and got[0, 4] == 0.0
    assert got[0, 3] == pytest.approx(2 / 5 / 2), "an n-gram counts as often as both have it"


def test_similarity_counts_other_wordings_of_the_same_query_only() -> None:
    ids = [1, 2, 1, 2, 3, 4, 1, 2]
    tokens = tokens_of([2] * 4, [0, 1, 1, 2], token_ids=ids, **{"item.query": [5.0, 5.0, 5.0, 6.0]})
    got = per_sample(siblings.group_similarity(tokens, max_ngram=1), tokens)
    assert got == [0.5, 1.0, 0.0, 0.0]  # the equal text of query 6 and the sibling of the same wording do not count
    kept = siblings.group_similarity(tokens.with_columns(reward=torch.full((8,), 2.0, dtype=F64)), keep=1.0, max_ngram=1)
    assert per_sample(kept, tokens) == [2.5, 3.0, 2.0, 2.0]
