"""The experts of every sampled token: recorded by the engine, kept with the sample, replayed by the policy (R3)."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch

from april.checkpoint.codec import decode_frames, encode
from april.core.clock import VirtualClock
from april.core.errors import DataError, ModelError
from april.core.ids import GroupId
from april.core.prompt import Prompt
from april.core.sample import Sample, Segment
from april.core.sampling import SamplingSpec
from april.engines.embedded import select
from april.engines.embedded.config import EmbeddedConfig
from april.engines.embedded.engine import EmbeddedEngine
from april.engines.embedded.transformers_forward import TransformersForward
from april.models.policy import PackedSequences, Policy
from april.models.routing import Routing
from april.testing.engine_run import EngineRun, cut
from april.testing.toy_model import toy_model


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@lru_cache
def module(dtype: torch.dtype = torch.float32) -> Any:
    return toy_model("qwen3_moe", dtype=dtype, seed=1)


def run(**options: Any) -> EngineRun:
    config = EmbeddedConfig(**({"max_running": 8, "kv_tokens": 4096, "record_routes": True, "report_every_tokens": 7} | options))
    return EngineRun(EmbeddedEngine(module(), clock=VirtualClock(), config=config))


def samples(num_groups: int = 4, size: int = 2, budget: int = 40) -> list[Sample]:
    prompts = [Prompt(f"p{serial}", np.arange(2, 5 + serial) + serial) for serial in range(num_groups)]
    return [
        Sample(GroupId(serial, 0, prompt.id).member(member), prompt, SamplingSpec(budget))
        for serial, prompt in enumerate(prompts)
        for member in range(size)
    ]


def finish(engine: EngineRun, given: list[Sample]) -> list[Sample]:
    engine.submit(given)
    engine.drain()
    return engine.results(given)


@lru_cache
def whole() -> tuple[Sample, ...]:
    return tuple(finish(run(), samples()))


def routes_of(sample: Sample) -> Any:
    """Experts of the passes that read the prompt and drew the response, by the module itself on the whole sequence."""
    routing, ids = Routing.of(module()), np.concatenate([sample.prompt.token_ids, sample.token_ids]).astype(np.int64)
    routing.replay(None)
    with torch.no_grad():
        module()(input_ids=torch.from_numpy(ids)[None])
    return routing.chosen()[:-1].numpy()


def recorded(sample: Sample) -> Any:
    """The same as the sample has it."""
    if sample.routes is None or sample.prompt_routes is None:
        raise ValueError("not recorded")
    return np.concatenate([sample.prompt_routes, sample.routes])


def share_equal(left: Any, right: Any) -> float:
    """Share of tokens and layers whose sets of experts agree."""
    return float((np.sort(left, -1) == np.sort(right, -1)).all(-1).mean())


def test_the_recorded_experts_are_those_of_the_pass_that_drew_the_token() -> None:
    for sample in whole():
        assert sample.routes is not None and sample.routes.shape == (40, 2, 2) and sample.routes.dtype == np.uint8
        assert share_equal(recorded(sample), routes_of(sample)) == 1
        assert share_equal(recorded(sample)[1:], routes_of(sample)[:-1]) < 0.9, "one token off would be seen"


def test_a_forward_that_computes_all_tokens_records_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "transformers_forward", TransformersForward)
    found = finish(run(), samples(2, 1, 12))
    for sample in found:
        assert share_equal(recorded(sample), routes_of(sample)) == 1


def test_nothing_is_recorded_unless_asked() -> None:
    found = finish(run(record_routes=False), samples(1, 1, 5))
    assert found[0].routes is None and found[0].token_ids.tolist() == whole()[0].token_ids[:5].tolist()


def test_a_model_without_experts_is_refused() -> None:
    with pytest.raises(ModelError, match="without experts"):
        EmbeddedEngine(toy_model("qwen3"), clock=VirtualClock(), config=EmbeddedConfig(record_routes=True))
    with pytest.raises(ValueError, match="record_routes"):
        EmbeddedConfig(record_routes=True, forward="lean")


def test_routes_survive_parking_a_crash_and_a_fork() -> None:
    given = [cut(sample, index) for index, sample in enumerate(whole())]
    engine = run(max_running=3)
    engine.submit(given)
    engine.until_tokens(30)
    engine.engine.abort()
    engine.until(lambda: not engine.open)
    parked = engine.results(given)
    prompts = {sample.prompt.id: sample.prompt for sample in parked}
    saved = decode_frames(encode(parked), "test", prompts)[0]
    assert any(0 < len(sample) < 40 for sample in saved)
    unfinished = [sample for sample in saved if sample.stop is None]
    engine = run()
    found = {sample.id: sample for sample in [*saved, *finish(engine, unfinished)]}
    for sample in whole():
        again = found[sample.id]
        assert again.token_ids.tolist() == sample.token_ids.tolist()
        assert np.array_equal(recorded(again), recorded(sample))
    child = whole()[0].forked(9, "0")
    assert np.array_equal(recorded(child), recorded(whole()[0])[: 2 + 9])


def test_tokens_without_a_record_are_marked() -> None:
    bare = Sample(GroupId(0, 0, "p").member(0), Prompt("p", np.array([2])), SamplingSpec(8))
    experts = np.array([[[3, 1]]], np.uint8)
    grown = bare.extended(Segment(np.array([4, 5]), np.zeros(2), 0)).extended(
        Segment(np.array([6]), np.zeros(1), 0, routes=experts)
    )
    assert grown.routes is not None and grown.routes.tolist() == [[[255, 255]], [[255, 255]], [[3, 1]]]
    longer = grown.extended(Segment(np.array([7]), np.zeros(1), 1))
    assert longer.routes is not None and longer.routes[3].tolist() == [[255, 255]]
    with pytest.raises(DataError, match="different models"):
        grown.extended(Segment(np.array([7]), np.zeros(1), 1, routes=np.zeros((1, 2, 2), np.uint8)))
    with pytest.raises(DataError, match="another form"):
        Segment(np.array([7]), np.zeros(1), 1, routes=np.zeros((1, 2), np.uint8))
    with pytest.raises(DataError, match="differ in length"):
        Segment(np.array([7]), np.zeros(1), 1, routes=np.zeros((2, 1, 2), np.uint8))


def gap(policy: Policy, found: tuple[Sample, ...] | list[Sample], *, replay: bool) -> float:
    """Mean difference of the policy's log-probs from the engine's."""
    prompts, responses = [sample.prompt.token_ids for sample in found], [sample.token_ids for sample in found]
    routes = [(sample.prompt_routes, sample.routes) for sample in found if sample.routes is not None]
    sequences = PackedSequences.of(prompts, responses, routes if replay else None)
    with torch.no_grad():
        logprobs = policy.response_logprobs(sequences, torch.ones(len(sequences.rows))).logprobs
    behaviour = torch.from_numpy(np.concatenate([sample.behaviour_logprobs for sample in found]))
    return float((logprobs - behaviour).abs().mean())


def test_replay_changes_nothing_where_routers_agree() -> None:
    assert gap(Policy(module()), whole(), replay=False) < 1e-5
    assert gap(Policy(module()), whole(), replay=True) < 1e-5


def test_replay_brings_a_trainer_with_perturbed_routers_back_to_the_engine() -> None:
    other, random = toy_model("qwen3_moe", seed=1), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name.endswith("mlp.gate.weight"):
                parameter.add_(0.001 * torch.randn(parameter.shape, generator=random))
    without, replayed = gap(Policy(other), whole(), replay=False), gap(Policy(other), whole(), replay=True)
    assert without > 0.01 and replayed < without / 4


def test_replay_brings_a_trainer_of_other_numerics_back_to_the_engine() -> None:
    found = finish(run(dtype="bfloat16"), samples())
    without, replayed = gap(Policy(module()), found, replay=False), gap(Policy(module()), found, replay=True)
    assert without > 0.2 and replayed < without / 10
