"""Routers of a mixture of experts: recorded, replayed, and left alone."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from april.core.errors import ModelError
from april.models.policy import PackedSequences, Policy
from april.models.routing import Routing, packed_routes, padded_routes, replayed_gates
from april.testing.toy_model import toy_model


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def moe(**options: Any) -> Any:
    return toy_model("qwen3_moe", hidden_size=16, num_heads=2, num_kv_heads=1, **options)


def logits_of(module: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return module(input_ids=ids).logits  # type: ignore[no-any-return]


IDS = torch.arange(2, 20).view(2, 9)


def test_gates_of_given_experts() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.5, -1.0]])
    experts = torch.tensor([[2, 0]])
    assert replayed_gates(logits, experts)[0].tolist() == pytest.approx([0.182426, 0.817574], abs=1e-6)
    whole = logits.softmax(-1)[0, experts[0]].tolist()
    assert replayed_gates(logits, experts, normalised=False)[0].tolist() == pytest.approx(whole, abs=1e-6)
    assert replayed_gates(logits, torch.tensor([[0, 1]]))[0].tolist() != pytest.approx([0.182426, 0.817574], abs=1e-2)


@pytest.mark.parametrize("normalised", [True, False])
def test_the_training_router_learns_through_the_gates(normalised: bool) -> None:
    logits = torch.tensor([[0.3, -0.7, 1.1, 0.2]], requires_grad=True)
    experts, weight = torch.tensor([[1, 3]]), torch.tensor([[1.0, -2.0]])
    replayed_gates(logits, experts, normalised=normalised).mul(weight).sum().backward()
    gradient = logits.grad
    assert gradient is not None
    for index in range(4):
        step = torch.zeros_like(logits)
        step[0, index] = 1e-2
        with torch.no_grad():
            high, low = (
                replayed_gates(logits + sign * step, experts, normalised=normalised).mul(weight).sum() for sign in (1, -1)
            )
        assert float(gradient[0, index]) == pytest.approx(float(high - low) / 2e-2, abs=1e-4)
    assert (float(gradient[0, 0]) == 0) is normalised


def test_replaying_a_model_to_itself_changes_nothing_and_other_experts_do() -> None:
    module = moe(dtype=torch.float64)
    plain = logits_of(module, IDS)
    routing = Routing.of(module)
    assert torch.equal(logits_of(module, IDS), plain)
    chosen = routing.chosen()
    assert chosen.shape == (18, 2, 2) and (routing.num_layers, routing.num_experts, routing.top_k) == (2, 8, 2)
    routing.replay(chosen)
    assert float((logits_of(module, IDS) - plain).abs().max()) < 1e-5
    routing.replay((chosen + 1) % 8)
    assert float((logits_of(module, IDS) - plain).abs().max()) > 0.1
    assert torch.equal(routing.chosen(), (chosen + 1) % 8)
    routing.replay(torch.full_like(chosen, -1))
    assert float((logits_of(module, IDS) - plain).abs().max()) < 1e-5


def test_a_copy_routes_by_itself() -> None:
    module = moe()
    routing = Routing.of(module)
    plain = logits_of(module, IDS)
    routing.replay((routing.chosen() + 1) % 8)
    before = routing.chosen()
    twin = copy.deepcopy(module)
    assert torch.equal(logits_of(twin, IDS), plain)
    assert torch.equal(routing.chosen(), before)
    assert Routing.of(module) is routing and Routing.of(twin) is not routing


def test_models_without_experts_and_routers_of_other_kinds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="without experts") as caught:
        Routing.of(toy_model("qwen3"))
    assert caught.value.got == "qwen3"
    module = moe()
    router = type(module.model.layers[0].mlp.gate)

    def sigmoid(self: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = torch.nn.functional.linear(hidden, self.weight)
        gates, experts = logits.sigmoid().topk(self.top_k)
        return logits, gates, experts

    monkeypatch.setattr(router, "forward", sigmoid)
    with pytest.raises(ModelError, match="not known"):
        Routing.of(module)


def test_routes_that_do_not_fit_are_refused() -> None:
    routing = Routing.of(moe())
    for wrong in (torch.zeros(5, 3, 2), torch.zeros(5, 2, 1), torch.full((5, 2, 2), 8)):
        with pytest.raises(ModelError, match="do not fit"):
            routing.replay(wrong.long())
    routing.replay(torch.full((5, 2, 2), 7))
    assert routing.dtype is np.uint8 and Routing.of(moe(num_experts=256)).dtype is np.uint16


def test_routes_belong_to_the_row_before_their_token() -> None:
    first = np.array([[[3]], [[255]]], np.uint8)  # two response tokens, the second unknown
    second = np.array([[[1]], [[2]], [[0]]], np.uint8)
    packed = packed_routes([(None, first), (None, second)], [2 + 2, 1 + 3])
    assert packed.flatten().tolist() == [-1, 3, -1, -1, 1, 2, 0, -1]
    known = packed_routes([(np.array([[[5]]], np.uint8), first), (np.zeros((0, 1, 1), np.uint8), second)], [4, 4])
    assert known.flatten().tolist() == [5, 3, -1, -1, 1, 2, 0, -1]
    inside = torch.tensor([[True] * 4 + [False], [True] * 4 + [False]])
    assert padded_routes(packed, inside).flatten().tolist() == [-1, 3, -1, -1, -1, 1, 2, 0, -1, -1]


def sequences(routed: bool) -> PackedSequences:
    prompts, responses = [np.array([2, 3]), np.array([4])], [np.array([5, 6, 7]), np.array([8, 9])]
    routes = [(None, np.array([[[1, 5]] * 2] * 3, np.uint8)), (None, np.array([[[6, 0]] * 2] * 2, np.uint8))]
    return PackedSequences.of(prompts, responses, routes if routed else None)  # type: ignore[arg-type]


def test_a_policy_uses_the_experts_it_is_given_and_its_own_afterwards() -> None:
    module, ones = moe(), torch.ones(5)
    policy = Policy(module)
    own = policy.response_logprobs(sequences(False), ones).logprobs
    given = policy.response_logprobs(sequences(True), ones).logprobs
    chosen = Routing.of(module).chosen().view(2, 5, 2, 2)
    assert chosen[0, 1:4].tolist() == [[[1, 5]] * 2] * 3 and chosen[1, :2].tolist() == [[[6, 0]] * 2] * 2
    assert float((given - own).detach().abs().min()) > 1e-4
    assert torch.equal(policy.response_logprobs(sequences(False), ones).logprobs, own)
    with pytest.raises(ModelError, match="without experts"):
        Policy(toy_model("qwen3")).response_logprobs(sequences(True), ones)


def test_a_forward_that_is_computed_again_in_the_backward_pass_uses_the_same_experts() -> None:
    def gradient(checkpointing: bool, forget: bool) -> torch.Tensor:
        module = moe()
        policy = Policy(module, gradient_checkpointing=checkpointing)
        loss = policy.response_logprobs(sequences(True), torch.ones(5)).logprobs.sum()
        if forget:
            Routing.of(module).replay(None)
        loss.backward()  # type: ignore[no-untyped-call]
        return module.model.embed_tokens.weight.grad  # type: ignore[no-any-return]

    plain = gradient(False, False)
    assert float((gradient(True, False) - plain).abs().max()) < 1e-4 * float(plain.abs().max())
    try:
        forgotten = gradient(True, True)
    except RuntimeError:  # torch notices that the second forward is another one
        return
    assert float((forgotten - plain).abs().max()) > 1e-2 * float(plain.abs().max())
