"""The contract kit must fail for engines that break the contract."""

from __future__ import annotations

import unittest
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from april.core.clock import VirtualClock
from april.core.event import Event, Finished, Parked, Progressed
from april.core.ids import GroupId
from april.core.prompt import Prompt
from april.core.sample import Sample
from april.core.sampling import SamplingSpec
from april.engines.base import Engine
from april.engines.embedded.config import EmbeddedConfig
from april.engines.embedded.engine import EmbeddedEngine
from april.testing.engine_contract import EngineContract
from april.testing.engine_run import ContractViolation, EngineRun, cut
from april.testing.toy_model import CharTokenizer, toy_model

MODULE = toy_model("llama", dtype=torch.float64)
OTHER = dict(toy_model("llama", dtype=torch.float64, seed=1).named_parameters())


class Faulty:
    """An embedded engine whose calls can be bent one at a time."""

    def __init__(self, engine: EmbeddedEngine, faults: dict[str, Callable[..., Any]]) -> None:
        self._engine, self._faults = engine, faults

    def __getattr__(self, name: str) -> Any:
        honest = getattr(self._engine, name)
        fault = self._faults.get(name)
        return honest if fault is None else lambda *args, **options: fault(honest, *args, **options)


class Kit(EngineContract):
    score_tolerance = cut_tolerance = 1e-6
    reuse_finished = False

    def __init__(self, **faults: Callable[..., Any]) -> None:
        self.faults = faults

    def make(self, *, max_running: int | None = None, kv_tokens: int | None = None) -> tuple[Engine, list[Sample]]:
        config = EmbeddedConfig(max_running=max_running or 8, kv_tokens=kv_tokens or 2048, steps_per_poll=3)
        engine: Any = Faulty(EmbeddedEngine(MODULE, tokenizer=CharTokenizer(), clock=VirtualClock(), config=config), self.faults)
        prompts = [Prompt(f"p{serial}", [3 + serial, 7, 9]) for serial in range(2)]
        spec = SamplingSpec(max_new_tokens=20)
        return engine, [Sample(GroupId(s, 0, p.id).member(m), p, spec) for s, p in enumerate(prompts) for m in range(2)]

    def new_weights(self) -> dict[str, Any]:
        return OTHER


def _each(change: Callable[[Event], list[Event]]) -> Callable[..., list[Event]]:
    return lambda honest: [changed for event in honest() for changed in change(event)]


def _twice(event: Event) -> list[Event]:
    return [event, event] if isinstance(event, Finished) else [event]


def _lost(event: Event) -> list[Event]:
    return [] if isinstance(event, Finished) and event.id.member == 1 else [event]


def _shorter(event: Event) -> list[Event]:
    segment = getattr(event, "segment", None)
    if not isinstance(event, Parked | Finished) or segment is None or len(segment) < 2:
        return [event]
    return [replace(event, segment=replace(segment, token_ids=segment.token_ids[:-1], logprobs=segment.logprobs[:-1]))]


def _relabelled(event: Event) -> list[Event]:
    segment = getattr(event, "segment", None)
    return [event] if segment is None else [replace(event, segment=replace(segment, version=1))]  # type: ignore[call-arg]


def _other_seed(honest: Callable[..., None], samples: Sequence[Sample]) -> None:
    honest([replace(sample, spec=replace(sample.spec, seed=sample.spec.seed + len(sample))) for sample in samples])


def _fresh_budget(honest: Callable[..., None], samples: Sequence[Sample]) -> None:
    honest([replace(s, spec=replace(s.spec, max_new_tokens=s.spec.max_new_tokens + len(s))) for s in samples])


def _accept_known(honest: Callable[..., None], samples: Sequence[Sample]) -> None:
    honest([sample for sample in samples if sample.stop is None and sample.remaining_tokens])


def _as_drain(honest: Callable[..., None], weights: Any, version: int, mode: str) -> None:
    honest(weights, version, "drain")


def _as_recompute(honest: Callable[..., None], weights: Any, version: int, mode: str) -> None:
    honest(weights, version, "recompute")


CASES: list[tuple[str, str, Callable[..., Any]]] = [
    ("test_each_sample_has_one_terminal_event", "poll", _each(_twice)),
    ("test_each_sample_has_one_terminal_event", "poll", _each(_lost)),
    ("test_each_sample_has_one_terminal_event", "poll", _each(_shorter)),
    ("test_parked_output_is_complete_and_can_be_continued", "poll", _each(_shorter)),
    ("test_segments_carry_the_version", "poll", _each(_relabelled)),
    ("test_cut_anywhere_gives_the_same_tokens", "submit", _other_seed),
    ("test_the_budget_counts_all_segments", "submit", _fresh_budget),
    ("test_score_equals_the_sampler", "score", lambda honest, samples: [score - 0.01 for score in honest(samples)]),
    ("test_a_bad_sample_rejects_the_whole_call", "submit", _accept_known),
    ("test_drain_lets_running_samples_finish", "update_weights", _as_recompute),
    ("test_recompute_continues_under_the_new_weights", "update_weights", _as_drain),
    ("test_keep_kv_is_another_sampler", "update_weights", _as_recompute),
    ("test_abort_of_a_waiting_sample_changes_nothing", "abort", lambda honest, ids=None: None),
]


@pytest.mark.parametrize(("name", "method", "fault"), CASES, ids=[f"{case[1]}-{index}" for index, case in enumerate(CASES)])
def test_a_broken_engine_is_found(name: str, method: str, fault: Callable[..., Any]) -> None:
    with pytest.raises(ContractViolation):
        getattr(Kit(**{method: fault}), name)()
    getattr(Kit(), name)()
    assert hasattr(EngineContract, name)


def test_events_of_unknown_samples_and_backward_times_are_found() -> None:
    engine, samples = Kit().make()
    run = EngineRun(engine)
    run.submit(samples[:1])
    with pytest.raises(ContractViolation, match="without a terminal event"):
        run._book(Parked(0.0, samples[1].id, None))
    run._book(Finished(5.0, samples[0].id, None, "eos"))
    run.open.add(samples[0].id)
    with pytest.raises(ContractViolation, match="do not decrease"):
        run._book(Parked(4.0, samples[0].id, None))


def test_parts_that_an_engine_does_not_promise_are_skipped() -> None:
    class NoPromise(Kit):
        def make(self, **options: Any) -> tuple[Engine, list[Sample]]:
            engine, samples = super().make(**options)
            engine._engine.caps = replace(engine.caps, score=False, addressed_random=False)  # type: ignore[attr-defined]
            return engine, samples

    for name in ("test_score_equals_the_sampler", "test_cut_anywhere_gives_the_same_tokens"):
        with pytest.raises(unittest.SkipTest, match="caps"):
            getattr(NoPromise(), name)()
    with pytest.raises(unittest.SkipTest, match="make the engine"):
        EngineContract().make()


def test_cut_takes_a_sample_back() -> None:
    prompt = Prompt("p", [1])
    sample = Sample(GroupId(0, 0, "p").member(0), prompt, SamplingSpec(max_new_tokens=9))
    grown = sample.extended(_segment([5, 6], 0)).extended(_segment([7], 1)).finished("eos")
    back = cut(grown, 1)
    assert back.token_ids.tolist() == [5] and back.stop is None and [span.end for span in back.spans] == [1]
    assert cut(grown, 3).versions.tolist() == [0, 0, 1] and len(cut(grown, 0).spans) == 0


def _segment(tokens: list[int], version: int) -> Any:
    from april.core.sample import Segment

    return Segment(np.array(tokens), np.full(len(tokens), -0.5), version)


def test_progress_is_not_an_end() -> None:
    engine, samples = Kit().make()
    run = EngineRun(engine)
    run.submit(samples[:1])
    run._book(Progressed(0.0, samples[0].id, _segment([4], 0)))
    assert run.open == {samples[0].id} and run.samples[samples[0].id].token_ids.tolist() == [4]
