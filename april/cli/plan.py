"""`april plan`: which schedule to take."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from april.cli.output import emit, print_table


def plan_command(fields: dict[str, Any], lengths: str, recipe: str, out: Path, quiet: bool, as_json: bool) -> None:
    """Search, write plan.json, plan.html and an overlay a row, print what to choose from."""
    from april import registry
    from april.observe.sinks import plain
    from april.simulate import plan_report
    from april.simulate.plan import PlanRequest, make_plan
    from april.simulate.plan_lengths import parse_lengths
    from april.simulate.plan_recipe import command, write_overlays

    request = registry.validate(PlanRequest, {**fields, "workload": parse_lengths(lengths)}, "plan")
    plan = make_plan(request, say=(lambda _line: None) if quiet else _say)  # type: ignore[arg-type]
    out.mkdir(parents=True, exist_ok=True)
    commands = [command(recipe, file) for file in write_overlays(plan, out / "rows")]
    payload = plan_report.as_json(plan)
    for row, text in zip(payload["front"], commands, strict=True):
        row["command"] = text
    (out / "plan.json").write_text(json.dumps(plain(payload), indent=1) + "\n", encoding="utf-8")
    report = plan_report.write_plan_report(plan, out / "plan.html", commands)
    if as_json:
        emit({**payload, "report": str(report)})
        return
    print(f"{plan_report.title(plan)}\n")
    print_table([plan_report.HEAD, *(plan_report.cells(plan, row) for row in plan.front)])
    print()
    print(*commands, sep="\n")
    print()
    for text in plan_report.notes(plan):
        print(text)
    print(f"report: {report}")


def _say(line: str) -> None:
    print(f"-- {line}", file=sys.stderr, flush=True)
