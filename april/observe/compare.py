"""Several runs on one page: the same recipe under different schedules, a few seeds each."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path

from april.observe.report import idle_share, write_page
from april.observe.report_data import Points, RunData, finite, load_run, points
from april.observe.report_page import note, page, plots, section, table
from april.observe.report_plots import SECONDS, STEPS, WIDE, Axis, Line, bar_chart, line_chart
from april.observe.statistics import mean_interval
from april.observe.words import MISSING, duration, number, percent

Runs = Mapping[str, Sequence[RunData]]
Value = Callable[[RunData], float | None]

FRACTION = Axis(style=lambda value: percent(value, 0), low=0.0, exact=percent)
COLOURS, DASHES = ("c1", "c2", "c3", "c4", "c5", "c6"), ("solid", "dash", "dot")
GRID = 60


def write_comparison(runs: Mapping[str, Sequence[Path]], out: Path) -> Path:
    """Write a self-contained page that compares runs.

    Args:
        runs: for each name (a schedule, an algorithm) its run folders, one a seed.
        out: the HTML file to write.

    Returns:
        The path of the file.
    """
    loaded = {name: [load_run(Path(folder)) for folder in folders] for name, folders in runs.items()}
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    return write_page(out, page("April comparison: " + " and ".join(runs), _render(loaded)))


def comparison_rows(runs: Mapping[str, Sequence[Path]], measures: Sequence[str] = ()) -> list[list[str]]:
    """The table of the page as texts: a head, then a row for each name; for a terminal or a README.

    Args:
        runs: as in `write_comparison`.
        measures: keys of metrics.jsonl whose mean over the steps gets a column.
    """
    return _rows({name: [load_run(Path(folder)) for folder in folders] for name, folders in runs.items()}, measures)


def mean_measure(run: RunData, key: str) -> float | None:
    """Mean of a key of metrics.jsonl over the steps that have it; None when none has."""
    known = [float(row[key]) for row in run.metrics if finite(row.get(key))]
    return statistics.fmean(known) if known else None


def mean_curve(curves: Sequence[Points], grid: int = GRID) -> Points:
    """Mean of curves over the stretch of x that all of them cover, each interpolated linearly."""
    curves = [curve for curve in curves if curve[0]]
    if not curves:
        return [], []
    low, high = max(xs[0] for xs, _ in curves), min(xs[-1] for xs, _ in curves)
    if high <= low:
        return [], []
    shared = sorted({x for xs, _ in curves for x in xs if low <= x <= high})
    places = shared if len(shared) <= grid else [low + (high - low) * index / (grid - 1) for index in range(grid)]
    return places, [statistics.fmean(interpolate(xs, ys, place) for xs, ys in curves) for place in places]


def interpolate(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    """Linear interpolation; constant beyond the ends."""
    if x <= xs[0]:
        return ys[0]
    for index in range(1, len(xs)):
        if x <= xs[index]:
            width = xs[index] - xs[index - 1]
            share = (x - xs[index - 1]) / width if width > 0 else 1.0
            return ys[index - 1] + share * (ys[index] - ys[index - 1])
    return ys[-1]


def steps_s(run: RunData) -> list[float]:
    """Seconds of all steps before the first, the second, ... and after the last: no evaluation, no checkpoint is in it."""
    return [0.0, *accumulate(float(row.get("step_s") or 0.0) for row in run.metrics)]


def reached_s(run: RunData, accuracy: float) -> float | None:
    """Seconds of steps until held-out accuracy first reaches a level, interpolated between evaluations; None: it never does."""
    seconds, (steps, ys) = steps_s(run), held_out(run, "step")
    xs = [seconds[min(int(step), len(seconds) - 1)] for step in steps]
    for index, value in enumerate(ys):
        if value >= accuracy:
            if index == 0 or value == ys[index - 1]:
                return xs[index]
            share = (accuracy - ys[index - 1]) / (value - ys[index - 1])
            return xs[index - 1] + share * (xs[index] - xs[index - 1])
    return None


def _render(runs: Runs) -> str:
    seeds = ", ".join(f"{name}: {len(group)} runs" for name, group in runs.items())
    return "<h1>Comparison of runs</h1>" + note(seeds) + _numbers(runs) + _charts(runs)


def _numbers(runs: Runs) -> str:
    head, *rows = _rows(runs)
    return section(
        "In numbers",
        "Mean over the runs of a row, plus or minus the half-width of its 95 % interval (Student's t over runs). The last row, "
        "of two kinds with equally many runs, pairs them in order (equal seeds): where the interval of a difference holds 0, "
        "these runs show none.",
        table(head, rows) if rows else "",
    )


def _charts(runs: Runs) -> str:
    accuracy = section(
        "Accuracy on held-out problems",
        "Thin lines are single runs, thick lines the mean of all runs of one kind. Further left on the second plot is faster.",
        plots(
            line_chart("By training step", _curves(runs, "step"), STEPS, FRACTION),
            line_chart("By wall clock", _curves(runs, "time_s"), SECONDS, FRACTION),
        ),
        missing="no run has evaluations",
    )
    idle = section(
        "Idle slots",
        "Share of slot-time in rollout that no sample used; each dot is one run. Waiting for the longest answer shows here.",
        plots(
            bar_chart("Idle share of slot-time", _bars(runs, idle_share), percent),
            bar_chart("Wall clock of the whole run", _bars(runs, _wall_s), duration),
        ),
        missing="no run has idle_fraction or times",
    )
    reward = section(
        "Training reward",
        "The mean reward of each batch; means over runs, which smooths chance but hides spread.",
        plots(line_chart("Mean reward by wall clock", _reward(runs), SECONDS, Axis(), width=WIDE), columns=1),
        missing="no run has reward_mean",
    )
    return accuracy + idle + reward


def _rows(runs: Runs, measures: Sequence[str] = ()) -> list[list[str]]:
    finals = [value for group in runs.values() for run in group if (value := _final(run)) is not None]
    level = min(finals, default=None)
    head = [
        "",
        "runs",
        "accuracy before",
        "accuracy after",
        "wall clock",
        "idle slots",
        "largest lag",
        "parked samples",
        "mean length",
    ]
    columns: list[tuple[Value, Callable[[object], str]]] = [
        (_initial, percent),
        (_final, percent),
        (_wall_s, duration),
        (idle_share, percent),
        (lambda run: max((float(r["lag_max"]) for r in run.metrics if finite(r.get("lag_max"))), default=None), number),
        (lambda run: run.last("parked_total"), number),
        (lambda run: run.last("length_mean"), number),
    ]
    if level is not None:
        head.insert(5, f"time to {percent(level)}")
        columns.insert(3, (lambda run: reached_s(run, level), duration))
    head += [key.replace("_", " ") for key in measures]
    columns += [(partial(mean_measure, key=key), number) for key in measures]
    rows = [head]
    for name, group in runs.items():
        rows.append([name, str(len(group)), *(_cell([value(run) for run in group], style) for value, style in columns)])
    if len(runs) == 2:
        (first, group), (second, others) = runs.items()
        if len(group) == len(others):
            cells = (_cell(_differences(group, others, value), style) for value, style in columns)
            rows.append([f"{first} − {second}", str(len(group)), *cells])
    return rows


def _differences(group: Sequence[RunData], others: Sequence[RunData], value: Value) -> list[float | None]:
    pairs = [(value(run), value(other)) for run, other in zip(group, others, strict=True)]
    return [None if a is None or b is None else a - b for a, b in pairs]


def _cell(values: Sequence[float | None], style: Callable[[object], str]) -> str:
    """Mean ± half-width; says how many runs have a value when some do not."""
    known = [value for value in values if value is not None]
    if not known:
        return MISSING
    estimate = mean_interval(known)
    mean, half = estimate.value, estimate.high - estimate.value
    text = style(mean) if math.isinf(half) else _plus_minus(style(mean), style(half))
    return text if len(known) == len(values) else f"{text} ({len(known)} of {len(values)})"


def _plus_minus(mean: str, half: str) -> str:
    """ "7.6 s" and "0.2 s" become "7.6 ± 0.2 s"; different units are both kept."""
    (value, _, unit), (_, _, other) = mean.partition(" "), half.partition(" ")
    return f"{value} ± {half}" if unit == other else f"{mean} ± {half}"


def _curves(runs: Runs, x_key: str) -> list[Line]:
    lines: list[Line] = []
    for index, (name, group) in enumerate(runs.items()):
        curves = [held_out(run, x_key) for run in group]
        colour, dash = COLOURS[index % 6], DASHES[index % 3]
        lines += [Line("", xs, ys, colour, dash, width=1.2, faint=True) for xs, ys in curves if len(group) > 1]
        lines.append(Line(name, *mean_curve(curves), colour, dash, width=2.8))
    return lines


def _reward(runs: Runs) -> list[Line]:
    lines = []
    for index, (name, group) in enumerate(runs.items()):
        curve = mean_curve([run.series("reward_mean", "time_s") for run in group])
        lines.append(Line(name, *curve, COLOURS[index % 6], DASHES[index % 3]))
    return lines


def _bars(runs: Runs, value: Value) -> list[tuple[str, float, Sequence[float], str]]:
    bars: list[tuple[str, float, Sequence[float], str]] = []
    for index, (name, group) in enumerate(runs.items()):
        known = [x for run in group if (x := value(run)) is not None]
        if known:
            bars.append((name, statistics.fmean(known), known, COLOURS[index % 6]))
    return bars


def held_out(run: RunData, x_key: str) -> Points:
    """Held-out accuracy in the run's first evaluation mode, by "step" or "time_s"."""
    modes = run.modes()
    return points(run.evaluated(modes[0]), x_key, "accuracy") if modes else ([], [])


def _initial(run: RunData) -> float | None:
    return next(iter(held_out(run, "step")[1]), None)


def _final(run: RunData) -> float | None:
    return next(reversed(held_out(run, "step")[1]), None)


def _wall_s(run: RunData) -> float | None:
    value = run.summary.get("wall_s")
    return float(value) if finite(value) else run.last("time_s")
