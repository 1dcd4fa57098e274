"""`april bench`: speed on this machine, and the guard against losing it."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from april.bench.engine_bench import BenchOptions

app = typer.Typer(help="Measure speed on this machine, against the engines one could take instead.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="End with one line of JSON; everything else goes to stderr.")]


@app.command()
def engine(
    out: Annotated[Path, typer.Option(help="Folder of results.json, table.md and the engines' own output.")] = Path("bench-run"),
    model: Annotated[str, typer.Option(help="Models, separated by commas: 1m, 3m, 25m, 100m (tiny tries the benchmark).")] = "3m",
    workload: Annotated[str, typer.Option(help="Lengths, separated by commas: fixed, lognormal, azure.")] = "fixed,lognormal",
    requests: Annotated[str, typer.Option(help="Requests generated together, separated by commas.")] = "256",
    peer: Annotated[
        str, typer.Option(help="Engines to compare with, separated by commas; none for April alone.")
    ] = "transformers-static,transformers-continuous,vllm",
    peer_python: Annotated[
        list[str] | None,
        typer.Option(help="Interpreter for a peer, as NAME=PATH; a path alone is vllm's. Repeatable.", metavar="[NAME=]PATH"),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Rounds of every engine.")] = 5,
    engine_seconds: Annotated[float, typer.Option(help="After so many seconds in one case an engine gets no more rounds.")] = 120,
    threads: Annotated[int, typer.Option(help="CPU threads of each engine.")] = 2,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 32,
    new_tokens: Annotated[int, typer.Option(help="New tokens of each request of the workload fixed.")] = 128,
    mu: Annotated[float, typer.Option(help="Mean of the logarithm of a length; exp(mu) is the median.")] = 3.4,
    sigma: Annotated[float, typer.Option(help="Standard deviation of the logarithm of a length.")] = 1.0,
    cap: Annotated[int, typer.Option(help="Longest response of the long-tailed workloads.")] = 512,
    trace: Annotated[Path | None, typer.Option(help="CSV with a column GeneratedTokens, for the workload azure.")] = None,
    group_size: Annotated[int, typer.Option(help="Requests that share a prompt.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of lengths and prompts.")] = 0,
    as_json: Json = False,
) -> None:
    """Generate the same requests with April's engine and with others, in turn, and compare."""
    from april.bench.case import Effort
    from april.bench.engine_bench import BenchOptions
    from april.bench.workload import WorkloadOptions

    options = BenchOptions(
        models=_names(model),
        workloads=_names(workload),  # type: ignore[arg-type]  # checked by the options
        requests=tuple(_number(value, "--requests") for value in _names(requests)),
        peers=() if peer == "none" else _names(peer),
        workload=WorkloadOptions(
            prompt_tokens, new_tokens, mu, sigma, cap, seed, group_size, None if trace is None else str(trace)
        ),
        effort=Effort(rounds, engine_seconds, threads),
        pythons=dict(_python(value) for value in peer_python or ()),
    )
    _run(options, out, as_json)


@app.command()
def profile(
    model: Annotated[str, typer.Option(help="Models, separated by commas: 1m, 3m, 25m, 100m.")] = "3m",
    batch: Annotated[int, typer.Option(min=1, help="Samples decoded at once.")] = 256,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 32,
    new_tokens: Annotated[int, typer.Option(help="New tokens of each; the first 32 are a warm-up.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Repetitions; medians are shown.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    as_json: Json = False,
) -> None:
    """Show what a decode step of the embedded engine spends its time on, and how near to the machine's limits."""
    from april.bench.profile import ProfileOptions, profile_table, run_profile
    from april.cli.main import emit

    names = _names(model)
    wanted = [ProfileOptions(name, batch, prompt_tokens, new_tokens, rounds, threads) for name in names]
    profiles = [run_profile(options, _say) for options in wanted]
    if as_json:
        emit({"command": _command(), "profiles": profiles})
    else:
        print(profile_table(profiles), end="")


@app.command()
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
    as_json: Json = False,
) -> None:
    """Train with April and with TRL's GRPOTrainer: same policy, prompts, update and number of steps."""
    from april.bench.grpo_bench import GrpoOptions, run_grpo_bench
    from april.cli.main import emit

    out.mkdir(parents=True, exist_ok=True)
    cases = []
    for name in _names(workload):
        options = GrpoOptions(name, model, steps=steps, seeds=seeds, threads=threads, trl_python=trl_python, models=models)
        cases.append(run_grpo_bench(options, out, _say))
    results = {"command": _command(), "cases": cases}
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


@app.command()
def columns(
    preset: Annotated[str, typer.Option(help="Algorithm presets, separated by commas.")] = "grpo",
    tokens: Annotated[int, typer.Option(help="Response tokens of the step.")] = 1_000_000,
    samples: Annotated[int, typer.Option(help="Samples of the step.")] = 8192,
    group_size: Annotated[int, typer.Option(help="Samples of a prompt.")] = 8,
    micro_batch_tokens: Annotated[int, typer.Option(help="Prompt and response tokens of a micro-batch.")] = 65536,
    rounds: Annotated[int, typer.Option(help="Rounds; the median counts.")] = 5,
    threads: Annotated[int, typer.Option(help="CPU threads of torch.")] = 2,
    as_json: Json = False,
) -> None:
    """What a training step costs outside the model: columns, credit, shares, weights, loss and metrics."""
    from april.algorithms.spec import AlgorithmConfig
    from april.bench.columns_bench import ColumnsOptions, run_columns_bench
    from april.cli.main import emit
    from april.config.load import find_recipe, read_toml

    results = []
    for name in _names(preset):
        algorithm = AlgorithmConfig.model_validate(read_toml(find_recipe(name, folder="algorithm")))
        options = ColumnsOptions(algorithm, name, tokens, samples, group_size, micro_batch_tokens, rounds, threads)
        results.append(run_columns_bench(options))
        stages = "  ".join(f"{stage} {seconds:.3f}" for stage, seconds in results[-1]["stages_s"].items())
        _say(f"{name}: {results[-1]['total_s']:.3f} s for {results[-1]['num_tokens']} tokens  ({stages})")
    if as_json:
        emit({"command": _command(), "results": results})


@app.command()
def simulator(
    out: Annotated[Path, typer.Option(help="Folder of results.json, costs.json and the recorded lengths.")] = Path("bench-run"),
    recipe: Annotated[str, typer.Option(help="A packaged recipe or a TOML file; it is run without learning.")] = "quickstart",
    steps: Annotated[int, typer.Option(min=1, help="Compared steps of each schedule.")] = 20,
    costs: Annotated[Path | None, typer.Option(help="Constants of `april calibrate`; measured first when left out.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Exit code 1 when a median error is above the tolerance.")] = False,
    as_json: Json = False,
) -> None:
    """Calibrate once, run schedules for real, and compare each step with what the simulator says."""
    from april.bench.simulator_bench import SimulatorOptions, markdown, run_simulator_bench
    from april.cli.main import emit

    options = SimulatorOptions(recipe, steps=steps, costs=costs)
    results = {"command": _command(), **run_simulator_bench(options, out / "simulator", _say)}
    (out / "simulator.json").write_text(json.dumps(results, indent=1) + "\n")
    if as_json:
        emit(results)
    else:
        print(markdown(results), end="")
    if check and not results["ok"]:
        sys.exit(1)


def _run(options: BenchOptions, out: Path, as_json: bool) -> None:
    """Measure, write the files, print the table or the ratios."""
    from april.bench.engine_bench import run_engine_bench
    from april.bench.table import markdown
    from april.cli.main import emit

    out.mkdir(parents=True, exist_ok=True)
    results = {"command": _command(), **run_engine_bench(options, out / "logs", _say)}
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "table.md").write_text(markdown(results))
    if as_json:
        ratios = {case["name"]: case["ratios"] for case in results["cases"]}
        emit({"results": str(out / "results.json"), "table": str(out / "table.md"), "ratios": ratios})
    else:
        print(markdown(results), end="")


@app.command()
def controller(
    in_flight: Annotated[int, typer.Option(min=8, help="Samples in the engines at once.")] = 10_000,
    engines: Annotated[int, typer.Option(min=1, help="Engines behind the pool.")] = 64,
    steps: Annotated[int, typer.Option(min=2, help="Batches; the first is not counted.")] = 6,
    group_size: Annotated[int, typer.Option(min=1, help="Samples of a prompt.")] = 8,
    schedule: Annotated[str, typer.Option(help="Schedules, separated by commas: bounded_async, april.")] = "bounded_async,april",
    rounds: Annotated[int, typer.Option(min=1, help="Repetitions; medians are shown.")] = 3,
    as_json: Json = False,
) -> None:
    """What the controller costs by itself: CPU time of driver, pools and schedule for one event of one sample."""
    from april.bench.controller_bench import ControllerOptions, run_controller_bench
    from april.cli.main import emit

    options = ControllerOptions(in_flight, engines, steps, group_size, schedules=_names(schedule), rounds=rounds)
    results = {"command": _command(), **run_controller_bench(options, _say)}
    if as_json:
        emit(results)
        return
    for case in results["cases"]:
        share = f"{case['core_fraction_at_1000_per_s']:.1%} of a core at 1,000 a second"
        told = f"{case['microseconds_per_event']:.1f} us an event, {share}"
        print(f"{case['schedule']}: {told}; {case['growth']:.2f} times that of a tenth of the samples")


@app.command()
def check(
    results: Annotated[Path, typer.Argument(help="results.json of `april bench engine`.")],
    baseline: Annotated[Path, typer.Option(help="File of ratios, such as benchmarks/baselines/cpu.json.")],
    write: Annotated[bool, typer.Option("--write", help="Make the baseline from the results instead of comparing.")] = False,
    tolerance: Annotated[float, typer.Option(help="With --write: share of a ratio that may be lost.")] = 0.25,
    as_json: Json = False,
) -> None:
    """Compare ratios with a baseline; exit code 1 when one has got worse."""
    from april.bench.baseline import check_results, make_baseline, read_json
    from april.cli.main import emit

    measured = read_json(results, "the results")
    if write:
        baseline.parent.mkdir(parents=True, exist_ok=True)
        baseline.write_text(json.dumps(make_baseline(measured, tolerance), indent=1) + "\n")
        print(f"wrote {baseline}", file=sys.stderr)
        return
    findings = check_results(read_json(baseline, "the baseline"), measured)
    worse = [finding for finding in findings if finding.verdict == "regression"]
    for finding in findings:
        print(finding, file=sys.stderr if as_json else sys.stdout)
    if as_json:
        emit({"ok": not worse, "regressions": [f"{finding.case} against {finding.against}" for finding in worse]})
    if worse:
        sys.exit(1)


def _say(line: str) -> None:
    print(f"-- {line}", file=sys.stderr, flush=True)


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _number(text: str, where: str) -> int:
    from april.core.errors import DataError

    try:
        return int(text)
    except ValueError as error:
        raise DataError("not a whole number", where=where, got=text) from error


def _python(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    return (name, path) if equals else ("vllm", text)


def _command() -> str:
    """The command line as it was given, with interpreters named without their folders."""
    return shlex.join(["april", *(_bare(argument) for argument in sys.argv[1:])])


def _bare(argument: str) -> str:
    name, equals, path = argument.rpartition("=")
    return f"{name}{equals}{Path(path).name}" if Path(path).is_absolute() else argument
