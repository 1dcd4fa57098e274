"""The process of an engine: commands in, events out. Its other end is `april.distributed.remote_engine`."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

from april.core.clock import WallClock
from april.core.errors import EngineError
from april.core.event import Event
from april.core.ids import Version
from april.distributed.channel import Channel, Closed
from april.distributed.transport import Moved, NotYet, Overwritten, WeightTransport
from april.engines.base import Caps, Engine, Load, UpdateMode

REPORT_S = 0.25
"""A busy engine reports its load this often, events or not: silence means that it hangs."""
RETRY_S = 0.2
"""Weights that could not be had are asked for again after this time; the engine goes on with those that it serves."""
MakeEngine = Callable[[WallClock], Engine]


class Hello(NamedTuple):
    """The engine is loaded."""

    caps: Caps
    load: Load


class Report(NamedTuple):
    """What happened since the last one; `trouble` says why new weights are not loaded yet."""

    events: list[Event]
    load: Load
    read: Moved | None
    trouble: str | None = None


class Reply(NamedTuple):
    """The answer to a question, or the error it ended with."""

    number: int
    value: Any


def serve_engine(
    channel: Channel, make: MakeEngine, origin_s: float, transport: WeightTransport | None, version: Version | None
) -> None:
    """The life of an engine's process: commands in, events out, until the parent closes the connection."""
    clock = WallClock(origin_s)
    engine = make(clock)
    updates = _Updates(engine, transport)
    try:
        held_back = [] if version is None else updates.begin(channel, version)
    except Closed:
        return
    channel.send(Hello(engine.caps, engine.load()))
    reported_s, served = clock.now(), engine.load().version
    while True:
        read = updates.load()
        try:
            for command in (*held_back, *channel.receive()):
                read = _obey(engine, channel, updates, *command) or read
        except Closed:
            return
        held_back = []
        events = engine.poll()
        load, now_s = engine.load(), clock.now()
        if events or read is not None or load.version != served or now_s - reported_s >= REPORT_S:
            channel.send(Report(events, load, read, updates.trouble))
            reported_s, served = now_s, load.version
        _rest(engine, channel, clock, RETRY_S if updates.wanted else None)


def _rest(engine: Engine, channel: Channel, clock: WallClock, longest_s: float | None) -> None:
    """Wait for a command while the engine has nothing to do; a busy engine reports in between."""
    ready_s = engine.ready_at()
    if ready_s is None:
        channel.wait(longest_s)
    elif ready_s > clock.now():
        others = engine.waitables() if hasattr(engine, "waitables") else ()
        channel.wait(min(ready_s - clock.now(), REPORT_S), others)


def _obey(engine: Engine, channel: Channel, updates: _Updates, name: str, *arguments: Any) -> Moved | None:
    """Carry out one command; returns what reading weights took."""
    match name:
        case "submit":
            engine.submit(*arguments)
        case "abort":
            engine.abort(*arguments)
        case "weights":
            updates.wanted = arguments
            return updates.load()
        case "sleep" | "wake":
            getattr(engine, name)()
            channel.send(Reply(arguments[0], None))
        case "score":
            number, samples = arguments
            try:
                channel.send(Reply(number, engine.score(samples)))
            except EngineError as error:
                channel.send(Reply(number, error))
    return None


class _Updates:
    """New weights for an engine: those that it is to load, and why it has not yet.

    Attributes:
        wanted: version and mode; None when there is nothing to load.
        trouble: what the last attempt ended with.
    """

    def __init__(self, engine: Engine, transport: WeightTransport | None) -> None:
        self._engine, self._transport = engine, transport
        self.wanted: tuple[Version, UpdateMode] | None = None
        self.trouble: str | None = None

    def begin(self, channel: Channel, version: Version) -> list[Any]:
        """Load the version that is served, or a newer one; returns the commands that came meanwhile, which wait for it.

        The others do not wait for a process that is not up: the version may be passed, or written over while it is read.
        """
        self.wanted, held_back = (version, "drain"), list[Any]()
        while True:
            for command in channel.receive():
                if command[0] == "weights":
                    self.wanted = command[1:]
                else:
                    held_back.append(command)
            self.wanted = self.wanted or (version, "drain")
            with suppress(Overwritten):
                if self.load() is not None:
                    return held_back
            channel.wait(RETRY_S)

    def load(self) -> Moved | None:
        """Load what is wanted, if it can be had now; returns what that took.

        A version that others have passed is let go of: this process was late, and the command for a newer one is on its way.
        """
        if self.wanted is None:
            return None
        start_s, (version, mode) = time.perf_counter(), self.wanted
        if self._transport is None:
            self._engine.update_weights({}, version, mode)
            return self._loaded(start_s, 0)
        try:
            if self._transport.passed(version):
                self.wanted = self.trouble = None
                return None
            with self._transport.reading(version) as weights:
                self._engine.update_weights(weights, version, mode)
        except NotYet as error:
            self.trouble = f"{error.what} ({error.got})"
            return None
        return self._loaded(start_s, weights.num_bytes)

    def _loaded(self, start_s: float, num_bytes: int) -> Moved:
        self.wanted = self.trouble = None
        return Moved(time.perf_counter() - start_s, num_bytes)
