"""Any split into micro-batches gives the same loss and gradient, for every atom there is; scopes say what must stay together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from april.algorithms.atoms import COLUMNS, SLOTS, atom
from april.algorithms.columns import Layout, TokenBatch
from april.algorithms.losses.compose import SHARE, Algorithm, credit, policy_loss, stage, value_loss
from april.algorithms.spec import AlgorithmConfig
from april.core.errors import AprilError

F64 = torch.float64
LENGTHS, GROUPS = [3, 5, 1, 4, 2, 6, 4, 3, 2, 7], [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
INTEGER = {"token_ids", "lag"}
LOGPROBS = {"behaviour", "proximal", "reference", "current"}


def tokens_of(seed: int = 0) -> TokenBatch:
    """Every column that there is, at random."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(LENGTHS)
    layout = Layout(torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]), torch.tensor(GROUPS), 3)
    size = layout.num_tokens

    def uniform() -> Tensor:
        return torch.rand(size, generator=generator, dtype=F64)

    start = -2 * uniform() - 0.05
    columns: dict[str, Tensor] = {name: uniform() for name in COLUMNS if not name.endswith("*")}
    columns |= {name: start + 0.3 * (uniform() - 0.5) for name in LOGPROBS}
    columns |= {name: (4 * uniform()).long() for name in INTEGER}
    columns |= {name: layout.spread(torch.rand(10, generator=generator, dtype=F64).round()) for name in ("reward", "correct")}
    columns["finished"] = layout.spread(torch.rand(10, generator=generator) > 0.3)
    columns["mask"] = uniform() > 0.2
    columns["trained"] = columns["mask"] & (uniform() > 0.2)
    columns["advantage"] = uniform() - 0.5
    columns["step"] = torch.full((layout.num_tokens,), 60)
    return TokenBatch(layout, {name: c for name, c in columns.items() if name != "current"})


def pieces(unit: str, seed: int) -> list[Tensor]:
    """A random partition of the samples that keeps the units whole."""
    generator = torch.Generator().manual_seed(seed)
    if unit == "batch":
        return [torch.arange(len(LENGTHS))]
    units = torch.arange(len(LENGTHS)) if unit == "sample" else torch.tensor(GROUPS)
    part = torch.randint(0, 3, (10,), generator=generator)[units]
    order = torch.randperm(len(LENGTHS), generator=generator) if unit == "sample" else torch.arange(len(LENGTHS))
    return [order[part[order] == index] for index in range(3) if bool((part == index).any())]


def losses(atoms: Algorithm, tokens: TokenBatch, parts: list[Tensor], dtype: torch.dtype) -> tuple[float, Tensor]:
    """Total and gradient with respect to the log-probs (N,), in the order of `tokens`."""
    whole = (tokens["proximal"] + 0.1 * torch.sin(torch.arange(tokens.layout.num_tokens))).to(dtype)
    entropy = tokens["current_entropy"].to(dtype)
    total, gradient = 0.0, torch.zeros_like(whole)
    for part in parts:
        _, rows = tokens.layout.take(part)
        current = whole[rows].clone().requires_grad_()
        micro = tokens.take(part).to(torch.device("cpu"), dtype).with_columns(current_entropy=entropy[rows] + 0.1 * current)
        loss = policy_loss(atoms, current, micro).total
        total += float(loss.detach())
        if loss.requires_grad:
            (gradient[rows],) = torch.autograd.grad(loss, current, allow_unused=True, materialize_grads=True)
    return total, gradient


def check_splits(options: dict[str, Any]) -> float:
    """Compare three random splits with the whole in both precisions; returns the size of the gradient."""
    atoms = Algorithm.of(AlgorithmConfig.model_validate(options))
    tokens = stage(atoms, tokens_of().with_columns(current=tokens_of()["proximal"] + 0.05))
    for dtype, tolerance in ((F64, 1e-10), (torch.float32, 1e-6)):
        value, gradient = losses(atoms, tokens, [torch.arange(len(LENGTHS))], dtype)
        for seed in range(3):
            got, moved = losses(atoms, tokens, pieces(atoms.unit, seed), dtype)
            assert abs(got - value) <= tolerance * max(1.0, abs(value)), (dtype, seed)
            assert float((moved - gradient).abs().max()) <= tolerance * max(1.0, float(gradient.abs().max())), (dtype, seed)
    return float(gradient.abs().max())


def every_atom() -> list[Any]:
    found = []
    for slot in ("ratio", "bounds", "surrogate", "aggregate", "weights", "penalties", "objectives"):
        found += [pytest.param(slot, name, id=f"{slot}.{name}") for name in sorted(SLOTS[slot])]
    return found


@pytest.mark.parametrize(("slot", "name"), every_atom())
def test_every_atom_gives_the_same_whatever_the_split(slot: str, name: str) -> None:
    required = {"constant": 9, "max_tokens": 5, "buffer_tokens": 2}
    fields = SLOTS[slot][name].config.model_fields
    atom_table = {"type": name} | {key: value for key, value in required.items() if key in fields}
    try:
        options = {slot: {name: atom_table} if slot in ("weights", "penalties", "objectives") else atom_table}
        atoms = Algorithm.of(AlgorithmConfig.model_validate(options))
    except (ValidationError, AprilError) as error:
        pytest.skip(f"has options without a default: {error}")
    if atoms.value_terms:
        predicted = tokens_of()["value"] + 0.1
        tokens = stage(atoms, tokens_of())
        parts = pieces("sample", 0)
        total = sum(float(value_loss(atoms, predicted[tokens.layout.take(p)[1]], tokens.take(p))[0]) for p in parts)
        assert total == pytest.approx(float(value_loss(atoms, predicted, tokens)[0]), abs=1e-12)
        return
    assert check_splits(options) >= 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"aggregate": "token_mean", "weights": {"tis": {"cap": 1.2}}},
        {"ratio": "sequence", "weights": {"mask": {"low": 0.9, "high": 1.1}}},
        {"penalties": {"k3": {"coefficient": 0.3, "aggregate": "token_mean"}}},
    ],
)
def test_some_whole_algorithms(options: dict[str, Any]) -> None:
    assert check_splits(options) > 1e-3


@pytest.fixture
def own() -> Iterator[None]:
    """Atoms that need more than a sample, declared rightly (a_...) and wrongly (wrong_...)."""

    def normalised(tokens: TokenBatch) -> Tensor:
        weight = (tokens["proximal"] - tokens["behaviour"]).exp()
        return weight / weight[tokens["mask"]].mean()

    def quantile(tokens: TokenBatch) -> tuple[Tensor, Tensor]:
        limit = tokens["entropy"].quantile(0.5)
        return torch.full_like(tokens["entropy"], 0.9), torch.where(tokens["entropy"] > limit, 1.2, 1.01).to(limit)

    def contrast(current: Tensor, tokens: TokenBatch) -> Tensor:
        layout = tokens.layout
        mine = layout.mean(current, tokens["trained"])
        centred = mine - (layout.group_sum(mine) / layout.group_sum(torch.ones_like(mine)).clamp(min=1))[layout.group_of_sample]
        return layout.spread(centred.square())

    def ranked(current: Tensor, tokens: TokenBatch) -> Tensor:
        order = tokens.layout.mean(current, tokens["trained"]).detach().argsort().argsort()
        return current * tokens.layout.spread(order).to(current.dtype)

    needs = frozenset({"proximal", "behaviour"})
    for prefix, right in (("a", True), ("wrong", False)):
        batch = "batch" if right else "sample"
        atom("weights", f"{prefix}_normalised", requires=needs, scope=batch)(normalised)  # type: ignore[arg-type]
        atom("bounds", f"{prefix}_quantile", requires=frozenset({"entropy"}), scope=batch)(quantile)  # type: ignore[arg-type]
        atom("penalties", f"{prefix}_contrast", scope="group" if right else "sample")(contrast)
        atom("objectives", f"{prefix}_ranked", scope=batch)(ranked)  # type: ignore[arg-type]
    yield
    for slot in ("weights", "bounds", "penalties", "objectives"):
        for name in [name for name in SLOTS[slot] if name.startswith(("a_", "wrong_"))]:
            del SLOTS[slot][name]


WIDER = [
    ("weights", {"{}_normalised": {}}, "sample"),
    ("bounds", {"type": "{}_quantile"}, "sample"),
    ("penalties", {"{}_contrast": {}}, "group"),
    ("objectives", {"{}_ranked": {}}, "batch"),
]


def named(table: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {key.format(prefix): value.format(prefix) if isinstance(value, str) else value for key, value in table.items()}


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(("slot", "table", "unit"), WIDER)
def test_what_sees_more_than_a_sample_gets_it(slot: str, table: dict[str, Any], unit: str) -> None:
    assert Algorithm.of(AlgorithmConfig.model_validate({slot: named(table, "a")})).unit == unit
    assert check_splits({slot: named(table, "a")}) > 1e-3
    with pytest.raises(AssertionError):  # the same function without its scope
        check_splits({slot: named(table, "wrong")})


@pytest.mark.usefixtures("own")
def test_a_staged_weight_is_the_weight_of_the_whole() -> None:
    atoms = Algorithm.of(AlgorithmConfig.model_validate({"weights": {"a_normalised": {}}}))
    assert atoms.staged_needs == {"proximal", "behaviour"} and atoms.weights[0].staged
    tokens = stage(atoms, tokens_of())
    weight = tokens["weight.a_normalised"]
    assert float(weight[tokens["mask"]].mean()) == pytest.approx(1.0)
    loss = policy_loss(atoms, tokens["proximal"], tokens)
    assert torch.equal(loss.weight, weight) and not weight.requires_grad


def test_tokens_that_a_weight_drops_can_leave_the_denominator() -> None:
    def last_half(tokens: TokenBatch, *, in_denominator: bool = True) -> Tensor:
        return (tokens["proximal"] > tokens["proximal"].median()).to(tokens["proximal"].dtype)

    atom("weights", "a_half")(last_half)
    try:
        shared = {}
        for counted in (True, False):
            options = {"aggregate": "token_mean", "weights": {"a_half": {"in_denominator": counted}}}
            atoms = Algorithm.of(AlgorithmConfig.model_validate(options))
            tokens = stage(atoms, tokens_of())
            shared[counted] = tokens[SHARE]
            kept = tokens["mask"] & (tokens["proximal"] > tokens["proximal"].median())
        masked = tokens_of()["mask"]
        assert float(shared[True][masked].max()) == pytest.approx(1 / int(masked.sum()))
        assert float(shared[False].max()) == pytest.approx(1 / int(kept.sum())) and shared[False][~kept].abs().max() == 0
        assert torch.equal(tokens["mask"], masked)
    finally:
        del SLOTS["weights"]["a_half"]


def test_credit_may_make_several_columns() -> None:
    def both(tokens: TokenBatch) -> dict[str, Tensor]:
        return {"advantage": tokens["reward"] - 0.5, "return": 2 * tokens["reward"]}

    atom("advantage", "a_both")(both)
    try:
        atoms = Algorithm.of(AlgorithmConfig.model_validate({"advantage": "a_both"}))
        tokens = credit(atoms, tokens_of())
        assert torch.equal(tokens["return"], 2 * tokens["reward"])
        assert torch.equal(tokens["advantage"], tokens["reward"] - 0.5)
    finally:
        del SLOTS["advantage"]["a_both"]
