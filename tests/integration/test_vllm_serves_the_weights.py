"""The weights that vLLM samples with are the trainer's: at the start and after every update, whatever the mode."""

from __future__ import annotations

import importlib.util
from importlib.resources import files

import pytest
import torch

from april.core.clock import WallClock
from april.core.ids import GroupId
from april.core.prompt import Prompt
from april.core.sample import Sample
from april.core.sampling import SamplingSpec
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


def test_log_probs_are_those_of_the_published_weights() -> None:
    from april.engines.vllm.config import VllmConfig
    from april.engines.vllm.engine import VllmEngine

    torch.set_num_threads(1)
    policy, other = (Policy.load(PACKAGED, dtype=torch.float32) for _ in range(2))
    with torch.no_grad():
        for parameter in other.module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    tokenizer = Tokenizer.load(PACKAGED)
    engine = VllmEngine(policy.module, tokenizer=tokenizer, clock=WallClock(), config=VllmConfig(kv_tokens=8192, max_running=32))
    prompt = Prompt("sum", tokenizer.encode("+".join("3459182736459182736")))  # type: ignore[arg-type]
    spec = SamplingSpec(max_new_tokens=40, temperature=0.9, stop_token_ids=tokenizer.eos_ids)

    def generate(serial: int) -> list[Sample]:
        run = EngineRun(engine)
        samples = [Sample(GroupId(serial, 0, "sum").member(member), prompt, spec) for member in range(6)]
        run.submit(samples)
        run.drain()
        return run.results(samples)

    first = generate(0)
    assert worst(policy, first) < 2e-3 < worst(other, first), "from the first token on, and the check can fail"
    engine.update_weights(other.weights(), 1, "recompute")
    second = generate(1)
    assert worst(other, second) < 2e-3 < worst(policy, second) and {v for s in second for v in s.versions.tolist()} == {1}
    engine.update_weights(dict(policy.module.named_parameters()), 2, "drain")
    third = generate(2)
    assert worst(policy, third) < 2e-3 < worst(other, third), "tied weights follow although they are named once"
    assert engine.load().shared_tokens > 0, "members of a group share their prompt, within one version only"
    engine.close()
