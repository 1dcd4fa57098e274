"""The commands of `april bench` about training."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from april.cli.bench_options import AsJson, Keep, command_line, finish, names, say, write_kept


def grpo(
    out: Annotated[Path, typer.Option(help="Folder of results.json, the runs and their output.")] = Path("bench-run"),
    workload: Annotated[str, typer.Option(help="Lengths, separated by commas: long-tailed, even.")] = "long-tailed",
    model: Annotated[
        str, typer.Option(help="Policy to start from: packaged, a folder, or 3m, which a warm start makes once.")
    ] = "packaged",
    models: Annotated[Path, typer.Option(help="Folder that keeps policies made for this.")] = Path("bench-run/models"),
    steps: Annotated[int, typer.Option(help="Updates of each run.")] = 10,
    seeds: Annotated[int, typer.Option(help="Runs of each side.")] = 3,
    threads: Annotated[int, typer.Option(help="CPU threads of each run.")] = 2,
    trl_python: Annotated[str, typer.Option(help="Interpreter of an environment that has trl.")] = sys.executable,
    keep: Keep = None,
    as_json: AsJson = False,
) -> None:
    """Train with April and with TRL's GRPOTrainer: same policy, prompts, update and number of steps."""
    from april.bench.engine_bench import describe_software
    from april.bench.grpo_bench import GrpoOptions, run_grpo_bench
    from april.cli.output import emit

    out.mkdir(parents=True, exist_ok=True)
    cases = []
    for name in names(workload):
        options = GrpoOptions(name, model, steps=steps, seeds=seeds, threads=threads, trl_python=trl_python, models=models)
        cases.append(run_grpo_bench(options, out, say))
    results = {"command": command_line(), "machine": describe_software(), "cases": cases}
    write_kept(keep, "grpo", results)
    (out / "grpo.json").write_text(json.dumps(results, indent=1) + "\n")
    if as_json:
        emit(results)
        return
    for case in cases:
        for side, ratio in case["speedup_over_trl"].items():
            interval = f"95 % interval {ratio['low']:.2f} to {ratio['high']:.2f}"
            print(
                f"{case['workload']}: {side} is {ratio['mean']:.2f} times as fast as TRL ({interval}, {len(ratio['runs'])} seeds)"
            )
            gain = case["accuracy_over_trl"][side]
            interval = f"95 % interval {gain['low']:+.1%} to {gain['high']:+.1%}"
            print(f"{case['workload']}: accuracy of {side} minus that of TRL {gain['mean']:+.1%} ({interval})")


def columns(
    preset: Annotated[str, typer.Option(help="Algorithm presets, separated by commas.")] = "grpo",
    tokens: Annotated[int, typer.Option(help="Response tokens of the step.")] = 1_000_000,
    samples: Annotated[int, typer.Option(help="Samples of the step.")] = 8192,
    group_size: Annotated[int, typer.Option(help="Samples of a prompt.")] = 8,
    micro_batch_tokens: Annotated[int, typer.Option(help="Prompt and response tokens of a micro-batch.")] = 65536,
    rounds: Annotated[int, typer.Option(help="Rounds; the median counts.")] = 5,
    threads: Annotated[int, typer.Option(help="CPU threads of torch.")] = 2,
    as_json: AsJson = False,
) -> None:
    """What a training step costs outside the model: columns, credit, shares, weights, loss and metrics."""
    from april.algorithms.spec import AlgorithmConfig
    from april.bench.columns_bench import ColumnsOptions, run_columns_bench
    from april.cli.output import emit
    from april.config.load import find_recipe, read_toml

    results = []
    for name in names(preset):
        algorithm = AlgorithmConfig.model_validate(read_toml(find_recipe(name, folder="algorithm")))
        options = ColumnsOptions(algorithm, name, tokens, samples, group_size, micro_batch_tokens, rounds, threads)
        results.append(run_columns_bench(options))
        stages = "  ".join(f"{stage} {seconds:.3f}" for stage, seconds in results[-1]["stages_s"].items())
        say(f"{name}: {results[-1]['total_s']:.3f} s for {results[-1]['num_tokens']} tokens  ({stages})")
    if as_json:
        emit({"command": command_line(), "results": results})


def learner(
    model: Annotated[str, typer.Option(help="Models, separated by commas: 1m, 3m, 25m, 100m (tiny tries the benchmark).")] = "3m",
    samples: Annotated[int, typer.Option(help="Samples of the batch.")] = 64,
    group_size: Annotated[int, typer.Option(help="Samples of a prompt.")] = 8,
    micro_batch_tokens: Annotated[int, typer.Option(help="Tokens that go through the model at once, padding included.")] = 16384,
    rounds: Annotated[int, typer.Option(min=1, help="Updates of each side; medians are shown.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    keep: Keep = None,
    as_json: AsJson = False,
) -> None:
    """April's packed training step against a plain padded loop over a Hugging Face model, once both compute the same."""
    from april.bench.learner_bench import LearnerOptions, learner_table, run_learner_bench

    wanted = [LearnerOptions(name, samples, group_size, micro_batch_tokens, rounds, threads) for name in names(model)]
    found = [run_learner_bench(options, say) for options in wanted]
    finish("learner", "models", found, learner_table, keep, as_json)
