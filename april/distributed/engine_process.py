"""The process of an engine: commands in, events out. Its other end is `april.distributed.remote_engine`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from april.core.clock import WallClock
from april.core.errors import EngineError
from april.core.event import Event
from april.core.ids import Version
from april.distributed.channel import Channel, Closed
from april.engines.base import Caps, Engine, Load, UpdateMode

if TYPE_CHECKING:
    from april.distributed.shared_weights import WeightBuffer

REPORT_S = 0.25
"""A busy engine reports its load this often, events or not: silence means that it hangs."""
MakeEngine = Callable[[WallClock], Engine]


class Hello(NamedTuple):
    """The engine is loaded."""

    caps: Caps
    load: Load


class Report(NamedTuple):
    """What happened since the last one."""

    events: list[Event]
    load: Load
    read_s: float | None


class Reply(NamedTuple):
    """The answer to a question, or the error it ended with."""

    number: int
    value: Any


def serve_engine(
    channel: Channel, make: MakeEngine, origin_s: float, buffer: WeightBuffer | None, version: Version | None
) -> None:
    """The life of an engine's process: commands in, events out, until the parent closes the connection."""
    clock = WallClock(origin_s)
    engine = make(clock)
    if version is not None:
        _load_weights(engine, buffer, version, "drain")
    channel.send(Hello(engine.caps, engine.load()))
    reported_s, served = clock.now(), engine.load().version
    while True:
        read_s: float | None = None
        try:
            for command in channel.receive():
                seconds = _obey(engine, channel, buffer, *command)
                read_s = seconds if seconds is not None else read_s
        except Closed:
            return
        events = engine.poll()
        load, now_s = engine.load(), clock.now()
        if events or read_s is not None or load.version != served or now_s - reported_s >= REPORT_S:
            channel.send(Report(events, load, read_s))
            reported_s, served = now_s, load.version
        _rest(engine, channel, clock)


def _rest(engine: Engine, channel: Channel, clock: WallClock) -> None:
    """Wait for a command while the engine has nothing to do; a busy engine reports in between."""
    ready_s = engine.ready_at()
    if ready_s is None:
        channel.wait(None)
    elif ready_s > clock.now():
        channel.wait(min(ready_s - clock.now(), REPORT_S))


def _obey(engine: Engine, channel: Channel, buffer: WeightBuffer | None, name: str, *arguments: Any) -> float | None:
    """Carry out one command; returns the seconds that reading weights took."""
    match name:
        case "submit":
            engine.submit(*arguments)
        case "abort":
            engine.abort(*arguments)
        case "weights":
            version, mode = arguments
            return _load_weights(engine, buffer, version, mode)
        case "score":
            number, samples = arguments
            try:
                channel.send(Reply(number, engine.score(samples)))
            except EngineError as error:
                channel.send(Reply(number, error))
    return None


def _load_weights(engine: Engine, buffer: WeightBuffer | None, version: Version, mode: UpdateMode) -> float:
    start_s = time.perf_counter()
    if buffer is None:
        engine.update_weights({}, version, mode)
    else:
        if buffer.passed(version):
            return 0.0  # this process was late, and others have gone on; the command for a newer version is on its way
        with buffer.reading(version) as weights:
            engine.update_weights(weights, version, mode)
    return time.perf_counter() - start_s
