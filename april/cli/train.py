"""`april train`."""

from __future__ import annotations

import sys
import textwrap
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console

from april.cli.output import emit, only_json
from april.observe.words import duration, percent


def train_command(
    recipe: str, overlays: list[str], overrides: list[str], *, resume: bool, overwrite: bool, quiet: bool, as_json: bool
) -> None:
    """Train, show a summary, and end with JSON where asked."""
    console = Console(stderr=as_json, highlight=False, soft_wrap=True)
    with only_json(as_json):
        with console.status(f"preparing {recipe} ...") if console.is_terminal else nullcontext():
            from april.api import resolve_recipe
            from april.run.folders import run_folder
            from april.run.loop import Run
            from april.run.loop import overwrite as forget

            resolved = resolve_recipe(recipe, overlays, overrides)
            if overwrite:
                forget(run_folder(resolved.recipe))
            run = Run(resolved, resume=resume, quiet=quiet)
        for finding in run.parts.findings:
            console.print(finding_lines(finding.name, finding.detail), markup=False)
        try:
            result = run.run()
        except KeyboardInterrupt:
            console.print(f"ended at once; `april train --resume {run.parts.folder}` goes on from the journal", markup=False)
            sys.exit(130)
    if as_json:
        emit({"folder": str(result.folder), "interrupted": result.interrupted, **result.summary})
    else:
        show_summary(console, result.folder, result.summary)
    if result.interrupted:
        sys.exit(130)


def finding_lines(name: str, detail: str) -> str:
    """What a check found, in lines that fit a wide terminal."""
    return textwrap.fill(f"  {name:<10} {detail}", 140, subsequent_indent=" " * 13)


def show_summary(console: Console, folder: Path, summary: dict[str, Any]) -> None:
    """What the run came to, in a few lines."""
    lines = [*_gains(summary), *_totals(summary)]
    console.print("\n".join(f"  {line}" for line in [*lines, f"report: {folder / 'report.html'}"]), markup=False)


def _gains(summary: dict[str, Any]) -> list[str]:
    lines = []
    for mode, suffix in (("sampled at temperature 1", ""), ("greedy", "_greedy")):
        before, after = summary.get(f"accuracy_before{suffix}"), summary.get(f"accuracy_after{suffix}")
        if before is None or after is None:
            continue
        line = f"held-out accuracy, {mode}: {percent(before)} -> {percent(after)}"
        if (gain := summary.get(f"gain{suffix}")) is not None:
            low, high = summary[f"gain_low{suffix}"], summary[f"gain_high{suffix}"]
            points = f"{100 * gain:+.1f} points, 95 % interval {100 * low:+.1f} to {100 * high:+.1f}"
            line += f" ({points}, {summary['n_eval']} problems)"
        lines.append(line)
    return lines


def _totals(summary: dict[str, Any]) -> list[str]:
    idle, ledger = summary["idle_fraction"], summary["ledger"]
    balance = "balances" if summary["ledger_balanced"] else "DOES NOT BALANCE"
    lines = [
        f"{summary['steps']} steps, {duration(summary['wall_s'] or 0)} in all; engine idle for {percent(idle, 0)} of the rollout",
        f"{summary['parked_total']} times a sample was parked, {summary['resumed_total']} times resumed; "
        f"lag at most {summary['max_lag_steps']} steps; the ledger {balance}",
    ]
    lost = {end: ledger["counts"].get(end, 0) for end in ("failed", "filtered", "evicted")}
    if any(lost.values()):
        reasons = sorted(ledger["reasons"].items(), key=lambda item: -item[1])[:3]
        ends = ", ".join(f"{count} samples {end}" for end, count in lost.items() if count)
        why = ", ".join(f"{reason.partition(': ')[2]} ({count})" for reason, count in reasons)
        lines.append(f"{ends}; most often: {why}")
    return lines


def check_only(recipe: str, overlays: list[str], overrides: list[str], as_json: bool) -> None:
    """The dry run: every check, nothing written."""
    from april.api import resolve_recipe
    from april.run.build import build
    from april.run.folders import run_folder

    with only_json(as_json):
        resolved = resolve_recipe(recipe, overlays, overrides)
        parts = build(resolved)
        parts.close()
    if as_json:
        emit({"ok": True, "folder": str(run_folder(resolved.recipe)), "checks": {f.name: f.detail for f in parts.findings}})
        return
    for finding in parts.findings:
        print(finding_lines(f"ok  {finding.name:<10}", finding.detail)[2:])
    trained = "" if parts.recipe.training.lora is None else f", {parts.num_trained / 1e6:.2f} M in adapters, trained"
    print(f"ok  {'model':<10} {parts.num_parameters / 1e6:.2f} M parameters on {parts.policy.device}{trained}")
