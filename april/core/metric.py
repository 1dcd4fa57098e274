"""Numbers that know how to merge: a mean carries its count, so a mean of means cannot happen."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sum:
    """A total."""

    total: float = 0.0

    @property
    def value(self) -> float:
        return self.total

    def merged(self, other: Sum) -> Sum:
        return Sum(self.total + other.total)


@dataclass(frozen=True, slots=True)
class Mean:
    """A weighted mean: `total` over `count`; nan when empty. Also any ratio of two sums."""

    total: float = 0.0
    count: float = 0.0

    @property
    def value(self) -> float:
        return self.total / self.count if self.count else float("nan")

    def merged(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)


@dataclass(frozen=True, slots=True)
class Max:
    """The largest value seen; nan when empty."""

    largest: float = float("nan")

    @property
    def value(self) -> float:
        return self.largest

    def merged(self, other: Max) -> Max:
        pair = [x for x in (self.largest, other.largest) if x == x]
        return Max(max(pair, default=float("nan")))


Metrics = dict[str, Sum | Mean | Max]


def merge(parts: list[Metrics]) -> Metrics:
    """Merge metrics by name; a name must have one kind everywhere."""
    out: Metrics = {}
    for part in parts:
        for name, metric in part.items():
            out[name] = out[name].merged(metric) if name in out else metric  # type: ignore[arg-type]
    return out


def values(metrics: Metrics) -> dict[str, float]:
    """The plain numbers."""
    return {name: metric.value for name, metric in metrics.items()}
