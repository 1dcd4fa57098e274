"""report.html of a study: a table, bars for each point of the grid, and what happened step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from april.observe.report import write_page
from april.observe.report_page import note, page, plots, section
from april.observe.report_page import table as html_table
from april.observe.report_plots import HALF, THIRD, Axis, Line, bar_chart, line_chart
from april.observe.words import duration, number, percent
from april.simulate.execute import CellResult
from april.simulate.study import Study, point_label
from april.simulate.summary import Verdict, summarise, table, with_interval

COLOURS, DASHES = ("c1", "c2", "c3", "c4", "c5", "c6"), ("solid", "dash", "dot")
BARS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("Consumed tokens per second", "consumed_tokens_per_s", number),
    ("Generated tokens per second", "generated_tokens_per_s", number),
    ("Step time", "step_s", duration),
    ("Idle share of all devices", "idle_fraction", percent),
    ("Mean lag of trained tokens, in updates", "lag_mean", number),
    ("Waste: generated, never trained on", "waste_fraction", percent),
)
MAX_POINTS = 12
"""Points of the grid that get charts of their own; the table holds all."""


def write_study_report(study: Study, results: Sequence[CellResult], verdicts: Sequence[Verdict], out: Path) -> Path:
    """Write the page; it needs no other file."""
    lines = summarise(study, results)
    head, rows = table(study, lines)
    parts = [
        f"<h1>{_escaped(study.config.name)}</h1>",
        note(study.config.description or "A study in virtual time."),
        section(
            "Results", f"Means over {study.config.seeds} seeds with equal lengths; ± is a 95 % interval.", html_table(head, rows)
        ),
    ]
    if verdicts:
        parts.append(section("Published figures", "What a publication says, and what came out here.", _verdicts(verdicts)))
    for point in study.points[:MAX_POINTS]:
        shown = [result for result in results if result.cell.point == point]
        title = point_label(point) or "All arms"
        parts.append(section(title, "Bars are means; each dot is a seed.", plots(*_bars(study, shown), columns=3)))
        parts.append(
            section(f"{title}: step by step", "The first seed; warm-up steps are shown too.", plots(*_curves(study, shown)))
        )
    return write_page(out, page(f"{study.config.name}: April study", "".join(parts)))


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


def verdict_rows(verdicts: Sequence[Verdict]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the published figures."""
    head = ["claim", "arm", "published", "accepted", "got", "verdict"]
    rows = []
    for verdict in verdicts:
        wanted = verdict.expectation
        arm = verdict.arm if wanted.against is None else f"{verdict.arm} / {wanted.against}"
        accepted = f"{number(wanted.low)} to {number(wanted.high)}"
        rows.append(
            [
                wanted.what,
                arm,
                wanted.published,
                accepted,
                with_interval(verdict.got),
                "as published" if verdict.ok else "OUTSIDE",
            ]
        )
    return head, rows


def _verdicts(verdicts: Sequence[Verdict]) -> str:
    return html_table(*verdict_rows(verdicts))


def _bars(study: Study, results: Sequence[CellResult]) -> list[str]:
    charts = []
    for title, figure, style in BARS:
        bars = []
        for place, arm in enumerate(study.arms):
            values = [result.figures[figure] for result in results if result.cell.arm == arm]
            if values:
                bars.append((arm, sum(values) / len(values), values, COLOURS[place % len(COLOURS)]))
        charts.append(bar_chart(title, bars, style, width=THIRD))
    return charts


def _curves(study: Study, results: Sequence[CellResult]) -> list[str]:
    def mean_lag(row: dict[str, list[int]]) -> float:
        tokens = row["lag_tokens"]
        return sum(lag * count for lag, count in enumerate(tokens)) / max(1, sum(tokens))

    curves: tuple[tuple[str, Callable[..., float], Callable[[float], str]], ...] = (
        ("Step time", lambda row: row["step_s"], duration),
        ("Mean lag, in updates", mean_lag, number),
        ("Length bias: trained over true mean length", lambda row: row["length_bias"], number),
        ("Consumed tokens per second", lambda row: row["consumed_tokens"] / row["step_s"], number),
    )
    charts = []
    for title, value, style in curves:
        lines = []
        for place, arm in enumerate(study.arms):
            first = next((result for result in results if result.cell.arm == arm), None)
            if first is not None:
                xs, ys = [row["step"] for row in first.rows], [value(row) for row in first.rows]
                colour, dash = COLOURS[place % len(COLOURS)], DASHES[place // len(COLOURS) % len(DASHES)]
                lines.append(Line(arm, xs, ys, colour, dash))
        charts.append(line_chart(title, lines, y=Axis(style=style, low=0.0), width=HALF))
    return charts
