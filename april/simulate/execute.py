"""Running a study: cell after cell, each written down as it ends, so that a study goes on where it stopped."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from april.observe.sinks import plain
from april.observe.trace import write_trace
from april.simulate.cell import Row, run_cell
from april.simulate.study import Cell, Study


@dataclass(frozen=True, slots=True)
class CellResult:
    """What a cell gave.

    Attributes:
        figures: name -> value, over the steps after the warm-up.
        rows: one a step.
        wall_s: real seconds that it took.
        cpu_s: seconds of processor time.
    """

    cell: Cell
    figures: dict[str, float]
    rows: list[Row]
    wall_s: float
    cpu_s: float


def run_study(
    study: Study,
    out: Path,
    on_step: Callable[[Cell, int, int], None] = lambda _cell, _index, _steps: None,
    on_cell: Callable[[CellResult, bool], None] = lambda _result, _new: None,
) -> list[CellResult]:
    """Run every cell that is not there yet.

    Args:
        out: the study's folder.
        on_step: told of (cell, its number, steps done).
        on_cell: told of each result, and whether it was made now.
    """
    (out / "cells").mkdir(parents=True, exist_ok=True)
    results = []
    for index, cell in enumerate(study.cells):
        path = out / "cells" / f"{cell.key}.json"
        known = _read(path, cell)
        if known is None:
            result = _run(study, cell, out, lambda row, c=cell, i=index: on_step(c, i, row["step"] + 1))  # type: ignore[misc]
            _write(path, result)
        else:
            result = known
        results.append(result)
        on_cell(result, known is None)
    return results


def _run(study: Study, cell: Cell, out: Path, on_step: Callable[[Row], None]) -> CellResult:
    wall_s, cpu_s, timeline = time.perf_counter(), time.process_time(), None
    if cell.seed == 0 and study.config.trace_samples:
        (out / "traces").mkdir(exist_ok=True)
        timeline = out / "traces" / f"{cell.key}.jsonl"
        timeline.unlink(missing_ok=True)
    rows, figures = run_cell(
        cell.config, cell.seed, folder=study.folder, timeline=timeline, trace_samples=study.config.trace_samples, on_step=on_step
    )
    if timeline is not None:
        write_trace(timeline, timeline.with_suffix(".json"))
        timeline.unlink()
    return CellResult(cell, figures, rows, time.perf_counter() - wall_s, time.process_time() - cpu_s)


def _write(path: Path, result: CellResult) -> None:
    content = {
        "arm": result.cell.arm,
        "point": dict(result.cell.point),
        "seed": result.cell.seed,
        "config": result.cell.config.model_dump(mode="json"),
        "figures": result.figures,
        "wall_s": result.wall_s,
        "cpu_s": result.cpu_s,
        "rows": result.rows,
    }
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(plain(content)) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _read(path: Path, cell: Cell) -> CellResult | None:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        figures = {name: float("nan") if value is None else float(value) for name, value in content["figures"].items()}
        return CellResult(cell, figures, content["rows"], float(content["wall_s"]), float(content["cpu_s"]))
    except (OSError, ValueError, KeyError):
        return None
