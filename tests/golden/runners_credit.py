"""Golden cases of the advantages: returns and values, groups, steps, trees and sets."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from april.algorithms.advantages import group, returns, sets, steps, tree
from april.algorithms.advantages.adjust import whiten
from april.algorithms.columns import Layout, TokenBatch
from april.algorithms.prefix_tree import prefix_tree
from april.algorithms.rewards.siblings import mean_across
from tests.golden.golden_helpers import Case, Values, clip_options, group_numbers, loss_of, matrix, packed, runs, samples_of


def ragged(lengths: list[int], groups: list[int], **columns: Any) -> TokenBatch:
    """Columns over samples of these lengths, in the default dtype; integers stay integers."""
    size = torch.tensor(lengths)
    layout = Layout(torch.cat([size.new_zeros(1), size.cumsum(0)]), torch.tensor(groups), max(groups) + 1)
    full = {name: torch.as_tensor(column) for name, column in columns.items()}
    full = {name: c.to(torch.get_default_dtype()) if c.is_floating_point() else c for name, c in full.items()}
    mask = torch.ones(layout.num_tokens, dtype=torch.bool)
    return TokenBatch(layout, {"mask": mask, "trained": mask, **full})


def floats(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.get_default_dtype())


@runs("reward_to_go_minus_greedy_baseline_remax")
def _remax(case: Case) -> Values:
    tokens = packed(case)
    baseline = floats(case["inputs"]["baseline"])
    tokens = tokens.with_columns(reward=torch.zeros_like(tokens["token_reward"]), baseline=tokens.layout.spread(baseline))
    gamma = case["params"]["gamma"]
    found = returns.reward_to_go(tokens, gamma=gamma, baseline="baseline")
    return {"returns": matrix(returns.reward_to_go(tokens, gamma=gamma), tokens), "adv": matrix(found, tokens)}


@runs("gae_advantage")
def _gae(case: Case) -> Values:
    tokens = packed(case)
    tokens = tokens.with_columns(reward=torch.zeros_like(tokens["value"]))
    found = returns.gae(tokens, gamma=case["params"]["gamma"], lam=case["params"]["lam"])
    white = whiten(found["advantage"], tokens)
    return {
        "adv_raw": matrix(found["advantage"], tokens),
        "returns": matrix(found["return"], tokens),
        "adv_whitened": matrix(white, tokens),
    }


@runs("egae_truncated_vs_finished")
def _egae(case: Case) -> Values:
    inputs, params = case["inputs"], case["params"]
    found = {}
    for name, finished, reward in (("adv_truncated", False, 9.0), ("adv_finished", True, inputs["finished_token_reward"][-1])):
        tokens = ragged([4], [0], value=floats(inputs["value"]), reward=floats([reward] * 4), finished=[finished] * 4)
        found[name] = returns.gae(tokens, **params, unfinished="hold")["advantage"].tolist()
    return found


@runs("grpo_degenerate_zero_std_and_singleton")
def _singleton(case: Case) -> Values:
    return {"adv": group.group_relative(samples_of(case), eps=case["params"]["eps"], singleton="raw").tolist()}


@runs("hapo_token_level_group_average")
def _hapo(case: Case) -> Values:
    tokens = packed(case)
    params = case["params"]
    return {"adv": matrix(group.token_weighted(tokens, eps=params["eps"], limit=params["fallback_abs"]), tokens)}


@runs("loop_leave_one_out")
def _loop(case: Case) -> Values:
    inputs, params = case["inputs"], case["params"]
    rows = {name: [[value] for value in inputs[name]] for name in ("logp", "old_logp")}
    inputs = {**rows, "reward": inputs["reward"], "group_id": ["q"] * params["k"], "mask": [[1.0]] * params["k"]}
    bounds = {**params, "eps_low": params["eps"], "eps_high": params["eps"]}
    whole = {**case, "inputs": inputs, "params": bounds}
    tokens, _, loss = loss_of(whole, advantage="leave_one_out", **clip_options(whole))
    return {"adv": tokens["advantage"].tolist(), "loss": float(loss.total)}


@runs("pvpo_static_anchor")
def _pvpo(case: Case) -> Values:
    rewards, measured = floats(case["inputs"]["reward"]), floats(case["inputs"]["anchor_rewards"])
    tokens = ragged([1] * 4, [0] * 4, reward=rewards).with_columns(**{"item.anchor": measured.mean().expand(4)})
    return {"anchor": float(tokens["item.anchor"][0]), "adv": returns.reward_to_go(tokens, baseline="item.anchor").tolist()}


@runs("grape_confidence_weighted")
def _grape(case: Case) -> Values:
    score, sure = floats(case["inputs"]["score"]), floats(case["inputs"]["confidence"])
    columns = {f"part.{j}": score[:, j] for j in range(3)} | {f"part.{j}_confidence": sure[:, j] for j in range(3)}
    tokens = ragged([1] * 3, [0] * 3).with_columns(**columns)
    weights = {str(j): weight for j, weight in enumerate(case["inputs"]["weight"])}
    mean, reward = group.rubric_rewards(tokens, weights)
    return {
        "mean_confidence": mean[:, 0].tolist(),
        "reward": reward.tolist(),
        "adv": group.rubric(tokens, items=weights).tolist(),
    }


@runs("gigpo_advantage")
def _gigpo(case: Case) -> Values:
    inputs, params = case["inputs"], case["params"]
    lengths = [3, 2, 1]
    columns = {"turn": torch.tensor([0, 1, 2, 0, 1, 0]), "anchor": group_numbers(inputs["anchor_obs"])}
    # the whole return of each trajectory is the step reward of its last step
    tokens = ragged(lengths, [0, 0, 0], reward=floats(inputs["episode_return"]), **columns)
    rows = steps.Steps.of(tokens)
    gained = steps.step_returns(steps.step_rewards(tokens, rows), ~rows.last, params["gamma"], rows.longest)
    return {
        "step_return": gained.tolist(),
        "adv_mean_norm": steps.anchored(tokens, **params).tolist(),
        "adv_mean_std_norm": steps.anchored(tokens, **params, std="sample").tolist(),
    }


@runs("ui_s1_discounted_return")
def _ui_s1_returns(case: Case) -> Values:
    goes_on = torch.tensor(case["inputs"]["matches_expert"])
    goes_on[-1] = False
    rewards = floats(case["inputs"]["step_reward"])
    return {"returns": steps.step_returns(rewards, goes_on, case["params"]["gamma"], 4).tolist()}


@runs("ui_s1_advantage")
def _ui_s1(case: Case) -> Values:
    inputs, params = case["inputs"], case["params"]
    index = torch.tensor(inputs["step_index"])
    tokens = ragged([2, 2], [0, 0], turn=index, anchor=index)
    rows, options = steps.Steps.of(tokens), {"eps": params["eps"]}
    episode = steps.episode_credit(floats(inputs["episode_reward"])[::2], rows, tokens.layout, **options)
    step = steps.index_credit(floats(inputs["step_return"]), rows, tokens.layout, **options)
    return {"adv": (params["w_episode"] * episode + params["w_step"] * step).tolist()}


def tree_tokens(case: Case, repeat: int = 1) -> TokenBatch:
    """Paths such as "q#1-0#2-1" as tokens: each item below the root is a segment of `repeat` tokens."""
    paths = [[int(item.split("-")[1]) for item in path.split("#")[1:]] for path in case["inputs"]["path"]]
    ids = [token for path in paths for item in path for token in [item] * repeat]
    lengths = [len(path) * repeat for path in paths]
    tokens = ragged(lengths, [0] * len(paths), token_ids=ids)
    return tokens.with_columns(reward=tokens.layout.spread(floats(case["inputs"]["reward"])))


@runs("treepo_subgroup_advantage_average", "treepo_subgroup_advantage_group_size")
def _subgroups(case: Case) -> Values:
    tokens = tree_tokens(case)
    found = tree.subgroups(tokens, strategy=case["params"]["strategy"], segment_tokens=1)
    unit = tokens.layout.first(found)
    # the case whitens over two tokens a leaf
    pairs = ragged([2] * len(unit), [0] * len(unit))
    return {"adv_unit": unit.tolist(), "adv_whitened": whiten(unit.repeat_interleave(2), pairs).reshape(-1, 2).tolist()}


@runs("treepo_segment_advantage")
def _segment_gain(case: Case) -> Values:
    size = case["params"]["segment_size"]
    tokens = tree_tokens(case, repeat=size)
    found = tree.segment_gain(tokens, segment_tokens=size).reshape(6, -1)
    own = tree.tree_of(tokens, size, ())
    every = torch.ones_like(own.node, dtype=torch.bool)
    return {
        "leaf_adjusted": tree.over_ancestors(tokens, own, every, "group_size").tolist(),
        "token_adv_unwhitened": found.tolist(),
    }


@runs("tree_grpo_inter_plus_intra")
def _inter_intra(case: Case) -> Values:
    rewards, trees = floats(case["inputs"]["reward"]), group_numbers(case["inputs"]["tree_id"])
    ids = torch.stack([trees, torch.arange(len(trees))], 1).reshape(-1)
    tokens = ragged([2] * len(trees), [0] * len(trees), token_ids=ids, reward=rewards.repeat_interleave(2))
    eps = case["params"]["eps"]
    inter = tokens.layout.first(group.group_relative(tokens, eps=eps))
    found = tokens.layout.first(tree.inter_and_intra(tokens, segment_tokens=1, eps=eps))
    return {"inter": inter.tolist(), "intra": (found - inter).tolist(), "adv": found.tolist()}


@runs("branch_grpo_depthwise")
def _depthwise(case: Case) -> Values:
    inputs, params = case["inputs"], case["params"]
    leaves = list(inputs["leaf_reward"])
    paths = [[inputs["parent"][leaf], leaf] for leaf in leaves]
    names = list(inputs["edge_logp"])
    ids = [names.index(name) for path in paths for name in path]
    edges = floats([inputs["edge_logp"][name] for path in paths for name in path])
    rewards = floats(list(inputs["leaf_reward"].values()))
    tokens = ragged([2] * 4, [0] * 4, token_ids=ids, behaviour=edges, reward=rewards.repeat_interleave(2))
    options = {"temperature": params["temperature"], "eps": params["eps"], "limit": params["adv_clip"]}
    found = tree.depthwise(tokens, fusion="softmax", segment_tokens=1, **options).reshape(4, 2)
    own = prefix_tree(tokens["token_ids"], tokens.layout, torch.ones(8, dtype=torch.bool))
    edge_of_node = floats([0.0] * 6).index_copy(0, own.node_of_token, edges)
    values = tree.fused(own, rewards, edge_of_node, params["temperature"])[own.node_of_token].reshape(4, 2)
    return {
        "fused": [float(values[0, 0]), float(values[2, 0])],
        "depth1_a_b": [float(found[0, 0]), float(found[2, 0])],
        "depth2_a1_a2_b1_b2": found[:, 1].tolist(),
    }


@runs("polychromic_set_advantage")
def _polychromic(case: Case) -> Values:
    inputs = case["inputs"]
    members = torch.tensor(inputs["sets"])
    score = sets.set_scores(floats(inputs["vine_return"]), group_numbers(inputs["signature"]), members)
    return {"f": score.tolist(), "baseline": float(score.mean()), "set_adv": sets.relative(score).tolist()}


@runs("ps_grpo_group_similarity")
def _ps_grpo(case: Case) -> Values:
    paraphrase = np.array(case["inputs"]["paraphrase_id"])
    reward = floats(mean_across(np.array(case["inputs"]["similarity"]), paraphrase).tolist())
    tokens = ragged([1] * 4, paraphrase.tolist(), reward=reward)
    return {"reward": reward.tolist(), "adv": group.group_relative(tokens, eps=case["params"]["eps"]).tolist()}
