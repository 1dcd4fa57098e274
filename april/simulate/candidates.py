"""What a plan chooses from: schedules with their options, and who uses which device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from april.core.errors import AprilError, RecipeError
from april.simulate.cost import Cluster, engine_costs

RATIOS = (1.25, 1.5, 2.0, 2.5, 3.0)
LAGS = (1, 2, 4, 8)
TRAIN_FRACTIONS = (1 / 8, 1 / 4, 3 / 8, 1 / 2)
ROOM_SAMPLES = 4
"""A replica must hold the KV of so many samples of full length, else it is given more devices."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to run.

    Attributes:
        schedule: type and options.
        train_devices: devices that only train; None where all devices generate and train in turn.
    """

    schedule: Mapping[str, Any]
    train_devices: int | None = None

    @property
    def label(self) -> str:
        """In a few words."""
        shown = [f"{key} {_short(value)}" for key, value in self.schedule.items() if key in _SHOWN]
        return " ".join([str(self.schedule["type"]), *shown])


_SHOWN = ("over_provision", "max_lag_steps", "tokens_per_step", "window_tokens")


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def candidates(
    *, max_lag_steps: int, mean_tokens: float, groups_per_step: int, group_size: int, num_devices: int, tp: int
) -> list[Candidate]:
    """All of them, `sync` first.

    Args:
        max_lag_steps: the largest bound on lag that is acceptable; 0 leaves synchronous schedules.
        mean_tokens: mean response.
        num_devices: 1 leaves colocated schedules.
        tp: devices of a replica; splits are multiples of it where possible.
    """
    lags = sorted({*(lag for lag in LAGS if lag < max_lag_steps), max_lag_steps} - {0})
    found = [Candidate({"type": "sync"}), Candidate({"type": "longest_first"})]
    samples = groups_per_step * group_size
    for lag in lags:
        found += [
            Candidate({"type": "april", "over_provision": ratio, "max_lag_steps": lag}) for ratio in RATIOS if ratio <= lag + 1
        ]
        found.append(Candidate({"type": "april", "over_provision": "adaptive", "max_lag_steps": lag}))
        budget = {"tokens_per_step": max(1, round(samples * mean_tokens)), "max_running": round(1.5 * samples)}
        found.append(Candidate({"type": "token_budget", "max_lag_steps": lag, **budget}))
    if lags:
        window = max(1, round(mean_tokens / 2))
        found.append(Candidate({"type": "truncated", "window_tokens": window, "max_lag_steps": lags[-1]}))
        for devices in splits(num_devices, tp):
            found.append(Candidate({"type": "one_step"}, devices))
            found += [Candidate({"type": "bounded_async", "max_lag_steps": lag}, devices) for lag in lags]
            # With "drain", which every engine can.
            found.append(Candidate({"type": "multi_version", "update_mode": "drain", "max_lag_steps": lags[-1]}, devices))
    return found


def splits(num_devices: int, tp: int) -> list[int]:
    """Numbers of training devices that leave whole replicas."""
    return sorted(set(_splits(num_devices, tp)))


def _splits(num_devices: int, tp: int) -> Iterator[int]:
    for fraction in TRAIN_FRACTIONS:
        devices = max(1, round(num_devices * fraction / tp)) * tp if num_devices >= 2 * tp else 0
        if 0 < devices <= num_devices - tp:
            yield devices


def smallest_tp(cluster: Cluster, longest_tokens: int) -> int:
    """The fewest devices, a power of two, on which a replica has room for the weights and some samples of full length.

    Raises:
        RecipeError: unknown device or model, or all devices together have no room.
    """
    tp, known_error = 1, None
    while tp <= cluster.num_devices:
        try:
            if engine_costs(cluster.model_copy(update={"tp": tp})).kv_tokens >= ROOM_SAMPLES * longest_tokens:
                return tp
        except AprilError as error:
            if "no room" not in str(error):
                raise
            known_error = error
        tp *= 2
    raise RecipeError(
        "the policy does not fit",
        where="--gpus",
        got=f"{cluster.num_devices} x {cluster.device} for {cluster.model}",
        expected=f"room for its weights and {ROOM_SAMPLES} samples of {longest_tokens} tokens",
        hint="take more devices, or larger ones",
    ) from known_error


def scale_of(samples_per_step: int, groups_per_step: int, num_devices: int, tp: int, max_samples: int) -> int:
    """By how much batch and devices may be divided together, so that a step stays quick to simulate; a power of two.

    Each replica keeps its load, and each training device its tokens; sixteen groups and four replicas remain at least.
    """
    scale = 1
    while (
        samples_per_step / scale > max_samples
        and groups_per_step % (2 * scale) == 0
        and groups_per_step // (2 * scale) >= 16
        and num_devices % (2 * scale * tp) == 0
        and num_devices // (2 * scale * tp) >= 4
    ):
        scale *= 2
    return scale


def front(points: Mapping[int, tuple[float, float]], worth: float = 0.0) -> list[int]:
    """Which (rate, lag) points are the fastest of all with as little lag, by lag; of equal ones the first.

    Args:
        worth: a point must be faster by this share than all with less lag.
    """
    kept, best = [], -math.inf
    for index in sorted(points, key=lambda index: (points[index][1], -points[index][0], index)):
        rate = points[index][0]
        if rate > best * (1 + worth) or best == -math.inf:
            kept.append(index)
            best = rate
    return kept
