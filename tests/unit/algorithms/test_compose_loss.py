"""The composed loss: identities that need no oracle, finite differences, and tokens that must not matter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from april.algorithms.columns import Layout, TokenBatch
from april.algorithms.losses.compose import Algorithm, credit, policy_loss, shares
from april.algorithms.spec import AlgorithmConfig

F64 = torch.float64
PLAIN = {"surrogate": "plain", "bounds": False}
VARIANTS: list[dict[str, object]] = [
    {},
    {"aggregate": "token_mean", "bounds": {"type": "constant", "high": 1.28}},
    {"aggregate": {"type": "fixed_length", "constant": 7}},
    {**PLAIN, "aggregate": "sequence_sum", "advantage": "leave_one_out"},
    {"ratio": "sequence"},
    {"weights": {"tis": {"cap": 1.5}, "mask": {"high": 3.0}}},
    {"penalties": {"k3": {"coefficient": 0.3}, "k2": {"coefficient": 0.2, "aggregate": "token_mean"}}},
    {"adjust": ["whiten"], "surrogate": {"type": "clip", "dual_clip": 3.0}},
]


def algorithm(**options: object) -> Algorithm:
    return Algorithm.of(AlgorithmConfig.model_validate(options))


def random_tokens(seed: int = 0, *, on_policy: bool = False) -> TokenBatch:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([3, 5, 1, 4, 2, 6])
    layout = Layout(torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]), torch.tensor([0, 0, 0, 1, 1, 1]), 2)
    size = layout.num_tokens
    proximal = -torch.rand(size, generator=generator, dtype=F64) * 2
    noise = 0 if on_policy else 0.3 * torch.randn(size, generator=generator, dtype=F64)
    mask = torch.rand(size, generator=generator) > 0.2
    trained = mask & (torch.rand(size, generator=generator) > 0.2)
    return TokenBatch(
        layout,
        {
            "mask": mask,
            "trained": mask if on_policy else trained,
            "proximal": proximal,
            "behaviour": proximal + noise,
            "reference": proximal - 0.2,
            "reward": layout.spread(torch.tensor([1, 0, 0.5, 0, 1, 1], dtype=F64)),
        },
    )


def prepared(atoms: Algorithm, tokens: TokenBatch) -> TokenBatch:
    return shares(atoms, credit(atoms, tokens))


@pytest.mark.parametrize("options", VARIANTS)
def test_gradient_equals_finite_differences(options: dict[str, object]) -> None:
    atoms = algorithm(**options)
    tokens = prepared(atoms, random_tokens())
    generator = torch.Generator().manual_seed(5)
    start = tokens["proximal"] + 0.15 * torch.randn(tokens.layout.num_tokens, generator=generator, dtype=F64)

    def total(current: Tensor) -> Tensor:
        return policy_loss(atoms, current, tokens).total

    current = start.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(total(current), current)
    if atoms.config.ratio.type == "sequence":  # its value moves all tokens of a sample at once; the sum is what must agree
        shift = tokens.layout.spread(torch.ones(tokens.layout.num_samples, dtype=F64)) * tokens["mask"]
        numeric = (total(start + 1e-6 * shift) - total(start - 1e-6 * shift)) / 2e-6
        assert float((gradient * shift).sum()) == pytest.approx(float(numeric), abs=1e-8)
        return
    numeric_each = []
    for index in range(len(start)):
        step = torch.zeros_like(start)
        step[index] = 1e-6
        numeric_each.append(float((total(start + step) - total(start - step)) / 2e-6))
    assert torch.allclose(gradient, torch.tensor(numeric_each, dtype=F64), atol=1e-8)
    assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize("surrogate", [{}, PLAIN, {"ratio": "sequence"}, {"weights": {"tis": {}, "mask": {}}}])
@pytest.mark.parametrize("aggregate", ["token_mean", "sequence_mean", "sequence_sum"])
def test_on_policy_every_surrogate_is_the_policy_gradient(surrogate: dict[str, object], aggregate: str) -> None:
    atoms = algorithm(**surrogate, aggregate=aggregate)
    tokens = prepared(atoms, random_tokens(on_policy=True))
    current = tokens["proximal"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(policy_loss(atoms, current, tokens).total, current)
    expected = -tokens["advantage"] * tokens["share"] * tokens["mask"]
    assert torch.allclose(gradient, expected, atol=1e-12) and expected.abs().max() > 0


def test_correction_is_exactly_one_for_fresh_tokens_and_not_for_others() -> None:
    with_tis, without = algorithm(weights={"tis": {}}), algorithm()
    for on_policy in (True, False):
        tokens = prepared(without, random_tokens(on_policy=on_policy))
        pair = [policy_loss(atoms, tokens["proximal"] + 0.1, tokens).total for atoms in (with_tis, without)]
        assert bool(torch.equal(pair[0], pair[1])) is on_policy


def test_without_a_proximal_column_the_detached_current_policy_is_proximal() -> None:
    atoms = algorithm()
    tokens = prepared(atoms, random_tokens())
    current = (tokens["proximal"] + 0.4).requires_grad_()
    columns = {name: column for name, column in tokens.columns.items() if name != "proximal"}
    loss = policy_loss(atoms, current, TokenBatch(tokens.layout, columns))
    assert loss.log_ratio.abs().max() == 0 and not loss.clipped.any()
    assert policy_loss(atoms, current, tokens).clipped.any()
    (gradient,) = torch.autograd.grad(loss.total, current)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("poison", [float("-inf"), float("nan")])
@pytest.mark.parametrize("options", VARIANTS)
def test_untrained_tokens_add_exactly_nothing(options: dict[str, object], poison: float) -> None:
    atoms = algorithm(**options)
    tokens = prepared(atoms, random_tokens())
    clean = tokens["proximal"].clone().requires_grad_()
    dirty = torch.where(tokens["trained"], tokens["proximal"], torch.full_like(clean, poison)).requires_grad_()
    if options.get("ratio") == "sequence":
        dirty = torch.where(tokens["mask"], tokens["proximal"], torch.full_like(clean, poison)).detach().requires_grad_()
    losses = [policy_loss(atoms, current, tokens).total for current in (clean, dirty)]
    gradients = [torch.autograd.grad(loss, current)[0] for loss, current in zip(losses, (clean, dirty), strict=True)]
    assert torch.isfinite(losses[1]) and torch.equal(losses[0], losses[1])
    assert torch.equal(gradients[0], gradients[1])
    assert gradients[1][~tokens["trained"]].abs().max() == 0


def test_stale_tokens_stay_in_the_denominator() -> None:
    atoms = algorithm(aggregate="token_mean", **PLAIN)
    tokens = prepared(atoms, random_tokens())
    current = tokens["proximal"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(policy_loss(atoms, current, tokens).total, current)
    count = int(tokens["mask"].sum())
    expected = torch.where(tokens["trained"], -tokens["advantage"] / count, torch.zeros_like(gradient))
    assert torch.allclose(gradient, expected) and int(tokens["trained"].sum()) < count


def test_any_split_into_samples_adds_up() -> None:
    for options in VARIANTS:
        atoms = algorithm(**options)
        tokens = prepared(atoms, random_tokens())
        whole = policy_loss(atoms, tokens["proximal"] + 0.1, tokens).total
        pieces = [tokens.take(torch.tensor(part)) for part in ([4], [0, 5], [3, 2, 1])]
        total = sum(policy_loss(atoms, piece["proximal"] + 0.1, piece).total for piece in pieces)
        assert float(total) == pytest.approx(float(whole), abs=1e-12)


def test_penalty_is_outside_the_weights_and_the_advantage() -> None:
    atoms = algorithm(penalties={"k3": {"coefficient": 2.0}}, weights={"mask": {"low": 100.0, "high": 200.0}})
    tokens = prepared(atoms, random_tokens())
    loss = policy_loss(atoms, tokens["proximal"], tokens)
    assert loss.parts["policy_loss"] == 0 and float(loss.parts["k3_loss"]) > 0
    alone = policy_loss(algorithm(penalties={"k3": {"coefficient": 1.0}}), tokens["proximal"], tokens)
    assert float(loss.parts["k3_loss"]) == pytest.approx(2 * float(alone.parts["k3_loss"]))
