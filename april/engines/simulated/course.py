"""What a sample will do: its length, how it ends, and where it waits for a tool."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from april.core.sample import Sample, Stop


@dataclass(frozen=True, slots=True)
class Course:
    """The whole response of a sample, as far as time is concerned.

    Attributes:
        num_tokens: length of the response; its budget may cut it.
        stop: how it ends where the budget does not cut it.
        pauses: (response position, seconds): tool calls during which nothing is decoded; positions ascending.
    """

    num_tokens: int
    stop: Stop = "eos"
    pauses: tuple[tuple[int, float], ...] = ()


Courses = Callable[[Sample], Course]
"""The course of each sample: the same for the same id, whatever the schedule does."""
