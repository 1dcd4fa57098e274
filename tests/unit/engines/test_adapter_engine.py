"""Engines of runs that publish adapters: they serve what is trained, and a thousand updates leave no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from april.core.clock import VirtualClock
from april.core.errors import ModelError
from april.core.ids import GroupId
from april.core.prompt import Prompt
from april.core.sample import Sample
from april.core.sampling import SamplingSpec
from april.engines.adapters import AdapterEngine
from april.engines.embedded.config import EmbeddedConfig
from april.engines.embedded.engine import EmbeddedEngine
from april.models.lora_config import LoraConfig
from april.models.policy import PackedSequences, Policy
from april.testing.engine_run import EngineRun
from april.testing.toy_model import toy_model

KINDS = ["qwen3", "llama", "gemma2"]


def policy(kind: str = "qwen3") -> Policy:
    return Policy(toy_model(kind, seed=3, vocab_size=29, hidden_size=32))  # type: ignore[arg-type]


def engine_of(base: Policy) -> Any:
    return AdapterEngine(EmbeddedEngine(base.module, clock=VirtualClock(), config=EmbeddedConfig(max_running=8)), base)  # type: ignore[arg-type]


def moved(subject: Policy, seed: int) -> Policy:
    torch.manual_seed(seed)
    with torch.no_grad():
        for tensor in subject.state().values():
            tensor.copy_(torch.randn_like(tensor) * 0.1)
    return subject


def responses(engine: Any) -> list[Sample]:
    spec = SamplingSpec(max_new_tokens=24, temperature=0.8)
    samples = [Sample(GroupId(i, 0, f"p{i}").member(0), Prompt(f"p{i}", [2 + i, 5, 7]), spec) for i in range(6)]
    run = EngineRun(engine)
    run.submit(samples)
    run.drain()
    return run.results(samples)


def gap(samples: list[Sample], subject: Policy) -> float:
    """Largest difference between the engine's log-probs and the trainer's."""
    sequences = PackedSequences.of([s.prompt.token_ids for s in samples], [s.token_ids for s in samples])
    with torch.no_grad():
        ours = subject.response_logprobs(sequences, torch.full((len(sequences.rows),), 0.8)).logprobs
    theirs = torch.cat([torch.tensor(sample.behaviour_logprobs) for sample in samples])
    return float((ours - theirs).abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_samples_from_what_is_trained(kind: str) -> None:
    base = policy(kind)
    subject, engine = base.adapted(LoraConfig(rank=4, alpha=8)), engine_of(base)
    engine.update_weights(subject.weights(), 1)
    assert gap(responses(engine), subject) < 1e-4
    engine.update_weights(moved(subject, 1).weights(), 2)
    samples = responses(engine)
    assert engine.load().version == 2 and gap(samples, subject) < 1e-4
    assert gap(samples, base) > 0.05, "the base would be noticed"


def test_new_adapters_change_no_bit() -> None:
    base = policy()
    plain, engine = responses(engine_of(base)), engine_of(base)
    engine.update_weights(base.adapted(LoraConfig(rank=4)).weights(), 1)
    got = responses(engine)
    assert all(
        (a.token_ids == b.token_ids).all() and (a.behaviour_logprobs == b.behaviour_logprobs).all()
        for a, b in zip(plain, got, strict=True)
    )


def test_a_hundred_updates_leave_no_trace() -> None:
    base = policy()
    before = {name: tensor.clone() for name, tensor in base.weights().items()}
    subject, many, once = base.adapted(LoraConfig(rank=4)), engine_of(base), engine_of(base)
    for version in range(1, 101):
        many.update_weights(moved(subject, version).weights(), version)
    once.update_weights(subject.weights(), 100)
    ours, theirs = responses(many), responses(once)
    assert all((a.behaviour_logprobs == b.behaviour_logprobs).all() for a, b in zip(ours, theirs, strict=True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.weights().items())


def test_adapters_wait_for_running_samples_as_any_weights_do() -> None:
    base = policy()
    subject, engine = base.adapted(LoraConfig(rank=4)), engine_of(base)
    spec = SamplingSpec(max_new_tokens=24, temperature=0.8)
    engine.submit([Sample(GroupId(0, 0, "p").member(0), Prompt("p", [2, 5, 7]), spec)])
    engine.poll()
    engine.update_weights(moved(subject, 1).weights(), 1, "drain")
    kept = {name: tensor.clone() for name, tensor in subject.weights().items()}
    moved(subject, 2)  # the trainer goes on in its own memory
    while engine.load().running or engine.pending():
        engine.poll()
    assert engine.load().version == 1
    for name, tensor in subject.weights().items():
        tensor.copy_(kept[name])
    assert gap(responses(engine), subject) < 1e-4


def test_whole_models_pass_and_adapters_of_others_are_refused() -> None:
    base, other = policy(), policy("gemma2")
    engine = engine_of(base)
    with pytest.raises(ModelError, match="a layer that the base lacks"):
        engine.update_weights({"model.layers.7.x.lora_A.weight": torch.zeros(1), **base.weights()}, 1)
    changed = moved(Policy(toy_model("qwen3", seed=4, vocab_size=29, hidden_size=32)), 5)
    engine.update_weights(changed.weights(), 1)
    assert gap(responses(engine), changed) < 1e-4 and engine.name == "embedded" and other is not base
