"""What a run says of itself while it goes on: for `april status`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from april.core.event import Wait
from april.rollout.waits import MAX_IDS, all_waits
from april.run.build import Parts

MAX_LOSSES = 5
"""Losses of processes that are told, the newest."""


def describe_run(parts: Parts, loading: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """Step, ledger, engines with their load and version, and who waits for what; looks at every open sample.

    Args:
        parts: of the run.
        loading: records of engines that have not joined yet.
    """
    driver, now_s = parts.driver, parts.clock.now()
    ledger = parts.pool.ledger
    losses = [loss for part in (*_engines(parts).values(), parts.trainer) for loss in getattr(part, "all_losses", ())]
    return {
        "name": parts.recipe.name,
        "folder": str(parts.folder),
        "time_s": now_s,
        "step": driver.emitted_steps,
        "steps": parts.recipe.steps,
        "version": driver.version,
        "ready_groups": len(parts.pool.ready),
        "open_groups": len(parts.pool.groups),
        "ledger": {
            "issued": ledger.issued,
            "balanced": ledger.balanced,
            "counts": {str(place): count for place, count in ledger.counts.items()},
        },
        "engines": [*_engine_records(parts), *loading],
        "waits": [_wait_record(wait, now_s) for wait in all_waits(parts.pool, driver.sources, driver.times, now_s)],
        "losses": losses[-MAX_LOSSES:],
    }


def _engines(parts: Parts) -> dict[str, Any]:
    return dict(getattr(parts.engine, "engines", {parts.engine.name: parts.engine}))


def _engine_records(parts: Parts) -> list[dict[str, Any]]:
    if hasattr(parts.engine, "describe"):
        return list(parts.engine.describe())
    engine, load = parts.engine, parts.engine.load()
    return [
        {
            "name": engine.name,
            "running": load.running,
            "waiting": load.waiting,
            "version": load.version,
            "process": getattr(engine, "pid", None),
            "restarts": getattr(engine, "num_restarts", 0),
            "state": "serving" if load.version == parts.driver.version else "not used",
        }
    ]


def _wait_record(wait: Wait, now_s: float) -> dict[str, Any]:
    """A wait with times relative to now, and the first few of its ids."""
    left_s = None if wait.deadline_s is None or math.isinf(wait.deadline_s) else max(0.0, wait.deadline_s - now_s)
    return {
        "owner": wait.owner,
        "stage": wait.stage,
        "num": len(wait.what),
        "what": list(wait.what[:MAX_IDS]),
        "for_s": max(0.0, now_s - wait.since_s),
        "left_s": left_s,
    }
