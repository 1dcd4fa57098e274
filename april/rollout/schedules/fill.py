"""Which waiting samples to start: what most schedules share."""

from __future__ import annotations

from collections.abc import Collection

from april.core.ids import SampleId
from april.rollout.view import View


def all_waiting(view: View) -> tuple[SampleId, ...]:
    """Every sample that can be started, by group from the oldest."""
    return tuple(sample for group in view.waiting_groups() for sample in view.waiting_samples(group))


def waiting_up_to(view: View, room: int | None, skip: Collection[object] = ()) -> tuple[SampleId, ...]:
    """The first samples that can be started, from the oldest group on.

    Args:
        room: how many; None for all.
        skip: groups that are left out.
    """
    if room is not None and room <= 0:
        return ()
    start: list[SampleId] = []
    for group in view.waiting_groups(None if room is None else room + len(skip)):  # each group has one sample at least
        if room is not None and len(start) >= room:
            break
        if group not in skip:
            waiting = view.waiting_samples(group)
            start.extend(waiting if room is None else waiting[: room - len(start)])
    return tuple(start)
