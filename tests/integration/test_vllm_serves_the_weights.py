"""The weights that vLLM samples with are the trainer's: at the start and after every update, whatever the mode."""

from __future__ import annotations

import importlib.util
from importlib.resources import files
from typing import Any

import pytest
import torch

from april.core.clock import WallClock, readable
from april.core.ids import GroupId
from april.core.prompt import Prompt
from april.core.sample import Sample
from april.core.sampling import SamplingSpec
from april.engines.base import Engine, UpdateMode, Weights
from april.models.policy import PackedSequences, Policy
from april.testing.engine_run import EngineRun
from april.text.tokenizer import Tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="the extra april-rl[vllm] is not installed"),
    pytest.mark.filterwarnings("ignore"),
]
PACKAGED = str(files("april") / "assets" / "policy")


def worst(policy: Policy, samples: list[Sample]) -> float:
    """Largest difference between the engine's log-probs and a plain forward's."""
    sequences = PackedSequences.of([s.prompt.token_ids for s in samples], [s.token_ids for s in samples])
    temperatures = torch.cat([torch.full((len(s),), s.spec.temperature) for s in samples])
    with torch.no_grad():
        exact = policy.response_logprobs(sequences, temperatures).logprobs
    sampled = torch.cat([torch.tensor(s.behaviour_logprobs) for s in samples])
    return float((exact - sampled).abs().max())


def wait_for(engine: Any) -> None:
    """An engine whose tokens come from elsewhere is waited for."""
    ready_s = engine.ready_at()
    if ready_s is not None and hasattr(engine, "waitables"):
        readable(engine.waitables(), max(0.0, ready_s - engine._clock.now()))


def engine_of(kind: str, policy: Policy, tokenizer: Tokenizer, **options: Any) -> Engine:
    from april.engines.vllm.config import VllmConfig, VllmServerConfig
    from april.engines.vllm.engine import VllmEngine
    from april.engines.vllm.server import VllmServerEngine

    if kind == "vllm":
        config = VllmConfig(kv_tokens=8192, max_running=32, **options)
        return VllmEngine(policy.module, tokenizer=tokenizer, clock=WallClock(), config=config)
    server = VllmServerConfig(kv_tokens=8192, max_running=32, **options)
    return VllmServerEngine(policy.module, tokenizer=tokenizer, clock=WallClock(), config=server)


@pytest.mark.parametrize(("kind", "tensor_parallel"), [("vllm", 1), ("vllm", 2), ("vllm_server", 1)])
def test_log_probs_are_those_of_the_published_weights(kind: str, tensor_parallel: int) -> None:
    torch.set_num_threads(1)
    policy, other = (Policy.load(PACKAGED, dtype=torch.float32) for _ in range(2))
    with torch.no_grad():
        for parameter in other.module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    tokenizer = Tokenizer.load(PACKAGED)
    engine = engine_of(kind, policy, tokenizer, tensor_parallel=tensor_parallel)
    prompt = Prompt("sum", tokenizer.encode("+".join("3459182736459182736")))  # type: ignore[arg-type]
    spec = SamplingSpec(max_new_tokens=40, temperature=0.9, stop_token_ids=tokenizer.eos_ids)

    def generate(serial: int) -> list[Sample]:
        run = EngineRun(engine, wait_for)
        samples = [Sample(GroupId(serial, 0, "sum").member(member), prompt, spec) for member in range(6)]
        run.submit(samples)
        run.drain()
        return run.results(samples)

    def update(weights: Weights, version: int, mode: UpdateMode) -> None:
        engine.update_weights(weights, version, mode)
        EngineRun(engine, wait_for).until(lambda: engine.load().version == version)

    first = generate(0)
    assert worst(policy, first) < 2e-3 < worst(other, first), "from the first token on, and the check can fail"
    update(other.weights(), 1, "recompute")
    second = generate(1)
    assert worst(other, second) < 2e-3 < worst(policy, second) and {v for s in second for v in s.versions.tolist()} == {1}
    update(dict(policy.module.named_parameters()), 2, "drain")
    third = generate(2)
    assert worst(policy, third) < 2e-3 < worst(other, third), "tied weights follow although they are named once"
    assert engine.load().shared_tokens > 0, "members of a group share their prompt, within one version only"
    engine.close()


@pytest.mark.parametrize("kind", ["vllm", "vllm_server"])
def test_more_prompt_tokens_than_a_step_takes(kind: str) -> None:
    """Seeded requests whose prompts vLLM would read in parts, which it cannot do on a CPU; with entropies from likely tokens."""
    torch.set_num_threads(1)
    policy, tokenizer = Policy.load(PACKAGED, dtype=torch.float32), Tokenizer.load(PACKAGED)
    engine = engine_of(kind, policy, tokenizer, entropy_top_k=3)
    run, found = EngineRun(engine, wait_for), list[Sample]()
    for serial in range(24):
        prompt = Prompt(
            f"p{serial}", tokenizer.encode("+".join(str((serial + i * i + i * (serial // 10)) % 10) for i in range(75)))
        )  # type: ignore[arg-type]
        found.append(Sample(GroupId(serial, 0, prompt.id).member(0), prompt, SamplingSpec(max_new_tokens=4, entropy=True)))
    assert len({tuple(s.prompt.token_ids) for s in found}) == 24 and sum(len(s.prompt.token_ids) for s in found) > 3 * 1024
    run.submit(found)
    run.drain()
    results = run.results(found)
    assert worst(policy, results) < 2e-3
    sequences = PackedSequences.of([s.prompt.token_ids for s in results], [s.token_ids for s in results])
    with torch.no_grad():
        exact = policy.response_logprobs(sequences, torch.ones(sum(map(len, results))), entropy=True).entropies
    estimates = torch.cat([torch.tensor(s.entropies) for s in results])
    assert not engine.caps.entropy and exact is not None and float((exact - estimates).max()) > 0.1 < float(estimates.max())
    assert float((estimates - exact).max()) < 1e-3, "from three likely tokens: a lower bound"
    engine.close()


def test_vllm_serves_adapters_merged_into_the_base() -> None:
    from april.engines.adapters import AdapterEngine
    from april.engines.vllm.config import VllmConfig
    from april.engines.vllm.engine import VllmEngine
    from april.models.lora_config import LoraConfig

    torch.set_num_threads(1)
    base = Policy.load(PACKAGED, dtype=torch.float32)
    policy = base.adapted(LoraConfig(rank=4))
    tokenizer = Tokenizer.load(PACKAGED)
    config = VllmConfig(kv_tokens=8192, max_running=32)
    inner = VllmEngine(base.module, tokenizer=tokenizer, clock=WallClock(), config=config)
    engine = AdapterEngine(inner, base)  # type: ignore[arg-type]
    prompt = Prompt("sum", tokenizer.encode("+".join("3459182736459182736")))  # type: ignore[arg-type]
    spec = SamplingSpec(max_new_tokens=40, temperature=0.9, stop_token_ids=tokenizer.eos_ids)
    for version in (1, 2):
        torch.manual_seed(version)
        with torch.no_grad():
            for tensor in policy.state().values():
                tensor.copy_(torch.randn_like(tensor) * 0.1)
        engine.update_weights(policy.weights(), version, "recompute" if version == 1 else "drain")
        run = EngineRun(engine)
        samples = [Sample(GroupId(version, 0, "sum").member(member), prompt, spec) for member in range(6)]
        run.submit(samples)
        run.drain()
        found = run.results(samples)
        assert worst(policy, found) < 2e-3 < worst(base, found) and {v for s in found for v in s.versions.tolist()} == {version}
    engine.close()
