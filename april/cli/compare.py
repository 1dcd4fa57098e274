"""`april compare`: arms of one recipe, run in turn with equal seeds."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from april.cli.main import emit
from april.config.comparison import Comparison

SHOWN = (
    "accuracy_before",
    "accuracy_after",
    "wall_s",
    "rollout_s",
    "train_s",
    "idle_fraction",
    "mean_lag_steps",
    "max_lag_steps",
    "length_bias",
    "tokens_generated",
    "stale_token_fraction",
)
Folders = dict[str, list[Path]]


def compare_command(
    recipe: str,
    overlays: list[str],
    overrides: list[str],
    versus: str,
    seeds: int | None,
    out: Path,
    jobs: int,
    quiet: bool,
    as_json: bool,
) -> None:
    """Run every arm with each seed, each run in a process of its own, and write the comparison.

    A run whose summary is there already is not run again, so an interrupted comparison goes on where it stopped; the figures
    are written anew after each run.

    Args:
        recipe: a comparison (packaged, or a TOML file with `[arms]`), or a recipe to set against itself with `versus`.
        overlays, overrides: for all arms.
        versus: one override, for a plain recipe.
        seeds: runs of each arm; None takes the comparison's own number.
        out: folder of all runs.
        jobs: runs at a time; times are only worth comparing with one.
    """
    comparison = _comparison(recipe, overlays, overrides, versus)
    comparison = comparison.model_copy(
        update={"seeds": seeds or comparison.seeds, "overrides": (*comparison.overrides, *overrides)}
    )
    folders: Folders = {
        name: [out / f"{_file_name(name)}-seed{seed}" for seed in range(comparison.seeds)] for name in comparison.arms
    }
    with ThreadPoolExecutor(max_workers=max(1, jobs)) as pool:
        tasks = [
            pool.submit(_run, command, folder, quiet or as_json) for folder, command in _commands(comparison, overlays, folders)
        ]
        for task in tasks:
            code = task.result()
            if code:
                pool.shutdown(cancel_futures=True)
                sys.exit(code)
            if code is not None:
                write_results(recipe, comparison, folders, out, jobs)
    payload = write_results(recipe, comparison, folders, out, jobs)
    if as_json:
        emit(payload)
        return
    _show([list(row) for row in _rows(comparison, folders)])
    print(f"report: {payload['report']}")


def _rows(comparison: Comparison, folders: Folders) -> list[list[str]]:
    from april.observe.compare import comparison_rows

    return comparison_rows(folders, comparison.measures)


def _show(rows: list[list[str]]) -> None:
    """Rows of texts in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip())


def _comparison(recipe: str, overlays: list[str], overrides: list[str], versus: str) -> Comparison:
    from april.api import resolve_recipe
    from april.config.comparison import find_comparison

    found = find_comparison(recipe)
    if found is not None:
        for extra in found.arms.values():  # a wrong key is an error before the first run, not hours later
            resolve_recipe(found.recipe, overlays, [*found.overrides, *overrides, *extra])
        return found
    sides = {str(resolve_recipe(recipe, overlays, [*overrides, *extra]).recipe.schedule.type): extra for extra in ([], [versus])}
    if len(sides) == 1:
        sides = {"recipe": [], versus: [versus]}
    return Comparison(recipe=recipe, arms={name: tuple(extra) for name, extra in sides.items()})


def _file_name(arm: str) -> str:
    return arm.replace("=", "-").replace("/", "-").replace(" ", "-")


def _commands(comparison: Comparison, overlays: list[str], folders: Folders) -> Iterator[tuple[Path, list[str]]]:
    """Every run with its command, seed by seed; the order of the arms turns round with each seed."""
    for seed in range(comparison.seeds):
        arms = list(comparison.arms.items())
        for name, extra in arms if seed % 2 == 0 else arms[::-1]:
            folder = folders[name][seed]
            own = [*comparison.overrides, *extra, f"seed={seed}", f"out={json.dumps(str(folder))}"]
            command = [sys.executable, "-m", "april", "train", comparison.recipe, *own, "--overwrite"]
            yield folder, [*command, *(part for overlay in overlays for part in ("--overlay", overlay))]


def _run(command: list[str], folder: Path, quiet: bool) -> int | None:
    """One run in a fresh process: no warm caches, and its own torch threads; its exit code, None where it was there already."""
    if (folder / "summary.json").exists():
        return None
    print(f"-- {folder.name}", file=sys.stderr)
    return subprocess.run([*command, *(["--quiet"] if quiet else [])], stdout=sys.stderr.fileno(), check=False).returncode


def write_results(name: str, comparison: Comparison, folders: Folders, out: Path, jobs: int) -> dict[str, Any]:
    """comparison.html, comparison.md and comparison.json of the runs that are finished; returns what the last holds."""
    from april.observe.compare import write_comparison
    from april.observe.comparison_page import comparison_page

    done = {name: [folder for folder in group if (folder / "summary.json").exists()] for name, group in folders.items()}
    done = {name: group for name, group in done.items() if group}
    report = write_comparison(done, out / "comparison.html")
    figures = {name: _figures(group, comparison.measures) for name, group in done.items()}
    target, seconds = _to_target(done)
    payload = {
        "name": name,
        "jobs": jobs,
        "measures": list(comparison.measures),
        "recipe": comparison.recipe,
        "overrides": list(comparison.overrides),
        "seeds": comparison.seeds,
        "baseline": comparison.against,
        "target_accuracy": target,
        "arms": {
            name: {"overrides": list(comparison.arms[name]), **figures[name], "seconds_to_target": seconds[name]} for name in done
        },
        "speedups": _speedups(comparison, done),
    }
    (out / "comparison.json").write_text(json.dumps(payload, indent=1) + "\n")
    (out / "comparison.md").write_text(comparison_page(payload))
    return {**payload, "report": str(report)}


def _figures(folders: list[Path], measures: tuple[str, ...]) -> dict[str, Any]:
    from april.observe.compare import held_out, mean_curve, mean_measure
    from april.observe.report_data import load_run

    runs = [load_run(folder) for folder in folders]
    columns = {key: [run.summary.get(key) for run in runs] for key in SHOWN}
    columns["tokens_per_s"] = [run.summary["tokens_generated"] / run.summary["rollout_s"] for run in runs]
    columns |= {key: [mean_measure(run, key) for run in runs] for key in measures}
    known = {key: [float(value) for value in column if value is not None] for key, column in columns.items()}
    steps, accuracy = mean_curve([held_out(run, "step") for run in runs])
    curve = {"curve": [[step, value] for step, value in zip(steps, accuracy, strict=True)]}
    return {key: _interval(values) for key, values in known.items() if values} | curve


def _to_target(done: Folders) -> tuple[float, dict[str, Any]]:
    """The accuracy that every finished run ends at or above, and the seconds that each run took to reach it."""
    from april.observe.compare import held_out, reached_s
    from april.observe.report_data import load_run

    runs = {name: [load_run(folder) for folder in group] for name, group in done.items()}
    target = min(held_out(run, "step")[1][-1] for group in runs.values() for run in group)
    seconds = {name: [reached_s(run, target) for run in group] for name, group in runs.items()}
    return target, {name: _interval([value for value in group if value is not None]) for name, group in seconds.items()}


def _speedups(comparison: Comparison, done: Folders) -> dict[str, Any]:
    """Seconds of the baseline over seconds of each other arm, seed by seed."""
    seconds = {name: {folder.name.rpartition("-seed")[2]: _summary(folder) for folder in group} for name, group in done.items()}
    base = seconds.get(comparison.against, {})
    out: dict[str, Any] = {}
    for name, runs in seconds.items():
        shared = [seed for seed in runs if seed in base]
        if name == comparison.against or not shared:
            continue
        keys = {"rollout": "rollout_s", "wall": "wall_s"}
        out[name] = {word: _interval([base[seed][key] / runs[seed][key] for seed in shared]) for word, key in keys.items()}
    return out


def _summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())  # type: ignore[no-any-return]


def _interval(values: list[float]) -> dict[str, Any]:
    from april.observe.statistics import mean_interval

    estimate = mean_interval(values)
    bounds = (
        {"low": estimate.low, "high": estimate.high} if len(values) > 1 else {"low": None, "high": None}
    )  # one run has no interval
    return {"mean": estimate.value, **bounds, "runs": values}
