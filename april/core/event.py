"""What sources report: every state change of the outside world is one of these, with its time in seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from april.core.group import Outcome
from april.core.ids import SampleId, Version
from april.core.sample import Segment, Stop


@dataclass(frozen=True, slots=True)
class Progressed:
    """A running sample has new tokens; it goes on."""

    time_s: float
    id: SampleId
    segment: Segment


@dataclass(frozen=True, slots=True)
class Parked:
    """A running sample was stopped on request; `segment` holds tokens not yet reported."""

    time_s: float
    id: SampleId
    segment: Segment | None


@dataclass(frozen=True, slots=True)
class Finished:
    """A running sample ended by itself; `segment` holds tokens not yet reported."""

    time_s: float
    id: SampleId
    segment: Segment | None
    stop: Stop


@dataclass(frozen=True, slots=True)
class Broken:
    """The engine lost a running sample; tokens reported before stay valid."""

    time_s: float
    id: SampleId
    reason: str


@dataclass(frozen=True, slots=True)
class Judged:
    """A finished sample has its outcome."""

    time_s: float
    id: SampleId
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Updated:
    """The trainer finished an update; `version` is the new one."""

    time_s: float
    version: Version
    metrics: dict[str, Any] = field(default_factory=dict)


Event = Progressed | Parked | Finished | Broken | Judged | Updated


class Source(Protocol):
    """Anything that reports events: engines, rewards, the trainer, timers.

    `ready_at` is asked before every `poll`; under a virtual clock the driver jumps to the earliest answer. A source
    that computes in process does a bounded slice of its work in `poll` and is ready at once while it has work.
    """

    name: str

    def ready_at(self) -> float | None:
        """Earliest time (s) at which `poll` may report something; None when nothing is pending."""
        ...

    def poll(self) -> list[Event]:
        """Events that have happened; never waits for the outside world."""
        ...

    def pending(self) -> list[str]:
        """What is being waited for, for the message when a run stalls."""
        ...


@dataclass(frozen=True, slots=True)
class Wait:
    """One thing that is waited for: by whom it must be brought, and until when.

    Attributes:
        owner: the source, with its process where it has one of its own.
        stage: what is being done: "start", "generate", "score", "train", "publish", ...
        what: ids of the samples, or the name of the batch or version.
        since_s: when the wait began.
        deadline_s: when its owner is given up; None where nothing but the run's own limit ends it.
    """

    owner: str
    stage: str
    what: tuple[str, ...]
    since_s: float
    deadline_s: float | None


class OutsideSource(Source, Protocol):
    """A source that computes in another process: it is waited for, not looked at again and again.

    `ready_at` then gives the nearest deadline; what comes before it can be read from a waitable. Both methods are optional
    for a source: one that lacks them computes in its `poll`.
    """

    def waitables(self) -> Sequence[Any]:
        """Objects with a `fileno` that can be read as soon as `poll` has something to report."""
        ...

    def waits(self) -> list[Wait]:
        """What is being waited for."""
        ...
