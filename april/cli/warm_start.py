"""`april warm-start`."""

from __future__ import annotations

import sys
from pathlib import Path

from april.cli.output import emit, only_json


def warm_start_command(recipe: str, overrides: list[str], out: Path, quiet: bool, as_json: bool) -> None:
    """Train and say what came of it."""
    from april.observe.console import Progress as Bar
    from april.run.warm_start import resolve_warm_start, warm_start
    from april.training.supervised import Progress

    resolved = resolve_warm_start(recipe, overrides)
    bars: dict[str, Bar] = {}

    def show(stage: str, done: int, total: int, progress: Progress) -> None:
        bar = bars.get(stage)
        if bar is None:
            bar = bars[stage] = Bar(f"{resolved.name}, {stage}", total, quiet=quiet, file=sys.stderr)
            bar.__enter__()
        bar.advance(1, loss=f"{progress.loss:.3f}", tokens=f"{progress.num_tokens / 1e6:.2f} M")
        if done == total:
            bar.__exit__(None, None, None)

    with only_json(as_json):
        summary = warm_start(resolved, out, show)
    if as_json:
        emit(summary)
    else:
        losses = ", ".join(f"{stage} {loss:.3f}" for stage, loss in summary["losses"].items())
        print(f"{summary['folder']}: {summary['parameters'] / 1e6:.2f} M parameters in {summary['wall_s']:.0f} s; loss {losses}")
