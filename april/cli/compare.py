"""`april compare`: arms of one recipe, run in turn with equal seeds."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from april.cli.output import emit, print_table
from april.config.comparison import Comparison
from april.core.errors import CheckpointError, RecipeError
from april.core.template import literal
from april.observe.status import read_status

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

    A run whose summary is there already is not run again, so an interrupted comparison goes on where it stopped; one of other
    values is refused. The figures are written when all runs have ended, and not between them, where writing would slow the
    next one.

    Args:
        recipe: a comparison (packaged, or a TOML file with `[arms]`), or a recipe to set against itself with `versus`.
        overlays, overrides: for all arms.
        versus: one override, for a plain recipe.
        seeds: runs of each arm; None takes the comparison's own number.
        out: folder of all runs.
        jobs: runs at a time; times are only worth comparing with one.

    Raises:
        AprilError: a recipe that cannot work, or a finished run of another.
    """
    comparison = _comparison(recipe, overlays, overrides, versus)
    comparison = comparison.model_copy(
        update={"seeds": comparison.seeds if seeds is None else seeds, "overrides": (*comparison.overrides, *overrides)}
    )
    folders: Folders = {
        name: [out / f"{_file_name(name)}-seed{seed}" for seed in range(comparison.seeds)] for name in comparison.arms
    }
    _check_apart(folders)
    _check_finished(comparison, overlays, folders)
    if code := _run_all(list(_commands(comparison, overlays, folders)), jobs, quiet or as_json):
        if as_json:
            emit({"error": {"what": "a run of the comparison failed", "got": f"exit code {code}", "next": "see standard error"}})
        sys.exit(code)
    payload = write_results(recipe, comparison, folders, out, jobs)
    if as_json:
        emit(payload)
        return
    print_table(_rows(comparison, folders))
    print(f"report: {payload['report']}")


def _rows(comparison: Comparison, folders: Folders) -> list[list[str]]:
    from april.observe.compare import comparison_rows

    return comparison_rows(folders, comparison.measures)


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
    return re.sub(r"[^\w.-]+", "-", arm)


def _runs(comparison: Comparison, folders: Folders) -> Iterator[tuple[Path, list[str]]]:
    """Every run's folder and overrides, seed by seed; the order of the arms turns round with each seed."""
    for seed in range(comparison.seeds):
        arms = list(comparison.arms.items())
        for name, extra in arms if seed % 2 == 0 else arms[::-1]:
            folder = folders[name][seed]
            yield folder, [*comparison.overrides, *extra, f"seed={seed}", f"out={json.dumps(literal(str(folder)))}"]


def _commands(comparison: Comparison, overlays: list[str], folders: Folders) -> Iterator[tuple[Path, list[str]]]:
    laid_over = [part for overlay in overlays for part in ("--overlay", overlay)]
    for folder, own in _runs(comparison, folders):
        yield folder, [sys.executable, "-m", "april", "train", comparison.recipe, *own, "--overwrite", *laid_over]


def _check_apart(folders: Folders) -> None:
    """Every arm has folders of its own.

    Raises:
        RecipeError: names of arms differ only in what no folder can be called.
    """
    owner: dict[Path, str] = {}
    for name, group in folders.items():
        for folder in group:
            if owner.setdefault(folder, name) != name:
                got = f"{owner[folder]!r} and {name!r}, both {folder.name}"
                hint = "rename one of them: letters, digits, dots, - and _ stay in the name of a folder"
                raise RecipeError("two arms would share a folder", where="arms", got=got, expected="other names", hint=hint)


def _check_finished(comparison: Comparison, overlays: list[str], folders: Folders) -> None:
    """A run that is not done again must be the one that is asked for.

    Raises:
        CheckpointError: a finished run of other values.
    """
    from april.api import resolve_recipe
    from april.config.load import read_toml
    from april.config.resolve import changes

    for folder, own in _runs(comparison, folders):
        if not _finished(folder):
            continue
        values = resolve_recipe(comparison.recipe, overlays, own).values()
        if changed := changes(read_toml(folder / "recipe.toml"), values):
            raise CheckpointError(
                "a finished run of the comparison has another recipe" + (f" ({len(changed)} values)" if changed[1:] else ""),
                where=str(folder),
                got=changed[0],
                expected="the values of this comparison",
                hint=f"choose another folder with --out, or remove {folder} to run it again",
            )


def _run_all(runs: list[tuple[Path, list[str]]], jobs: int, quiet: bool) -> int:
    """Do the runs, so many at a time; after one that fails no other is begun, and its exit code is returned."""
    failed: list[int] = []

    def run(folder: Path, command: list[str]) -> None:
        if not failed and (code := _run(command, folder, quiet)):
            failed.append(code)

    with ThreadPoolExecutor(max_workers=jobs) as pool:
        for task in [pool.submit(run, *each) for each in runs]:
            task.result()
    return failed[0] if failed else 0


def _run(command: list[str], folder: Path, quiet: bool) -> int:
    """One run in a fresh process: no warm caches, and its own torch threads."""
    if _finished(folder):
        return 0
    print(f"-- {folder.name}", file=sys.stderr)
    return subprocess.run([*command, *(["--quiet"] if quiet else [])], stdout=sys.stderr.fileno(), check=False).returncode


def _finished(folder: Path) -> bool:
    """Whether a run came to its end; one that was interrupted has a summary, too."""
    return (folder / "summary.json").exists() and read_status(folder)["state"] == "finished"


def write_results(name: str, comparison: Comparison, folders: Folders, out: Path, jobs: int) -> dict[str, Any]:
    """comparison.html, comparison.md and comparison.json of the runs that are finished; returns what the last holds."""
    from april.observe.compare import write_comparison
    from april.observe.comparison_page import comparison_page

    done = {name: [folder for folder in group if _finished(folder)] for name, group in folders.items()}
    done = {name: group for name, group in done.items() if group}
    report = write_comparison(done, out / "comparison.html")
    figures = {name: _figures(group, comparison.measures) for name, group in done.items()}
    target, seconds = _to_target(done)
    payload = {
        "name": name,
        "jobs": jobs,
        "measures": list(comparison.measures),
        "times": comparison.times,
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
    from april.observe.compare import held_out, mean_curve, mean_measure, steps_s
    from april.observe.report_data import load_run

    runs = [load_run(folder) for folder in folders]
    columns = {key: [run.summary.get(key) for run in runs] for key in SHOWN}
    columns["steps_s"] = [steps_s(run)[-1] for run in runs]
    columns["tokens_per_s"] = [run.summary["tokens_generated"] / steps_s(run)[-1] for run in runs]
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
    seconds = {name: {folder.name.rpartition("-seed")[2]: _seconds(folder) for folder in group} for name, group in done.items()}
    base = seconds.get(comparison.against, {})
    out: dict[str, Any] = {}
    for name, runs in seconds.items():
        shared = [seed for seed in runs if seed in base]
        if name == comparison.against or not shared:
            continue
        out[name] = {word: _interval([base[seed][word] / runs[seed][word] for seed in shared]) for word in base[shared[0]]}
    return out


def _seconds(folder: Path) -> dict[str, float]:
    """Of waiting for rollouts, of all steps, and of the whole run with its evaluations."""
    from april.observe.compare import steps_s
    from april.observe.report_data import load_run

    run = load_run(folder)
    return {"rollout": run.summary["rollout_s"], "steps": steps_s(run)[-1], "wall": run.summary["wall_s"]}


def _interval(values: list[float]) -> dict[str, Any]:
    from april.observe.statistics import mean_interval

    estimate = mean_interval(values)
    bounds = (
        {"low": estimate.low, "high": estimate.high} if len(values) > 1 else {"low": None, "high": None}
    )  # one run has no interval
    return {"mean": estimate.value, **bounds, "runs": values}
