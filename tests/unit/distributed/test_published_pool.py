"""A pool of engines over each transport: one version for all; who missed one is of no use until it has caught up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from process_helpers import drain, samples_of
from publishing_helpers import TRANSPORTS, Marked, marked, tokens_of, transport_named, weights_of

from april.core.clock import WallClock
from april.core.errors import DataError
from april.core.event import Event, Finished, Parked, Progressed
from april.core.ids import GroupId
from april.core.sample import Sample
from april.core.sampling import SamplingSpec
from april.distributed.channel import Channel
from april.distributed.engine_process import serve_engine
from april.distributed.remote_engine import RemoteEngine
from april.distributed.transport import NotYet
from april.engines.base import UpdateMode, Weights
from april.engines.pool import EnginePool


def group_of(serial: int, size: int = 6) -> list[Sample]:
    prompt = samples_of(1, 1)[0].prompt
    spec = SamplingSpec(max_new_tokens=200)
    return [Sample(GroupId(serial, 0, prompt.id).member(member), prompt, spec) for member in range(size)]


def generated(pool: EnginePool, samples: list[Sample]) -> list[Sample]:
    """The samples as they finish, whoever generates them."""
    pool.submit(samples)
    state = {sample.id: sample for sample in samples}
    events: list[Event] = drain(pool, lambda: not pool.load().running + pool.load().waiting)  # type: ignore[arg-type]
    for event in [*events, *pool.poll()]:
        if isinstance(event, Progressed | Parked | Finished) and event.segment is not None:
            state[event.id] = state[event.id].extended(event.segment)
    return list(state.values())


def served(pool: EnginePool, version: int) -> bool:
    """Whether all members serve the version, waiting for it."""
    drain(pool, lambda: pool.load().version == version)  # type: ignore[arg-type]
    return all(engine.load().version == version for engine in pool.engines.values())


def pool_on(name: str, folder: Path, **limits: Any) -> tuple[EnginePool, RemoteEngine, RemoteEngine]:
    transport = transport_named(name, folder, deadline_s=2.0)
    one, other = (marked(f"engine {index}", transport, **limits) for index in range(2))
    pool = EnginePool({"engine 0": one, "engine 1": other}, WallClock())
    if pool.caps.max_running != 4:  # asked for here so that both are loaded: before that they count as up to date
        raise ValueError("other engines than expected")
    return pool, one, other


def drop_next_update(engine: RemoteEngine) -> list[int]:
    """The next command to load weights is lost on its way."""
    send, dropped = engine._send, []

    def lossy(name: str, *arguments: Any) -> None:
        if name == "weights" and not dropped:
            dropped.append(arguments[0])
        else:
            send(name, *arguments)

    engine._send = lossy  # type: ignore[method-assign]
    return dropped


@pytest.mark.parametrize("name", TRANSPORTS)
def test_all_engines_serve_a_version_before_anything_is_generated_with_it(name: str, tmp_path: Path) -> None:
    pool, one, other = pool_on(name, tmp_path)
    pool.update_weights(weights_of(7), 1, "recompute")
    assert served(pool, 1)
    samples = generated(pool, group_of(0))
    assert all(tokens_of(sample) == {7} and set(sample.versions.tolist()) == {1} for sample in samples)
    assert min(one.load().generated_tokens, other.load().generated_tokens) > 0, "both have had some"
    pool.close()


@pytest.mark.parametrize("name", TRANSPORTS)
def test_a_dropped_update_keeps_an_engine_out_until_it_has_caught_up(name: str, tmp_path: Path) -> None:
    pool, one, other = pool_on(name, tmp_path)
    pool.update_weights(weights_of(7), 1, "recompute")
    assert served(pool, 1)
    dropped = drop_next_update(other)
    pool.update_weights(weights_of(8), 2, "recompute")
    drain(pool, lambda: one.load().version == 2)  # type: ignore[arg-type]
    pool.submit(waiting := group_of(1))
    pool.poll()
    assert dropped == [2] and other.load().version == 1
    assert pool.load().version != 2 and not one.load().running + other.load().running, "nothing is given out meanwhile"
    pool.abort([sample.id for sample in waiting])
    pool.poll()
    pool.restart("was killed: it did not serve version 2")
    before = other.load().generated_tokens
    assert all(tokens_of(sample) == {8} for sample in generated(pool, group_of(2)))
    assert other.num_restarts == 1 and "did not serve version 2" in other.all_losses[0]
    drain(pool, lambda: other.load().version == 2)  # type: ignore[arg-type]
    assert all(tokens_of(sample) == {8} for sample in generated(pool, group_of(3)))
    assert other.load().generated_tokens > before, "it is used again, on the weights that it had missed"
    pool.close()


@pytest.mark.parametrize("name", TRANSPORTS)
def test_an_engine_that_dies_comes_back_with_the_newest_version_without_another_write(name: str, tmp_path: Path) -> None:
    pool, one, other = pool_on(name, tmp_path)
    pool.update_weights(weights_of(7), 1, "recompute")
    assert served(pool, 1)
    pool.update_weights(weights_of(9), 2, "recompute")
    assert served(pool, 2)
    assert other._child is not None
    other._child.kill()
    drain(pool, lambda: bool(other.all_losses))  # type: ignore[arg-type]
    assert all(tokens_of(sample) == {9} for sample in generated(pool, group_of(0)))
    pool.update_weights(weights_of(10), 3, "recompute")
    drain(pool, lambda: other.load().version == 3 == one.load().version)  # type: ignore[arg-type]
    before = other.load().generated_tokens
    assert all(tokens_of(sample) == {10} for sample in generated(pool, group_of(1)))
    assert other.load().generated_tokens > before
    pool.close()


def test_weights_that_cannot_be_had_yet_are_asked_for_again_and_the_wait_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport = transport_named("shared_memory", tmp_path)
    plain, late = type(transport).reading, [True]

    def reading(self: Any, version: int) -> Any:
        if late and version >= 2:
            raise NotYet("the file system is slow", got=f"version {version}")
        return plain(self, version)

    monkeypatch.setattr(type(transport), "reading", reading)
    engine = marked("engine", transport)
    engine.update_weights(weights_of(1), 1)
    drain(engine, lambda: engine.load().version == 1 and engine.ready_at() is None)
    engine.update_weights(weights_of(2), 2)
    drain(engine, lambda: "slow" in str(engine.waits()))
    assert engine.load().version == 1 and engine.pending() == ["publish version 2: the file system is slow (version 2)"]
    engine.restart("was killed")
    assert "was killed: the file system is slow (version 2)" in engine.all_losses[0]
    drain(engine, lambda: engine.pid is not None)
    late.clear()
    drain(engine, lambda: engine.load().version == 2)
    assert engine.waits() == []
    engine.close()


def test_a_restarted_engine_computes_nothing_before_it_has_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `retry` its samples are sent to the new process at once; they wait there until the weights can be had."""
    transport = transport_named("shared_memory", tmp_path)
    plain, late = type(transport).reading, list[int]()

    def reading(self: Any, version: int) -> Any:
        if late and late.pop():
            raise NotYet("not yet", got=f"version {version}")
        return plain(self, version)

    monkeypatch.setattr(type(transport), "reading", reading)
    engine = marked("engine", transport, pause_s=0.02, on_engine_loss="retry")
    engine.update_weights(weights_of(5), 1)
    drain(engine, lambda: engine.load().version == 1)
    samples = group_of(0, size=2)
    engine.submit(samples)
    late += [1, 1, 1]
    engine.restart("was killed")
    events = drain(engine, lambda: not engine.load().running + engine.load().waiting)
    tokens = {token for event in events for token in getattr(getattr(event, "segment", None), "token_ids", ())}
    assert tokens == {5} and not late and sum(isinstance(event, Finished) for event in events) == 2
    engine.close()


def test_a_restarted_engine_whose_weights_are_written_over_takes_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others do not wait for it: two versions further on, the trainer writes where it reads."""
    transport = transport_named("shared_memory", tmp_path)
    engine = marked("engine", transport)
    engine.update_weights(weights_of(5), 1)
    assert engine.caps.max_running == 2, "asked for here so that it is loaded"
    plain, overwritten = type(transport).reading, list[int]()

    @contextmanager
    def reading(self: Any, version: int) -> Iterator[Any]:
        with plain(self, version) as weights:
            yield weights
            if not overwritten:
                transport.write(weights_of(6), 2)
                transport.write(weights_of(7), 3)
                overwritten.append(version)

    monkeypatch.setattr(type(transport), "reading", reading)
    engine.restart("was killed")
    drain(engine, lambda: bool(overwritten))
    engine.update_weights(transport.view(3), 3)
    drain(engine, lambda: engine.load().version == 3)
    assert overwritten == [1] and engine.num_restarts == 1
    engine.submit(group_of(0, size=1))
    events = drain(engine, lambda: not engine.load().running + engine.load().waiting)
    assert {token for event in events for token in getattr(getattr(event, "segment", None), "token_ids", ())} == {7}
    engine.close()


def test_an_engine_that_starts_reads_the_newest_of_the_versions_it_was_told_of(tmp_path: Path) -> None:
    transport = transport_named("shared_memory", tmp_path)
    for version in (0, 1):
        transport.write(weights_of(version), version)
    ours, theirs = (Channel(end) for end in Channel.pair())
    ours.send(("weights", 1, "drain"))
    theirs.wait(None)
    loaded = list[int]()

    class Told(Marked):
        def update_weights(self, weights: Weights, version: int, mode: UpdateMode = "drain") -> None:
            loaded.append(version)
            ours.close()
            super().update_weights(weights, version, mode)

    serve_engine(theirs, lambda _clock: Told(), 0.0, transport, 0)
    theirs.close()
    assert loaded == [1]


def test_a_corrupted_file_ends_the_run_with_its_place(tmp_path: Path) -> None:
    transport = transport_named("disk", tmp_path)
    engine = marked("engine", transport)
    transport.write(weights_of(1), 1)
    (path,) = (tmp_path / "weights").glob("weights-*")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="a file of weights is damaged") as caught:
        engine.update_weights(transport.view(1), 1)
        drain(engine, lambda: engine.load().version == 1 and engine.pid is None)
    assert path.name in str(caught.value.where)
    engine.close()
