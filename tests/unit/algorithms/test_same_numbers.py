"""The blocks of docs/same_numbers.md against the formulas of the systems that they stand for, on (B, T) matrices."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from april.algorithms.columns import TokenBatch
from april.algorithms.losses.compose import credit, policy_loss, stage
from tests.unit.algorithms.loss_helpers import F64, algorithm, layout_of

PAGE = Path(__file__).resolve().parents[3] / "docs" / "same_numbers.md"
ROWS, WIDTH, GROUP = 6, 7, 3


class Data(NamedTuple):
    """Padded matrices (B, T), as the other systems have them; rewards (B,), groups are consecutive."""

    mask: Tensor
    behaviour: Tensor
    proximal: Tensor
    reference: Tensor
    reward: Tensor


def data() -> tuple[Data, Tensor]:
    """Three policies well apart, so that every bound acts on some token."""
    generator = torch.Generator().manual_seed(4)

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(ROWS, WIDTH, generator=generator, dtype=F64)

    lengths = torch.tensor([7, 4, 6, 2, 7, 5])
    mask = (torch.arange(WIDTH) < lengths[:, None]) & (torch.rand(ROWS, WIDTH, generator=generator) > 0.15)
    mask[:, 0] = True
    proximal = -2 * torch.rand(ROWS, WIDTH, generator=generator, dtype=F64) - 0.2
    behaviour = proximal - noise(0.5)
    behaviour[0, 1], behaviour[2, 0] = proximal[0, 1] - 1.9, proximal[2, 0] + 1.2
    current = proximal + noise(0.35)
    return Data(mask, behaviour, proximal, proximal + noise(0.3), torch.tensor([1, 0, 0.5, 0, 0.2, 1], dtype=F64)), current


def packed(d: Data) -> TokenBatch:
    layout = layout_of([WIDTH] * ROWS, [0, 0, 0, 1, 1, 1])
    names = {"mask": d.mask, "trained": d.mask, "behaviour": d.behaviour, "proximal": d.proximal, "reference": d.reference}
    columns = {name: matrix.reshape(-1) for name, matrix in names.items()}
    return TokenBatch(layout, {**columns, "reward": layout.spread(d.reward)})


def blocks() -> dict[str, dict[str, Any]]:
    """The TOML block of each system by its heading; a second one of a section as "name 2"."""
    found: dict[str, dict[str, Any]] = {}
    for section in re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        name = section.partition("\n")[0].strip()
        for number, body in enumerate(re.findall(r"^```toml preset\n([\s\S]*?)^```$", section, re.MULTILINE), 1):
            found[name if number == 1 else f"{name} {number}"] = tomllib.loads(body)
    return found


# -- what the systems compute, in their terms ------------------------------------------------------------------------------


def z_score(d: Data, eps: float) -> Tensor:
    groups = d.reward.view(-1, GROUP)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + eps)).reshape(-1, 1)


def ppo(ratio: Tensor, a: Tensor, low: float, high: float) -> Tensor:
    return -torch.min(ratio * a, ratio.clamp(low, high) * a)


def over_tokens(loss: Tensor, mask: Tensor) -> Tensor:
    return (loss * mask).sum() / mask.sum()


def over_samples(loss: Tensor, mask: Tensor) -> Tensor:
    return ((loss * mask).sum(1) / mask.sum(1)).mean()


def k3(current: Tensor, reference: Tensor) -> Tensor:
    return torch.exp(reference - current) - (reference - current) - 1


def trl(lp: Tensor, d: Data) -> Tensor:
    weight = (d.mask * (d.proximal - d.behaviour)).sum(1, keepdim=True).exp()
    weight = weight.masked_fill(weight > 3.0, 0.0)
    return over_tokens(ppo((lp - d.proximal).exp(), z_score(d, 1e-4), 0.8, 1.2) * weight, d.mask)


def trl_with_kl(lp: Tensor, d: Data) -> Tensor:
    ratio, weight = (lp - d.proximal).exp(), (d.proximal - d.behaviour).exp().clamp(max=3.0)
    return over_samples(ppo(ratio, z_score(d, 1e-4), 0.8, 1.2) * weight + 0.04 * k3(lp, d.reference) * ratio, d.mask)


def verl(lp: Tensor, d: Data) -> Tensor:
    a = z_score(d, 1e-6)
    loss = ppo((lp - d.proximal).exp(), a, 0.8, 1.2)
    loss = torch.where(a < 0, torch.min(loss, -3.0 * a), loss) * (d.proximal - d.behaviour).exp().clamp(max=2.0)
    return over_tokens(loss, d.mask) + 0.001 * over_tokens(k3(lp, d.reference), d.mask)


def slime(lp: Tensor, d: Data) -> Tensor:
    weight = (d.proximal - d.behaviour).exp().clamp(0, 2.0)
    return over_samples(ppo((lp - d.proximal).exp(), z_score(d, 1e-6), 0.8, 1.28) * weight, d.mask)


def areal(lp: Tensor, d: Data) -> Tensor:
    score = ((d.reward - 0.5) * 10.0).clamp(-20, 20).view(-1, GROUP)
    score = (score - score.mean(1, keepdim=True)) / (score.std(1, keepdim=True) + 1e-5)
    spread = (score.reshape(-1, 1) * d.mask)[d.mask]
    a = (score.reshape(-1, 1) - spread.mean()) / (spread.std() + 1e-5)
    weight = (d.proximal - d.behaviour).exp()
    kept = d.mask & (weight <= 5.0)
    return (ppo((lp - d.proximal).exp(), a, 0.6, 1.4) * weight * kept).sum() / d.mask.sum()


def openrlhf(lp: Tensor, d: Data) -> Tensor:
    weight = (d.proximal - d.behaviour).exp().clamp(0.5, 5.0)
    kl = over_tokens((lp - d.reference) ** 2 / 2, d.mask)
    return over_tokens(ppo((lp - d.proximal).exp(), z_score(d, 1e-9), 0.8, 1.2) * weight, d.mask) + 0.01 * kl


def skyrl(lp: Tensor, d: Data) -> Tensor:
    scaled = z_score(d, 1e-6) / d.mask.sum()
    return (ppo((lp - d.proximal).exp(), scaled, 0.8, 1.2) * d.mask).sum() + 0.001 * over_samples(k3(lp, d.reference), d.mask)


def nemo(lp: Tensor, d: Data) -> Tensor:
    kl = k3(lp, d.reference) * (lp - lp.detach()).exp()
    return over_tokens(ppo((lp - d.proximal).exp(), z_score(d, 1e-6), 0.8, 1.2), d.mask) + 0.01 * over_tokens(kl, d.mask)


def prime(lp: Tensor, d: Data) -> Tensor:
    groups = d.reward.view(-1, GROUP)
    a = (groups - groups.mean(1, keepdim=True)).reshape(-1, 1)
    moved, log_ratio = lp.detach().exp() - d.behaviour.exp(), lp - d.behaviour
    masked = torch.where(a > 0, moved > 0.2, moved < -0.2)
    loss = -a * log_ratio.exp() * (d.mask & ~masked) + 1e-3 * log_ratio**2 * d.mask
    return loss.sum() / d.mask.sum()


SYSTEMS: dict[str, tuple[Callable[[Tensor, Data], Tensor], float]] = {
    "TRL": (trl, 1e-12),
    "TRL 2": (trl_with_kl, 1e-12),
    "verl": (verl, 1e-12),
    "slime": (slime, 1e-12),
    "AReaL": (areal, 2e-5),
    "OpenRLHF": (openrlhf, 1e-12),
    "SkyRL": (skyrl, 1e-12),
    "NeMo-RL": (nemo, 1e-12),
    "prime-rl": (prime, 1e-12),
}


def april_loss(options: dict[str, Any], d: Data, current: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient (B, T) under the options of a block."""
    atoms = algorithm(**options)
    leaf = current.reshape(-1).clone().requires_grad_()
    staged = stage(atoms, credit(atoms, packed(d)).with_columns(current=leaf.detach()))
    total = policy_loss(atoms, leaf, staged).total
    return total.detach(), torch.autograd.grad(total, leaf)[0].reshape(current.shape)


def test_every_block_has_its_formula() -> None:
    assert set(blocks()) == set(SYSTEMS)


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_block_has_the_loss_and_the_gradient_of_its_system(name: str) -> None:
    formula, tolerance = SYSTEMS[name]
    d, current = data()
    leaf = current.clone().requires_grad_()
    expected = formula(leaf, d)
    value, gradient = april_loss(blocks()[name], d, current)
    (slope,) = torch.autograd.grad(expected, leaf)
    assert float(value) == pytest.approx(float(expected.detach()), abs=tolerance)
    assert torch.allclose(gradient, slope, atol=tolerance, rtol=tolerance) and slope.abs().max() > 0.01


OTHER: dict[str, dict[str, Any]] = {
    "advantage": {"type": "group", "std": "population", "eps": 0.01},
    "bounds": {"type": "constant", "low": 0.85, "high": 1.1},
    "aggregate": {"type": "group_mean"},
    "weights": {},
    "penalties": {},
    "surrogate": {"type": "importance"},
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_line_of_a_block_matters(name: str) -> None:
    d, current = data()
    options = blocks()[name]
    value, right = april_loss(options, d, current)
    for slot in sorted(options.keys() & OTHER.keys()):
        if not options[slot]:
            continue
        other, wrong = april_loss({**options, slot: OTHER[slot]}, d, current)
        assert float((wrong - right).abs().max() + (other - value).abs()) > 1e-5, f"{name}: {slot} changes nothing"


def nemo_advantage(rewards: list[float]) -> list[float]:
    """NeMo-RL 0.7 with `use_leave_one_out_baseline`, one group: mean and deviation of the siblings, which is left out where 0."""
    found = []
    for index, reward in enumerate(rewards):
        others = torch.tensor(rewards[:index] + rewards[index + 1 :], dtype=F64)
        deviation = float(others.std()) if len(others) > 1 else 0.0
        advantage = reward - float(others.mean())
        found.append(advantage / (deviation + 1e-6) if deviation > 0 else advantage)
    return found


@pytest.mark.parametrize("rewards", [[1.0, 0.0, 0.5, 0.2], [1.0, 0.0, 0.0, 0.0], [0.1 + 0.2, 0.3, 0.3], [1.0, 0.0], [0.7, 0.7]])
def test_the_leave_one_out_baseline_of_nemo(rewards: list[float]) -> None:
    layout = layout_of([1] * len(rewards), [0] * len(rewards))
    tokens = TokenBatch(layout, {"reward": torch.tensor(rewards, dtype=F64)})
    atoms = algorithm(advantage={"type": "group", "std": "siblings", "eps": 1e-6, "leave_one_out": True})
    assert atoms.advantage(tokens).tolist() == pytest.approx(nemo_advantage(rewards), abs=1e-9)
    in_float32 = TokenBatch(layout, {"reward": torch.tensor(rewards)})
    assert atoms.advantage(in_float32).tolist() == pytest.approx(nemo_advantage(rewards), abs=1e-4)
