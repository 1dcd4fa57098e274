"""Waiting, bounded: what the driver waits for, for how long, and what it says when nothing comes.

Every wait has an owner (the source that must bring it), a stage, and a deadline. A source in another process keeps its own
deadlines and answers for them in `ready_at`; the driver sees to the rest: that new weights are served, that stopped samples
leave the engine, that something happens at all. `limits` in the recipe holds all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from april.core.clock import Clock
from april.core.event import Broken, Event, Finished, Judged, Parked, Source, Wait
from april.core.ids import SampleId
from april.rollout.pool import Pool
from april.rollout.view import Status

LOOK_S = 0.5
"""While other processes are waited for, the driver looks up this often: somebody may have asked it to stop."""
MAX_IDS = 8
"""Ids of one stage that a report prints."""
_INDENT = "\n" + " " * 12


def wait_for_next(clock: Clock, sources: Sequence[Source]) -> bool:
    """Wait until some source may have something to report, or soon enough to look up; False when none will ever."""
    times = [time_s for source in sources if (time_s := source.ready_at()) is not None]
    if not times:
        return False
    now_s, first_s = clock.now(), min(times)
    if first_s <= now_s:
        return True
    if waitables := [waitable for source in sources for waitable in getattr(source, "waitables", tuple)()]:
        clock.wait_until(min(first_s, now_s + LOOK_S), waitables)
    else:
        clock.wait_until(first_s)
    return True


class Patience:
    """How long something may fail to move.

    Args:
        clock: of the run.
        limit_s: None for ever.
    """

    def __init__(self, clock: Clock, limit_s: float | None) -> None:
        self._clock, self.limit_s = clock, limit_s
        self.begin()

    def begin(self) -> None:
        """Count from now on."""
        self._mark: Any = None
        self._since_s = self._clock.now()

    def ended(self, mark: Callable[[], Any]) -> bool:
        """Whether what `mark` returns has stayed the same for longer than the limit; the patience then begins anew."""
        if self.limit_s is None:
            return False
        now_s, seen = self._clock.now(), mark()
        if seen != self._mark:
            self._mark, self._since_s = seen, now_s
        elif now_s - self._since_s > self.limit_s:
            self._since_s = now_s
            return True
        return False


class StageTimes:
    """Since when each sample is in its present stage, and since when the trainer has its batch."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.since_s: dict[SampleId, float] = {}

    def started(self, samples: Iterable[SampleId]) -> None:
        """These samples went into the engine."""
        self.since_s |= dict.fromkeys(samples, self._clock.now())

    def on_event(self, event: Event) -> None:
        """An event ends a stage; a finished sample enters the next."""
        match event:
            case Finished():
                self.since_s[event.id] = event.time_s
            case Parked() | Judged() | Broken():
                self.since_s.pop(event.id, None)
            case _:
                pass


def busy_elsewhere(sources: Sequence[Source]) -> bool:
    """Whether another process is at something that takes long and says nothing, under a deadline of its own."""
    waits = [wait for source in sources if hasattr(source, "waits") for wait in source.waits()]
    return any(wait.stage in ("train", "start") and wait.deadline_s is not None for wait in waits)


def report(pool: Pool, sources: Sequence[Source], times: StageTimes, now_s: float) -> str:
    """Who waits for what: each stage with its owner, its ids, for how long, and until when; arguments as `all_waits`."""
    return "".join(_INDENT + _line(wait, now_s) for wait in all_waits(pool, sources, times, now_s))


def all_waits(pool: Pool, sources: Sequence[Source], times: StageTimes, now_s: float) -> list[Wait]:
    """Everything that is waited for; looks at every open sample, so not for every event.

    Args:
        pool: knows which samples are where.
        sources: engine and rewards first.
        times: since when.
        now_s: on the driver's clock.
    """
    waits = [wait for source in sources if hasattr(source, "waits") for wait in source.waits()]
    named = {name for wait in waits for name in wait.what}
    scoring = [sample for sample, status in pool.status.items() if status is Status.SCORING]
    for stage, source, samples in (("generate", sources[0], list(pool.running)), ("score", sources[1], scoring)):
        if unnamed := [sample for sample in samples if str(sample) not in named]:
            since_s = min(times.since_s.get(sample, now_s) for sample in unnamed)
            waits.append(Wait(source.name, stage, tuple(map(str, unnamed)), since_s, None))
    return waits


def _line(wait: Wait, now_s: float) -> str:
    shown = ", ".join(wait.what[:MAX_IDS]) + (f" and {len(wait.what) - MAX_IDS} more" if len(wait.what) > MAX_IDS else "")
    seconds = f", for {now_s - wait.since_s:.1f} s" if now_s > wait.since_s else ""
    left = "" if wait.deadline_s is None else f", given up in {max(0.0, wait.deadline_s - now_s):.1f} s"
    return f"{wait.stage}: {len(wait.what)} in {wait.owner}{seconds}{left}: {shown}"
