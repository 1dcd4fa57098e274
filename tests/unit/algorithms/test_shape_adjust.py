"""Changes to the credit by hand, beside variants that must differ."""

from __future__ import annotations

import math

import pytest
import torch
from shape_cases import F64, atoms_of, random_tokens, tensor, tokens_of

from april.algorithms.advantages import adjust, adjust_entropy, adjust_samples, key_tokens
from april.algorithms.advantages.across import query_relative
from april.algorithms.advantages.group import group_relative
from april.algorithms.atoms import function_of
from april.algorithms.losses.compose import Algorithm, credit, shares
from april.algorithms.spec import AlgorithmConfig

ADJUSTS = atoms_of("adjust")
EMPTY = torch.zeros(0, dtype=torch.int64)


def run(atom, tokens):
    """The columns after an adjust."""
    result = function_of("adjust", atom)(tokens["advantage"], tokens, **atom.options())
    return tokens.with_columns(**(result if isinstance(result, dict) else {"advantage": result}))


# -- all of them ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("atom", ADJUSTS, ids=lambda atom: atom.type)
def test_order_of_samples_and_groups_does_not_matter(atom) -> None:
    tokens = random_tokens()
    order = torch.tensor([9, 4, 0, 11, 2, 7, 5, 1, 10, 3, 8, 6])
    _, rows = tokens.layout.take(order)
    there, moved = run(atom, tokens), run(atom, tokens.take(order))
    for name in there.columns:
        assert torch.allclose(moved[name].double(), there[name][rows].double(), atol=1e-12, equal_nan=True), name
    new = [name for name in there.columns if name not in tokens or not torch.equal(there[name], tokens[name])]
    assert new or atom.type in ("clip",), "it does nothing on this batch"


@pytest.mark.parametrize("atom", ADJUSTS, ids=lambda atom: atom.type)
def test_empty_masked_and_zero_advantages_stay_finite(atom) -> None:
    tokens = random_tokens()
    nothing = torch.zeros_like(tokens["mask"])
    masked = run(atom, tokens.with_columns(mask=nothing, trained=nothing))
    assert bool(masked["advantage"].isfinite().all()) and not bool(masked["trained"].any())
    zero = run(atom, tokens.with_columns(advantage=torch.zeros_like(tokens["advantage"])))["advantage"]
    assert bool(zero.isfinite().all()) and (bool((zero == 0).all()) or atom.type in ("key_tokens", "budget_gap"))
    assert len(run(atom, tokens.take(EMPTY))["advantage"]) == 0


@pytest.mark.parametrize("atom", ADJUSTS, ids=lambda atom: atom.type)
def test_what_is_read_and_provided_is_declared(atom) -> None:
    tokens = random_tokens()
    only = type(tokens)(
        tokens.layout,
        {name: column for name, column in tokens.columns.items() if name in atom.needs | {"advantage", "mask", "trained"}},
    )
    assert torch.equal(run(atom, only)["advantage"], run(atom, tokens)["advantage"])
    assert set(run(atom, only).columns) - set(only.columns) == set(atom.provides)


# -- values --------------------------------------------------------------------------------------------------------------


def test_scaled_signs() -> None:
    tokens = tokens_of([3], [0])
    assert adjust.scale_signs(tensor([2, -2, 0]), tokens, positive=0.1, negative=3.0).tolist() == pytest.approx([0.2, -6, 0])


def test_novelty_needs_a_right_answer_and_a_positive_advantage() -> None:
    columns = {"behaviour": [-3.0, -0.1, -3.0, -0.1], "correct": [1.0, 0.0, 0.0, 1.0]}
    tokens = tokens_of([1] * 4, [0] * 4, **columns)
    got = adjust.novelty(tensor([1, 1, 1, -1]), tokens, strength=2.5, cap=0.5).tolist()
    assert got == [1.5, 1.0, 1.0, -1.0]
    unsolved = adjust.novelty(tensor([1, 1, 1, -1]), tokens.with_columns(correct=torch.ones(4, dtype=F64)))
    assert unsolved.tolist() != got, "the third sample is unlikely, too"


def test_novelty_is_the_mean_over_trainable_tokens() -> None:
    tokens = tokens_of([3, 1], [0, 0], mask=[1, 1, 0, 1], behaviour=[-1.0, -3.0, -50.0, -2.0])
    assert adjust.likelihood_in_group(tokens).tolist() == pytest.approx([1.0, 1.0])


def test_budget_gap_leaves_samples_without_a_budget_alone() -> None:
    tokens = tokens_of([1] * 3, [0] * 3, reward=[1.0, 3.0, 7.0], **{"item.budget": [4.0, 4.0, math.nan]})
    got = adjust.budget_gap(torch.zeros(3, dtype=F64), tokens, scale_tokens=4, weight=0.5)
    assert got.tolist() == pytest.approx([1.0, 1.0, 0.0])  # mean 2 minus 4 cos(pi / 2)


def test_credit_across_prompts_of_one_query() -> None:
    tokens = tokens_of([1] * 6, [0, 0, 1, 1, 2, 2], reward=[0.0, 0, 4, 4, 1, 5], **{"item.query": [3.0] * 4 + [math.nan] * 2})
    assert query_relative(tokens, std="none").tolist() == [-2, -2, 2, 2, -2, 2]
    assert group_relative(tokens, std="none").tolist() == [0, 0, 0, 0, -2, 2], "within each prompt there is no signal"


def test_whole_batch_of_unknown_queries_is_group_relative() -> None:
    tokens = random_tokens()
    unknown = tokens.with_columns(**{"item.query": torch.full_like(tokens["reward"], math.nan)})
    assert torch.allclose(query_relative(unknown), group_relative(tokens))


# -- entropy -------------------------------------------------------------------------------------------------------------


def test_quantile_is_an_entropy_that_occurs() -> None:
    values = tensor([5, 1, 4, 2, 3])
    assert [float(adjust_entropy.quantile(values, share)) for share in (0.2, 0.21, 0.8, 1.0)] == [1, 2, 4, 5]


def test_entropy_score_is_zero_without_differences_and_for_unknown_tokens() -> None:
    tokens = tokens_of([3], [0], entropy=[0.5, 0.5, 0.5], advantage=[1.0, 1.0, 1.0])
    assert adjust_entropy.normalised_entropy(tokens["advantage"], tokens)["entropy_score"].tolist() == [0, 0, 0]
    mixed = tokens.with_columns(entropy=tensor([0.1, math.nan, 0.9]))
    assert adjust_entropy.normalised_entropy(tokens["advantage"], mixed, pivot_quantile=0.5)["entropy_score"].tolist() == [
        0,
        0,
        1,
    ]


def test_differential_factor_by_hand() -> None:
    score, ratio = tensor([0.5, 0.5, -0.5, -0.5, -1.0]), tensor([1.0, 1.15, 1.0, 1.15, 1.0])
    low, high = torch.full((5,), 0.8, dtype=F64), torch.full((5,), 1.2, dtype=F64)
    assert adjust_entropy.differential_factor(score, ratio, low, high).tolist() == [1, 1.5, 0.5, 1, 0]
    assert adjust_entropy.differential_factor(score, ratio, low, high, strength=0.0).tolist() == [1] * 5


def test_entropy_scale_never_turns_a_sign() -> None:
    tokens = tokens_of([3], [0], entropy=[0.0, 1.0, 2.0])
    got = adjust_entropy.entropy_scale(tensor([1, 1, -1]), tokens, strength=0.2)
    assert got.tolist() == pytest.approx([0.8, 1.0, -1.2])
    strong = adjust_entropy.entropy_scale(tensor([1, 1, -1]), tokens, strength=5.0)
    assert strong.tolist() == pytest.approx([0.0, 1.0, -6.0])


def test_reshape_is_within_the_group_and_not_below_zero() -> None:
    tokens = tokens_of([1] * 6, [0, 0, 0, 0, 1, 1], entropy=[0.1, 0.1, 0.1, 3.7, 2.0, math.nan])
    factor = adjust_entropy.reshape_factor(tokens).tolist()
    assert factor == pytest.approx([1.9, 1.9, 1.9, 0.0, 1.0, 1.0])
    together = adjust_entropy.reshape_factor(tokens_of([1] * 6, [0] * 6, entropy=tokens["entropy"])).tolist()
    assert together != pytest.approx(factor, abs=0.05)


def test_entropy_bonus_is_capped_by_the_advantage() -> None:
    tokens = tokens_of([4], [0], entropy=[0.1, 9.0, 9.0, math.nan])
    got = adjust_entropy.entropy_bonus(tensor([1, 1, -1, 1]), tokens, strength=0.4, cap=0.5)
    assert got.tolist() == pytest.approx([1.04, 1.5, -0.5, 1.0])


def test_top_tokens_of_the_batch_keep_their_credit() -> None:
    tokens = tokens_of([3, 2], [0, 1], mask=[1, 1, 1, 1, 0], entropy=[0.1, 0.9, 0.5, 0.2, 5.0])
    advantage = tensor([1, 1, 1, 10, 1])
    assert adjust_entropy.top_tokens(advantage, tokens, fraction=0.25)["advantage"].tolist() == [0, 1, 0, 0, 0]
    weighted = adjust_entropy.top_tokens(advantage, tokens, fraction=0.25, by="advantage_entropy", renormalise=True)
    assert weighted["advantage"].tolist() == [0, 0, 0, 10, 0] and weighted["trained"].tolist() == [False] * 3 + [True, False]
    ties = tokens.with_columns(entropy=tensor([1, 1, 1, 0, 0]))
    assert adjust_entropy.top_tokens(advantage, ties, fraction=0.25)["advantage"].tolist() == [1, 1, 1, 0, 0]


def test_left_out_tokens_leave_the_denominators_only_when_asked() -> None:
    tokens = tokens_of([2, 2], [0, 0], reward=[1.0, 0.0], entropy=[1.0, 0.1, 0.9, 0.1])
    shared = {}
    for renormalise in (False, True):
        chain = [{"type": "top_tokens", "fraction": 0.5, "renormalise": renormalise}]
        atoms = Algorithm.of(AlgorithmConfig.model_validate({"adjust": chain, "aggregate": "token_mean"}))
        shared[renormalise] = shares(atoms, credit(atoms, tokens))["share"].tolist()
    assert shared[False] == [0.25] * 4 and shared[True] == [0.5, 0, 0.5, 0]


# -- samples -------------------------------------------------------------------------------------------------------------


def test_overlong_samples_stay_in_the_statistics_of_their_group() -> None:
    tokens = tokens_of([1, 1, 1, 1], [0] * 4, reward=[1.0, 1.0, 0.0, 0.0], finished=[1.0, 1.0, 1.0, 0.0])
    advantage = group_relative(tokens, std="none")
    got = adjust_samples.overlong_filter(advantage, tokens)
    assert got["advantage"].tolist() == [0.5, 0.5, -0.5, 0.0] and got["mask"].tolist() == [True, True, True, False]
    assert set(adjust_samples.overlong_filter(advantage, tokens, renormalise=False)) == {"advantage"}


def test_survivors_of_the_selection_keep_their_advantage() -> None:
    tokens = tokens_of([2] * 4, [0, 0, 1, 1], reward=[0.0] * 4, token_ids=range(8))
    advantage = tokens.layout.spread(tensor([0.1, -2.0, 0.0, 1.0]))
    got = adjust_samples.max_variance_samples(advantage, tokens, fraction=0.5)["advantage"]
    assert tokens.layout.first(got).tolist() == [0.0, -2.0, 0.0, 1.0]


def test_which_of_equal_samples_train_does_not_depend_on_their_order() -> None:
    order = torch.tensor([5, 2, 7, 0, 3, 6, 1, 4])
    tokens = tokens_of([1] * 8, [0] * 8, token_ids=range(8))
    advantage = tensor([1.0, -1, 1, -1, 1 - 1e-16, 1, -1, -1])
    got, other = (
        adjust_samples.max_variance_samples(advantage[rows], tokens.take(rows), fraction=0.5)["trained"][rows.argsort()]
        for rows in (torch.arange(8), order)
    )
    assert torch.equal(got, other) and got.sum() == 4 and advantage[got].sum() == 0


# -- key tokens ----------------------------------------------------------------------------------------------------------


def test_fisher_p_by_hand() -> None:
    a, b, c, d = tensor([3, 1, 2]), tensor([0, 1, 1]), tensor([0, 1, 1]), tensor([3, 1, 2])
    assert key_tokens.fisher_p(a, b, c, d).tolist() == pytest.approx([0.1, 1.0, 1.0])
    assert key_tokens.fisher_p(tensor([8]), tensor([2]), tensor([1]), tensor([5])).tolist() == pytest.approx([0.034965034965])


def test_a_token_of_right_answers_gains_and_one_of_wrong_answers_loses() -> None:
    ids = [7, 1, 7, 2, 7, 3, 9, 1, 9, 2, 9, 3]
    tokens = tokens_of([2] * 6, [0] * 6, token_ids=ids, correct=[1.0] * 3 + [0.0] * 3)
    options = {"scale": 0.5, "fisher": 1.0, "gain": 1.0, "frequency": True}
    value = key_tokens.association(tokens, **options)
    assert value[0] > 0.4 and value[6] == -value[0] and float(value[1].abs()) < 1e-9
    one_group = key_tokens.association(
        tokens_of([2] * 6, [0, 0, 0, 1, 1, 1], token_ids=ids, correct=[1.0] * 3 + [0.0] * 3), **options
    )
    assert bool((one_group == 0).all()), "groups that agree say nothing"


def test_ignored_tokens_get_nothing() -> None:
    tokens = random_tokens()
    zero = torch.zeros_like(tokens["advantage"])
    some = key_tokens.key_tokens(zero, tokens, ignore_token_ids=(0, 1))
    every = key_tokens.key_tokens(zero, tokens)
    ignored = tokens["token_ids"] <= 1
    assert bool((some[ignored] == 0).all()) and torch.equal(some[~ignored], every[~ignored]) and bool(every[ignored].any())
