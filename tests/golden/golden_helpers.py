"""What all runners of golden cases share: the file's inputs as our columns, and the comparison.

A runner computes what one or more cases expect; `runners_*.py` hold them by family. All work in torch's default dtype, so
that each case runs in float64 and in float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from april.algorithms.columns import Layout, TokenBatch
from april.algorithms.losses.compose import Algorithm, policy_loss, shares
from april.algorithms.spec import AlgorithmConfig

PATH = Path(__file__).resolve().parents[3] / "shared" / "methods" / "golden_objectives.json"
NAMES = {"logp": "current", "old_logp": "proximal", "behave_logp": "behaviour", "ref_logp": "reference", "adv": "advantage"}
"""The file's words for our columns."""
AGGREGATES = {"token-mean": "token_mean", "seq-mean-token-mean": "sequence_mean", "seq-mean-token-sum": "sequence_sum"}

Case = dict[str, Any]
Values = dict[str, Any]
RUNNERS: dict[str, Callable[[Case], Values]] = {}


def runs(*names: str) -> Callable[[Callable[[Case], Values]], Callable[[Case], Values]]:
    def add(function: Callable[[Case], Values]) -> Callable[[Case], Values]:
        RUNNERS.update(dict.fromkeys(names, function))
        return function

    return add


def group_numbers(ids: list[str]) -> Tensor:
    order = list(dict.fromkeys(ids))
    return torch.tensor([order.index(name) for name in ids])


def packed(case: Case) -> TokenBatch:
    """The (B, T) inputs as columns; padding stays as masked tokens."""
    inputs = case["inputs"]
    first = next(value for value in inputs.values() if isinstance(value[0], list))
    rows, width = len(first), len(first[0])
    groups = group_numbers(inputs["group_id"]) if "group_id" in inputs else torch.arange(rows)
    layout = Layout(torch.arange(rows + 1) * width, groups, int(groups.max()) + 1)
    columns = {
        NAMES.get(name, name): torch.tensor(value, dtype=torch.get_default_dtype()).reshape(-1)
        for name, value in inputs.items()
        if isinstance(value[0], list) and name != "mask"
    }
    mask = torch.tensor(inputs["mask"]).reshape(-1).bool()
    if "reward" in inputs:
        columns["reward"] = torch.tensor(inputs["reward"], dtype=torch.get_default_dtype()).repeat_interleave(width)
    return TokenBatch(layout, {"mask": mask, "trained": mask, **columns})


def matrix(values: Tensor, tokens: TokenBatch) -> list[list[float]]:
    return torch.where(tokens["mask"], values, torch.zeros_like(values)).reshape(tokens.layout.num_samples, -1).tolist()  # type: ignore[no-any-return]


def samples_of(case: Case) -> TokenBatch:
    """One token a sample, from (B,) inputs."""
    reward = torch.tensor(case["inputs"]["reward"], dtype=torch.get_default_dtype())
    groups = group_numbers(case["inputs"]["group_id"])
    mask = torch.ones(len(reward), dtype=torch.bool)
    layout = Layout(torch.arange(len(reward) + 1), groups, int(groups.max()) + 1)
    return TokenBatch(layout, {"reward": reward, "mask": mask})


def loss_of(case: Case, **options: Any) -> tuple[TokenBatch, Tensor, Any]:
    """Run the composed loss on given advantages; returns columns, gradient and loss."""
    aggregate = AGGREGATES[case["params"].get("agg", "token-mean")]
    atoms = Algorithm.of(AlgorithmConfig.model_validate({"aggregate": aggregate, **options}))
    tokens = packed(case)
    if "advantage" not in tokens:
        tokens = tokens.with_columns(advantage=atoms.advantage(tokens))
    tokens = shares(atoms, tokens)
    current = tokens["current"].clone().requires_grad_()
    loss = policy_loss(atoms, current, tokens)
    (gradient,) = torch.autograd.grad(loss.total, current)
    return tokens, gradient, dataclasses.replace(loss, total=loss.total.detach())


def clip_options(case: Case) -> dict[str, Any]:
    params = case["params"]
    return {
        "bounds": {"type": "constant", "low": 1 - params["eps_low"], "high": 1 + params["eps_high"]},
        "surrogate": {"type": "clip", "dual_clip": params.get("dual_clip")},
    }


def numbers(expected: Any) -> Any:
    """What a case expects as numbers: the values of a table in its order, a name as one that is its own, none as -1."""
    if isinstance(expected, dict | list):
        return [numbers(one) for one in (expected.values() if isinstance(expected, dict) else expected)]
    return -1.0 if expected is None else float(sum(expected.encode())) if isinstance(expected, str) else expected


def deviation(got: Any, expected: Any) -> float:
    """Largest absolute difference, whatever the nesting; infinite between different shapes."""
    a, b = torch.tensor(got, dtype=torch.float64), torch.tensor(numbers(expected), dtype=torch.float64)
    return float((a - b).abs().max()) if a.shape == b.shape else float("inf")
