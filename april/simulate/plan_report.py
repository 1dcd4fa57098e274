"""A plan as a table, as JSON and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from april.observe.report import write_page
from april.observe.report_page import folded, note, page, plots, section
from april.observe.report_page import table as html_table
from april.observe.report_plots import Axis, Line, line_chart
from april.observe.words import duration, number, percent
from april.simulate.plan import Plan, PlanRow

HEAD = ("schedule", "devices", "tokens/s", "x sync", "lag mean", "lag bound", "step", "idle", "length bias", "waste")


def cells(plan: Plan, row: PlanRow) -> list[str]:
    """One line of the table."""
    figures = row.figures
    return [
        row.candidate.label,
        devices(plan, row),
        number(figures["consumed_tokens_per_s"]),
        f"{figures['consumed_tokens_per_s'] / plan.sync.figures['consumed_tokens_per_s']:.2f}",
        f"{figures['lag_mean']:.2f}",
        number(bound(row)),
        duration(figures["step_s"]),
        percent(figures["idle_fraction"]),
        f"{figures['length_bias']:.2f}",
        percent(figures["waste_fraction"]),
    ]


def devices(plan: Plan, row: PlanRow) -> str:
    """Who uses how many: all in turn, or those that generate + those that train."""
    train, gpus = row.candidate.train_devices, plan.request.gpus
    return f"{gpus} in turn" if train is None else f"{gpus - train} + {train}"


def bound(row: PlanRow) -> int:
    """The lag that the schedule promises not to pass."""
    return int(row.candidate.schedule.get("max_lag_steps", 1 if row.candidate.schedule["type"] == "one_step" else 0))


def as_json(plan: Plan) -> dict[str, Any]:
    """Everything, for a script."""
    return {
        "request": plan.request.model_dump(mode="json"),
        "tp": plan.tp,
        "scale": plan.scale,
        "complete": plan.complete,
        "wall_s": plan.wall_s,
        "front": [_row(plan, row) for row in plan.front],
        "others": [_row(plan, row) for row in plan.rows if not row.on_front],
    }


def _row(plan: Plan, row: PlanRow) -> dict[str, Any]:
    return {
        "schedule": dict(row.candidate.schedule),
        "train_devices": row.candidate.train_devices,
        "steps": row.steps,
        "over_sync": row.figures["consumed_tokens_per_s"] / plan.sync.figures["consumed_tokens_per_s"],
        "figures": row.figures,
    }


def title(plan: Plan) -> str:
    """What was planned."""
    request = plan.request
    return f"{request.model} on {request.gpus} x {request.hardware}, {request.groups_per_step} x {request.group_size} samples"


def notes(plan: Plan) -> list[str]:
    """What a reader has to know about the numbers."""
    out = [f"a replica has {plan.tp} device{'s' if plan.tp > 1 else ''}; simulated steps: {max(row.steps for row in plan.rows)}"]
    if plan.scale > 1:
        out.append(f"simulated with {1 / plan.scale:g} of the batch and of the devices; rates are those of all")
    if not plan.complete:
        out.append("the time was up before the last round had ended: give it more with --seconds")
    return out


def write_plan_report(plan: Plan, out: Path, commands: Sequence[str]) -> Path:
    """Write the page; it needs no other file.

    Args:
        commands: what runs each row of the front.
    """
    front, others = plan.front, [row for row in plan.rows if not row.on_front]
    lines = [
        Line("to choose from", *_points(front), marks=True),
        Line(
            "simulated, too", *_points(sorted(others, key=lambda row: row.figures["lag_mean"])), colour="c6", marks=True, width=0
        ),
    ]
    chart = line_chart(
        "Consumed tokens per second by mean lag", lines, Axis("mean lag, in updates", low=0.0), Axis(low=0.0), width=1100
    )
    parts = [
        f"<h1>{title(plan)}</h1>".replace("&", "&amp;"),
        *(note(text) for text in notes(plan)),
        section(
            "What to choose from", "Nothing else is as fast with less lag.", html_table(HEAD, [cells(plan, r) for r in front])
        ),
        *(folded(row.candidate.label, text) for row, text in zip(front, commands, strict=True)),
        section("Speed against age", "Every candidate; those off the line were dropped on the way.", plots(chart, columns=1)),
        section(
            "All candidates", "Fewer steps for those that were dropped early.", html_table(HEAD, [cells(plan, r) for r in others])
        ),
    ]
    return write_page(out, page(f"{plan.request.model}: April plan", "".join(parts)))


def _points(rows: list[PlanRow]) -> tuple[list[float], list[float]]:
    return [row.figures["lag_mean"] for row in rows], [row.figures["consumed_tokens_per_s"] for row in rows]
