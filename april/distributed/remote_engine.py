"""An engine in a process of its own, and what stands for it in the controlling process.

    RemoteEngine  -- submit, abort, weights, score -->  serve_engine: commands -> engine.poll -> events, load
                  <---- report (events, load), reply --

The one here knows which samples are in the other process. When that one dies, or has work and says nothing for too long,
it is killed; what it had reported stays, its samples come back as `Broken` (or are given to the next process), and a new
process is started on the newest weights. So a version is never served half, and no sample is lost.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from april.config.limits import LimitsConfig
from april.core.clock import WallClock
from april.core.errors import EngineError, ProcessError
from april.core.event import Broken, Event, Finished, Parked, Progressed, Wait
from april.core.ids import NO_VERSION, SampleId, Version
from april.core.restarts import Restarts
from april.core.sample import Sample, Segment
from april.distributed.channel import Closed
from april.distributed.child import Child, Failed, Launch, deliver, with_end
from april.distributed.engine_process import Hello, MakeEngine, Reply, Report, serve_engine
from april.distributed.transport import WeightTransport
from april.engines.admission import check_admission
from april.engines.base import Caps, Load, UpdateMode, Weights

_COUNTERS = (
    "generated_tokens", "prefill_tokens", "shared_tokens", "forked_tokens", "resumed_tokens", "preemptions", "busy_s", "slot_s",
    "drafted_tokens", "accepted_tokens",
)  # fmt: skip


@dataclass(slots=True)
class _Open:
    """A sample in the other process, and what that reported of it."""

    sample: Sample
    since_s: float
    segments: list[Segment] = field(default_factory=list)
    aborted: bool = False

    def continued(self) -> Sample:
        sample = self.sample
        for segment in self.segments:
            sample = sample.extended(segment)
        return sample


class RemoteEngine:
    """See `april.engines.base.Engine`; the process is started by the first use, or by `start`.

    Args:
        make: makes the engine in the child, on a clock with the origin of ours; importable.
        clock: of the run.
        limits: deadlines and policies.
        transport: where new weights are read; None for an engine that needs none (a scripted one).
        threads: CPU threads of the child.
        name: of the source.
        spawn: starts the process; a child of this one by default.
    """

    def __init__(
        self,
        make: MakeEngine,
        *,
        clock: WallClock,
        limits: LimitsConfig | None = None,
        transport: WeightTransport | None = None,
        threads: int = 1,
        name: str = "engine",
        spawn: Callable[[Launch], Any] | None = None,
    ) -> None:
        self.name, self._make, self._clock, self._limits = name, make, clock, limits or LimitsConfig()
        self._transport, self._threads = transport, threads
        self._spawn = spawn
        self._restarts = Restarts(name, self._limits.restarts, self._limits.restart_pause_s, self._limits.restart_window_s)
        self._child: Child | None = None
        self._caps: Caps | None = None
        self._up = False
        self._restart_s: float | None = None
        self._heard_s = 0.0
        self._open: dict[SampleId, _Open] = {}
        self._outbox: list[Event] = []
        self._load, self._before = Load(), Load()
        self._wanted: Version = 0
        self._published = False
        self._trouble: str | None = None
        self._question, self._reply = 0, Reply(0, None)
        self.all_losses: list[str] = []
        """Why processes of this engine were lost, in order."""

    # -- the process --------------------------------------------------------------------------------------------------

    @property
    def pid(self) -> int | None:
        """Of the child; None while there is none."""
        return None if self._child is None else self._child.pid

    @property
    def num_restarts(self) -> int:
        """How often the process was started again."""
        return self._restarts.total

    @property
    def caps(self) -> Caps:
        """What the engine promises; waits until it is loaded.

        Raises:
            ProcessError: it does not start.
        """
        while self._caps is None:
            self._wait_a_moment()
        return self._caps

    @property
    def loaded(self) -> bool:
        """Whether the engine can be used; `caps` does not wait then."""
        return self._up

    def start(self) -> None:
        """Start the process where it does not run; returns before it is loaded."""
        if self._child is not None or self._restart_s is not None:
            return
        transport = None if self._transport is None else self._transport.reader(self.name)
        arguments = (self._make, self._clock.origin_s, transport, self._wanted if self._published else None)
        self._child = (self._spawn or Child)(Launch(self.name, serve_engine, arguments, self._threads))
        self._up, self._heard_s = False, self._clock.now()

    def _start_again(self) -> None:
        self._restart_s = None
        self.start()
        if self._open:
            samples = []
            for entry in self._open.values():
                entry.sample, entry.segments = entry.continued(), []
                samples.append(entry.sample)
            self._send("submit", samples)

    def restart(self, reason: str) -> None:
        """Give the process up and start another one on the newest weights; what it held comes back."""
        if self._child is not None:
            self._lost(reason if self._trouble is None else f"{reason}: {self._trouble}")

    def _lost(self, reason: str, error: ProcessError | None = None, grace_s: float = 0.0) -> None:
        """The process is of no more use: end it, take what it had sent, and decide what becomes of its samples."""
        child, self._child = self._child, None
        if child is None:
            return
        ended = child.kill(grace_s)
        if self._transport is not None:
            self._transport.gone(self.name)
        with contextlib.suppress(Closed):
            for message in child.channel.receive():
                if not isinstance(message, Failed):
                    self._take(message)
        was_up, told = self._up, f"the {self.name} process {child.pid} {with_end(reason, ended)}"
        child.close()
        self.all_losses.append(told)
        self._up, self._trouble = False, None
        now_s, former = self._clock.now(), self._load
        self._before = replace(self._before, **{name: getattr(self._counted(former), name) for name in _COUNTERS})
        self._load = Load()
        if not was_up and self._caps is None and not getattr(child, "lost_node", False):
            raise error or _not_started(self.name, told)
        if self._limits.on_engine_loss == "fail":
            raise error or ProcessError(told, where="limits.on_engine_loss", got=f"{len(self._open)} samples in it", hint=_RESUME)
        if self._limits.on_engine_loss != "retry":
            self._outbox += [Broken(now_s, sample, told) for sample in self._open]
            self._open.clear()
        for sample in [sample for sample, entry in self._open.items() if entry.aborted]:
            del self._open[sample]  # it does not go on in the next process
            self._outbox.append(Parked(now_s, sample, None))
        self._restart_s = self._restarts.next_s(now_s, told)

    # -- the source ---------------------------------------------------------------------------------------------------

    def waitables(self) -> Sequence[Any]:
        """The connection to the process."""
        return () if self._child is None else (self._child.channel,)

    def ready_at(self) -> float | None:
        """Now when there is something to report; else when patience ends; None when nothing is waited for."""
        if self._outbox:
            return self._clock.now()
        return self._deadline_s() if self._busy else None

    @property
    def _busy(self) -> bool:
        return bool(self._open) or self.load().version != self._wanted

    def _deadline_s(self) -> float:
        if self._restart_s is not None:
            return self._restart_s
        return self._heard_s + (self._limits.engine_silence_s if self._up else self._limits.start_s)

    def poll(self) -> list[Event]:
        """What the process has reported; also restarts it when it is due, and gives it up when it is late."""
        self._receive()
        if self._restart_s is not None and self._busy and self._clock.now() >= self._restart_s:
            self._start_again()
        if self._child is not None and (self._busy or not self._up) and self._clock.now() >= self._deadline_s():
            silence_s = self._clock.now() - self._heard_s
            self._lost(f"was killed: it said nothing for {silence_s:.1f} s" + ("" if self._up else " and is not loaded"))
        events, self._outbox = self._outbox, []
        return events

    def _receive(self) -> None:
        def lost(reason: str, failed: Failed | None) -> None:
            if failed is None:
                self._lost(reason, grace_s=1.0)
            else:
                self._lost(reason, _as_process_error(failed))

        deliver(self._child, self._take, lost, worked_before=self._caps is not None and not self._up)

    def _take(self, message: Hello | Report | Reply) -> None:
        self._heard_s = self._clock.now()
        match message:
            case Hello(caps, load):
                self._caps, self._load, self._up = caps, load, True
            case Report(events, load, read, trouble):
                self._load, self._trouble = load, trouble
                if read is not None and self._transport is not None:
                    self._transport.took("read", read)
                for event in events:
                    self._book(event)
            case Reply():
                self._reply = message

    def _book(self, event: Event) -> None:
        if not isinstance(event, Progressed | Parked | Finished | Broken) or event.id not in self._open:
            raise EngineError("an engine reported a sample that it does not have", where=self.name, got=event)
        if isinstance(event, Progressed):
            self._open[event.id].segments.append(event.segment)
        else:
            del self._open[event.id]
        self._outbox.append(event)

    def pending(self) -> list[str]:
        """What a caller who waits for this engine waits for."""
        return [f"{wait.stage} {len(wait.what) if wait.stage == 'generate' else wait.what[0]}" for wait in self.waits()]

    def waits(self) -> list[Wait]:
        """Its samples, new weights, and the process itself while it does not run yet."""
        owner, deadline_s, out = self._owner, self._deadline_s(), []
        if self._restart_s is not None or (self._child is not None and not self._up):
            out.append(Wait(owner, "start", (self.name,), self._heard_s, deadline_s))
        if self._open:
            since_s = min(entry.since_s for entry in self._open.values())
            out.append(Wait(owner, "generate", tuple(map(str, self._open)), since_s, deadline_s))
        if self.load().version != self._wanted:
            what = f"version {self._wanted}" + ("" if self._trouble is None else f": {self._trouble}")
            out.append(Wait(owner, "publish", (what,), self._heard_s, deadline_s))
        return out

    @property
    def _owner(self) -> str:
        return f"{self.name} (process {self.pid})" if self._child is not None else f"{self.name} (no process)"

    # -- requests -----------------------------------------------------------------------------------------------------

    def submit(self, samples: Sequence[Sample]) -> None:
        """Accept all samples, or none and raise; waits for the engine's `caps` the first time."""
        check_admission(samples, self._open, self.caps.max_sample_tokens)
        now_s = self._clock.now()
        if not self._busy:
            self._heard_s = now_s
        self._open |= {sample.id: _Open(sample, now_s) for sample in samples}
        self._send("submit", list(samples))

    def abort(self, ids: Sequence[SampleId] | None = None) -> None:
        """Stop these samples; ids that are not here are ignored."""
        wanted = [id for id in (self._open if ids is None else ids) if id in self._open]
        if self._child is not None:
            for id in wanted:
                self._open[id].aborted = True
            self._send("abort", wanted)
            return
        for id in wanted:  # there is no process: nothing more will come of them
            del self._open[id]
            self._outbox.append(Parked(self._clock.now(), id, None))

    def update_weights(self, weights: Weights, version: Version, mode: UpdateMode = "drain") -> None:
        """Switch to new weights: written to the transport, or by name where they were published already."""
        self.shared(weights, version)
        if not self._busy:
            self._heard_s = self._clock.now()
        self._wanted, self._published = version, True
        if self._child is None and self._restart_s is None:
            self.start()  # on these weights
        else:
            self._send("weights", version, mode)

    def shared(self, weights: Weights, version: Version) -> Weights:
        """The weights as they are published, written unless they are; others with the same transport need not write them."""
        if self._transport is None or getattr(weights, "transport", None) is self._transport:
            return weights
        self._transport.took("write", self._transport.write(weights, version))
        return self._transport.view(version)

    def score(self, samples: Sequence[Sample]) -> list[npt.NDArray[np.float32]]:
        """Log-probs (T,) of each sample's response; waits for them.

        Raises:
            ProcessError: the process was lost before it answered.
        """
        self.start()
        number, child, lost = self._ask("score", list(samples)), self._child, self._restarts.total
        while self._reply.number != number:
            self._wait_a_moment()
            if self._child is not child or self._restarts.total != lost:
                raise ProcessError(f"the {self.name} process was lost while it scored", got=f"{len(samples)} samples")
        (_, value), self._reply = self._reply, Reply(0, None)
        if isinstance(value, EngineError):
            raise value
        return list(value)

    def sleep(self) -> None:
        """Have the engine give its memory back, and wait until it has; one that is lost meanwhile has given it back, too."""
        if self._child is None or not self._up:
            return
        number, child = self._ask("sleep"), self._child
        while self._reply.number != number and self._child is child:
            self._wait_a_moment()

    def wake(self) -> None:
        """Have it take its memory again; commands that follow wait for it."""
        if self._child is not None and self._up:
            self._ask("wake")

    def _ask(self, name: str, *arguments: Any) -> int:
        """Send a question; returns the number of its answer."""
        self._question += 1
        self._heard_s = self._clock.now()
        self._send(name, self._question, *arguments)
        return self._question

    def _wait_a_moment(self) -> None:
        """Read what comes next, or act on a deadline; for the few calls that need an answer before they return."""
        self.start()
        deadline_s = self._deadline_s()
        self._clock.wait_until(min(deadline_s, self._clock.now() + 1.0), self.waitables())
        self._outbox = self.poll()
        if self._restart_s is not None and self._clock.now() >= self._restart_s:
            self._start_again()
        if self._child is not None and self._clock.now() >= self._deadline_s():
            self._lost(f"was killed: no answer for {self._clock.now() - self._heard_s:.1f} s")

    def _send(self, name: str, *arguments: Any) -> None:
        self.start()
        if self._child is not None:  # else it is given everything when it is started again
            self._child.channel.send((name, *arguments))

    def load(self) -> Load:
        """Counters over all processes so far; between two reports, those of the last one."""
        running = min(self._load.running, len(self._open))
        version = self._load.version
        if not self._up:  # the first process begins with what is published; a later one is not of use before it has that, too
            version = self._wanted if self._caps is None else NO_VERSION
        return replace(self._counted(self._load), running=running, waiting=len(self._open) - running, version=version)

    def _counted(self, load: Load) -> Load:
        return replace(load, **{name: getattr(self._before, name) + getattr(load, name) for name in _COUNTERS})

    def close(self) -> None:
        """End the process; nothing more is reported."""
        if self._child is not None:
            self._child.close()
            if self._transport is not None:
                self._transport.gone(self.name)
        self._child, self._caps, self._restart_s, self._up = None, None, None, False
        self._open, self._outbox = {}, []


_RESUME = "`april train --resume FOLDER` goes on with the tokens that were reported"


def _not_started(name: str, told: str) -> ProcessError:
    hint = 'in a script, start the run below `if __name__ == "__main__":`; or set the part\'s `process = "main"`'
    return ProcessError(f"the {name} process did not start", got=told, expected="a process that loads", hint=hint)


def _as_process_error(message: Failed) -> ProcessError:
    error = message.error
    return error if isinstance(error, ProcessError) else ProcessError(str(error))
