"""The scripted engine under the contract kit."""

from __future__ import annotations

import numpy as np
from rollout_helpers import make_prompts

from april.core.clock import VirtualClock
from april.core.ids import GroupId
from april.core.random import stream_key
from april.core.sample import Sample
from april.core.sampling import SamplingSpec
from april.engines.base import Engine
from april.engines.scripted import Reply, ScriptedEngine
from april.testing.engine_contract import EngineContract


def _reply(sample: Sample) -> Reply:
    length = 12 + stream_key(0, sample.id) % 25
    return Reply(tuple(int(token) for token in np.arange(length) + 100 * sample.id.member))


class TestScripted(EngineContract):
    children_differ = False  # fixed replies have no random stream

    def make(self, *, max_running: int | None = None, kv_tokens: int | None = None) -> tuple[Engine, list[Sample]]:
        engine = ScriptedEngine(_reply, VirtualClock(), max_running=max_running or 100, report_every_tokens=5)
        spec = SamplingSpec(max_new_tokens=30)
        samples = [
            Sample(GroupId(serial, 0, prompt.id).member(member), prompt, spec)
            for serial, prompt in enumerate(make_prompts(3))
            for member in range(2)
        ]
        return engine, samples

    def advance(self, engine: Engine) -> None:
        ready_s = engine.ready_at()
        if ready_s is not None:
            engine._clock.wait_until(ready_s)  # type: ignore[attr-defined]
