"""`april simulate`: a study in virtual time."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from april.cli.output import emit, print_table

if TYPE_CHECKING:
    from april.simulate.execute import CellResult
    from april.simulate.study import Cell, Study


def simulate_command(name: str, overrides: list[str], out: Path | None, check: bool, quiet: bool, as_json: bool) -> None:
    """Run what is not there yet, write results.json and report.html, print the table.

    With `check`, the exit code is 1 when a published figure is not reached.
    """
    from april.observe.sinks import plain
    from april.simulate.execute import run_study
    from april.simulate.report import verdict_rows, write_study_report
    from april.simulate.study import load_study, slug
    from april.simulate.summary import as_json as results_of
    from april.simulate.summary import judge, summarise, table

    study = load_study(name, overrides)
    folder = out or Path("studies") / slug(study.config.name)
    with _Progress(study, quiet) as progress:
        results = run_study(study, folder, progress.step, progress.cell)
    lines, verdicts = summarise(study, results), judge(study, results)
    payload = results_of(study, results, lines, verdicts)
    (folder / "results.json").write_text(json.dumps(plain(payload), indent=1) + "\n", encoding="utf-8")
    report = write_study_report(study, results, verdicts, folder / "report.html")
    if as_json:
        emit({**payload, "report": str(report)})
    else:
        head, rows = table(study, lines)
        print_table([head, *rows])
        if verdicts:
            print()
            head, rows = verdict_rows(verdicts)
            print_table([head, *rows])
        print(f"\nreport: {report}")
    if check and not all(verdict.ok for verdict in verdicts):
        sys.exit(1)


class _Progress:
    """A bar on standard error; one line a cell where that is no terminal."""

    def __init__(self, study: Study, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self._bar = None
        self._plain = not quiet and not console.is_terminal
        self._num = len(study.cells)
        self._done = 0
        if not quiet and console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task(study.config.name, total=sum(cell.config.steps for cell in study.cells))
        self._starts = [0]
        for cell in study.cells:
            self._starts.append(self._starts[-1] + cell.config.steps)

    def __enter__(self) -> _Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, cell: Cell, index: int, steps: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=f"{cell.label}, seed {cell.seed}", completed=self._starts[index] + steps)

    def cell(self, result: CellResult, new: bool) -> None:
        self._done += 1
        if self._bar is not None:
            self._bar.update(self._task, completed=self._starts[self._done])
        if self._plain:
            how = f"{result.wall_s:.1f} s" if new else "known"
            print(f"-- {self._done}/{self._num} {result.cell.label}, seed {result.cell.seed}: {how}", file=sys.stderr, flush=True)
