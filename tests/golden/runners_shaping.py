"""Golden cases of shaping: rewards, adjusted advantages, composers and the formulas of allocation."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from april.algorithms.advantages import adjust, adjust_entropy, key_tokens
from april.algorithms.advantages.across import query_relative
from april.algorithms.advantages.adjust_samples import max_variance_samples
from april.algorithms.advantages.group import group_relative
from april.algorithms.columns import Layout, TokenBatch
from april.algorithms.composers import preferred, roc_select, widest
from april.algorithms.rewards import length, parts
from april.rewards.flaws import process_reward
from april.rewards.meta import Prediction, Rollouts, meta_parts
from april.rewards.traces import answer_slips, error_share
from april.rewards.workflow import success_probability, workflow_value
from april.selection import allocation
from tests.golden.golden_helpers import Case, Values, group_numbers, matrix, numbers, packed, runs


def per_sample(lengths: list[int], groups: list[str] | None = None, **columns: list[Any]) -> TokenBatch:
    """Samples of these lengths with columns that are constant in each; "reward" is 0 unless given."""
    size = torch.tensor(lengths)
    ids = torch.zeros_like(size) if groups is None else group_numbers(groups)
    layout = Layout(torch.cat([size.new_zeros(1), size.cumsum(0)]), ids, int(ids.max()) + 1)
    values = {"reward": [0.0] * len(lengths), **columns}
    spread = {name: layout.spread(torch.tensor(value, dtype=torch.get_default_dtype())) for name, value in values.items()}
    mask = torch.ones(layout.num_tokens, dtype=torch.bool)
    return TokenBatch(layout, {"mask": mask, "trained": mask, **spread})


def ones(case: Case, name: str, **columns: list[Any]) -> TokenBatch:
    """One token a sample, as many as the input of this name has."""
    return per_sample([1] * len(case["inputs"][name]), **columns)


def firsts(values: Tensor, tokens: TokenBatch) -> list[float]:
    return tokens.layout.first(values).tolist()  # type: ignore[no-any-return]


@runs("ktae_token_weights")
def _ktae(case: Case) -> Values:
    tokens, params = packed(case), case["params"]
    tokens = tokens.with_columns(token_ids=tokens["token_ids"].long(), correct=tokens["reward"])
    value = key_tokens.association(
        tokens, scale=params["scale"], fisher=params["alpha"], gain=params["beta_ig"], frequency=params["gamma_tf"] > 0
    )
    ids = tokens["token_ids"]
    by_id = [next(iter(value[tokens["mask"] & (ids == one)].tolist()), 0.0) for one in range(int(ids.max()) + 1)]
    advantage = key_tokens.key_tokens(group_relative(tokens, eps=params["eps"]), tokens)
    informative = [one for one, weight in enumerate(by_id) if abs(weight) > 1e-3]
    return {
        "token_weight_by_id": by_id,
        "informative_ids": informative,
        "weights_of_informative_ids": [by_id[one] for one in informative],
        "adv": matrix(advantage, tokens),
    }


@runs("hapo_normalised_entropy")
def _entropy_score(case: Case) -> Values:
    tokens, quantile = packed(case), case["params"]["pivot_quantile"]
    zero = torch.zeros_like(tokens["entropy"])
    found = {
        name: adjust_entropy.normalised_entropy(zero, tokens, pivot_quantile=quantile, signed=signed)["entropy_score"]
        for name, signed in (("h_signed", True), ("h_as_released", False))
    }
    return {name: matrix(value, tokens) for name, value in found.items()}


@runs("hapo_differential_advantage")
def _differential(case: Case) -> Values:
    tokens = packed(case)
    factor = adjust_entropy.differential_factor(
        tokens["h"], tokens["ratio"], 1 - tokens["eps_low"], 1 + tokens["eps_high"], strength=case["params"]["beta"]
    )
    return {"adv": matrix(tokens["advantage"] * factor, tokens)}


@runs("aepo_rollout_budget")
def _aepo_budget(case: Case) -> Values:
    inputs, params = case["inputs"], case["params"]
    pairs = zip(inputs["H_root"], inputs["H_tool_mean"], strict=True)
    options = {"weight": params["branch_weight"], "penalty": params["penalty"]}
    return {
        "m": [allocation.whole_rollouts(root, tool, inputs["k"], sharpness=params["beta"]) for root, tool in pairs],
        "branch_score_u0_6_dH1_l0_l4": [allocation.branch_score(0.6, 1.0, row, **options) for row in (0, 4)],
    }


@runs("ettrl_advantage_reshape")
def _ettrl(case: Case) -> Values:
    tokens, beta = packed(case), case["params"]["clip_beta"]
    entropy, known = adjust_entropy.known_entropy(tokens)
    return {
        "resp_entropy": tokens.layout.mean(entropy, known).tolist(),
        "scale": adjust_entropy.reshape_factor(tokens).tolist(),
        "adv_res": matrix(adjust_entropy.entropy_reshape(tokens["advantage"], tokens), tokens),
        "adv_clip": matrix(adjust.clip(tokens["advantage"], tokens, low=-beta, high=beta), tokens),
    }


@runs("ettrl_fork_token_ratio")
def _fork(case: Case) -> Values:
    inputs = case["inputs"]
    cost = allocation.fork_cost(inputs["M"], forks_per_root=inputs["N"], branches=inputs["B"])
    return {"rollouts": cost.rollouts, "token_ratio": cost.token_fraction}


@runs("d3s_selection")
def _d3s(case: Case) -> Values:
    inputs, params = case["inputs"], case["params"]
    score = inputs["sample_adv"]
    chosen = widest(score, params["n_keep"])
    samples = per_sample([2] * len(score), advantage=score)
    samples = samples.with_columns(token_ids=torch.arange(2 * len(score)))
    kept = max_variance_samples(samples["advantage"], samples, fraction=params["n_keep"] / len(score))
    keep = firsts(kept["trained"], samples)
    assert [index for index, one in enumerate(keep) if one] == chosen
    tokens = packed({"inputs": {"adv": inputs["token_adv"], **{name: inputs[name] for name in ("entropy", "mask")}}})
    one = adjust_entropy.top_tokens(
        tokens["advantage"], tokens, fraction=params["top_fraction"], by="advantage_entropy", renormalise=True
    )
    return {
        "sample_keep": keep,
        "variance": float(np.var([score[index] for index in chosen])),
        "token_key": matrix(tokens["advantage"].abs() * tokens["entropy"], tokens),
        "token_keep": matrix(one["trained"].to(tokens["entropy"].dtype), tokens),
    }


@runs("d3s_schedule")
def _d3s_schedule(case: Case) -> Values:
    params = case["params"]

    def shares(name: str) -> list[float]:
        at = [per_sample([1], step=[100 * progress]) for progress in case["inputs"]["progress"]]
        return [adjust_entropy.share_of_step(tokens, params[f"{name}_init"], params[f"{name}_final"], 100) for tokens in at]

    return {"n": shares("n"), "k": shares("k")}


@runs("fapo_reward")
def _fapo(case: Case) -> Values:
    inputs, params = case["inputs"], case["params"]
    tokens = ones(case, "correct", correct=inputs["correct"], **{"part.flawed": inputs["flawed"]})
    rewards = {"right": params["correct_reward"], "wrong": params["wrong_reward"], "penalty": params["penalty"]}
    return {"reward": firsts(parts.flaw_penalty(tokens, **rewards), tokens)}


@runs("fapo_genrm_process_reward")
def _process(case: Case) -> Values:
    names = ("predicted_step", "true_step", "total_steps")
    return {"reward": [process_reward(*row) for row in zip(*(case["inputs"][name] for name in names), strict=True)]}


@runs("jet_length_reward")
def _jet(case: Case) -> Values:
    inputs, params = case["inputs"], case["params"]
    columns = {"correct": inputs["correct"], "part.format": inputs["format_ok"]}
    tokens = per_sample(inputs["length"], inputs["group_id"], **columns)
    options = {"strength": params["alpha"], "floor": params["delta"]}
    reward = length.shorter_is_better(
        tokens, correct_weight=params["w_acc"], format_weight=params["w_format"], format_part="part.format", **options
    )
    return {"length_reward": length.length_reward(tokens, **options).tolist(), "reward": firsts(reward, tokens)}


@runs("jet_truncation_points")
def _cuts(case: Case) -> Values:
    params = case["params"]
    options = {"first_fraction": params["t0_fraction"], "step_fraction": params["step_fraction"], "extra": params["K"]}
    return {"cut": allocation.cut_points(case["inputs"]["full_length"], **options)}


@runs("hbpo_reward_and_advantage")
def _hbpo(case: Case) -> Values:
    inputs, params = case["inputs"], case["params"]
    columns = {"correct": inputs["correct"], "item.budget": inputs["budget"], "item.query": [7.0] * len(inputs["length"])}
    tokens = per_sample(inputs["length"], inputs["group_id"], **columns)
    tokens = tokens.with_columns(reward=length.budget_reward(tokens, scale_tokens=params["max_len"]))
    inter = query_relative(tokens, eps=params["eps"])
    once, twice = (adjust.budget_gap(inter, tokens, weight=weight, scale_tokens=params["max_len"]) for weight in (1.0, 2.0))
    found = {"reward": tokens["reward"], "inter": inter, "intra": once - inter, "adv_intra_once": once, "adv_as_released": twice}
    return {name: firsts(value, tokens) for name, value in found.items()}


@runs("grpo_roc_penalties")
def _roc_penalties(case: Case) -> Values:
    texts = case["inputs"]["text"]
    return {"error_ratio": [error_share(text) for text in texts], "answer_format": [answer_slips(text) for text in texts]}


@runs("grpo_roc_selection")
def _roc(case: Case) -> Values:
    inputs, params = case["inputs"], case["params"]
    chosen = roc_select(
        inputs["reward"],
        inputs["penalty"],
        params["keep"],
        min_wrong=params["min_zero"],
        min_right=params["min_nonzero"],
        order=range(len(inputs["reward"])),
    )
    num_right = sum(inputs["reward"][index] > 0 for index in chosen)
    return {"n_zero": len(chosen) - num_right, "n_nonzero": num_right, "keep_index": chosen}


@runs("xrouter_cost_reward")
def _xrouter(case: Case) -> Values:
    inputs, params = case["inputs"], case["params"]
    tokens = ones(case, "score", reward=inputs["score"], **{"part.cost": inputs["cost"]})
    options = {"base": params["K"], "price": params["lam"], "max_discount": params["cost_max"]}
    return {"reward": firsts(parts.cost_discount(tokens, **options), tokens)}


@runs("router_r1_cost_and_reward")
def _router_r1(case: Case) -> Values:
    inputs, params = case["inputs"], case["params"]
    prices = torch.tensor(inputs["price"], dtype=torch.get_default_dtype())
    grown = [
        parts.cheapness(prices[index : index + 1], prices[: index + 1], params["q_low"], params["q_high"]).item()
        for index in range(len(prices))
    ]
    score, form = (torch.tensor([float(one[name]) for one in inputs["cases"]]) for name in ("em", "format"))
    cheap = torch.full_like(score, params["cost_reward"])
    return {"cost_reward": grown, "reward": parts.blended(score, form, cheap, params["alpha"]).tolist()}


@runs("acecode_pass_branch")
def _acecode(case: Case) -> Values:
    inputs = case["inputs"]
    columns = {"part.time_s": inputs["t_generated"], "item.reference_time_s": inputs["t_reference"]}
    tokens = ones(case, "t_reference", correct=[1.0] * 3, **columns)
    return {"reward": firsts(parts.speed_ladder(tokens, cap=case["params"]["cap"]), tokens)}


@runs("afterburner_reward")
def _afterburner(case: Case) -> Values:
    inputs, params = case["inputs"], case["params"]
    columns = {
        "part.time_s": inputs["time"],
        "part.format": inputs["format_ok"],
        "item.baseline_time_s": inputs["baseline_time"],
        "item.baseline_passes": inputs["baseline_pass"],
    }
    tokens = ones(case, "time", correct=inputs["pass_"], **columns)
    options = {"sharpness": params["scale"], "max_time_s": params["clip"]}
    weights = {
        "improve_weight": params["beta_improve"],
        "format_weight": params["beta_format"],
        "gain_weight": params["eff_weight"],
    }
    reward = parts.improvement(tokens, format_part="part.format", **options, **weights)
    improved = parts.improvement(tokens, **options, **{**weights, "improve_weight": 1.0, "format_weight": 0.0})
    passed = parts.pass_change(tokens["item.baseline_passes"], tokens["correct"])
    gain = parts.speed_gain(tokens["item.baseline_time_s"], tokens["part.time_s"], **options)
    found = {"pass_reward": passed, "efficiency": gain, "improvement": improved, "reward": reward}
    return {name: firsts(value, tokens) for name, value in found.items()}


@runs("reex_sql_composite")
def _reex(case: Case) -> Values:
    columns = {f"part.{name}": values for name, values in case["inputs"].items()}
    weights = {name: case["params"][f"w_{name.removeprefix('part.')}"] for name in columns}
    tokens = ones(case, "format", **columns)
    return {"reward": firsts(parts.weighted_parts(tokens, weights=weights), tokens)}


@runs("opus_expected_reward")
def _opus(case: Case) -> Values:
    inputs, params = case["inputs"], case["params"]
    success = {name: (inputs["p"][name], inputs["q"][name]) for name in inputs["order"]}
    p_output = success_probability(inputs["parents"], success, inputs["order"][-1])
    cost = sum(inputs["cost"].values())
    weights = {"gain": params["gain"], "cost_weight": params["cost_weight"]}
    total = workflow_value(p_output, cost, params["penalty"], penalty_weight=params["penalty_weight"], **weights)
    return {"p_output": p_output, "reward": workflow_value(p_output, cost, {}, **weights), "total": total}


@runs("masa_meta_reward")
def _masa(case: Case) -> Values:
    said, made = case["inputs"]["prediction"], case["inputs"]["rollouts"]
    found = meta_parts(
        Prediction(said["math_notion"], said["solution_length"], said["pass_rate"]),
        Rollouts(made["problem"], made["response"], [score > 0 for score in made["score"]], made["length"]),
        base=case["params"]["base"],
        num_rollouts=case["params"]["n_rollouts_scale"],
    )
    return {**found, "reward": sum(found.values()) / 3}


@runs("xrpo_novelty_sharpening")
def _xrpo(case: Case) -> Values:
    inputs, params = case["inputs"], case["params"]
    columns = {"reward": inputs["reward"], "correct": inputs["reward"], "behaviour": inputs["mean_logp"]}
    tokens = per_sample([3] * 4, inputs["group_id"], **columns)
    sharpened = adjust.novelty(group_relative(tokens, eps=params["eps"]), tokens, strength=params["lam"], cap=params["kappa"])
    return {"novelty": adjust.likelihood_in_group(tokens).tolist(), "adv": firsts(sharpened, tokens)}


@runs("xrpo_allocator")
def _xrpo_allocator(case: Case) -> Values:
    n, std, total = (case["inputs"][name] for name in ("n", "std", "T"))
    confidence = case["params"]["confidence"]
    return {
        "half_width_n": allocation.half_width(std, n, confidence),
        "half_width_n1": allocation.half_width(std, n + 1, confidence),
        "gain": allocation.uncertainty_gain(std, n, confidence=confidence),
        "bonus": allocation.exploration_bonus(n, total, strength=case["params"]["lam"]),
    }


@runs("econprover_switch_pairs")
def _switch(case: Case) -> Values:
    pairs = zip(case["inputs"]["short_pass"], case["inputs"]["long_pass"], strict=True)
    return {"chosen": numbers([{True: "cot", False: "no_cot", None: None}[preferred(*pair)] for pair in pairs])}
