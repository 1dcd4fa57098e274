"""Golden cases of the atoms of first light: group advantages, clipping, truncated weights, aggregates."""

from __future__ import annotations

import torch

from april.algorithms.advantages.adjust import whiten
from april.algorithms.advantages.group import group_relative, leave_one_out
from april.algorithms.columns import Layout, TokenBatch
from april.algorithms.filters import zero_variance
from april.algorithms.losses import penalties, weights
from april.algorithms.losses.compose import Algorithm, shares
from april.algorithms.rewards.length import overlong
from april.algorithms.spec import AlgorithmConfig
from april.core.group import Group, Reward
from april.core.ids import GroupId
from april.core.prompt import Prompt
from april.core.sample import Sample
from april.core.sampling import SamplingSpec
from tests.golden.golden_helpers import (
    AGGREGATES,
    Case,
    Values,
    clip_options,
    deviation,
    loss_of,
    matrix,
    packed,
    runs,
    samples_of,
)


@runs("grpo_advantage_std", "grpo_advantage_no_std", "two_grpo_pairs", "rloo_advantage")
def _advantage(case: Case) -> Values:
    tokens, params = samples_of(case), case["params"]
    if case["name"] == "rloo_advantage":
        return {"adv": leave_one_out(tokens).tolist()}
    std = {"unbiased": "sample", "population": "population"}.get(params.get("std", ""), "none")
    out = {"adv": group_relative(tokens, std=std, eps=params.get("eps", 1e-6)).tolist()}  # type: ignore[arg-type]
    if case["name"] == "two_grpo_pairs":
        out["adv_unbiased_std"] = group_relative(tokens, std="sample", eps=0.0).tolist()
    return out


@runs("reinforce_pp_baseline_advantage")
def _whitened(case: Case) -> Values:
    tokens = packed(case)
    return {"adv": matrix(whiten(group_relative(tokens, std="none"), tokens, eps=case["params"]["eps"]), tokens)}


@runs("dapo_overlong_soft_punishment")
def _overlong(case: Case) -> Values:
    lengths, reward = (
        torch.tensor(case["inputs"]["length"]),
        torch.tensor(case["inputs"]["reward"], dtype=torch.get_default_dtype()),
    )
    layout = Layout(torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]), torch.zeros_like(lengths), 1)
    params = {
        "max_tokens": case["params"]["max_len"],
        "buffer_tokens": case["params"]["buffer"],
        "factor": case["params"]["factor"],
    }
    changed = layout.first(overlong(TokenBatch(layout, {"reward": layout.spread(reward)}), **params))
    return {"reward": changed.tolist(), "penalty": (changed - reward).tolist()}


@runs("dapo_dynamic_sampling_mask")
def _filter(case: Case) -> Values:
    ids, rewards = case["inputs"]["group_id"], case["inputs"]["reward"]
    keep = []
    for name in ids:
        mine = [Reward(r, r >= 1) for r, other in zip(rewards, ids, strict=True) if other == name]
        group = GroupId(0, 0, name)
        prompt = Prompt(name, [1])  # type: ignore[arg-type]
        members = tuple(Sample(group.member(i), prompt, SamplingSpec(1), stop="eos") for i in range(len(mine)))
        keep.append(zero_variance(Group(group, members, tuple(mine))) is None)
    return {"keep": keep}


@runs("reinforce_loss_token_mean")
def _plain(case: Case) -> Values:
    _, _, loss = loss_of(case, surrogate="plain", bounds=False, ratio="token")
    return {"loss": float(loss.total)}


@runs("ppo_clip_loss", "ppo_dual_clip", "dapo_clip_higher_token_mean")
def _clip(case: Case) -> Values:
    tokens, _, loss = loss_of(case, **clip_options(case))
    atoms = Algorithm.of(AlgorithmConfig.model_validate(clip_options(case)))
    log_ratio = tokens["current"] - tokens["proximal"]
    each, _ = atoms.surrogate(log_ratio, tokens["current"], tokens["advantage"], atoms.bounds(tokens), tokens)  # type: ignore[misc]
    return {"loss": float(loss.total), "loss_mat": matrix(each, tokens)}


@runs("gspo_loss", "gspo_token_gradient")
def _gspo(case: Case) -> Values:
    tokens, gradient, loss = loss_of(case, **clip_options(case), ratio="sequence")
    ratio = tokens.layout.first(loss.log_ratio).exp()
    return {"loss": float(loss.total), "grad_logp": matrix(gradient, tokens), "seq_ratio": ratio.tolist()}


@runs("kl_estimators")
def _kl(case: Case) -> Values:
    tokens = packed(case)
    values = {"k1": tokens["current"] - tokens["reference"]}
    values |= {"k2": penalties.k2(tokens["current"], tokens), "k3": penalties.k3(tokens["current"], tokens)}
    return {name: matrix(value, tokens) for name, value in values.items()}


@runs("aggregate_token_mean", "aggregate_seq_mean_token_sum", "aggregate_seq_mean_token_mean")
def _aggregate(case: Case) -> Values:
    tokens = packed(case)
    atoms = Algorithm.of(AlgorithmConfig.model_validate({"aggregate": AGGREGATES[case["params"]["mode"]]}))
    return {"loss": float((tokens["loss_mat"] * shares(atoms, tokens)["share"]).sum())}


@runs("aggregate_seq_mean_token_sum_norm")
def _constant(case: Case) -> Values:
    tokens = packed(case)
    width = len(case["inputs"]["mask"][0])
    atoms = Algorithm.of(AlgorithmConfig.model_validate({"aggregate": {"type": "constant", "constant": width}}))
    return {"loss": float((tokens["loss_mat"] * shares(atoms, tokens)["share"]).sum())}


@runs("tis_token_truncated")
def _tis(case: Case) -> Values:
    tokens = packed(case)
    weight = weights.truncated(tokens, cap=case["params"]["cap"])
    weighted = weight * tokens["pg_loss_mat"]
    return {
        "weight": matrix(weight, tokens),
        "weighted_loss_mat": matrix(weighted, tokens),
        "flat_weighted": weighted[tokens["mask"]].tolist(),
    }


@runs("tis_sequence_and_normalised")
def _tis_sequence(case: Case) -> Values:
    tokens = packed(case)
    normalised = weights.truncated_normalised(tokens, cap=case["params"]["cap"])
    sequence = weights.truncated(tokens, cap=case["params"]["cap"], level="sequence")
    return {"weight_sequence": matrix(sequence, tokens), "weight_token_batch_norm": matrix(normalised, tokens)}


@runs("icepop_weight")
def _icepop(case: Case) -> Values:
    tokens = packed(case)
    weight = weights.masked(tokens, low=case["params"]["alpha"], high=case["params"]["beta"])
    return {"weight": matrix(weight, tokens), "flat_weighted": (weight * tokens["pg_loss_mat"])[tokens["mask"]].tolist()}


@runs("decoupled_ppo_token_mask")
def _decoupled(case: Case) -> Values:
    mask = {"type": "mask", "low": 0.0, "high": case["params"]["cap"]}
    tokens, _, loss = loss_of(case, weights={"mask": mask})
    return {"loss": float(loss.total), "weight": matrix(loss.weight, tokens)}


@runs("pipeline_grpo_cliphigher_tis_kl")
def _pipeline(case: Case) -> Values:
    penalty = {"k3": {"coefficient": case["params"]["kl_coef"]}}
    tokens, _, loss = loss_of(case, **clip_options(case), weights={"tis": {"cap": case["params"]["tis_cap"]}}, penalties=penalty)
    kl = float(loss.parts["k3_loss"]) / case["params"]["kl_coef"]
    values = {"adv": matrix(tokens["advantage"], tokens), "total": float(loss.total)}
    return values | {"pg_loss": float(loss.parts["policy_loss"]), "kl_loss": kl}


@runs("on_policy_gradient_identity")
def _identity(case: Case) -> Values:
    found: Values = {}
    for mode in ("token-mean", "seq-mean-token-mean"):
        every = []
        for options in ({}, {"surrogate": "plain", "bounds": False}, {"ratio": "sequence"}):
            tokens, gradient, _ = loss_of({**case, "params": {"agg": mode}}, **options)
            every.append(matrix(gradient, tokens))
        last_bits = 1e-12 if torch.get_default_dtype() == torch.float64 else 1e-6
        assert deviation(every[0], every[1]) < last_bits and deviation(every[0], every[2]) < last_bits
        found["grad_logp_" + mode.replace("-", "_")] = every[0]
    return found
