"""`april compare`: two variants of one recipe, run in turn with equal seeds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from april.cli.main import emit

SHOWN = ("accuracy_after", "wall_s", "rollout_s", "train_s", "idle_fraction", "mean_lag_steps", "length_bias", "tokens_generated")


def compare_command(
    recipe: str, overlays: list[str], overrides: list[str], versus: str, seeds: int, out: Path, quiet: bool, as_json: bool
) -> None:
    """Run both sides for each seed, each run in a process of its own, and write the comparison.

    A run whose summary is there already is not run again, so an interrupted comparison goes on where it stopped.
    """
    from april.api import resolve_recipe
    from april.observe.compare import comparison_rows, write_comparison

    sides = {_side(resolve_recipe(recipe, overlays, [*overrides, *extra])): extra for extra in ([], [versus])}
    if len(sides) == 1:
        sides = {"recipe": [], versus: [versus]}
    folders: dict[str, list[Path]] = {name: [] for name in sides}
    for seed in range(seeds):
        order = list(sides.items())
        for name, extra in order if seed % 2 == 0 else order[::-1]:
            folder = out / f"{name.replace('=', '-')}-seed{seed}"
            folders[name].append(folder)
            _run(
                recipe, overlays, [*overrides, *extra, f"seed={seed}", f"out={json.dumps(str(folder))}"], folder, quiet or as_json
            )
    report = write_comparison(folders, out / "comparison.html")
    summaries = {name: [json.loads((folder / "summary.json").read_text()) for folder in runs] for name, runs in folders.items()}
    payload = {"recipe": recipe, "seeds": seeds, "report": str(report), "sides": {n: _figures(s) for n, s in summaries.items()}}
    payload["rollout_speedup"] = _ratio(summaries, "rollout_s")
    payload["wall_speedup"] = _ratio(summaries, "wall_s")
    (out / "comparison.json").write_text(json.dumps(payload, indent=1) + "\n")
    if as_json:
        emit(payload)
        return
    columns = [list(column) for column in comparison_rows(folders)]
    widths = [max(map(len, column)) for column in columns]
    for cells in zip(*columns, strict=True):
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip())
    print(f"report: {report}")


def _side(resolved: Any) -> str:
    return str(resolved.recipe.schedule.type)


def _run(recipe: str, overlays: list[str], overrides: list[str], folder: Path, quiet: bool) -> None:
    """One run in a fresh process: no warm caches, and its own torch threads."""
    if (folder / "summary.json").exists():
        return
    command = [sys.executable, "-m", "april", "train", recipe, *overrides, "--overwrite"]
    for overlay in overlays:
        command += ["--overlay", overlay]
    print(f"-- {folder.name}", file=sys.stderr)
    done = subprocess.run([*command, *(["--quiet"] if quiet else [])], stdout=sys.stderr.fileno(), check=False)
    if done.returncode:
        sys.exit(done.returncode)


def _figures(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    from april.observe.statistics import mean_interval

    out: dict[str, Any] = {}
    for key in SHOWN:
        values = [float(summary[key]) for summary in summaries if summary.get(key) is not None]
        if values:
            estimate = mean_interval(values)
            out[key] = {"mean": estimate.value, "low": estimate.low, "high": estimate.high, "runs": values}
    return out


def _ratio(summaries: dict[str, list[dict[str, Any]]], key: str) -> dict[str, Any]:
    """Seconds of the second side over seconds of the first, seed by seed."""
    from april.observe.statistics import mean_interval

    first, second = summaries.values()
    ratios = [b[key] / a[key] for a, b in zip(first, second, strict=True)]
    estimate = mean_interval(ratios)
    return {"mean": estimate.value, "low": estimate.low, "high": estimate.high, "runs": ratios}
