"""An engine that gives its memory back while somebody else needs it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from april.core.clock import VirtualClock
from april.core.errors import EngineError
from april.core.ids import GroupId
from april.core.prompt import Prompt
from april.core.sample import Sample
from april.core.sampling import SamplingSpec
from april.engines.embedded.config import EmbeddedConfig
from april.engines.embedded.engine import EmbeddedEngine
from april.engines.pool import EnginePool
from april.testing.engine_run import EngineRun, same_tokens
from april.testing.toy_model import toy_model

PROMPT = Prompt("p", np.arange(2, 8, dtype=np.int32))
SAMPLES = [Sample(GroupId(0, 0, "p").member(member), PROMPT, SamplingSpec(max_new_tokens=30)) for member in range(3)]


def running(dtype: torch.dtype = torch.float64) -> EngineRun:
    config = EmbeddedConfig(max_running=8, kv_tokens=4096, steps_per_poll=4)
    module = toy_model(dtype=dtype, hidden_size=64)
    return EngineRun(EmbeddedEngine(module, clock=VirtualClock(), config=config))


def finish(run: EngineRun, samples: Sequence[Sample]) -> list[Sample]:
    run.submit(samples)
    run.drain()
    return run.results(samples)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_asleep_an_engine_holds_no_kv_and_afterwards_goes_on_with_the_same_tokens(dtype: torch.dtype) -> None:
    whole = finish(running(dtype), SAMPLES)
    run = running(dtype)
    run.submit(SAMPLES)
    run.poll()
    with pytest.raises(EngineError, match="with samples cannot sleep"):
        run.engine.sleep()  # type: ignore[attr-defined]
    run.engine.abort()
    run.drain()
    memory = run.engine._running._memory  # type: ignore[attr-defined]
    assert memory.kept.num_tokens > 0 and memory.allocated_tokens > 0, "parked samples keep their KV"
    held = [weakref.ref(bucket.data) for bucket in memory._buckets.values()]
    assert run.engine.caps.sleeps and held
    run.engine.sleep()  # type: ignore[attr-defined]
    assert (memory.kept.num_tokens, memory.allocated_tokens) == (0, 0)
    assert all(tensor() is None for tensor in held), "nothing else holds it"
    run.engine.wake()  # type: ignore[attr-defined]
    same_tokens(finish(run, run.results(SAMPLES)), whole, 1e-9 if dtype == torch.float64 else 1e-4)


def test_a_pool_sleeps_if_all_of_it_can() -> None:
    clock = VirtualClock()
    members = {f"engine {index}": EmbeddedEngine(toy_model(), clock=clock) for index in range(2)}
    pool = EnginePool(members, clock)  # type: ignore[arg-type]
    assert pool.caps.sleeps
    slept: list[str] = []
    for name, member in members.items():
        member.sleep = lambda name=name: slept.append(name)  # type: ignore[method-assign,misc]
    pool.sleep()
    pool.wake()
    assert slept == ["engine 0", "engine 1"]
