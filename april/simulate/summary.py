"""From cells to a table: means over seeds with intervals, ratios seed by seed, and published figures beside what came out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from april.core.errors import RecipeError, choice
from april.observe.statistics import Estimate, mean_interval
from april.observe.words import duration, number, percent
from april.simulate.execute import CellResult
from april.simulate.study import Expectation, Study, point_label

Point = tuple[tuple[str, Any], ...]
RATIO = "consumed_tokens_per_s"
COLUMNS = (
    ("consumed tok/s", "consumed_tokens_per_s", number),
    ("generated tok/s", "generated_tokens_per_s", number),
    ("step", "step_s", duration),
    ("rollout", "rollout_s", duration),
    ("idle", "idle_fraction", percent),
    ("lag mean", "lag_mean", number),
    ("lag max", "lag_max", number),
    ("length bias", "length_bias", number),
    ("waste", "waste_fraction", percent),
    ("preempted", "preemptions_per_step", number),
)


@dataclass(frozen=True, slots=True)
class Line:
    """One arm at one point of the grid.

    Attributes:
        figures: name -> mean over seeds, with its interval.
        ratio: consumed tokens/s over the baseline's, seed by seed; None for the baseline.
        cpu_s: processor time of a run, in the mean over seeds.
    """

    arm: str
    point: Point
    figures: dict[str, Estimate]
    ratio: Estimate | None
    cpu_s: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """An expectation and what came out.

    Attributes:
        arm: the one that was taken, of several.
        ok: whether the mean is inside the range.
    """

    expectation: Expectation
    arm: str
    got: Estimate
    ok: bool


def summarise(study: Study, results: Sequence[CellResult]) -> list[Line]:
    """One line for each arm and point."""
    lines = []
    for point in study.points:
        base = _figures(results, study.baseline, point, RATIO)
        for arm in study.arms:
            runs = [result for result in results if (result.cell.arm, result.cell.point) == (arm, point)]
            if not runs:
                continue
            figures = {name: _mean([run.figures[name] for run in runs]) for name in runs[0].figures}
            own = _figures(results, arm, point, RATIO)
            ratio = None if arm == study.baseline or not base else _mean([own[s] / base[s] for s in own if s in base])
            lines.append(Line(arm, point, figures, ratio, sum(run.cpu_s for run in runs) / len(runs)))
    return lines


def judge(study: Study, results: Sequence[CellResult]) -> list[Verdict]:
    """What each expectation of the study says of the results.

    Raises:
        RecipeError: for a figure that does not exist.
    """
    return [_judge(study, results, expectation) for expectation in study.config.expect]


def _judge(study: Study, results: Sequence[CellResult], wanted: Expectation) -> Verdict:
    known = results[0].figures
    if wanted.figure not in known:
        raise RecipeError(
            "unknown figure", where="expect.figure", got=wanted.figure, **choice(wanted.figure, known, "see results.json")
        )
    points = [p for p in study.points if all(dict(p).get(key) == value for key, value in wanted.where.items())]
    found = []
    for arm in (wanted.arm,) if isinstance(wanted.arm, str) else wanted.arm:
        values = []
        for point in points:
            own = _figures(results, arm, point, wanted.figure)
            base = None if wanted.against is None else _figures(results, wanted.against, point, wanted.figure)
            values += [value if base is None else value / base[seed] for seed, value in own.items()]
        if not values:
            raise RecipeError(
                "an expectation is about no cell", where="expect.where", got=wanted.where, expected="a point of [grid]"
            )
        found.append((arm, _mean(values)))
    arm, got = max(found, key=lambda pair: pair[1].value)
    return Verdict(wanted, arm, got, wanted.low <= got.value <= wanted.high)


def _figures(results: Sequence[CellResult], arm: str, point: Point, figure: str) -> dict[int, float]:
    """A figure by seed."""
    return {r.cell.seed: r.figures[figure] for r in results if (r.cell.arm, r.cell.point) == (arm, point)}


def _mean(values: list[float]) -> Estimate:
    finite = [value for value in values if math.isfinite(value)]
    return mean_interval(finite) if finite else Estimate(float("nan"), float("nan"), float("nan"), 0)


def with_interval(estimate: Estimate, style: Any = number) -> str:
    """A mean, and half the width of its interval."""
    half = (estimate.high - estimate.low) / 2
    return f"{style(estimate.value)} ±{style(half)}" if math.isfinite(half) and half > 0 else str(style(estimate.value))


def table(study: Study, lines: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """Head and rows as texts."""
    grid = bool(study.config.grid)
    ratio = f"x {study.baseline}"
    head = [*(["point"] if grid else []), "arm", *(name for name, _, _ in COLUMNS), *([ratio] if len(study.arms) > 1 else [])]
    rows = []
    for line in lines:
        cells = [point_label(line.point)] if grid else []
        cells += [line.arm, *(style(line.figures[figure].value) for _, figure, style in COLUMNS)]
        if len(study.arms) > 1:
            cells.append("1" if line.ratio is None else with_interval(line.ratio))
        rows.append(cells)
    return head, rows


def as_json(study: Study, results: Sequence[CellResult], lines: Sequence[Line], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Everything for a script: intervals, ratios and verdicts; the steps are in the files of the cells."""
    return {
        "study": study.config.name,
        "seeds": study.config.seeds,
        "baseline": study.baseline,
        "cells": [r.cell.key for r in results],
        "wall_s": sum(r.wall_s for r in results),
        "cpu_s": sum(r.cpu_s for r in results),
        "lines": [
            {
                "arm": line.arm,
                "point": dict(line.point),
                "figures": {name: _estimate(value) for name, value in line.figures.items()},
                "ratio": None if line.ratio is None else _estimate(line.ratio),
                "cpu_s": line.cpu_s,
            }
            for line in lines
        ],
        "expectations": [
            {
                "what": v.expectation.what,
                "published": v.expectation.published,
                "arm": v.arm,
                "got": _estimate(v.got),
                "low": v.expectation.low,
                "high": v.expectation.high,
                "ok": v.ok,
            }
            for v in verdicts
        ],
    }


def _estimate(value: Estimate) -> dict[str, float]:
    return {"mean": value.value, "low": value.low, "high": value.high, "runs": value.num}
