"""Every preset trains on rollouts of the packaged policy and shows there what it is for; plain GRPO shows none of it.

.venv/bin/python -m pytest tests/integration/test_presets_train.py
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from april.config.load import recipe_names
from april.core.group import Group
from april.models.policy import Policy
from tests.integration.preset_rollouts import LINE, Outcome, executed, moved_policy, outcome_of, pulls, rollouts

pytestmark = pytest.mark.slow
Effect = Callable[[Outcome, Outcome], bool]
"""(what the preset came to, what GRPO came to) -> whether the preset's own effect is seen."""


def acts(key: str, least: float = 0.0) -> Effect:
    """A metric is above `least` in one of the updates."""
    return lambda own, _: own.most(key) > least


def advantage(outcome: Outcome) -> Tensor:
    """(S,): credit of each sample's first token."""
    return outcome.sample("advantage")


def inside(own: Outcome, _: Outcome) -> bool:
    """Tokens of one sample have different credit."""
    layout, mask, credit = own.tokens.layout, own.tokens["mask"], own.tokens["advantage"]
    away = (credit - layout.spread(layout.mean(credit, mask)))[mask]
    return float(away.abs().max()) > 1e-3


def judged(outcome: Outcome) -> Tensor:
    return torch.tensor([reward.value for reward in outcome.data.rewards], dtype=torch.float64)


def reshaped(own: Outcome, _: Outcome) -> bool:
    """Samples that were judged alike, and rightly, earn different rewards."""
    reward, right = own.sample("reward"), own.sample("correct") > 0
    return not torch.allclose(reward, judged(own)) and float(reward[right].std()) > 1e-6


def constant(outcome: Outcome) -> Tensor:
    """bool (S,): samples of groups that were judged alike throughout."""
    layout, value = outcome.tokens.layout, judged(outcome)
    mean = layout.group_sum(value) / layout.group_sum(torch.ones_like(value)).clamp(min=1)
    spread = layout.group_sum((value - mean[layout.group_of_sample]).abs())
    return (spread < 1e-9)[layout.group_of_sample]


def learns_from_constant(own: Outcome, _: Outcome) -> bool:
    """Groups that were judged alike have credit."""
    return float(advantage(own)[constant(own)].abs().max()) > 1e-3


def minus_greedy(own: Outcome, _: Outcome) -> bool:
    """The credit is the reward minus that of the group's greedy answer, which does not train."""
    if "baseline" not in own.tokens or any(sample.spec.greedy for sample in own.data.samples):
        return False
    greedy = own.sample("baseline")
    return torch.equal(advantage(own), judged(own) - greedy) and set(greedy.tolist()) == {0.0, 1.0}


def other_credit(own: Outcome, grpo: Outcome) -> bool:
    """On the same samples the credit is not GRPO's, nor a multiple of it in each group."""
    if len(advantage(own)) != len(advantage(grpo)):
        return False
    layout, a, b = own.tokens.layout, advantage(own), advantage(grpo)
    cross, own_norm, norm = (layout.group_sum(x) for x in (a * b, a * a, b * b))
    return bool((cross.square() < 0.999 * own_norm * norm).any())


def filters(own: Outcome, _: Outcome) -> bool:
    """Groups are dropped, and would be sampled again."""
    return own.num_filtered > 0 and not bool(constant(own).any())


def selects(own: Outcome, grpo: Outcome) -> bool:
    """Fewer tokens train than were sampled."""
    return own.rows[0]["num_tokens_trained"] < grpo.rows[0]["num_tokens_trained"] - 1


def both(*effects: Effect) -> Effect:
    return lambda own, grpo: all(effect(own, grpo) for effect in effects)


def clips(mechanism: Callable[[Outcome], bool]) -> Effect:
    """A bound acts in training, and acts as the preset's own does."""
    return lambda own, _: own.most("clip_fraction") > 0 and mechanism(own)


def all_are(values: Tensor, expected: float) -> bool:
    """Whether there are values, all of them this one."""
    known = values[~values.isnan()]
    return len(known) > 0 and bool(((known - expected).abs() < 1e-9).all())


def raised(outcome: Outcome) -> Tensor:
    """bool (N,): tokens that the credit makes likelier."""
    return outcome.tokens["trained"] & (outcome.tokens["advantage"] > 0)


def lowered(outcome: Outcome) -> Tensor:
    return outcome.tokens["trained"] & (outcome.tokens["advantage"] < 0)


def wider_above(high: float, low: float = 0.8) -> Callable[[Outcome], bool]:
    """The pull of what rises is as free as the ratio up to `high` and none beyond; of what falls down to `low`."""

    def seen(own: Outcome) -> bool:
        up, down = raised(own), lowered(own)
        free = all_are(pulls(own, high - 0.02)[up], high - 0.02) and all_are(pulls(own, low + 0.02)[down], low + 0.02)
        return free and all_are(pulls(own, high + 0.02)[up], 0) and all_are(pulls(own, low - 0.02)[down], 0)

    return seen


def by_entropy(own: Outcome) -> bool:
    """At one ratio uncertain tokens that rise are free, and certain ones that fall; the others are clipped."""
    entropy, splits = own.tokens["entropy"], []
    for ratio, side, sign in ((1.3, raised(own), 1), (0.7, lowered(own), -1)):
        pull = pulls(own, ratio)
        free, stopped = (sign * entropy[side & mask] for mask in (pull > 0, pull == 0))
        splits.append(len(free) > 0 and len(stopped) > 0 and float(free.min()) > float(stopped.max()))
    return all(splits)


def keeps_capped_pull(cap: float) -> Callable[[Outcome], bool]:
    """Beyond the bound what rises is pulled as at the bound."""
    return lambda own: all_are(pulls(own, 2.0)[raised(own)], cap)


def bounds_the_weight(cap: float) -> Callable[[Outcome], bool]:
    """The weight of every token, rising or falling, is its ratio up to `cap`."""

    def seen(own: Outcome) -> bool:
        either = raised(own) | lowered(own)
        return all_are(pulls(own, 2.0)[either], cap) and all_are(pulls(own, 0.5)[either], 0.5)

    return seen


def tapers_failures(own: Outcome) -> bool:
    """Solved samples have full weight at any ratio, the others their ratio up to 1."""
    solved, failed = own.tokens["correct"] > 0, own.tokens["correct"] == 0
    halved, doubled = pulls(own, 0.5), pulls(own, 2.0)
    return all_are(halved[solved], 1) and all_are(halved[failed], 0.5) and all_are(doubled, 1)


def bounds_probability(own: Outcome) -> bool:
    """At one ratio the tokens that rise stop exactly where their probability grew by more than 0.2."""
    pull, grown = pulls(own, 1.3), 0.3 * own.tokens["behaviour"].exp()
    up = raised(own) & ~pull.isnan()
    return bool(((pull == 0) == (grown > 0.2))[up].all()) and 0 < int((pull[up] == 0).sum()) < int(up.sum())


def has_a_budget(own: Outcome) -> bool:
    """How far a token may go depends on how many go far: a twentieth at 1.7 is free while as many at 3 stop; all at 1.7 stop."""
    tokens, up = own.tokens, raised(own).nonzero().squeeze(-1)
    harmful = int((raised(own) | lowered(own)).sum())
    creeping = 1 + 1e-3 * tokens["advantage"].sign()

    def pulled(*moves: tuple[Tensor, float]) -> Tensor:
        ratios = creeping.clone()
        for chosen, ratio in moves:
            ratios[chosen] = ratio
        return pulls(own, ratios)

    few, others = up[: harmful // 20], up[harmful // 20 : 2 * (harmful // 20)]
    spread, crowd = pulled((few, 1.7), (few[:1], 1.8), (others, 3.0)), pulled((up, 1.7))
    return all_are(spread[few[1:]], 1.7) and all_are(spread[others], 0) and all_are(crowd[up], 0)


def follows_the_policy(own: Outcome) -> bool:
    """The bounds stand around where the policy before the update is, not around the one that sampled."""
    up = raised(own)
    free = all_are(pulls(own, 1.6, moved=1.5)[up], 1.6) and all_are(pulls(own, 1.1)[up], 1.1)
    return free and all_are(pulls(own, 1.8, moved=1.5)[up], 0) and all_are(pulls(own, 1.6)[up], 0)


def ladder(own: Outcome, _: Outcome) -> bool:
    """Programs that pass earn more than 0.5, the fast ones 1; the others by how far they came."""
    reward, right = own.sample("reward"), own.sample("correct") > 0
    fast, slow = float(reward[right].max()), float(reward[right].min())
    return fast > 0.99 and 0.5 < slow < 0.6 and {round(x, 6) for x in reward[~right].tolist()} == {-0.3, -0.6, -1.0}


def gains(own: Outcome, _: Outcome) -> bool:
    """Programs that pass earn by their speed against the one to improve; all others have broken it."""
    reward, right = own.sample("reward"), own.sample("correct") > 0
    fast, slow = float(reward[right].max()), float(reward[right].min())
    return abs(fast - 0.6404) < 1e-3 and fast - slow > 1e-3 and all_are(reward[~right], -0.3)


def weighs_the_query(own: Outcome, _: Outcome) -> bool:
    """The weighted parts of what the queries did, the best of them 9."""
    return {round(x, 6) for x in own.sample("reward").tolist()} == {9.0, 7.0, 6.0, 2.5, 2.0, 5.0, 0.0}


def whitened(own: Outcome, _: Outcome) -> bool:
    """Mean 0 and variance 1 over the tokens of the batch."""
    credit = own.tokens["advantage"][own.tokens["mask"]]
    return abs(float(credit.mean())) < 1e-6 and abs(float(credit.var()) - 1) < 1e-3


def pairs_alone(name: str) -> Effect:
    """Pairs train, and nothing else does."""
    return lambda own, _: own.most(f"{name}_loss") > 0 and all(row["policy_loss"] == 0 for row in own.rows)


def unscaled(own: Outcome, grpo: Outcome) -> bool:
    """The credit is the reward minus a mean: at most 1, and smaller than what is divided by a standard deviation."""
    return float(advantage(own).abs().max()) <= 8 / 7 + 1e-6 < float(advantage(grpo).abs().max())


def same_ratio(own: Outcome, _: Outcome) -> bool:
    """The ratio is that of the whole sample: clipped to within a band that is far narrower than what tokens do."""
    return own.config.ratio.type == "sequence" and own.most("clip_fraction") > 0.02


def moved_unclipped(own: Outcome, _: Outcome) -> bool:
    """Ratios are far beyond the usual bounds, and nothing is clipped."""
    far = own.most("ratio_max") > 1.3 or min(row["ratio_mean"] for row in own.rows) < 0.7
    return far and own.most("clip_fraction") == 0


def extremes(own: Outcome, _: Outcome) -> bool:
    """Right answers weigh a tenth of wrong ones."""
    return {round(value, 6) for value in advantage(own).tolist()} == {0.1, -1.0}


def plus_or_minus_one(own: Outcome, _: Outcome) -> bool:
    """A mixed pair has +1 and -1."""
    found = advantage(own).abs()
    return len(own.data.rewards) == 12 and bool(((found - 1).abs() < 1e-3).any()) and float(found.max()) < 1.001


def sure_of_few(own: Outcome, _: Outcome) -> bool:
    """Only the most uncertain tokens have credit."""
    used = (own.tokens["advantage"] != 0) & own.tokens["mask"]
    entropy = own.tokens["entropy"]
    return 0 < int(used.sum()) < 0.25 * len(used) and float(entropy[used].min()) > float(entropy[own.tokens["mask"]].median())


def few_trained(own: Outcome, _: Outcome) -> bool:
    """Of half the samples, a fifth of the tokens: those of large credit and entropy."""
    trained, entropy = own.tokens["trained"], own.tokens["entropy"]
    return int(trained.sum()) < 0.2 * len(trained) and float(entropy[trained].min()) > float(entropy.median())


def rarer_counts_more(own: Outcome, grpo: Outcome) -> bool:
    """The rarest success stands out from the most common one more than under GRPO."""
    ratios = []
    for outcome in (own, grpo):
        won = advantage(outcome)[(outcome.sample("correct") > 0) & ~constant(outcome)]
        ratios.append(float(won.max() / won.min()))
    return ratios[0] > 1.2 * ratios[1]


def held(own: Outcome, _: Outcome) -> bool:
    """A sample that was cut has no surprise at its last token: its value is held there."""
    layout, last = own.tokens.layout, own.tokens.layout.offsets[1:] - 1
    cut = ~own.tokens["finished"][last]
    inner = own.tokens["advantage"][last[cut]]
    return own.most("value_loss") > 0 and layout.num_samples > 0 and float(inner.std()) < 1e-6


LINES = [f"algorithm.advantage.delimiter_ids=[{LINE}]"]
NODES = ["algorithm.advantage.segment_tokens=2"]
EFFECTS: dict[str, tuple[Effect, list[str]]] = {
    # preset: its effect, and overrides that the packaged policy's short answers ask for
    "grpo": (acts("clip_fraction"), []),
    "dr_grpo": (both(unscaled, acts("clip_fraction")), []),
    "two_grpo": (plus_or_minus_one, ["batch.group_size=2"]),
    "rloo": (unscaled, []),
    "loop": (both(unscaled, acts("clip_fraction")), []),
    "opo": (other_credit, []),
    "max_rl": (rarer_counts_more, []),
    "pass_at_k": (rarer_counts_more, []),
    "gdpo": (both(learns_from_constant, whitened), []),
    "grape": (learns_from_constant, []),
    "reinforce": (learns_from_constant, []),
    "reinforce_pp": (both(learns_from_constant, whitened), []),
    "reinforce_pp_baseline": (whitened, []),
    "remax": (minus_greedy, []),
    "pvpo": (learns_from_constant, []),
    "weighted_reinforce": (extremes, []),
    "ppo": (both(inside, acts("value_loss")), []),
    "t_ppo": (both(inside, held), []),
    "gigpo": (inside, LINES),
    "ui_s1": (inside, LINES),
    "treepo": (other_credit, NODES),
    "treepo_segment": (inside, NODES),
    "tree_grpo": (other_credit, NODES),
    "branch_grpo": (inside, NODES),
    "polychromic": (learns_from_constant, []),
    "dapo": (both(filters, clips(wider_above(1.28))), []),
    "dapo_overlong": (both(filters, selects), []),
    "gpg": (filters, []),
    "ktae": (both(filters, inside), []),
    "hapo": (both(filters, clips(by_entropy)), []),
    "aepo": (both(inside, clips(keeps_capped_pull(1.28))), []),
    "entropy_advantage": (inside, []),
    "ettrl": (other_credit, []),
    "top_entropy": (sure_of_few, []),
    "d3s": (both(selects, few_trained), []),
    "xrpo": (other_credit, []),
    "gspo": (same_ratio, []),
    "gspo_token": (same_ratio, []),
    "luspo": (same_ratio, []),
    "gmpo": (clips(wider_above(1.49182, 0.67032)), []),
    "cispo": (clips(bounds_the_weight(1.28)), []),
    "truncated_gradient": (clips(bounds_the_weight(1.0)), []),
    "topr": (clips(tapers_failures), []),
    "sapo": (moved_unclipped, []),
    "kimi_k1_5": (moved_unclipped, []),
    "vespo": (moved_unclipped, []),
    "dppo": (clips(bounds_probability), []),
    "tis": (acts("weight_changed_fraction"), []),
    "icepop": (acts("mask_dropped_fraction"), []),
    "decoupled_ppo": (acts("mask_dropped_fraction"), ["algorithm.weights.mask.high=2.0"]),
    "mis": (acts("mask_dropped_fraction"), []),
    "m2po": (clips(has_a_budget), []),
    "m2po_mask": (acts("m2po_dropped_fraction"), []),
    "opsm": (acts("opsm_dropped_fraction"), []),
    "clip_cov": (acts("clip_cov_dropped_fraction"), []),
    "kl_cov": (acts("kl_cov_loss"), []),
    "remix": (both(acts("kl_convex_loss"), clips(follows_the_policy)), []),
    "grpo_kl": (both(acts("k3_loss"), acts("kl_reference")), []),
    "kl_in_reward": (reshaped, []),
    "entropy_regularised": (lambda own, _: min(row.get("entropy_loss", 0.0) for row in own.rows) < 0, []),
    "positive_nll": (acts("nll_loss"), []),
    "dpo": (pairs_alone("dpo"), []),
    "ipo": (pairs_alone("ipo"), []),
    "simpo": (pairs_alone("simpo"), []),
    "rpo": (pairs_alone("rpo"), []),
    "econprover": (both(acts("num_left_out_samples"), pairs_alone("dpo")), []),
    "grpo_roc": (both(filters, acts("num_left_out_samples")), []),
    "pods": (acts("num_left_out_samples"), []),
    "fapo": (reshaped, []),
    "jet": (reshaped, []),
    "hbpo": (reshaped, ["algorithm.reward=[{ type = 'budget', scale_tokens = 64 }]"]),
    "ps_grpo": (reshaped, []),
    "masa": (lambda own, _: not torch.allclose(own.sample("reward"), judged(own)), []),
    "xrouter": (reshaped, []),
    "router_r1": (reshaped, []),
    "acecode": (both(reshaped, ladder), []),
    "afterburner": (both(reshaped, gains), []),
    "reex_sql": (both(reshaped, weighs_the_query), []),
    "sfpo": (lambda own, _: own.rows[0]["optimizer_steps"] == 8 and own.rows[0]["reposition_alpha"] == 0.8, []),
    "adept": (lambda own, _: [row["optimizer_steps"] for row in own.rows] == [2, 4], ["algorithm.update.max_kl=100.0"]),
}
SHARED = {"grpo", "tis"}
"""Whose effect plain GRPO has, too."""


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> tuple[Group, ...]:
    torch.set_num_threads(1)
    return rollouts(Path(tmp_path_factory.mktemp("presets")))


@cache
def policies() -> tuple[Policy, Policy]:
    """Where training starts, and the reference: each a little off the policy that sampled."""
    return moved_policy(0.03, 1), moved_policy(0.03, 2)


@pytest.fixture(scope="module")
def grpo(groups: tuple[Group, ...]) -> Outcome:
    return outcome_of("grpo", groups, *policies(), [])


def test_every_preset_has_an_effect_to_show() -> None:
    assert sorted(EFFECTS) == recipe_names("algorithm")


def test_the_rollouts_have_what_presets_need(groups: tuple[Group, ...], grpo: Outcome) -> None:
    accuracy = [sum(reward.correct for _, reward in group.sampled.rewarded) for group in groups]
    assert sum(0 < right < 8 for right in accuracy) >= 2 and 8 in accuracy
    assert {sample.stop for group in groups for sample in group.samples} == {"eos", "length"}
    assert (
        all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in grpo.rows)
        and grpo.rows[1]["weight_changed_fraction"] > 0
    )


@pytest.mark.parametrize("name", EFFECTS)
def test_the_preset_trains_and_shows_its_effect(name: str, groups: tuple[Group, ...], grpo: Outcome) -> None:
    effect, extra = EFFECTS[name]
    own = outcome_of(name, executed(name, groups), *policies(), extra)
    assert all(math.isfinite(row["loss"]) for row in own.rows)
    assert sum(row["optimizer_steps"] for row in own.rows) >= 2 and own.most("grad_norm") > 0
    assert effect(own, grpo), {key: value for row in own.rows for key, value in row.items()}
    assert name in SHARED or not effect(grpo, grpo), "GRPO has no such effect"
