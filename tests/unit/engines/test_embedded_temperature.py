"""A temperature for each token: drawn with, recorded by the entropy that it follows from, and learned at (HAPO)."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch

from april.core.clock import VirtualClock
from april.core.errors import DataError
from april.core.group import Batch, Group, Reward
from april.core.ids import GroupId
from april.core.prompt import Prompt
from april.core.sample import Sample, Segment
from april.core.sampling import AdaptiveTemperature, SamplingSpec
from april.engines.embedded.config import EmbeddedConfig
from april.engines.embedded.engine import EmbeddedEngine
from april.engines.embedded.sampler import draw, log_distribution, spec_batch
from april.models.policy import PackedSequences, Policy
from april.rollout.temperature import TemperatureRule
from april.testing.engine_run import EngineRun, cut, same_tokens
from april.testing.toy_model import toy_model
from april.training.batch import assemble

RULE = AdaptiveTemperature(strength=0.4, pivot=0.3, scale_above=1.5, scale_below=0.8)
DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@lru_cache
def module() -> Any:
    return toy_model("qwen3", dtype=DOUBLE, spread=2.0)


def samples(adaptive: AdaptiveTemperature | None = RULE, temperature: float = 0.9) -> list[Sample]:
    spec = SamplingSpec(24, temperature=temperature, entropy=True, adaptive=adaptive)
    prompts = [Prompt(f"p{serial}", np.arange(3, 9) + serial) for serial in range(3)]
    return [Sample(GroupId(s, 0, prompt.id).member(m), prompt, spec) for s, prompt in enumerate(prompts) for m in range(2)]


def finish(given: list[Sample], **options: Any) -> list[Sample]:
    config = EmbeddedConfig.model_validate({"max_running": 8, "kv_tokens": 2048, **options})
    run = EngineRun(EmbeddedEngine(module(), clock=VirtualClock(), config=config))
    run.submit(given)
    run.drain()
    return run.results(given)


@lru_cache
def whole() -> tuple[Sample, ...]:
    return tuple(finish(samples()))


def test_a_token_is_drawn_at_the_temperature_of_its_entropy() -> None:
    logits = torch.randn(3, 50, dtype=DOUBLE, generator=torch.Generator().manual_seed(0)) * torch.tensor([[0.1], [2.0], [6.0]])
    specs = [SamplingSpec(1, temperature=0.7, entropy=True, adaptive=RULE)] * 3
    drawn = draw(logits, spec_batch(specs, 50, torch.device("cpu"), DOUBLE), torch.tensor([0.3, 0.6, 0.9], dtype=DOUBLE))
    base = (logits / 0.7).log_softmax(-1)
    entropies = -(base.exp() * base).sum(-1)
    factors = torch.tensor(RULE.factors(entropies.numpy()))
    assert factors[0] == 1.4 and factors[2] < 1 and len(set(factors.tolist())) == 3
    wanted = (logits / (0.7 * factors[:, None])).log_softmax(-1)
    assert drawn.entropies is not None and torch.allclose(drawn.entropies, entropies)
    assert torch.allclose(drawn.logprobs, wanted.gather(1, drawn.tokens[:, None])[:, 0])
    assert torch.allclose(log_distribution(logits, spec_batch(specs, 50, torch.device("cpu"), DOUBLE)), wanted)
    assert not torch.allclose(wanted, base, atol=1e-2)


def test_rows_of_other_kinds_are_not_changed_by_an_adaptive_one() -> None:
    logits, device = torch.linspace(-3, 3, 40, dtype=DOUBLE).repeat(3, 1), torch.device("cpu")
    uniforms = torch.full((3,), 0.4, dtype=DOUBLE)
    others = [SamplingSpec(1, temperature=1.3), SamplingSpec(1, temperature=0.0, entropy=True, adaptive=RULE)]
    mixed = draw(logits, spec_batch([*others, SamplingSpec(1, entropy=True, adaptive=RULE)], 40, device, DOUBLE), uniforms)
    alone = draw(logits[:2], spec_batch(others, 40, device, DOUBLE), uniforms[:2])
    assert torch.equal(mixed.tokens[:2], alone.tokens) and torch.equal(mixed.logprobs[:2], alone.logprobs)
    assert mixed.entropies is not None and float(mixed.entropies[1]) == 0 == float(mixed.logprobs[1])


def test_what_was_recorded_gives_the_learner_the_samplers_distribution() -> None:
    found = list(whole())
    pairs = [tuple(found[index : index + 2]) for index in range(0, 6, 2)]
    groups = tuple(Group(pair[0].id.group, pair, (Reward(1.0), Reward(0.0))) for pair in pairs)
    tokens = assemble(Batch(0, 0, groups)).tokens
    sequences = PackedSequences.of([sample.prompt.token_ids for sample in found], [sample.token_ids for sample in found])

    def gap(temperatures: torch.Tensor) -> float:
        with torch.no_grad():
            return float((Policy(module()).response_logprobs(sequences, temperatures).logprobs - tokens["behaviour"]).abs().max())

    temperatures = tokens["temperature"]
    assert float(temperatures.min()) < 0.85 and float(temperatures.max()) > 0.95
    assert gap(temperatures) < 1e-5
    assert gap(torch.full_like(temperatures, 0.9)) > 0.1, "one temperature for all tokens is wrong"


def test_score_equals_the_sampler() -> None:
    engine = EmbeddedEngine(module(), clock=VirtualClock(), config=EmbeddedConfig(kv_tokens=2048))
    found = [cut(sample, 24) for sample in whole()]
    for scored, sample in zip(engine.score(found), found, strict=True):
        assert float(np.abs(scored - sample.behaviour_logprobs).max()) < 1e-5


@pytest.mark.parametrize("options", [{"max_running": 2}, {"decode_chunk_steps": 5}, {"max_draft_tokens": 3}])
def test_cut_anywhere_and_decoded_anyhow_the_tokens_are_the_same(options: dict[str, Any]) -> None:
    found = finish([cut(sample, 3 * index) for index, sample in enumerate(whole())], **options)
    same_tokens(found, whole(), 1e-6)
    entropies = [(a.entropies, b.entropies) for a, b in zip(found, whole(), strict=True)]
    assert all(a is not None and b is not None and np.allclose(a, b, atol=1e-5) for a, b in entropies)


def test_without_a_rule_other_tokens_are_drawn() -> None:
    plain = finish(samples(None))
    assert any(a.token_ids.tolist() != b.token_ids.tolist() for a, b in zip(plain, whole(), strict=True))


def test_the_rule_needs_entropies_and_sane_numbers() -> None:
    with pytest.raises(DataError, match="entropy"):
        SamplingSpec(4, adaptive=RULE)
    for wrong in ((1.0, 0, 1, 1), (-0.1, 0, 1, 1), (0.1, 0, -1, 1)):
        with pytest.raises(DataError, match="out of range"):
            AdaptiveTemperature(*wrong)
    assert RULE.factors(np.array([np.nan, 0.0])).tolist() == pytest.approx([1.0, 0.6])


def a_group(entropies: list[float | None], serial: int = 0) -> Group:
    prompt = Prompt(f"p{serial}", np.array([2]))
    spec = SamplingSpec(8, entropy=True)
    values = np.array([np.nan if value is None else value for value in entropies], np.float32)
    empty = Sample(GroupId(serial, 0, prompt.id).member(0), prompt, spec)
    sample = empty.extended(Segment(np.arange(len(values)), np.zeros(len(values)), 0, "", values)).finished("length")
    return Group(empty.id.group, (sample,), (Reward(1.0),))


def test_a_batch_gives_the_pivot_and_the_scales_of_the_next_samples() -> None:
    rule = TemperatureRule(0.05, quantile=0.8)
    found = rule.measured([a_group([0.1, 0.2, None]), a_group([0.4, 0.8, 1.6], 1)])
    assert found is not None and found.strength == 0.05 and found.pivot == pytest.approx(np.log(0.8), abs=1e-6)
    assert found.factors(np.array([1.6, 0.8, 0.1, 0.4])).tolist() == pytest.approx([1.05, 1.0, 0.95, 1 - 0.05 / 3])
    assert found.factors(np.array([9.0, 0.001])).tolist() == pytest.approx([1.05, 0.95]), "beyond what was seen: no further"


def test_equal_entropies_leave_the_temperature_alone_and_nothing_known_changes_nothing() -> None:
    rule = TemperatureRule(0.05)
    found = rule.measured([a_group([0.5, 0.5])])
    assert found is not None and found.factors(np.array([0.5, 0.1, 2.0])).tolist() == [1.0, 1.0, 1.0]
    assert rule.measured([a_group([None])]) is None and rule.measured([]) is None
    assert TemperatureRule(0.0).measured([a_group([0.1, 0.9])]) is None
