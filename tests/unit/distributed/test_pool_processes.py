"""A pool of engines in child processes: it is waited for as one, and lives on when one of them dies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from process_helpers import drain, remote, samples_of

from april.core.clock import WallClock
from april.core.event import Broken, Event, Finished, Parked, Progressed
from april.core.ids import SampleId
from april.core.sample import Sample
from april.distributed.layout import Layout
from april.distributed.shared_weights import WeightBuffer
from april.engines.pool import EnginePool


def continued(samples: list[Sample], events: list[Event]) -> dict[SampleId, Sample]:
    """The samples with everything that was reported."""
    state = {sample.id: sample for sample in samples}
    for event in events:
        if isinstance(event, Progressed | Parked | Finished) and event.segment is not None:
            state[event.id] = state[event.id].extended(event.segment)
    return state


@pytest.mark.parametrize("trouble", ["kill", pytest.param("stop", marks=pytest.mark.slow)])
def test_samples_of_an_engine_that_dies_or_hangs_go_to_the_other(tmp_path: Path, trouble: str) -> None:
    limits = {"engine_silence_s": 5.0} if trouble == "stop" else {}
    ill, well = remote(tmp_path, trouble, pause_s=0.01, **limits), remote(tmp_path, "none", pause_s=0.01)
    pool = EnginePool({"ill": ill, "well": well}, WallClock())
    try:
        samples = samples_of(num_groups=4)
        pool.submit(samples)
        assert len(pool.waitables()) == 1 and pool.computes_outside
        events: list[Event] = []
        events += drain(pool, lambda: bool(ill.all_losses) or pool.load().running + pool.load().waiting == 0)  # type: ignore[arg-type]
        events += pool.poll()
        broken = [event for event in events if isinstance(event, Broken)]
        assert len(broken) == 4 and all(event.reason == ill.all_losses[0] for event in broken)
        state = continued(samples, events)
        assert all(len(state[event.id]) > 0 for event in broken), "what was reported is not generated again"
        pool.submit([state[event.id] for event in broken])
        events += drain(pool, lambda: not pool.load().running + pool.load().waiting)  # type: ignore[arg-type]
        events += pool.poll()
        whole = continued(samples, events)
        assert all(len(sample) == 40 for sample in whole.values())
        assert sum(isinstance(event, Finished) for event in events) == 8
    finally:
        pool.close()


def test_a_reader_that_is_late_sees_that_others_went_on() -> None:
    def weights(number: float) -> dict[str, Any]:
        return {"matrix": torch.full((3,), number)}

    buffer = WeightBuffer(Layout.of(weights(0)))
    for version in (4, 5):
        buffer.write(weights(version), version)
    assert not buffer.passed(4) and not buffer.passed(5)
    buffer.write(weights(6), 6)
    assert buffer.passed(4) and not buffer.passed(5) and not buffer.passed(6)
    assert not buffer.passed(7), "negative control: one that was never there is not passed"
