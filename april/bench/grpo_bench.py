"""A whole GRPO run of April against TRL's `GRPOTrainer`: same policy, prompts, update and number of steps.

Each run has a process of its own; the sides take turns, seed by seed. What is compared is the time from the first step to the
last, loading and evaluation left out, and what was learnt: the accuracy of both results on the same held-out problems.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from april.bench.grpo_policy import start_policy
from april.config.resolve import Resolved, resolve
from april.core.errors import EngineError
from april.core.template import fill
from april.observe.sinks import read_jsonl
from april.observe.statistics import mean_interval

WORKLOADS: dict[str, tuple[str, ...]] = {
    "long-tailed": (),
    "even": (
        "task.mixture=[{name='chain_sum',options={min_terms=14,max_terms=14,min_digits=1,max_digits=1}}]",
        "evaluation_task.mixture=[{name='chain_sum',options={min_terms=14,max_terms=14,min_digits=1,max_digits=1}}]",
    ),
}
"""Recipe changes of each workload: the quickstart's sums, or sums of 14 numbers, whose workings all have about 126 tokens."""


@dataclass(frozen=True, slots=True)
class GrpoOptions:
    """What is run.

    Attributes:
        workload: key of `WORKLOADS`.
        model: policy to start from; "3m" is made where it is not there yet.
        models: folder of policies that are made.
        steps, groups_per_step, group_size: of each run.
        seeds: runs of each side.
        threads: CPU threads of each run.
        trl_python: interpreter of an environment with `trl`.
    """

    workload: str
    model: str = "packaged"
    steps: int = 10
    groups_per_step: int = 8
    group_size: int = 8
    seeds: int = 3
    threads: int = 2
    trl_python: str = sys.executable
    models: Path = Path("bench-run/models")


def run_grpo_bench(options: GrpoOptions, out: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Run both sides for every seed; returns seconds, tokens and accuracies, and their ratios and differences by seed."""
    named = options.model
    options = replace(options, model=start_policy(named, options.workload, options.models, options.threads, say))
    sides: dict[str, list[dict[str, Any]]] = {"april": [], "april-sync": [], "trl": []}
    for seed in range(options.seeds):
        for side in list(sides) if seed % 2 == 0 else list(sides)[::-1]:
            folder = out / f"{options.workload}-{side}-seed{seed}"
            done = _trl(options, seed, folder) if side == "trl" else _april(options, seed, folder, side)
            sides[side].append(done)
            say(f"{options.workload}, seed {seed}, {side}: {done['wall_s']:.1f} s, accuracy {done['accuracy']:.1%}")
    ratios = {
        side: [t["wall_s"] / a["wall_s"] for t, a in zip(sides["trl"], sides[side], strict=True)]
        for side in ("april", "april-sync")
    }
    gains = {side: [a["accuracy"] - t["accuracy"] for t, a in zip(sides["trl"], sides[side], strict=True)] for side in ratios}
    return {
        "workload": options.workload,
        "options": {
            "model": named,
            **{name: getattr(options, name) for name in ("steps", "groups_per_step", "group_size", "seeds", "threads")},
        },
        "sides": sides,
        "speedup_over_trl": {side: _interval(values) for side, values in ratios.items()},
        "accuracy_over_trl": {side: _interval(values) for side, values in gains.items()},
    }


def _interval(values: Sequence[float]) -> dict[str, Any]:
    estimate = mean_interval(values)
    return {"mean": estimate.value, "low": estimate.low, "high": estimate.high, "runs": list(values)}


def _recipe(options: GrpoOptions, seed: int, folder: Path) -> Resolved:
    overrides = (
        f"out={json.dumps(str(folder))}",
        f"seed={seed}",
        f"steps={options.steps}",
        f"model.path={json.dumps(options.model)}",
        f"model.threads={options.threads}",
        f"batch.groups_per_step={options.groups_per_step}",
        f"batch.group_size={options.group_size}",
        "evaluation.every_steps=0",
        "evaluation.modes=['sampled']",
        "checkpoint.every_steps=0",
    )
    return resolve("quickstart", overrides=[*overrides, *WORKLOADS[options.workload]])


def _run(command: list[str], threads: int, log: Path) -> str:
    """Run a command to its end; returns its last line of output."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    with log.open("w") as errors:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, env=environment, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        raise EngineError(
            "a compared run failed", where=" ".join(command[:4]), got=f"exit code {done.returncode}", hint=f"see {log}"
        )
    return lines[-1]


def _april(options: GrpoOptions, seed: int, folder: Path, side: str) -> dict[str, Any]:
    resolved = _recipe(options, seed, folder)
    recipe = folder.with_suffix(".toml")
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text(resolved.to_toml())
    extra = ["schedule.type=sync"] if side == "april-sync" else []
    command = [sys.executable, "-m", "april", "train", str(recipe), *extra, "--overwrite", "--quiet", "--json"]
    summary = json.loads(_run(command, options.threads, folder.with_suffix(".log")))
    rows = read_jsonl(folder / "metrics.jsonl")
    return {
        "wall_s": training_s(rows),
        "num_samples": summary["samples_trained"],
        "num_tokens": summary["tokens_trained"],
        "length_median": median(row["length_p50"] for row in rows),
        "length_max": max(row["length_max"] for row in rows),
        "accuracy": summary["accuracy_after"],
        "accuracy_before": summary["accuracy_before"],
    }


def training_s(rows: Sequence[Mapping[str, Any]]) -> float:
    """Seconds from the start of the first step to the end of the last, with all that is written between steps, as for TRL."""
    first_start_s: float = rows[0]["time_s"] - rows[0]["step_s"]
    return float(rows[-1]["time_s"] - first_start_s)


def _trl(options: GrpoOptions, seed: int, folder: Path) -> dict[str, Any]:
    from april.run.build import model_path
    from april.run.data import held_apart

    resolved = _recipe(options, seed, folder)
    recipe = resolved.recipe
    items, _ = held_apart(recipe)
    spec = {
        "threads": options.threads,
        "seed": seed,
        "model": model_path(options.model),
        "answer_pattern": recipe.reward.answer_pattern,
        "out": str(folder),
        "steps": options.steps,
        "groups_per_step": options.groups_per_step,
        "group_size": options.group_size,
        "max_new_tokens": recipe.sampling.max_new_tokens,
        "lr": recipe.training.lr,
        "items": [
            {"prompt": fill(recipe.prompt.template, item, "prompt.template"), "answer": str(item["answer"])} for item in items
        ],
    }
    file = folder.with_suffix(".json")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(spec))
    command = [options.trl_python, "-m", "april.bench.peers.trl_grpo", str(file)]
    done = json.loads(_run(command, options.threads, folder.with_suffix(".log")))
    (folder.with_suffix(".toml")).write_text(resolved.to_toml())
    evaluate = [sys.executable, "-m", "april", "evaluate", str(folder.with_suffix(".toml")), "--model", str(folder), "--json"]
    scores = json.loads(_run(evaluate, options.threads, folder.with_suffix(".eval.log")))
    return {**done, "accuracy": scores["sampled"]["accuracy"]}
