"""What the commands of `april bench` share: options, and how they are read."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

AsJson = Annotated[bool, typer.Option("--json", help="End with one line of JSON; everything else goes to stderr.")]
Keep = Annotated[
    Path | None, typer.Option(help="Also keep the results in this file; docs/generate.py makes a page of those in docs/results.")
]
EngineChanges = Annotated[
    list[str] | None,
    typer.Option("--engine", help="An option of April's engine, such as max_draft_tokens=4. Repeatable.", metavar="KEY=VALUE"),
]


def write_kept(file: Path | None, benchmark: str, results: dict[str, Any]) -> None:
    """Write results with the name of their benchmark, where a file is asked for."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"benchmark": benchmark, **results}, indent=1) + "\n")
        print(f"wrote {file}", file=sys.stderr)


def finish(
    benchmark: str, part: str, found: list[Any], table: Callable[[list[Any]], str], keep: Path | None, as_json: bool
) -> None:
    """Keep what was found where that is asked for, and print it: as a table, or as JSON with the machine beside `part`."""
    from april.bench.engine_bench import describe_software
    from april.cli.output import emit

    results = {"command": command_line(), "machine": describe_software(), part: found}
    write_kept(keep, benchmark, results)
    if as_json:
        emit(results)
    else:
        print(table(found).rstrip("\n"))


def say(line: str) -> None:
    """A line of progress."""
    print(f"-- {line}", file=sys.stderr, flush=True)


def names(text: str) -> tuple[str, ...]:
    """Different names separated by commas."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def number(text: str, where: str) -> int:
    """A whole number.

    Raises:
        DataError: for anything else.
    """
    from april.core.errors import DataError

    try:
        return int(text)
    except ValueError as error:
        raise DataError("not a whole number", where=where, got=text) from error


def command_line() -> str:
    """The command line as it was given, with files and interpreters outside the current folder named without their folders."""
    return shlex.join(["april", *(_bare(argument) for argument in sys.argv[1:])])


def _bare(argument: str) -> str:
    name, equals, path = argument.rpartition("=")
    return f"{name}{equals}{Path(path).name}" if Path(path).is_absolute() else argument
