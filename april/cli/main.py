"""The `april` command."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from april.cli.bench import app as bench_app
from april.cli.output import emit, only_json
from april.core.errors import AprilError, ResourceError

app = typer.Typer(
    name="april",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(bench_app, name="bench")

Overrides = Annotated[
    list[str] | None, typer.Argument(help="Dotted overrides, such as schedule.over_provision=2", metavar="[KEY=VALUE]...")
]
Overlays = Annotated[list[str] | None, typer.Option("--overlay", help="A further TOML file, laid over the recipe; repeatable.")]
Json = Annotated[bool, typer.Option("--json", help="End with one line of JSON; everything else goes to stderr.")]


def _no_flag(value: Path | None) -> Path | None:
    """A folder's name was forgotten when what follows is the next option."""
    if value is not None and str(value).startswith("--"):
        raise typer.BadParameter(f"{value} is an option, not a path")
    return value


Quiet = Annotated[bool, typer.Option("--quiet", help="Plain lines instead of the live view.")]
RecipeName = Annotated[str, typer.Argument(help="A packaged recipe, a TOML file, or a run's folder.", metavar="RECIPE")]


OVERRIDABLE = ("train", "evaluate", "compare", "simulate", "calibrate", "warm-start", "config")
"""Commands that take overrides."""
REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)
"""What the file system may say to a path of the user's; other errors of the system are defects and show a traceback."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; errors that a user can act on end with one screen and exit code 2."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = app(args=given or ["--help"], standalone_mode=False)
        sys.stdout.flush()
        sys.exit(code if isinstance(code, int) else 0)
    except AprilError as error:
        fail(error, given)
    except (typer.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        fail(_refused_by_system(error), given)
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        # click names the option of other refusals, too: a known one without its value
        unknown = getattr(error, "option_name", "") if type(error).__name__ == "NoSuchOption" else ""
        fail(AprilError(error.format_message(), hint=_help_for(given, unknown)), given)


def command_names() -> set[str]:
    """What may follow `april` on the command line."""
    commands = {entry.name or entry.callback.__name__ for entry in app.registered_commands if entry.callback}
    return commands | {group.name for group in app.registered_groups if group.name}


def _help_for(given: list[str], unknown_option: str) -> str:
    """What to read about arguments that click refuses."""
    command = next((name for name in given if name in command_names()), "")
    see = f"`{f'april {command}'.strip()} --help`"
    key = unknown_option.lstrip("-").replace("-", "_")
    return f"a value of the recipe has no dashes: {key}=VALUE; for options, {see}" if key and command in OVERRIDABLE else see


def fail(error: AprilError, given: Sequence[str]) -> NoReturn:
    """End with an error that the user can act on: in words on stderr, and as the one line of JSON where that was asked for."""
    print(f"error: {error}", file=sys.stderr)
    if "--json" in given:
        labels = {"where": error.where, "got": error.got, "expected": error.expected, "next": error.hint}
        known = {label: str(value) for label, value in labels.items() if value is not None}
        emit({"error": {"what": error.what, **known}})
    sys.exit(2)


def _refused_by_system(error: OSError) -> ResourceError:
    return ResourceError(
        "the file system refuses",
        where=str(error.filename or "a file of the run"),
        got=error.strerror,
        expected="a path that can be read or written, with room on its disk",
        hint="free some room, or choose another folder; what was saved before is intact",
    )


def _print_path(name: str, path: Path, as_json: bool) -> None:
    if as_json:
        emit({name: str(path)})
    else:
        print(path)


def _version(asked: bool) -> None:
    if asked:
        from april import __version__

        print(f"april {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and end.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Reinforcement-learning post-training whose rollouts never wait for the longest one."""


@app.command()
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    overlay: Overlays = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the recipe's folder.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Forget the run in the recipe's folder and begin again.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, start nothing.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train a policy."""
    from april.cli.train import check_only, train_command

    if dry_run:
        check_only(recipe, overlay or [], overrides or [], as_json)
    else:
        train_command(recipe, overlay or [], overrides or [], resume=resume, overwrite=overwrite, quiet=quiet, as_json=as_json)


@app.command()
def evaluate(
    recipe: RecipeName,
    overrides: Overrides = None,
    overlay: Overlays = None,
    model: Annotated[str | None, typer.Option(help="Policy to evaluate: a model folder, a hub name or a run's folder.")] = None,
    samples: Annotated[
        int | None, typer.Option(help="Samples per problem when sampling: pass@k for every k up to it.", min=1)
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure accuracy on held-out problems, with confidence intervals."""
    from april.cli.evaluate import evaluate_command

    extra = [f"evaluation.num_samples={samples}"] if samples is not None else []
    evaluate_command(recipe, overlay or [], [*(overrides or []), *extra], model, as_json)


@app.command()
def compare(
    recipe: Annotated[
        str, typer.Argument(help="A recipe; or a comparison: a packaged one, or a TOML file with [arms].", metavar="RECIPE")
    ],
    overrides: Overrides = None,
    overlay: Overlays = None,
    versus: Annotated[str, typer.Option(help="The other side of a plain recipe, as one override.")] = "schedule.type=sync",
    seeds: Annotated[
        int | None, typer.Option(help="Runs of each arm, with seeds 0, 1, ...; 3 unless the comparison says.", min=1)
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of all runs and of the comparison.", callback=_no_flag)] = Path(
        "compare-runs"
    ),
    jobs: Annotated[int, typer.Option(help="Runs at a time; with more than one, times mean little.", min=1)] = 1,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train a recipe against a variant of it, or all arms of a comparison: same seeds, same steps, in turn."""
    from april.cli.compare import compare_command

    compare_command(recipe, overlay or [], overrides or [], versus, seeds, out, jobs, quiet, as_json)


@app.command()
def simulate(
    study: Annotated[str, typer.Argument(help="A packaged study, or a TOML file.", metavar="STUDY")],
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the results, studies/NAME by default; goes on there.", callback=_no_flag)
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Exit code 1 when a published figure is not reached.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")] = False,
    as_json: Json = False,
) -> None:
    """Run schedules in virtual time: what they would do on hardware that is not here."""
    from april.cli.simulate import simulate_command

    simulate_command(study, overrides or [], out, check, quiet, as_json)


@app.command()
def calibrate(
    recipe: RecipeName,
    overrides: Overrides = None,
    overlay: Overlays = None,
    out: Annotated[Path, typer.Option(help="File of the constants.", callback=_no_flag)] = Path("costs.json"),
    rounds: Annotated[int, typer.Option(help="Repetitions of each measurement; medians count.", min=1)] = 3,
    as_json: Json = False,
) -> None:
    """Measure a recipe's engine and trainer once, and write down the constants that the simulator works with."""
    from april.cli.calibrate import calibrate_command

    calibrate_command(recipe, overlay or [], overrides or [], out, rounds, as_json)


@app.command()
def plan(
    model: Annotated[str, typer.Option(help="Name in the table of models, such as Qwen3-8B.")],
    lengths: Annotated[
        str, typer.Option(help="Such as mean=8000,sigma=0.9,max=16384; or a run's folder; or a CSV with GeneratedTokens.")
    ],
    hardware: Annotated[str, typer.Option(help="A device such as H100, or a file that `april calibrate` wrote.")] = "H100",
    gpus: Annotated[int, typer.Option(help="Devices in all; 1 with a file.", min=1)] = 8,
    groups: Annotated[int, typer.Option(help="Prompts of an update.", min=1)] = 32,
    group_size: Annotated[int, typer.Option(help="Samples of a prompt.", min=1)] = 8,
    max_lag: Annotated[int, typer.Option(help="Largest bound on lag that is acceptable, in updates.", min=0)] = 4,
    tp: Annotated[int | None, typer.Option(help="Devices of a replica; the fewest that do when left out.", min=1)] = None,
    seconds: Annotated[float, typer.Option(help="Time for the search.")] = 60,
    recipe: Annotated[str, typer.Option(help="Recipe that the rows are laid over, in the printed commands.")] = "quickstart",
    out: Annotated[Path, typer.Option(help="Folder of plan.json, plan.html and the rows' overlays.", callback=_no_flag)] = Path(
        "plan"
    ),
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")] = False,
    as_json: Json = False,
) -> None:
    """Search schedules, ratios, splits of the devices and lag bounds, and show which are worth choosing from."""
    from april.cli.plan import plan_command

    fields = {"model": model, "hardware": hardware, "gpus": gpus, "groups_per_step": groups, "group_size": group_size}
    limits = {"max_lag_steps": max_lag, "tp": tp, "seconds": seconds}
    plan_command({**fields, **limits}, lengths, recipe, out, quiet, as_json)


@app.command(name="warm-start")
def warm_start(
    recipe: Annotated[str, typer.Argument(help="A packaged warm-start recipe, or a TOML file.", metavar="RECIPE")],
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="Folder of the model.", callback=_no_flag)] = Path("warm-start"),
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Make a policy by supervised training on worked solutions."""
    from april.cli.warm_start import warm_start_command

    warm_start_command(recipe, overrides or [], out, quiet, as_json)


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A run's folder, a checkpoint, or a folder of adapters.", metavar="MODEL")],
    out: Annotated[Path, typer.Argument(help="Folder to write.", callback=_no_flag)],
    as_json: Json = False,
) -> None:
    """Write a policy as an ordinary Hugging Face folder, with its adapters merged in."""
    from april import api

    with only_json(as_json):
        folder = api.export(model, out)
    _print_path("folder", folder, as_json)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A run's folder, finished or not.")],
    out: Annotated[
        Path | None, typer.Option(help="File to write instead of report.html in the folder.", callback=_no_flag)
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the report of a run again."""
    from april.core.errors import DataError
    from april.observe.report import write_report

    if not (folder / "recipe.toml").is_file():
        got = "a folder without recipe.toml" if folder.is_dir() else "no such folder"
        raise DataError("there is no such run", where=str(folder), got=got, expected="a run's folder", hint="check the path")
    _print_path("report", write_report(folder, out), as_json)


@app.command()
def status(
    folder: Annotated[Path, typer.Argument(help="A run's folder, while it runs or afterwards.")],
    as_json: Json = False,
) -> None:
    """Tell what a run is doing now, and who waits for what."""
    from april.cli.status import status_command

    status_command(folder, as_json)


@app.command()
def engines(
    folder: Annotated[Path, typer.Argument(help="A run's folder, while it runs.")],
    add: Annotated[int, typer.Option(help="Engines to start beside those that there are.", min=0)] = 0,
    remove: Annotated[list[str] | None, typer.Option(help="Name of an engine that is to leave; repeatable.")] = None,
    finish: Annotated[
        bool, typer.Option("--finish", help="Engines that leave end their samples; they go to others otherwise.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Let engines join and leave a run that goes on, between two of its steps."""
    from april.cli.engines import engines_command

    engines_command(folder, add, remove or [], finish, as_json)


@app.command()
def config(
    recipe: RecipeName,
    overrides: Overrides = None,
    overlay: Overlays = None,
    toml: Annotated[bool, typer.Option("--toml", help="The complete recipe as a TOML file.")] = False,
    as_json: Json = False,
) -> None:
    """Print the complete recipe, with where each value came from."""
    from april.cli.config import config_command

    config_command(recipe, overlay or [], overrides or [], toml, as_json)


@app.command(name="list")
def list_components(
    kind: Annotated[str | None, typer.Argument(help="One kind only, such as schedule or recipes.")] = None,
    as_json: Json = False,
) -> None:
    """List every registered component with its options."""
    from april.cli.listing import list_command

    list_command(kind, as_json)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check this machine: versions, devices, known-bad combinations."""
    from april.cli.doctor import doctor_command

    doctor_command(as_json)
