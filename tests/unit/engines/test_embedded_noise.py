"""Noise on the sampler's norms: when, how much, on which copy, and under which name (QeRL)."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch

from april.core.clock import VirtualClock
from april.core.errors import EngineError
from april.core.ids import GroupId
from april.core.prompt import Prompt
from april.core.sample import Sample
from april.core.sampling import SamplingSpec
from april.engines.embedded.config import EmbeddedConfig, NoiseConfig
from april.engines.embedded.engine import EmbeddedEngine
from april.engines.embedded.noise import NormNoise, noise_level, noise_levels
from april.models.policy import PackedSequences, Policy
from april.testing.engine_run import EngineRun
from april.testing.toy_model import ToyKind, toy_model

NOISE = {"start": 0.3, "end": 0.003, "stages": 4, "total_steps": 40}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@lru_cache
def module(kind: ToyKind = "qwen3") -> Any:
    return toy_model(kind)


def run(noise: dict[str, Any] | None, version: int = 0, kind: ToyKind = "qwen3") -> EngineRun:
    config = EmbeddedConfig.model_validate({"max_running": 8, "kv_tokens": 2048, "noise": noise})
    return EngineRun(EmbeddedEngine(module(kind), clock=VirtualClock(), config=config, version=version))


def samples(epoch: int = 0, budget: int = 16) -> list[Sample]:
    prompts = [Prompt(f"p{serial}", np.arange(3, 8) + serial) for serial in range(4)]
    return [
        Sample(GroupId(serial, epoch, prompt.id).member(0), prompt, SamplingSpec(budget)) for serial, prompt in enumerate(prompts)
    ]


def finish(engine: EngineRun, epoch: int = 0) -> list[Sample]:
    given = samples(epoch)
    engine.submit(given)
    engine.drain()
    return engine.results(given)


def weights(kind: ToyKind = "qwen3") -> dict[str, torch.Tensor]:
    return Policy(module(kind)).weights()


def difference(left: list[Sample], right: list[Sample]) -> float:
    """Largest difference of first tokens' log-probs, or 1 where other tokens were drawn."""
    same = all(a.token_ids[0] == b.token_ids[0] for a, b in zip(left, right, strict=True))
    gaps = [abs(float(a.behaviour_logprobs[0] - b.behaviour_logprobs[0])) for a, b in zip(left, right, strict=True)]
    return max(gaps) if same else 1.0


def test_levels_fall_geometrically_after_a_first_stage_without_noise() -> None:
    assert noise_levels(0.3, 0.003, 4) == pytest.approx([0.3, 0.03, 0.003])
    config = NoiseConfig.model_validate(NOISE)
    assert [noise_level(step, 40, config) for step in (0, 9, 10, 20, 39, 40, 99)] == pytest.approx(
        [0, 0, 0.3, 0.03, 0.003, 0.003, 0.003]
    )
    assert [noise_level(step, 2, config) for step in (0, 1, 2)] == pytest.approx([0, 0.03, 0.003]), "fewer updates than stages"
    assert noise_levels(0.3, 0.003, 2) == [0.3]


def test_without_a_level_nothing_is_touched() -> None:
    given, noise = weights(), NormNoise(NoiseConfig.model_validate(NOISE))
    assert noise.applied(given, 3) is given and noise.sampler(3) == ""
    assert NormNoise(None).applied(given, 30) is given
    quiet, plain = finish(run(NOISE)), finish(run(None))
    assert difference(quiet, plain) == 0 and quiet[0].spans == plain[0].spans


def test_only_norms_of_the_copy_change() -> None:
    given = weights()
    before = {name: tensor.clone() for name, tensor in given.items()}
    noisy = NormNoise(NoiseConfig.model_validate(NOISE)).applied(given, 10)
    changed = {name for name in given if not torch.equal(noisy[name], given[name])}
    assert changed == {name for name in given if "norm" in name} and len(changed) == 9
    assert all(torch.equal(given[name], before[name]) for name in given), "the trainer's tensors are as they were"
    spread = torch.cat([noisy[name] - given[name] for name in sorted(changed)]).std()
    assert float(spread) == pytest.approx(0.3, rel=0.15)


def test_the_draw_belongs_to_seed_version_and_parameter() -> None:
    def drawn(version: int, seed: int | None = None) -> torch.Tensor:
        noise = NormNoise(NoiseConfig.model_validate({**NOISE, "seed": seed}))
        return noise.applied(weights(), version)["model.norm.weight"]

    assert torch.equal(drawn(10), drawn(10))
    assert not torch.equal(drawn(10), drawn(11)) and not torch.equal(drawn(10), drawn(10, seed=1))
    noisy = NormNoise(NoiseConfig.model_validate(NOISE)).applied(weights(), 10)
    first, second = (noisy[name] - weights()[name] for name in ("model.norm.weight", "model.layers.0.input_layernorm.weight"))
    assert not torch.allclose(first, second, atol=1e-3)


def test_noise_does_not_accumulate_and_an_engine_may_begin_with_it() -> None:
    fresh = run(NOISE, version=12)
    began = finish(fresh)
    updated = run(NOISE)
    for version in (10, 11, 12):
        updated.engine.update_weights(weights(), version, "recompute")
    assert difference(finish(updated), began) < 1e-5
    other = run(NOISE)
    other.engine.update_weights(weights(), 11, "drain")
    assert difference(finish(other), began) > 1e-2


@pytest.mark.parametrize("kind", ["qwen3", "gpt_neox"])
def test_logprobs_are_those_of_the_noisy_sampler_and_it_says_so(kind: ToyKind) -> None:
    engine = run(NOISE, version=10, kind=kind)
    found = finish(engine)
    assert {span.sampler for sample in found for span in sample.spans} == {"embedded-float32+noise-0.3"}
    scored = engine.engine.score(found)
    assert max(float(np.abs(a - b.behaviour_logprobs).max()) for a, b in zip(scored, found, strict=True)) < 1e-4
    sequences = PackedSequences.of([sample.prompt.token_ids for sample in found], [sample.token_ids for sample in found])
    with torch.no_grad():
        trainer = Policy(module(kind)).response_logprobs(sequences, torch.ones(len(sequences.rows))).logprobs
    behaviour = torch.from_numpy(np.concatenate([sample.behaviour_logprobs for sample in found]))
    assert float((trainer - behaviour).abs().mean()) > 0.05, "the trainer's weights have no noise"
    engine.engine.update_weights(weights(kind), 20, "drain")
    assert {span.sampler for sample in finish(engine, 1) for span in sample.spans} == {"embedded-float32+noise-0.03"}


def test_what_cannot_be_noisy_is_refused() -> None:
    with pytest.raises(EngineError, match="number of updates"):
        run({**NOISE, "total_steps": None})
    with pytest.raises(EngineError, match="no norms"):
        NormNoise(NoiseConfig.model_validate(NOISE)).applied({"model.embed.weight": torch.zeros(3, 2)}, 10)
    with pytest.raises(ValueError, match="stages"):
        NoiseConfig(stages=1)
