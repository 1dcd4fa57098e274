"""Each preset of shaping does what it is for: by numbers on data where it can."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from shape_cases import group_of, tensor, tokens_of

from april.algorithms.columns import TokenBatch
from april.algorithms.filters import first_reason
from april.algorithms.losses.compose import Algorithm, credit, policy_loss, shares
from april.algorithms.spec import AlgorithmConfig
from april.config.load import read_preset
from april.core.errors import RecipeError
from april.core.group import Batch, Group, Reward
from april.training.batch import assemble


def preset(name: str, **changes: Any) -> Algorithm:
    return Algorithm.of(AlgorithmConfig.model_validate({**read_preset(name)[0], **changes}))


def advantages(algorithm: Algorithm, tokens: TokenBatch) -> list[float]:
    """Credit of each sample's first token."""
    return tokens.layout.first(credit(algorithm, tokens)["advantage"]).tolist()


def trained(groups: list[Group], algorithm: Algorithm) -> list[list[int]]:
    """Members of each group that give tokens after the filters and composers."""
    kept = tuple(group for group in groups if first_reason(algorithm.config.filter, group) is None)
    for compose in algorithm.compose:
        kept = compose(kept)
    data = assemble(Batch(0, 0, tuple(groups)), tuple(kept))
    rewarded = sum(len(group.rewarded) for group in groups)
    assert data.num_failed == 0, "members that a composer leaves out have not failed"
    assert data.num_left_out == rewarded - len(data.samples)
    return [[s.id.member for s in data.samples if s.id.serial == group.id.serial] for group in kept]


GRPO = preset("grpo")

# -- rewards -------------------------------------------------------------------------------------------------------------


def test_fapo_pushes_flawed_answers_up_early_and_down_late() -> None:
    def of_flawed(correct: list[float], flawed: list[float]) -> float:
        return advantages(preset("fapo"), tokens_of([1] * 8, [0] * 8, correct=correct, **{"part.flawed": flawed}))[0]

    flaws = [1.0] + [0.0] * 7
    assert of_flawed([1.0] + [0.0] * 7, flaws) > 0.5, "most answers are wrong: it is the better one"
    assert of_flawed([1.0] * 7 + [0.0], flaws) < -0.5, "most answers are right: it is the worse one"
    assert of_flawed([1.0] * 7 + [0.0], [0.0] * 8) > 0, "without the verdict it is one of the right ones"


def test_jet_ranks_right_answers_by_length() -> None:
    tokens = tokens_of([2, 8, 2, 8], [0] * 4, reward=[1.0, 1, 0, 0], correct=[1.0, 1, 0, 0])
    short, long, *wrong = advantages(preset("jet"), tokens)
    assert short > long > wrong[0] == wrong[1]
    assert advantages(GRPO, tokens)[0] == advantages(GRPO, tokens)[1]


def test_hbpo_prefers_short_answers_under_small_budgets_and_compares_across_them() -> None:
    columns = {"correct": [1.0, 1.0, 1.0, 1.0], "reward": [1.0] * 4, "item.query": [1.0] * 4}
    tokens = tokens_of([500, 2000, 500, 2000], [0, 0, 1, 1], **columns, **{"item.budget": [512.0, 512.0, 2048.0, 2048.0]})
    got = advantages(preset("hbpo"), tokens)
    assert got[0] - got[1] > got[2] - got[3] + 0.2, "the budget is worth more where it is small"
    within = advantages(preset("hbpo", advantage={"type": "group"}), tokens)
    assert max(abs(a - b) for a, b in zip(got, within, strict=True)) > 0.1, "other budgets of the question count"


def test_ps_grpo_rewards_the_answer_that_other_wordings_give() -> None:
    ids = [1, 2, 3, 4, 1, 2, 5, 6]
    columns = {"token_ids": ids, "item.query": [9.0] * 4, "reward": [1.0] * 4}
    got = advantages(preset("ps_grpo"), tokens_of([2] * 4, [0, 0, 1, 1], **columns))
    assert got[0] > 0 > got[1] and got[2] > 0 > got[3]
    columns["item.query"] = [9.0, 9.0, 8.0, 8.0]
    assert advantages(preset("ps_grpo"), tokens_of([2] * 4, [0, 0, 1, 1], **columns)) == [0.0] * 4


@pytest.mark.parametrize("name", ["xrouter", "router_r1"])
def test_routers_prefer_the_cheap_success(name: str) -> None:
    tokens = tokens_of([1] * 4, [0] * 4, reward=[1.0, 1, 0, 0], correct=[1.0, 1, 0, 0], **{"part.cost": [0.01, 0.2, 0.0, 0.3]})
    cheap, dear, *failed = advantages(preset(name), tokens)
    assert cheap > dear > failed[0] == failed[1], "a cheap failure is not better than a dear one"


def test_acecode_prefers_the_fast_program_and_the_one_that_starts() -> None:
    columns = {
        "correct": [1.0, 1.0, 0.0, 0.0],
        "part.time_s": [1.0, 4.0, math.nan, math.nan],
        "item.reference_time_s": [1.0] * 4,
        "part.compiled": [1.0, 1.0, 1.0, 0.0],
    }
    fast, slow, fails, broken = advantages(preset("acecode"), tokens_of([1] * 4, [0] * 4, **columns))
    assert fast > slow > fails > broken


def test_afterburner_prefers_the_larger_gain() -> None:
    columns = {
        "correct": [1.0, 1.0, 0.0],
        "part.time_s": [1.0, 9.0, math.nan],
        "item.baseline_time_s": [10.0] * 3,
        "item.baseline_passes": [1.0] * 3,
    }
    much, little, broken = advantages(preset("afterburner"), tokens_of([1] * 3, [0] * 3, **columns))
    assert much > little > broken


def test_reex_sql_adds_up_its_parts() -> None:
    named = {"format": [1.0, 1.0], "execution": [1.0, 0.0], "exact": [1.0, 0.0], "entity": [1.0, 0.5], "exploration": [1.0, 0.5]}
    tokens = tokens_of([1, 1], [0, 0], **{f"part.{name}": values for name, values in named.items()})
    assert tokens.layout.first(credit(preset("reex_sql"), tokens)["reward"]).tolist() == [9.0, 3.5]


def test_masa_rewards_the_prediction_that_fits_the_solutions() -> None:
    nan = math.nan
    columns = {
        "item.query": [1.0] * 8,
        "item.meta": [0.0] * 4 + [1.0] * 4,
        "part.num_passes": [nan] * 4 + [4.0, 4.0, 8.0, nan],
        "part.length_tokens": [nan] * 4 + [3.0, 9.0, 9.0, nan],
    }
    solutions = {"reward": [1.0, 1, 0, 0, 0, 0, 0, 0], "correct": [1.0, 1, 0, 0, 0, 0, 0, 0]}
    tokens = tokens_of([2, 5, 9, 9, 1, 1, 1, 1], [0] * 4 + [1] * 4, **solutions, **columns)
    reward = tokens.layout.first(credit(preset("masa"), tokens)["reward"]).tolist()
    assert reward == pytest.approx([1, 1, 0, 0, 1.0, 0.5, 0.05, 0.0])
    got = advantages(preset("masa"), tokens)
    assert got[4] > got[5] > got[6] > got[7] and got[:4] == pytest.approx(advantages(GRPO, tokens)[:4])
    other = tokens.with_columns(**{"item.query": tokens["item.query"] + tokens["item.meta"]})
    assert advantages(preset("masa"), other)[4:] == [0.0] * 4, "without solutions there is nothing to agree with"


def test_kl_in_reward_lowers_the_credit_of_what_left_the_reference() -> None:
    tokens = tokens_of([1] * 2, [0, 0], reward=[1.0, 1.0], behaviour=[-1.0, -1.0], reference=[-1.0, -4.0])
    stayed, left = advantages(preset("kl_in_reward"), tokens)
    assert stayed > 0 > left and advantages(GRPO, tokens) == [0.0, 0.0]


# -- groups --------------------------------------------------------------------------------------------------------------


def test_grpo_roc_resamples_oversampled_groups() -> None:
    right = [(1.0, True, {"tool_error": slip}) for slip in (0.9, 0.0, 0.5, 0.1)]
    groups = [group_of([*right, *[(0.0, False)] * 4], 0), group_of([(1.0, True)] * 8, 1)]
    (members,) = trained(groups, preset("grpo_roc"))  # the constant group is filtered
    assert [member for member in members if member < 4] == [1, 3] and len(members) == 4


def test_pods_trains_the_extremes() -> None:
    rewards = [0.5, 0.4, 1.0, 0.6, 0.0, 0.5, 0.45, 0.55]
    assert trained([group_of([(value, value > 0.5) for value in rewards])], preset("pods")) == [[2, 4]]


def test_econprover_trains_pairs_and_its_loss_prefers_the_direct_answer() -> None:
    modes = [(1.0, True, {"reasoning": 0.0}), (1.0, True, {"reasoning": 1.0}), (0.0, False, {"reasoning": 1.0})]
    algorithm, groups = preset("econprover"), [group_of(modes, 0), group_of([(0.0, False, {"reasoning": 1.0})] * 2, 1)]
    made = algorithm.compose[0](groups)
    data = assemble(Batch(0, 0, tuple(groups)), made)
    assert [(s.id.serial, s.id.member) for s in data.samples] == [(0, 0), (0, 1)] and [r.value for r in data.rewards] == [1, 0]
    tokens = shares(algorithm, credit(algorithm, data.tokens.with_columns(reference=data.tokens["behaviour"])))
    current = tokens["behaviour"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(policy_loss(algorithm, current, tokens).total, current)
    assert gradient[0] < 0 < gradient[1], "the direct answer becomes likelier, the reasoned one less likely"


# -- credit --------------------------------------------------------------------------------------------------------------


def test_ktae_moves_credit_to_the_tokens_that_decide() -> None:
    ids = [7, 1, 7, 1, 9, 1, 9, 1]
    tokens = tokens_of([2] * 4, [0] * 4, token_ids=ids, reward=[1.0, 1, 0, 0], correct=[1.0, 1, 0, 0])
    got, plain = credit(preset("ktae"), tokens)["advantage"], credit(GRPO, tokens)["advantage"]
    assert got[0] > plain[0] + 0.5 and got[4] < plain[4] - 0.5 and torch.allclose(got[1::2], plain[1::2])


def test_hapo_widens_bounds_and_changes_credit_by_entropy() -> None:
    algorithm = preset("hapo", weights={})
    tokens = tokens_of([2, 8], [0, 0], reward=[1.0, 0.0], entropy=[2.0, 0.01] + [0.5] * 8)
    tokens = shares(algorithm, credit(algorithm, tokens))
    low, high = algorithm.bounds(tokens)  # type: ignore[misc]
    assert high[0] > 1.3 and low[1] < 0.7 and high[1] == pytest.approx(1.2) and low[0] == pytest.approx(0.8)
    tokens = tokens.with_columns(proximal=tensor([-1] * 10), behaviour=tensor([-1] * 10))

    def gradient_of(moved: float, strength: float) -> list[float]:
        made = preset("hapo", weights={}, surrogate={"type": "hapo", "strength": strength})
        current = (tokens["proximal"] + moved).requires_grad_()
        return torch.autograd.grad(policy_loss(made, current, tokens).total, current)[0].tolist()  # type: ignore[no-any-return]

    at_one, plain = gradient_of(0.0, 1.0), gradient_of(0.0, 0.0)
    assert at_one[1] == 0.0 and plain[1] < -0.1, "a certain token inside of its bounds stops moving"
    assert at_one[0] == pytest.approx(plain[0]), "an uncertain one is only strengthened outside"
    assert gradient_of(0.25, 1.0)[0] == pytest.approx(2 * gradient_of(0.25, 0.0)[0])


def test_ettrl_trusts_the_certain_sample() -> None:
    tokens = tokens_of([2] * 4, [0] * 4, reward=[1.0, 1, 0, 0], entropy=[0.1, 0.1, 2.0, 2.0, 0.5, 0.5, 0.5, 0.5])
    certain, unsure, *_ = advantages(preset("ettrl"), tokens)
    assert certain > advantages(GRPO, tokens)[0] > unsure >= 0


def test_d3s_trains_few_samples_and_few_of_their_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    entropy = torch.rand(40, generator=generator, dtype=torch.float64)
    rewards = [1.0, 0.9, 0.5, 0.5, 0.5, 0.5, 0.1, 0.0]
    tokens = tokens_of([5] * 8, [0] * 8, reward=rewards, entropy=entropy, token_ids=torch.arange(40))
    tokens = credit(preset("d3s"), tokens)
    per_sample = tokens.layout.sum(tokens["trained"].double()).tolist()
    assert per_sample[2:6] == [0.0] * 4 and sum(per_sample) == 4, "a fifth of the 20 tokens of 4 samples"
    assert float(shares(preset("d3s"), tokens)["share"].sum()) == pytest.approx(1.0), "and the loss is a mean over those"


def test_d3s_relaxes_its_selection_over_the_run() -> None:
    relaxing = {"final_fraction": 1.0, "over_steps": 10}
    adjust = [{"type": "max_variance_samples", "fraction": 0.5, **relaxing}, {"type": "top_tokens", "fraction": 0.2, **relaxing}]
    atoms = preset("d3s", adjust=adjust)
    tokens = tokens_of([5] * 8, [0] * 8, reward=range(8), entropy=torch.arange(40), token_ids=torch.arange(40))
    trained = []
    for step in (0, 5, 10, 99):
        credited = credit(atoms, tokens.with_columns(step=torch.full((40,), step)))
        trained.append(int((credited["advantage"] != 0).sum()))
    assert trained == [4, 18, 40, 40], "a fifth of 4 samples, 0.6 of 6, all of 8"
    with pytest.raises(RecipeError, match="an end and a number of updates"):
        preset("d3s", adjust=[{"type": "top_tokens", "final_fraction": 1.0}])


def test_xrpo_sharpens_the_unlikely_right_answer() -> None:
    columns = {"reward": [1.0, 1, 0, 0], "correct": [1.0, 1, 0, 0], "behaviour": [-0.1, -3.0, -3.0, -0.1]}
    likely, unlikely, *wrong = advantages(preset("xrpo"), tokens_of([1] * 4, [0] * 4, **columns))
    assert unlikely == pytest.approx(1.5 * likely) and wrong[0] == wrong[1] == pytest.approx(-likely)


def test_top_entropy_trains_a_fifth_of_the_tokens() -> None:
    entropy = [0.1 * index for index in range(10)]
    tokens = credit(preset("top_entropy"), tokens_of([5, 5], [0, 0], reward=[1.0, 0.0], entropy=entropy))
    assert (tokens["advantage"] != 0).tolist() == [False] * 8 + [True] * 2 and bool(tokens["mask"].all())


def test_entropy_advantage_lifts_uncertain_tokens() -> None:
    tokens = tokens_of([2, 2], [0, 0], reward=[1.0, 0.0], entropy=[0.0, 5.0, 0.0, 5.0])
    calm_right, unsure_right, calm_wrong, unsure_wrong = credit(preset("entropy_advantage"), tokens)["advantage"].tolist()
    assert unsure_right == pytest.approx(1.5 * calm_right) and unsure_wrong == pytest.approx(0.5 * calm_wrong)


def test_weighted_reinforce_learns_mostly_from_mistakes() -> None:
    got = advantages(preset("weighted_reinforce"), tokens_of([1, 1], [0, 0], correct=[1.0, 0.0]))
    assert got == pytest.approx([0.1, -1.0])


def test_dapo_overlong_gives_cut_samples_no_gradient() -> None:
    algorithm = preset("dapo_overlong")
    columns = {"reward": [1.0, 1, 0, 0], "finished": [1.0, 1, 1, 0]}
    tokens = shares(algorithm, credit(algorithm, tokens_of([1] * 4, [0] * 4, **columns)))
    assert tokens["advantage"].tolist()[3] == 0.0 and tokens["share"].tolist() == pytest.approx([1 / 3] * 3 + [0])
    assert tokens["advantage"].tolist()[:3] == pytest.approx(credit(preset("dapo"), tokens)["advantage"].tolist()[:3])


def test_accuracy_range_drops_the_easy_and_the_hard() -> None:
    algorithm = preset("dapo", filter=[{"type": "accuracy_range", "low_fraction": 0.3, "high_fraction": 0.7}])
    groups = [group_of([(float(i < right), i < right) for i in range(4)], right) for right in range(5)]
    assert trained(groups, algorithm) == [[0, 1, 2, 3]]
    assert [group.id.serial for group in groups if first_reason(algorithm.config.filter, group) is None] == [2]
    assert all(isinstance(outcome, Reward) for group in groups for outcome in group.outcomes)
