"""`april plan`: which schedule to take."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from april.cli.main import emit


def plan_command(fields: dict[str, Any], lengths: str, out: Path, quiet: bool, as_json: bool) -> None:
    """Search, write plan.json and plan.html, print what to choose from."""
    from april import registry
    from april.observe.sinks import plain
    from april.simulate import plan_report
    from april.simulate.plan import PlanRequest, make_plan, parse_lengths

    request = registry.validate(PlanRequest, {**fields, "workload": parse_lengths(lengths)}, "plan")
    plan = make_plan(request, say=(lambda _line: None) if quiet else _say)  # type: ignore[arg-type]
    out.mkdir(parents=True, exist_ok=True)
    payload = plan_report.as_json(plan)
    (out / "plan.json").write_text(json.dumps(plain(payload), indent=1) + "\n", encoding="utf-8")
    report = plan_report.write_plan_report(plan, out / "plan.html")
    if as_json:
        emit({**payload, "report": str(report)})
        return
    print(f"{plan_report.title(plan)}\n")
    rows = [list(plan_report.HEAD), *(plan_report.cells(plan, row) for row in plan.front)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip())
    print()
    for row in plan.front:
        print(plan_report.command(plan, row))
    print()
    for text in plan_report.notes(plan):
        print(text)
    print(f"report: {report}")


def _say(line: str) -> None:
    print(f"-- {line}", file=sys.stderr, flush=True)
