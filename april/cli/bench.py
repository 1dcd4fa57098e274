"""`april bench`: speed on this machine, and the guard against losing it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from april.cli import bench_training
from april.cli.bench_options import AsJson, EngineChanges, Keep, command_line, finish, names, number, say, write_kept

if TYPE_CHECKING:
    from april.bench.engine_bench import BenchOptions

app = typer.Typer(help="Measure speed on this machine, against the engines one could take instead.", no_args_is_help=True)
app.command()(bench_training.grpo)
app.command()(bench_training.columns)
app.command()(bench_training.learner)


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
    changes: EngineChanges = None,
    keep: Keep = None,
    as_json: AsJson = False,
) -> None:
    """Generate the same requests with April's engine and with others, in turn, and compare."""
    from april.bench.case import Effort
    from april.bench.engine_bench import BenchOptions
    from april.bench.engine_options import engine_options
    from april.bench.workload import WorkloadOptions

    options = BenchOptions(
        models=names(model),
        workloads=names(workload),  # type: ignore[arg-type]  # checked by the options
        requests=tuple(number(value, "--requests") for value in names(requests)),
        peers=() if peer == "none" else names(peer),
        workload=WorkloadOptions(
            prompt_tokens, new_tokens, mu, sigma, cap, seed, group_size, None if trace is None else str(trace)
        ),
        effort=Effort(rounds, engine_seconds, threads),
        pythons=dict(_python(value) for value in peer_python or ()),
        engine=engine_options(changes or ()),
    )
    _run(options, out, keep, as_json)


@app.command()
def profile(
    model: Annotated[str, typer.Option(help="Models, separated by commas: 1m, 3m, 25m, 100m.")] = "3m",
    batch: Annotated[int, typer.Option(min=1, help="Samples decoded at once.")] = 256,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 32,
    new_tokens: Annotated[int, typer.Option(help="New tokens of each; the first 32 are a warm-up.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Repetitions; medians are shown.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    changes: EngineChanges = None,
    keep: Keep = None,
    as_json: AsJson = False,
) -> None:
    """Show what a decode step of the embedded engine spends its time on, and how near to the machine's limits."""
    from april.bench.engine_options import engine_options
    from april.bench.profile import ProfileOptions, profile_table, run_profile

    changed = engine_options(changes or ())
    wanted = [ProfileOptions(name, batch, prompt_tokens, new_tokens, rounds, threads, engine=changed) for name in names(model)]
    profiles = [run_profile(options, say) for options in wanted]
    finish("profile", "profiles", profiles, profile_table, keep, as_json)


@app.command("compile")
def compile_step(
    model: Annotated[str, typer.Option(help="Models, separated by commas: 1m, 3m, 25m, 100m (tiny tries the benchmark).")] = "3m",
    batch: Annotated[str, typer.Option(help="Samples in one decode step, separated by commas.")] = "256",
    context_tokens: Annotated[int, typer.Option(min=1, help="Tokens of KV of each sample.")] = 100,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; medians are shown.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    keep: Keep = None,
    as_json: AsJson = False,
) -> None:
    """What torch.compile makes of a decode step, and after how many steps its compile time is won back."""
    from april.bench.compile_bench import CompileOptions, compile_table, run_compile_bench

    sizes = [number(value, "--batch") for value in names(batch)]
    wanted = [CompileOptions(name, rows, context_tokens, rounds, threads) for name in names(model) for rows in sizes]
    found = [run_compile_bench(options, say) for options in wanted]
    finish("compile", "steps", found, compile_table, keep, as_json)


@app.command()
def simulator(
    out: Annotated[Path, typer.Option(help="Folder of results.json, costs.json and the recorded lengths.")] = Path("bench-run"),
    recipe: Annotated[str, typer.Option(help="A packaged recipe or a TOML file; it is run without learning.")] = "quickstart",
    steps: Annotated[int, typer.Option(min=1, help="Compared steps of each schedule.")] = 20,
    costs: Annotated[Path | None, typer.Option(help="Constants of `april calibrate`; measured first when left out.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Exit code 1 when a median error is above the tolerance.")] = False,
    as_json: AsJson = False,
) -> None:
    """Calibrate once, run schedules for real, and compare each step with what the simulator says."""
    from april.bench.simulator_bench import SimulatorOptions, markdown, run_simulator_bench
    from april.cli.output import emit

    options = SimulatorOptions(recipe, steps=steps, costs=costs)
    results = {"command": command_line(), **run_simulator_bench(options, out / "simulator", say)}
    (out / "simulator.json").write_text(json.dumps(results, indent=1) + "\n")
    if as_json:
        emit(results)
    else:
        print(markdown(results), end="")
    if check and not results["ok"]:
        sys.exit(1)


def _run(options: BenchOptions, out: Path, keep: Path | None, as_json: bool) -> None:
    """Measure, write the files, print the table or the ratios."""
    from april.bench.engine_bench import run_engine_bench
    from april.bench.table import markdown
    from april.cli.output import emit

    out.mkdir(parents=True, exist_ok=True)
    results = {"command": command_line(), **run_engine_bench(options, out / "logs", say)}
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "table.md").write_text(markdown(results))
    write_kept(keep, "engine", results)
    if as_json:
        ratios = {case["name"]: case["ratios"] for case in results["cases"]}
        emit({"results": str(out / "results.json"), "table": str(out / "table.md"), "ratios": ratios})
    else:
        print(markdown(results), end="")


@app.command()
def publish(
    model: Annotated[str, typer.Option(help="Shapes of the weights, separated by commas: 1m, 3m, 25m, 100m.")] = "1m,25m,100m",
    transport: Annotated[
        str, typer.Option(help="Transports, separated by commas: shared_memory, disk, broadcast.")
    ] = "shared_memory,disk,broadcast",
    readers: Annotated[int, typer.Option(min=1, help="Engines that take every version.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; the median counts.")] = 5,
    folder: Annotated[Path | None, typer.Option(help="Folder of the disk transport; a temporary one when left out.")] = None,
    fsync: Annotated[bool, typer.Option(help="Force the files to the disk.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each process.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Measure the transports of weights against each other: seconds until all engines have a version, and bytes moved."""
    from april.bench.publish_bench import PublishOptions, markdown, run_publish_bench
    from april.cli.output import emit

    options = PublishOptions(
        models=names(model),
        transports=names(transport),
        readers=readers,
        rounds=rounds,
        folder=None if folder is None else str(folder),
        fsync=fsync,
        threads=threads,
    )
    results = {"command": command_line(), **run_publish_bench(options, say)}
    if as_json:
        emit(results)
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
    as_json: AsJson = False,
) -> None:
    """What the controller costs by itself: CPU time of driver, pools and schedule for one event of one sample."""
    from april.bench.controller_bench import ControllerOptions, run_controller_bench
    from april.cli.output import emit

    options = ControllerOptions(in_flight, engines, steps, group_size, schedules=names(schedule), rounds=rounds)
    results = {"command": command_line(), **run_controller_bench(options, say)}
    if as_json:
        emit(results)
        return
    for case in results["cases"]:
        share = f"{case['core_fraction_at_1000_per_s']:.1%} of a core at 1,000 a second"
        told = f"{case['microseconds_per_event']:.1f} us an event, {share}"
        print(f"{case['schedule']}: {told}; {case['growth']:.2f} times that of a tenth of the samples")


@app.command()
def check(
    results: Annotated[list[Path], typer.Argument(help="Files of results of `april bench engine`.")],
    baseline: Annotated[Path, typer.Option(help="File of ratios, such as benchmarks/baselines/cpu.json.")],
    write: Annotated[
        bool, typer.Option("--write", help="Make the baseline from the results instead of comparing; its floors stay.")
    ] = False,
    tolerance: Annotated[float, typer.Option(help="With --write: share of a ratio that may be lost.")] = 0.25,
    as_json: AsJson = False,
) -> None:
    """Compare ratios with a baseline and its floors; exit code 1 when one has got worse."""
    from april.bench.baseline import check_results, make_baseline, read_json
    from april.cli.output import emit

    measured = [read_json(path, "the results") for path in results]
    if write:
        floors = read_json(baseline, "the baseline").get("floors") if baseline.exists() else None
        baseline.parent.mkdir(parents=True, exist_ok=True)
        baseline.write_text(json.dumps(make_baseline(measured, tolerance, floors), indent=1) + "\n")
        print(f"wrote {baseline}", file=sys.stderr)
        if as_json:
            emit({"baseline": str(baseline)})
        return
    findings = check_results(read_json(baseline, "the baseline"), measured)
    worse = [finding for finding in findings if finding.verdict == "regression"]
    for finding in findings:
        print(finding, file=sys.stderr if as_json else sys.stdout)
    if as_json:
        emit({"ok": not worse, "regressions": [f"{finding.case} against {finding.against}" for finding in worse]})
    if worse:
        sys.exit(1)


def _python(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    return (name, path) if equals else ("vllm", text)
