"""Engines and trainer on the same devices: engines sleep while the trainer computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from april.run.build import Parts
from april.run.checks import overlap_refused, shares_devices


@contextmanager
def engines_asleep(parts: Parts) -> Iterator[None]:
    """While the body runs, engines that share devices with the trainer have given back what memory they can.

    Raises:
        RecipeError: the schedule generates during an update; one of April's own was refused before anything started.
    """
    if not shares_devices(parts.recipe):
        yield
        return
    engine: Any = parts.engine
    _check_idle(parts)
    sleeps = engine.caps.sleeps
    if sleeps:
        engine.sleep()
    yield
    _check_idle(parts)
    if sleeps:
        engine.wake()


def _check_idle(parts: Parts) -> None:
    """Nothing is generated in the memory that the trainer has now."""
    load = parts.engine.load()
    if load.running or load.waiting:
        raise overlap_refused(parts.recipe, f"has {load.running + load.waiting} samples in the engines in an update")
