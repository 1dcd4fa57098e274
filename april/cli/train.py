"""`april train`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from april.cli.main import emit


def train_command(
    recipe: str, overlays: list[str], overrides: list[str], *, resume: bool, overwrite: bool, quiet: bool, as_json: bool
) -> None:
    """Train, show a summary, and end with JSON where asked."""
    console = Console(stderr=as_json)
    with console.status(f"preparing {recipe} ...") if console.is_terminal else _nothing():
        from april.api import resolve_recipe
        from april.run.build import run_folder
        from april.run.loop import Run
        from april.run.loop import overwrite as forget

        resolved = resolve_recipe(recipe, overlays, overrides)
        if overwrite:
            forget(run_folder(resolved.recipe))
        run = Run(resolved, resume=resume, quiet=quiet)
    for finding in run.parts.findings:
        console.print(f"  {finding.name:<10} {finding.detail}", highlight=False)
    result = run.run()
    if as_json:
        emit({"folder": str(result.folder), "interrupted": result.interrupted, **result.summary})
    else:
        show_summary(console, result.folder, result.summary)
    if result.interrupted:
        sys.exit(130)


def show_summary(console: Console, folder: Path, summary: dict[str, Any]) -> None:
    """What the run came to, in a few lines."""
    for mode, suffix in (("sampled at temperature 1", ""), ("greedy", "_greedy")):
        before, after = summary.get(f"accuracy_before{suffix}"), summary.get(f"accuracy_after{suffix}")
        if before is None or after is None:
            continue
        line = f"  held-out accuracy, {mode}: {before:.1%} -> {after:.1%}"
        if (gain := summary.get(f"gain{suffix}")) is not None:
            low, high = summary[f"gain_low{suffix}"], summary[f"gain_high{suffix}"]
            line += (
                f"  ({100 * gain:+.1f} points, 95 % interval {100 * low:+.1f} to {100 * high:+.1f}, {summary['n_eval']} problems)"
            )
        console.print(line, highlight=False)
    balanced = "balances" if summary["ledger_balanced"] else "DOES NOT BALANCE"
    idle = summary["idle_fraction"]
    console.print(
        f"  {summary['steps']} steps in {summary['wall_s'] or 0:.0f} s; engine idle {idle or 0:.0%}; "
        f"{summary['parked_total']} samples parked, {summary['resumed_total']} resumed; lag at most {summary['max_lag_steps']}; the ledger {balanced}",
        highlight=False,
    )
    console.print(f"  report: {folder / 'report.html'}", highlight=False)


def check_only(recipe: str, overlays: list[str], overrides: list[str], as_json: bool) -> None:
    """The dry run: every check, nothing written."""
    from april.api import resolve_recipe
    from april.run.build import build, run_folder

    resolved = resolve_recipe(recipe, overlays, overrides)
    parts = build(resolved)
    if as_json:
        emit({"ok": True, "folder": str(run_folder(resolved.recipe)), "checks": {f.name: f.detail for f in parts.findings}})
        return
    for finding in parts.findings:
        print(f"ok  {finding.name:<10} {finding.detail}")
    print(f"ok  {'model':<10} {parts.num_parameters / 1e6:.2f} M parameters on {parts.policy.device}")


class _nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...
