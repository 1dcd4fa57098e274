"""What each preset of losses and corrections is for, shown to act on data that call for it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from april.algorithms.columns import TokenBatch
from april.algorithms.losses.compose import Loss, credit, policy_loss, stage
from tests.unit.algorithms.loss_helpers import batch_of, preset, step_loss, tensor

LN2 = math.log(2)


def two_samples(
    ratios: list[float], weights: list[float] | None = None, **more: list[float] | Tensor
) -> tuple[TokenBatch, Tensor]:
    """Three tokens of a solved and three of a failed sample: current / proximal and proximal / behaviour as given."""
    proximal = torch.full((6,), -1.0, dtype=torch.float64)
    behaviour = proximal - tensor(weights or [1.0] * 6).log()
    solved = [1.0] * 3 + [0.0] * 3
    columns: dict[str, list[float] | Tensor] = {
        "proximal": proximal, "behaviour": behaviour, "reward": solved, "correct": solved, "reference": [-1.0] * 6,
        "current_entropy": [1.0] * 6, "step": torch.full((6,), 75), "lag": torch.zeros(6, dtype=torch.int64),
        "token_ids": torch.arange(6),
    }  # fmt: skip
    tokens = batch_of([3, 3], [0, 0], **{**columns, **more})
    return tokens, proximal + tensor(ratios).log()


def run(name: str, ratios: list[float], weights: list[float] | None = None, **more: list[float] | Tensor) -> tuple[Loss, Tensor]:
    """Loss and gradient of a preset; its own credit gives the solved sample a positive advantage."""
    tokens, current = two_samples(ratios, weights, **more)
    return step_loss(preset(name), tokens, current, credited=False)


def signs(gradient: Tensor) -> list[int]:
    return [int(sign) for sign in torch.sign(torch.where(gradient.abs() < 1e-9, torch.zeros_like(gradient), gradient))]


def test_gspo_clips_whole_responses_and_gspo_token_alike() -> None:
    ratios = [1.5, 0.7, 1.2, 1.5, 0.7, 1.2]  # geometric mean 1.08: the solved sample is past its bound
    for name in ("gspo", "gspo_token"):
        loss, gradient = run(name, ratios)
        assert loss.clipped.tolist() == [True] * 3 + [False] * 3 and signs(gradient) == [0, 0, 0, 1, 1, 1]
    assert run("grpo", ratios)[0].clipped.tolist() == [True, False, False, False, True, False]


def test_luspo_weighs_a_response_by_its_length() -> None:
    reward = tensor([1.0] + [0.0] * 3)
    tokens = batch_of([1, 3], [0, 0], proximal=[-1.0] * 4, behaviour=[-1.0] * 4, reward=reward)
    grads = {name: step_loss(preset(name), tokens, tokens["proximal"], credited=False)[1] for name in ("luspo", "gspo")}
    assert float(grads["gspo"][:1].sum() + grads["gspo"][1:].sum()) == pytest.approx(0, abs=1e-12)
    assert float(grads["luspo"][1:].sum() / -grads["luspo"][:1].sum()) == pytest.approx(3)


def test_gmpo_is_hardly_moved_by_one_outlier() -> None:
    loss, gradient = run("gmpo", [20.0, 1, 1, 1, 1, 1])
    assert loss.clipped.tolist() == [True] + [False] * 5
    assert -float(gradient[1]) / float(gradient[4]) == pytest.approx(math.exp(0.4 / 3), abs=1e-4)
    assert signs(run("gmpo", [0.05, 1, 1, 1, 1, 1])[1])[0] == -1, "moved against its advantage: not clipped"


def test_cispo_keeps_bounded_tokens() -> None:
    loss, gradient = run("cispo", [3.0, 1, 1, 1, 1, 1])
    assert loss.clipped.tolist() == [True] + [False] * 5
    assert float(gradient[0] / gradient[1]) == pytest.approx(1.28) and run("grpo", [3.0, 1, 1, 1, 1, 1])[1][0] == 0
    stale = run("cispo", [1.0] * 6, [0.25, 1, 1, 1, 1, 1])[1]
    assert float(stale[0] / stale[1]) == pytest.approx(0.25), "the anchor is the policy that sampled"


def test_sapo_fades_where_the_clip_cuts() -> None:
    _, gradient = run("sapo", [1.3, 1, 3.0, 1, 1, 1])
    fraction = [float(gradient[i] / gradient[1]) for i in (0, 2)]
    assert fraction[0] == pytest.approx(1.3 * 4 / (2 + 2 * math.cosh(0.3)), abs=1e-6) and 0 < fraction[0] < 1.3
    assert float(gradient[1] / -gradient[4]) == pytest.approx(1), "at ratio 1 both temperatures give the plain gradient"
    assert run("grpo", [1.3, 1, 3.0, 1, 1, 1])[1][0] == 0
    stale = run("sapo", [1.0] * 6, [3.0, 1, 1, 1, 1, 1])[1]
    assert float(stale[0] / stale[1]) == pytest.approx(fraction[1]) and fraction[1] < 3 / 2, "far from the sampler it fades, too"


def test_gpg_is_the_policy_gradient_of_groups_that_say_something() -> None:
    atoms = preset("gpg")
    _, gradient = run("gpg", [5.0, 1, 1, 1, 1, 1])
    assert torch.allclose(gradient, tensor([-0.5, -0.5, -0.5, 0.5, 0.5, 0.5]) / 6)
    assert [atom.type for atom in atoms.config.filter] == ["zero_variance"]


def test_topr_tapers_failures_only() -> None:
    _, gradient = run("topr", [0.25, 1, 1, 0.25, 4.0, 1])
    assert torch.allclose(gradient * 6, tensor([-0.5, -0.5, -0.5, 0.125, 0.5, 0.5]))


def test_truncated_gradient_tapers_all() -> None:
    loss, gradient = run("truncated_gradient", [0.25, 4.0, 1, 0.25, 4.0, 1])
    assert torch.allclose(gradient / gradient[2], tensor([0.25, 1, 1, -0.25, -1, -1]))
    assert loss.clipped.tolist() == [False, True, False, False, True, False]


def test_kimi_pulls_back_to_the_policy_that_sampled() -> None:
    moved = run("kimi_k1_5", [math.e, 1, 1, 1, 1, 1])[1] - run("kimi_k1_5", [1.0] * 6)[1]
    assert torch.allclose(moved * 6, tensor([0.1, 0, 0, 0, 0, 0]))


def test_aepo_keeps_what_grpo_clips_and_prefers_uncertain_tokens() -> None:
    entropy = [3.0, 1, 1, 1, 1, 1]
    _, gradient = run("aepo", [2.0, 1, 1, 1, 1, 1], entropy=entropy)
    factor = 1 + 0.2 * (3 - 8 / 6) / tensor(entropy).std().item()
    rest = 1 + 0.2 * (1 - 8 / 6) / tensor(entropy).std().item()
    assert float(gradient[0] / gradient[1]) == pytest.approx(1.28 * factor / rest) and factor > 1.3
    assert run("dapo", [2.0, 1, 1, 1, 1, 1])[1][0] == 0


def test_dppo_bounds_the_change_of_probability() -> None:
    rare = tensor([-7.0, -1.0, -1, -1, -1, -1])
    tokens, _ = two_samples([1.0] * 6)
    tokens = tokens.with_columns(behaviour=rare, proximal=rare)
    current = rare + tensor([2.0, 0.6, 0, 0, 0, 0])  # ratio 7.4 of a rare token; a common one from 0.37 to 0.67
    loss, gradient = step_loss(preset("dppo"), tokens, current, credited=False)
    assert loss.clipped.tolist() == [False, True, False, False, False, False] and signs(gradient)[:3] == [-1, 0, -1]
    assert step_loss(preset("grpo"), tokens, current, credited=False)[0].clipped.tolist()[:2] == [True, True]


def test_vespo_fades_responses_that_are_far_away() -> None:
    near, far = (run("vespo", [r] * 3 + [1.0] * 3)[1] for r in (1.0, 2.0))
    assert float(far[0] / near[0]) == pytest.approx(64 * math.exp(3 * (1 - 8)), rel=1e-6)
    assert torch.equal(far[3:], near[3:])


STALE = [8.0, 1.0, 0.25, 1.0, 1.0, 1.0]


def test_tis_caps_icepop_and_decoupled_drop() -> None:
    weights = {name: run(name, [1.0] * 6, STALE)[0].weight[:3].tolist() for name in ("tis", "icepop", "decoupled_ppo")}
    assert weights["tis"] == pytest.approx([2, 1, 0.25])
    assert weights["icepop"] == pytest.approx([0, 1, 0]) and weights["decoupled_ppo"] == pytest.approx([0, 1, 0.25])
    loss, gradient = run("icepop", [1.0] * 6, STALE)
    assert loss.dropped["mask"].tolist() == [True, False, True, False, False, False] and signs(gradient)[:3] == [0, -1, 0]
    assert float(gradient[1] / -gradient[3]) == pytest.approx(1), "the denominator keeps the dropped tokens"


def test_mis_drops_whole_responses() -> None:
    drifted, gradient = run("mis", [1.0] * 6, [1.3] * 3 + [1.05, 0.95, 1.0])
    assert drifted.dropped["mask"].tolist() == [True] * 3 + [False] * 3 and signs(gradient) == [0, 0, 0, 1, 1, 1]
    vetoed, _ = run("mis", [1.0] * 6, [1e-5, 1e5, 1.0, 1, 1, 1])
    assert vetoed.dropped["veto"].tolist() == [True] * 3 + [False] * 3 and not vetoed.dropped["mask"].any()


def test_m2po_clips_the_outlier_alone() -> None:
    ratios = [1.4, 1.3, 6.0, 1.0, 0.8, 0.9]
    clipped = {name: run(name, ratios)[0].clipped.tolist() for name in ("m2po", "grpo")}
    assert clipped["m2po"] == [False, False, True, False, False, False] and sum(clipped["grpo"]) >= 3
    wide = preset("m2po", bounds={"type": "second_moment", "budget": 4.0, "low": 0.85, "high": 1.1})
    tokens, current = two_samples(ratios)
    assert sum(step_loss(wide, tokens, current, credited=False)[0].clipped.tolist()) == 4, "a budget that is kept: the tightest"


def test_m2po_mask_drops_the_fewest() -> None:
    loss, _ = run("m2po_mask", [1.0] * 6, [4.0, 1.1, 1.1, 0.9, 1.0, 1.0])
    assert loss.dropped["m2po"].tolist() == [True] + [False] * 5
    assert not run("m2po_mask", [1.0] * 6, [1.1] * 6)[0].dropped["m2po"].any()


def test_opsm_drops_failures_that_the_policy_has_left() -> None:
    loss, gradient = run("opsm", [0.5] * 6)
    assert loss.dropped["opsm"].tolist() == [False] * 3 + [True] * 3 and signs(gradient) == [-1] * 3 + [0] * 3
    assert not run("opsm", [1.0] * 6)[0].dropped["opsm"].any()


def test_remix_centres_the_clip_on_the_present_policy() -> None:
    apart = two_samples([1.0, 1.5, 1, 1, 1, 1], [2.0, 2.0, 2, 1, 1, 1])
    loss, gradient = step_loss(preset("remix", penalties={}), *apart, credited=False)
    assert loss.clipped.tolist() == [False, True, False, False, False, False] and signs(gradient)[:2] == [-1, 0]
    anchored = preset("remix", bounds={"type": "constant"})
    tokens, current = two_samples([1.0] * 6, [2.0, 2.0, 2, 1, 1, 1])
    assert step_loss(anchored, tokens, current, credited=False)[0].clipped.tolist()[:3] == [True] * 3
    away, _ = run("remix", [1.0] * 6, reference=[-2.0] * 6)
    assert float(away.parts["kl_convex_loss"]) == pytest.approx(0.001 * 0.7 * (math.exp(-1) + 1 - 1))


def test_clip_cov_and_kl_cov_act_on_the_token_that_loses_most_entropy() -> None:
    ratios = [math.exp(0.9), 1, 1, math.exp(-2.9), 1, 1]
    loss, gradient = run("clip_cov", ratios)
    assert loss.dropped["clip_cov"].tolist() == [False, False, False, True, False, False] and gradient[3] == 0
    held, free = run("kl_cov", ratios)[1], step_loss(preset("kl_cov", penalties={}), *two_samples(ratios), credited=False)[1]
    assert signs(held - free) == [0, 0, 0, -1, 0, 0]


def test_penalties_pull_where_they_should() -> None:
    near = run("grpo_kl", [1.0] * 6)[1]
    pulled = run("grpo_kl", [1.0] * 6, reference=[-2.0] * 3 + [-1.0] * 3)[1] - near
    assert signs(pulled) == [1, 1, 1, 0, 0, 0], "more likely than under the reference: pushed down"
    tokens, current = two_samples([1.0] * 6)
    atoms, entropy = preset("entropy_regularised"), torch.ones(6, dtype=torch.float64).requires_grad_()
    staged = stage(atoms, credit(atoms, tokens).with_columns(current=current)).with_columns(current_entropy=entropy)
    total = policy_loss(atoms, current.requires_grad_(), staged).total
    assert torch.allclose(torch.autograd.grad(total, entropy)[0], tensor([-0.001 / 6] * 6))


def test_imitation_learns_from_solved_groups_too() -> None:
    tokens, current = two_samples([1.0] * 6)
    solved = tokens.with_columns(reward=torch.ones(6).double(), correct=torch.ones(6).double())
    assert signs(step_loss(preset("positive_nll"), solved, current, credited=False)[1]) == [-1] * 6
    assert signs(step_loss(preset("grpo"), solved, current, credited=False)[1]) == [0] * 6
    both = (
        step_loss(preset("positive_nll"), tokens, current, credited=False)[1]
        - step_loss(preset("dapo"), tokens, current, credited=False)[1]
    )
    assert torch.allclose(both, tensor([-0.1 / 3] * 3 + [0] * 3))


@pytest.mark.parametrize("name", ["dpo", "ipo", "simpo", "rpo"])
def test_pair_presets_separate_the_best_from_the_worst(name: str) -> None:
    reward = tensor([1, 1, 0.4, 0.4, 0, 0, 0.7, 0.7])
    tokens = batch_of([2, 2, 2, 2], [0, 0, 0, 1], reward=reward, correct=(reward > 0.5).double(), proximal=[-1.0] * 8,
                      behaviour=[-1.0] * 8, reference=[-1.0] * 8)  # fmt: skip
    loss, gradient = step_loss(preset(name), tokens, tokens["proximal"], credited=False)
    middle = 1 if name == "rpo" else 0  # unsolved: a loser of all its pairs
    assert signs(gradient) == [-1, -1, middle, middle, 1, 1, 0, 0]
    assert loss.parts["policy_loss"] == 0 and float(loss.parts[f"{name}_loss"]) > 0


def test_rpo_stops_where_the_margins_agree_and_dpo_does_not() -> None:
    tokens = batch_of(
        [1, 1], [0, 0], reward=[1.0, 0], correct=[1.0, 0], proximal=[-1.0, -1], behaviour=[-1.0, -1], reference=[-1.0, -1]
    )
    there = tensor([4.0, -6.0])  # beta * delta = 0.1 * 10 = the margin of the rewards
    assert step_loss(preset("rpo"), tokens, there, credited=False)[1].abs().max() < 1e-12
    assert step_loss(preset("dpo"), tokens, there, credited=False)[1].abs().max() > 0.01
