"""`april engines`: engines join and leave a run that goes on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def engines_command(folder: Path, add: int, remove: Sequence[str], finish: bool, as_json: bool) -> None:
    """Ask it of the run in a folder; it is done between two steps.

    Raises:
        DataError: nothing runs there, it has no such engine, or nothing was asked for.
        RecipeError: the engines of this run cannot come and go.
    """
    from april.cli.output import emit
    from april.config.resolve import resolve
    from april.core.errors import DataError, choice
    from april.observe.status import read_status
    from april.run.elastic import check_elastic
    from april.run.requests import ask

    record = read_status(folder)
    if record["state"] not in ("running", "unknown"):
        hint = f"`april status {folder}` tells what became of it"
        expected = "a run that is running"
        raise DataError("the run does not go on", where=str(folder), got=record["state"], expected=expected, hint=hint)
    check_elastic(resolve(folder / "recipe.toml").recipe)
    known = [engine["name"] for engine in record["engines"]]
    for name in remove:
        if name not in known:
            raise DataError("the run has no such engine", where="--remove", got=name, **choice(name, known, "see `april status`"))
    if not add and not remove:
        hint = f"`april status {folder}` tells the engines"
        raise DataError(
            "nothing is asked for", where="--add, --remove", got="neither --add nor --remove", expected="one of them", hint=hint
        )
    if finish and not remove:
        what = "there is nobody to finish"
        raise DataError(what, where="--finish", got="no --remove", hint="name the engine that is to leave with --remove")
    if add + len(known) <= len(set(remove)):
        raise DataError(
            "the last engine cannot leave", where="--remove", got=", ".join(remove), hint="add another one with --add"
        )
    request = ask(folder, {"add": add, "remove": list(remove), "finish": finish})
    if as_json:
        emit({"request": str(request), "engines": known})
    else:
        print(f"asked; done between two steps: `april status {folder}` shows it")
