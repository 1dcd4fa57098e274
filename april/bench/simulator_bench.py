"""The simulator against reality: `april bench simulator`.

    calibrate once -> real runs of every arm, without learning -> the simulator replays their lengths -> seconds of each step

Without learning (the smallest learning rate changes no weight) and with addressed random numbers a sample has the same
tokens under every schedule, so the recordings of all arms are one, and each replay knows also what its own run left unfinished.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from april import registry
from april.config.resolve import Resolved, resolve
from april.run.build import build
from april.run.calibrate import Effort, measure
from april.run.telemetry import lengths_of
from april.simulate.calibrate import fit_costs
from april.simulate.cell import CellConfig, run_cell
from april.simulate.cost import Costs
from april.simulate.recorded import FILE

Say = Callable[[str], None]
Row = dict[str, Any]
MAX_LAG_STEPS = 4
UNFINISHED_STEPS = 4
"""Further batches of the first arm, so that what the others issue ahead is recorded."""
TOLERANCE = 0.10
PARTS = ("rollout_s", "train_s", "step_s")
NO_LEARNING = (
    "training.lr=1e-30",  # lost in the rounding of every weight
    "training.schedule=constant",
    "training.skip_zero_advantage=false",
    "training.process=main",
    "engine.process=main",
    "scoring.workers=0",
    "engine.share_prefix=false",
)
"""Prefixes are not shared: siblings of the packaged policy often begin alike, which no recorded length tells."""


@dataclass(frozen=True, slots=True)
class SimulatorOptions:
    """What is compared.

    Attributes:
        recipe, overrides: the run.
        steps: compared steps of each arm, after one that warms up.
        costs: a file that `april calibrate` wrote; measured now when None.
        ratios: over-provision of the arms of `april`.
    """

    recipe: str = "quickstart"
    overrides: tuple[str, ...] = ()
    steps: int = 20
    costs: Path | None = None
    ratios: tuple[float, ...] = (1.25, 1.5, 2.0)
    rounds: int = 3


def run_simulator_bench(options: SimulatorOptions, out: Path, say: Say) -> dict[str, Any]:
    """Calibrate, run, replay, compare.

    Args:
        out: folder of costs.json and of each arm's lengths.

    Returns:
        for each arm the errors, and the seconds of each step, measured and predicted.
    """
    out.mkdir(parents=True, exist_ok=True)
    base = resolve(resolve(options.recipe, (), options.overrides).values(), (), NO_LEARNING)
    costs_file = options.costs or out / "costs.json"
    if options.costs is None:
        fit_costs(measure(base, Effort(rounds=options.rounds), say)).save(costs_file)
    costs, known = Costs.load(costs_file), dict[str, Row]()
    schedules = _schedules(options.ratios)
    arms: list[Row] = []
    for name, schedule in schedules.items():
        extra = 0 if arms else UNFINISHED_STEPS
        rows = _real_run(base, schedule, options.steps + 1 + extra, out / name, known)
        if not arms:
            schedules["token_budget"] |= _budget(base, rows)
        config = _cell(base, schedule, out / name, costs_file, options.steps + 1)
        predicted, _ = run_cell(config, 0)
        arms.append(compare(name, rows[1 : options.steps + 1], predicted[1:]))
        say(f"{name}: median error of a rollout {arms[-1]['rollout_s']['median_error']:.1%}")
    return {
        "recipe": options.recipe,
        "steps": options.steps,
        "tolerance": TOLERANCE,
        "costs": costs.model_dump(mode="json"),
        "ok": all(arm["step_s"]["median_error"] <= TOLERANCE for arm in arms),
        "arms": arms,
    }


def _schedules(ratios: Sequence[float]) -> dict[str, dict[str, Any]]:
    """Arm -> schedule, the synchronous one first."""
    april = {f"april {ratio:g}": {"type": "april", "over_provision": ratio, "max_lag_steps": MAX_LAG_STEPS} for ratio in ratios}
    return {"sync": {"type": "sync"}, **april, "token_budget": {"type": "token_budget", "max_lag_steps": MAX_LAG_STEPS}}


def _budget(base: Resolved, rows: Sequence[Row]) -> dict[str, int]:
    """As many tokens as synchronous batches have, and as many samples as the engine has places."""
    batch = base.recipe.batch
    places = getattr(base.recipe.engine, "max_running", None) or batch.groups_per_step * batch.group_size
    return {"tokens_per_step": round(statistics.mean(row["consumed_tokens"] for row in rows)), "max_running": places}


def _real_run(base: Resolved, schedule: Mapping[str, Any], steps: int, folder: Path, known: dict[str, Row]) -> list[Row]:
    """Seconds of each step; writes the lengths of this run and of all before it.

    Args:
        known: serial and prompt -> recorded group; this run's groups are added.
    """
    values = {**base.values(), "schedule": dict(schedule), "steps": steps + UNFINISHED_STEPS + MAX_LAG_STEPS}
    parts = build(resolve(values))
    rows, own = [], dict[str, Row]()
    try:
        for _ in range(steps):
            marks = [time.perf_counter()]
            batch = parts.driver.next_batch()
            marks.append(time.perf_counter())
            parts.trainer.submit(batch)
            updated = parts.driver.wait_for_update()
            marks.append(time.perf_counter())
            parts.driver.publish(parts.trainer.weights(), updated.version, parts.driver.schedule.update_mode)
            marks.append(time.perf_counter())
            lines = [lengths_of(batch.step, group) for group in batch.groups]
            own |= {f"{line['serial']} {line['prompt']}": line for line in lines}
            rows.append(
                {
                    "rollout_s": marks[1] - marks[0],
                    "train_s": marks[2] - marks[1],
                    "step_s": marks[3] - marks[0],
                    "consumed_tokens": sum(sum(line["tokens"]) for line in lines),
                }
            )
    finally:
        parts.close()
    known |= own
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_text("".join(json.dumps(line) + "\n" for line in known.values()), encoding="utf-8")
    return rows


def _cell(base: Resolved, schedule: Mapping[str, Any], folder: Path, costs: Path, steps: int) -> CellConfig:
    """The same run in virtual time."""
    recipe = base.recipe
    tree = {
        "schedule": dict(schedule),
        "workload": {"lengths": "recorded", "path": str(folder), "max_tokens": recipe.sampling.max_new_tokens},
        "costs": str(costs),
        "engine": {"report_every_s": 0.0, "shares_prefix": bool(getattr(recipe.engine, "share_prefix", True))},
        "groups_per_step": recipe.batch.groups_per_step,
        "group_size": recipe.batch.group_size,
        "steps": steps,
        "warmup_steps": 1,
    }
    return registry.validate(CellConfig, tree, "")  # type: ignore[return-value]


def compare(name: str, measured: list[Row], predicted: list[Row]) -> Row:
    """Errors of an arm, step by step and in sum."""
    out: Row = {"arm": name, "same_batches": _same(measured, predicted)}
    for part in PARTS:
        real, told = [row[part] for row in measured], [row[part] for row in predicted]
        errors = [abs(t / r - 1) for r, t in zip(real, told, strict=True)]
        out[part] = {
            "median_error": statistics.median(errors),
            "ratio_of_sums": sum(told) / sum(real),
            "measured": real,
            "predicted": told,
        }
    return out


def _same(measured: list[Row], predicted: list[Row]) -> float:
    """Share of steps in which reality and simulation trained on as many tokens: the same groups, most likely."""
    pairs = zip(measured, predicted, strict=True)
    return statistics.mean(float(real["consumed_tokens"] == told["consumed_tokens"]) for real, told in pairs)


def markdown(results: Mapping[str, Any]) -> str:
    """A table of all arms."""
    lines = [
        f"{results['recipe']}, {results['steps']} steps of each arm",
        "",
        "| arm | step, measured | predicted | median error of a step | of its rollout | of its update "
        "| sum, predicted / measured | same batches |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for arm in results["arms"]:
        step = arm["step_s"]
        cells = [f"{statistics.mean(step[name]):.3f} s" for name in ("measured", "predicted")]
        cells += [f"{arm[part]['median_error']:.1%}" for part in ("step_s", "rollout_s", "train_s")]
        cells += [f"{step['ratio_of_sums']:.3f}", f"{arm['same_batches']:.0%}"]
        lines.append(f"| {arm['arm']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
