"""Golden cases of ratios, bounds, surrogates, corrections, penalties and pair losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from april.algorithms.advantages.adjust_entropy import entropy_scale
from april.algorithms.columns import TokenBatch
from april.algorithms.losses import bounds, pairs, penalties, weights
from april.algorithms.losses.aggregate import token_mean
from april.algorithms.losses.objectives import value
from april.algorithms.losses.ratio import interpolated
from april.algorithms.losses.surrogate import cispo
from tests.golden.golden_helpers import Case, Values, loss_of, matrix, packed, runs


def one(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.get_default_dtype())


def rows(values: Tensor, tokens: TokenBatch) -> list[list[float]]:
    """(N,) as a (B, T) matrix, padding included."""
    return values.reshape(tokens.layout.num_samples, -1).tolist()  # type: ignore[no-any-return]


def each_loss(case: Case, surrogate: dict[str, Any], limits: Any = False, **columns: Tensor) -> list[list[float]]:
    """The loss of every token under a surrogate."""
    from april.algorithms.losses.compose import Algorithm
    from april.algorithms.spec import AlgorithmConfig

    atoms = Algorithm.of(AlgorithmConfig.model_validate({"surrogate": surrogate, "bounds": limits}))
    tokens = packed(case).with_columns(**columns)
    low_high = None if atoms.bounds is None else atoms.bounds(tokens)
    ratio = atoms.ratio(tokens["current"], tokens["proximal"], tokens)
    loss, _ = atoms.surrogate(ratio, tokens["current"], tokens["advantage"], low_high, tokens)
    return matrix(loss, tokens)


def limits_of(case: Case) -> dict[str, Any]:
    return {"type": "constant", "low": 1 - case["params"]["eps_low"], "high": 1 + case["params"]["eps_high"]}


@runs("cispo_loss", "cispo_gradient")
def _cispo(case: Case) -> Values:
    tokens, gradient, loss = loss_of(case, surrogate="cispo", bounds=limits_of(case))
    like = torch.ones_like(tokens["advantage"])
    low_high = (like * (1 - case["params"]["eps_low"]), like * (1 + case["params"]["eps_high"]))
    log_ratio = tokens["current"] - tokens["proximal"]
    weight, _ = cispo(log_ratio, -like, like, low_high, tokens)  # the weight alone: advantage 1, log-prob -1
    return {"weight": matrix(weight, tokens), "loss": float(loss.total), "grad_logp": matrix(gradient, tokens)}


@runs("cispo_unified_mask")
def _cispo_unified(case: Case) -> Values:
    return {"loss_mat": each_loss(case, {"type": "cispo", "outside": "drop_harmful"}, limits_of(case))}


@runs("sapo_soft_gate")
def _sapo(case: Case) -> Values:
    params = case["params"]
    gate = {"type": "soft_gate", "temperature_positive": params["tau_pos"], "temperature_negative": params["tau_neg"]}
    _, _, loss = loss_of(case, surrogate=gate, bounds=False)
    return {"loss": float(loss.total)}


@runs("topr_loss")
def _topr(case: Case) -> Values:
    inner = {name: values for name, values in case["inputs"].items() if name != "outcome"}
    correct = one(case["inputs"]["outcome"]).repeat_interleave(len(inner["logp"][0]))
    surrogate = {"type": "topr", "positive": case["params"]["pos_weight"], "negative": case["params"]["neg_weight"]}
    return {"loss_mat": each_loss({**case, "inputs": inner}, surrogate, correct=correct)}


@runs("roll_tis_loss")
def _truncated_gradient(case: Case) -> Values:
    limits = {"type": "constant", "low": case["params"]["low"], "high": case["params"]["high"]}
    return {"loss_mat": each_loss(case, {"type": "cispo"}, limits)}


@runs("kimi15_loss")
def _kimi(case: Case) -> Values:
    return {"loss_mat": each_loss(case, {"type": "mirror", "tau": case["params"]["tau"]})}


@runs("mis_mask_geometric_veto")
def _mis(case: Case) -> Values:
    tokens, params = packed(case), case["params"]
    log_w = weights.log_weight(tokens)
    kept = weights.masked(tokens, low=params["geo_low"], high=params["geo_high"], level="sequence_mean", keep="one")
    inside = weights.masked(tokens, low=params["token_low"], high=params["token_high"], keep="one")
    mask = kept * weights.veto(tokens, below=params["veto"])
    ratio = tokens.layout.mean(log_w, tokens["mask"]).exp()
    outside = [float(inside[row]) for row in (6,)]  # token 2 of sample 1 is outside the token band as well
    assert outside == [0.0]
    return {"weight": matrix(log_w.exp(), tokens), "mask": matrix(mask * inside, tokens), "geo_ratio": ratio.tolist()}


@runs("mis_token_k1_rejection")
def _rejection(case: Case) -> Values:
    tokens = packed(case)
    kept = weights.reject(tokens, statistic="k1", low=case["params"]["low"], high=case["params"]["high"])
    return {"mask": matrix(kept, tokens)}


@runs("decoupled_ppo_sequence_clamp")
def _sequence_clamp(case: Case) -> Values:
    params = case["params"]
    clamp = {"type": "tis", "low": params["low"], "cap": params["high"], "level": "sequence_mean"}
    clip = {"type": "clip", "dual_clip": params["dual_clip"]}
    tokens, _, loss = loss_of(case, surrogate=clip, weights={"clamp": clamp})
    return {"loss": float(loss.total), "weight": matrix(loss.weight, tokens)}


@runs("proximal_loglinear_approximation")
def _interpolated(case: Case) -> Values:
    inner = {name: values for name, values in case["inputs"].items() if name != "version"}
    version = torch.tensor(case["inputs"]["version"]).reshape(-1)
    mask = (version >= 0).int().reshape(len(inner["logp"]), -1).tolist()
    tokens = packed({**case, "inputs": {**inner, "mask": mask}})
    lag = torch.where(version < 0, 0, case["params"]["current_version"] - 1 - version)
    estimate = interpolated(tokens["behaviour"], tokens["current"], lag)
    alpha = interpolated(torch.zeros_like(estimate), torch.ones_like(estimate), lag)
    return {"alpha": matrix(alpha, tokens), "prox_logp": matrix(estimate, tokens)}


@runs("off_policy_sequence_mask")
def _opsm(case: Case) -> Values:
    tokens = packed(case)
    keep = weights.off_policy_sequences(tokens, max_divergence=case["params"]["delta"], against="proximal")
    return {"seq_kl": weights.mean_divergence(tokens, "proximal").tolist(), "keep": rows(keep, tokens)}


@runs("m2po_mask_all_tokens")
def _m2po(case: Case) -> Values:
    inputs = {("old_logp" if name == "prox_logp" else name): values for name, values in case["inputs"].items()}
    tokens = packed({**case, "inputs": inputs})
    keep = weights.second_moment(tokens, budget=case["params"]["m2_threshold"])
    squares, kept = weights.log_weight(tokens).square(), tokens["mask"] & (keep > 0)
    after = squares[kept].mean()
    return {"mask": matrix(keep, tokens), "m2_before": float(squares[tokens["mask"]].mean()), "m2_after": float(after)}


@runs("m2po_harmful_quadrant_bounds")
def _m2po_bounds(case: Case) -> Values:
    tokens, params = packed(case), case["params"]
    squares, harmful = bounds.harmful_squares(tokens, "proximal")
    tau = float(bounds.second_moment_limit(squares, params["m2_budget"]))
    low, high = bounds.second_moment(
        tokens,
        budget=params["m2_budget"],
        low=1 - params["min_clip_low"],
        high=1 + params["min_clip_high"],
        anchor="proximal",
    )
    found = {"ratio_low": float(torch.tensor(-tau).exp()), "ratio_high": float(torch.tensor(tau).exp())}
    found |= {"m2_before": float(squares.mean()), "n_harmful": int(harmful.sum())}
    return found | {"eps_low": 1 - float(low[0]), "eps_high": float(high[0]) - 1}


@runs("remix_mix_ppg_shifted_clip")
def _remix(case: Case) -> Values:
    inputs = {("old_logp" if name == "current_policy_logp" else name): values for name, values in case["inputs"].items()}
    eps, ratio = case["params"]["eps"], {"type": "token", "anchor": "behaviour"}
    renamed = {**case, "inputs": inputs}
    _, _, loss = loss_of(renamed, ratio=ratio, bounds={"type": "shifted", "width_low": eps, "width_high": eps})
    tokens = packed(renamed)
    centre, _ = bounds.shifted(tokens, width_low=0.0, width_high=0.0)
    return {"centre": matrix(centre, tokens), "loss": float(loss.total)}


@runs("remix_kl_convex")
def _convex(case: Case) -> Values:
    steps = torch.tensor(case["inputs"]["steps"], dtype=torch.get_default_dtype())
    lam = penalties.convex_share(steps, 50, 10, 0.1, 0.5)
    names = {"base_logp": "ref_logp", "prev_policy_logp": "old_logp"}
    inputs = {names.get(name, name): values for name, values in case["inputs"].items() if name != "steps"}
    tokens = packed({**case, "inputs": inputs})
    tokens = tokens.with_columns(step=torch.full_like(tokens["mask"], 75, dtype=torch.int64))
    loss = penalties.convex(tokens["current"], tokens, previous="proximal")
    return {"lam": lam.tolist(), "kl_at_lam_0_7": float((loss * token_mean(tokens)).sum())}


@runs("hapo_adaptive_clip")
def _entropy_bounds(case: Case) -> Values:
    tokens, params = packed(case), case["params"]
    scored = tokens.with_columns(entropy_score=tokens["h"])
    low, high = bounds.entropy(scored, low=1 - params["eps_low"], high=1 + params["eps_high"], strength=params["alpha"])
    return {"eps_low": matrix(1 - low, tokens), "eps_high": matrix(high - 1, tokens)}


@runs("aepo_entropy_balanced_loss_and_gradient")
def _aepo(case: Case) -> Values:
    tokens, params = packed(case), case["params"]
    adv = entropy_scale(tokens["advantage"], tokens, strength=params["adv_coef"])
    inner = {**case, "inputs": {**case["inputs"], "adv": matrix(adv, tokens)}}
    surrogate = {"type": "clip_keep_gradient", "dual_clip": params["dual_clip"]}
    found, gradient, loss = loss_of(inner, surrogate=surrogate, bounds=limits_of(case))
    return {"adv": matrix(adv, tokens), "loss": float(loss.total), "grad_logp": matrix(gradient, found)}


@runs("value_loss_clipped")
def _value(case: Case) -> Values:
    tokens = packed(case)
    tokens = tokens.with_columns(**{"value": tokens["value_old"], "return": tokens["returns"]})
    loss = value(tokens["value_pred"], tokens, clip=case["params"]["clip_value"])
    return {"loss": float((loss * token_mean(tokens)).sum())}


def margins(case: Case, *, average: bool = False, reference: bool = True) -> pairs.Margins:
    inputs = {name: one(values) for name, values in case["inputs"].items()}
    sides = []
    for side in ("chosen", "rejected"):
        total = inputs[f"policy_{side}"] - (inputs[f"ref_{side}"] if reference else 0)
        sides.append(total / inputs[f"len_{side}"] if average else total)
    score = inputs["reward_chosen"] - inputs["reward_rejected"] if "reward_chosen" in inputs else torch.zeros_like(sides[0])
    return pairs.Margins(sides[0], sides[1], score)


@runs("dpo_family_pair_losses")
def _pairs(case: Case) -> Values:
    params, summed, averaged = case["params"], margins(case), margins(case, average=True)
    beta = params["beta"]
    found = {name: pairs.LOSSES[name](summed, beta=beta).tolist() for name in ("dpo", "hinge")}
    found["sppo_hard"] = pairs.sppo(summed, beta=beta).tolist()
    found["bco_pair"] = pairs.bco(summed, beta=beta, centre=0.0).tolist()
    found["ipo_sum"], found["ipo_length_avg"] = pairs.ipo(summed, beta=beta).tolist(), pairs.ipo(averaged, beta=beta).tolist()
    bare = margins(case, average=True, reference=False)
    found["simpo"] = pairs.simpo(bare, beta=params["simpo_beta"], margin=params["simpo_gamma"]).tolist()
    return found


@runs("rpo_pairwise")
def _rpo(case: Case) -> Values:
    m, beta, eta = margins(case), case["params"]["beta"], case["params"]["eta"]
    names = {"rpo_sq": "squared", "rpo_bwd_kl": "backward_kl", "rpo_fwd_kl": "forward_kl"}
    return {key: float(pairs.rpo(m, beta=beta, eta=eta, distance=name).mean()) for key, name in names.items()}  # type: ignore[arg-type]
