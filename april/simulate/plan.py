"""Which schedule to take: a search in virtual time, by successive halving, for what is fast and fresh.

    candidates -> few steps each -> the better part -> more steps -> ... -> the Pareto front of consumed tokens/s and mean lag

Every candidate meets the same lengths. "Better" is by rank of non-domination, so slow but fresh candidates stay in the race
(successive halving: Jamieson and Talwalkar, arXiv 1502.07943; ranks: Deb et al., NSGA-II, IEEE TEC 2002).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from april import registry
from april.config.schema import Config
from april.core.errors import RecipeError
from april.simulate import hardware
from april.simulate.candidates import Candidate, candidates, front, scale_of, smallest_tp
from april.simulate.cell import CellConfig, run_cell
from april.simulate.cost import Cluster
from april.simulate.workload import Lengths, Workload

RUNGS = ((6, 3, 1), (14, 5, 1), (30, 10, 2))
"""(steps, warm-up steps, seeds) of each round of the search."""
KEPT = 0.6
"""Share of the candidates that goes on to the next round."""
WORTH = 0.01
"""A row must be so much faster than one with less lag, else it is not shown."""
MAX_SAMPLES = 1024

Figures = dict[str, float]
Known = dict[int, tuple[Figures, int]]
"""Candidate -> (figures, simulated steps of each seed)."""


class PlanRequest(Config):
    """What is to be planned."""

    model: str = Field(description="name in the table of models")
    hardware: str = Field("H100", description="name in the table of devices, or a file of measured constants")
    gpus: int = Field(8, ge=1, description="devices in all")
    workload: Workload = Field(default=Workload(), description="lengths of the responses")
    groups_per_step: int = Field(32, ge=1, description="prompts of an update (N)")
    group_size: int = Field(8, ge=1, description="samples of a prompt (G)")
    max_lag_steps: int = Field(4, ge=0, description="the largest bound on lag that is acceptable")
    tp: int | None = Field(None, ge=1, description="devices of a replica; the fewest that hold the policy when left out")
    seconds: float = Field(60.0, gt=0, description="the search ends after so long, with what it knows")

    @property
    def measured(self) -> bool:
        """Whether the hardware is a file."""
        return self.hardware.endswith(".json")


@dataclass(frozen=True, slots=True)
class PlanRow:
    """A candidate and what it came to.

    Attributes:
        figures: as of a cell, in the mean over seeds; tokens/s of all devices.
        steps: that were simulated, of each seed.
        on_front: whether nothing else is as fast with less lag.
    """

    candidate: Candidate
    figures: Figures
    steps: int
    on_front: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """The outcome of a search.

    Attributes:
        rows: all candidates, the fastest first.
        tp: devices of a replica.
        scale: batch and devices were divided by this for the simulation.
        complete: False when the time was up.
        wall_s: what the search took.
    """

    request: PlanRequest
    rows: tuple[PlanRow, ...]
    tp: int
    scale: int
    complete: bool
    wall_s: float

    @property
    def front(self) -> list[PlanRow]:
        """What to choose from, by lag."""
        return sorted((row for row in self.rows if row.on_front), key=lambda row: row.figures["lag_mean"])

    @property
    def sync(self) -> PlanRow:
        """What everything is compared with."""
        return next(row for row in self.rows if row.candidate.schedule["type"] == "sync")


def make_plan(
    request: PlanRequest,
    *,
    folder: Path | None = None,
    now: Callable[[], float] = time.monotonic,
    say: Callable[[str], None] = lambda _line: None,
) -> Plan:
    """Search.

    Args:
        folder: where relative paths start.
        now: seconds; for the time limit only.
        say: told of each round.

    Raises:
        RecipeError: unknown names, a policy that does not fit, measured constants with more than one device.
        DataError: lengths that cannot be read.
    """
    start_s, tp = now(), _tp(request)
    samples = request.groups_per_step * request.group_size
    scale = scale_of(samples, request.groups_per_step, request.gpus, tp, MAX_SAMPLES)
    mean_tokens = Lengths(request.workload, 0, request.group_size, folder).mean_tokens
    pool = candidates(
        max_lag_steps=request.max_lag_steps,
        mean_tokens=mean_tokens,
        groups_per_step=request.groups_per_step // scale,
        group_size=request.group_size,
        num_devices=1 if request.measured else request.gpus // scale,
        tp=tp,
    )

    def simulate(index: int, steps: int, warmup: int, seeds: int) -> Figures:
        cell = _cell(request, pool[index], tp, scale, steps, warmup)
        return _mean([run_cell(cell, seed, folder=folder)[1] for seed in range(seeds)], scale)

    known, complete = _search(len(pool), simulate, lambda: now() - start_s > request.seconds, say)
    return Plan(request, _rows(pool, known, scale), tp, scale, complete, now() - start_s)


def _search(
    num_candidates: int, simulate: Callable[..., Figures], time_is_up: Callable[[], bool], say: Callable[[str], None]
) -> tuple[Known, bool]:
    """Round after round, the best of the one before first, until the time is up.

    What is compared must have had the same steps: a round that was cut short counts when it came as far as the front of the
    one before; the first one counts as far as it came.

    Args:
        simulate: (candidate, steps, warm-up steps, seeds) -> figures.

    Returns:
        candidate -> (figures, steps) of the last round that counts, and whether all rounds were finished.
    """
    known: Known = {}
    alive = list(range(num_candidates))
    for round_, (steps, warmup, seeds) in enumerate(RUNGS):
        if round_:
            alive = _survivors(alive, known)
        say(f"round {round_ + 1}: {len(alive)} candidates, {steps} steps each")
        new: Known = {}
        for index in alive:
            if (known or new) and time_is_up():
                counts = new.keys() >= set(front({i: _key(known[i][0]) for i in alive if i in known}))
                return known | new if counts else known, False
            new[index] = simulate(index, steps, warmup, seeds), steps
        known |= new
    return known, True


def _tp(request: PlanRequest) -> int:
    if request.measured:
        if request.gpus != 1:
            raise RecipeError(
                "measured constants are of one replica",
                where="--gpus",
                got=request.gpus,
                expected="1 with a file of constants",
                hint="name a device to plan for more: --hardware H100",
            )
        return 1
    longest = request.workload.max_tokens + request.workload.prompt_tokens
    hardware.device(request.hardware, "--hardware")
    hardware.model(request.model, "--model")
    cluster = Cluster(device=request.hardware, model=request.model, num_devices=request.gpus)
    if request.tp is None:
        return smallest_tp(cluster, longest)
    if request.tp > request.gpus:
        raise RecipeError(
            "a replica has more devices than there are", where="--tp", got=request.tp, expected=f"<= {request.gpus}"
        )
    return request.tp


def _cell(request: PlanRequest, candidate: Candidate, tp: int, scale: int, steps: int, warmup: int) -> CellConfig:
    tree: dict[str, Any] = {
        "schedule": dict(candidate.schedule),
        "workload": request.workload,
        "groups_per_step": request.groups_per_step // scale,
        "group_size": request.group_size,
        "steps": steps,
        "warmup_steps": warmup,
    }
    if request.measured:
        tree |= {"costs": request.hardware, "engine": {"report_every_s": 0.0}}
    else:
        cluster = {"device": request.hardware, "model": request.model, "num_devices": request.gpus // scale, "tp": tp}
        split = {} if candidate.train_devices is None else {"placement": "split", "train_devices": candidate.train_devices}
        tree["cluster"] = {**cluster, **split}
    return registry.validate(CellConfig, tree, "")  # type: ignore[return-value]


def _mean(runs: Sequence[Figures], scale: int) -> Figures:
    """Means over seeds; rates as of all devices."""
    out = {name: sum(run[name] for run in runs) / len(runs) for name in runs[0]}
    return {name: value * scale if name.endswith("_per_s") else value for name, value in out.items()}


def _key(figures: Figures) -> tuple[float, float]:
    return figures["consumed_tokens_per_s"], figures["lag_mean"]


def ranks(points: Mapping[int, tuple[float, float]]) -> dict[int, int]:
    """Rank of non-domination of (rate, lag) points: 0 on the front, 1 on the front of the rest, ..."""
    out: dict[int, int] = {}
    left, rank = dict(points), 0
    while left:
        for index in front(left):
            out[index] = rank
            del left[index]
        rank += 1
    return out


def _survivors(alive: Sequence[int], known: Known) -> list[int]:
    """The better part, best first; the first candidate, `sync`, always stays, and of those that came to the same the first."""
    points: dict[int, tuple[float, float]] = {}
    for index in alive:
        if index in known and (point := _key(known[index][0])) not in points.values():
            points[index] = point
    rank = ranks(points)
    order = sorted(points, key=lambda index: (rank[index], -points[index][0]))
    return list(dict.fromkeys([0, *order[: math.ceil(KEPT * len(order))]]))


def _rows(pool: Sequence[Candidate], known: Known, scale: int) -> tuple[PlanRow, ...]:
    """All that was simulated; only those that were simulated longest can be on the front."""
    longest = max(steps for _, steps in known.values())
    best = front({index: _key(figures) for index, (figures, steps) in known.items() if steps == longest}, WORTH)
    rows = [PlanRow(_unscaled(pool[i], scale), figures, steps, i in best) for i, (figures, steps) in known.items()]
    return tuple(sorted(rows, key=lambda row: -row.figures["consumed_tokens_per_s"]))


def _unscaled(candidate: Candidate, scale: int) -> Candidate:
    """The candidate for all devices and the whole batch."""
    sized = ("tokens_per_step", "max_running")
    schedule = {key: value * scale if key in sized else value for key, value in candidate.schedule.items()}
    return Candidate(schedule, None if candidate.train_devices is None else candidate.train_devices * scale)
