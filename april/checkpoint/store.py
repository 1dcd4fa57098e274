"""Atomic checkpoint folders: written beside, made whole, then renamed into place.

    checkpoints/step-000010/
        model/  trainer.pt  rollout.bin  ...     whatever the run saves
        manifest.json                            written last: names, sizes and SHA-256 of all files

A folder without a matching manifest is damaged and refused; the error names the last good one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from april.core.errors import CheckpointError, ResourceError

SCHEMA = 2
_PREFIX = "step-"


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: holds one folder a checkpoint.
        keep: how many of the newest good ones stay.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def save(self, step: int, write: Callable[[Path], None]) -> Path:
        """Write a checkpoint atomically and remove the oldest ones.

        Args:
            step: number of updates it holds.
            write: fills an empty folder.

        Raises:
            ResourceError: no room on the disk; checkpoints saved before stay.
        """
        target, draft = self._free_path(step), self.folder / f".draft-{step}"
        shutil.rmtree(draft, ignore_errors=True)
        try:
            draft.mkdir(parents=True)
            write(draft)
            _write_manifest(draft, step)
            os.replace(draft, target)
            _sync_folder(self.folder)
        except OSError as error:
            shutil.rmtree(draft, ignore_errors=True)
            raise ResourceError(
                "a checkpoint could not be written",
                where=str(target),
                got=error,
                hint="free some room; the checkpoints before it are intact",
            ) from error
        for past in self.all()[: -self.keep]:
            shutil.rmtree(past)
        return target

    def _free_path(self, step: int) -> Path:
        """A name that sorts behind those of the same step: step-000010, step-000010b, step-000010c, ..."""
        for letter in ("", *"bcdefghijklmnopqrstuvwxyz"):
            path = self.folder / f"{_PREFIX}{step:06d}{letter}"
            if not path.exists():
                return path
        shutil.rmtree(path)
        return path

    def all(self) -> list[Path]:
        """All checkpoint folders, the oldest first; whole or not."""
        if not self.folder.is_dir():
            return []
        return sorted(entry for entry in self.folder.iterdir() if entry.name.startswith(_PREFIX))

    def latest(self) -> Path | None:
        """The newest checkpoint, verified; None when there is none.

        Raises:
            CheckpointError: it is damaged or of another schema; names the last good one.
        """
        folders = self.all()
        if not folders:
            return None
        newest = folders[-1]
        if (problem := problem_of(newest)) is None:
            return newest
        good = next((folder for folder in reversed(folders[:-1]) if problem_of(folder) is None), None)
        hint = (
            f"remove {newest} to continue from the last good one, {good}"
            if good
            else "no good one is left: start in a new folder"
        )
        raise CheckpointError(
            "the newest checkpoint is damaged", where=str(newest), got=problem, expected="files as in its manifest", hint=hint
        )


def step_of(folder: Path) -> int:
    """Number of updates that a whole checkpoint holds."""
    return int(json.loads((folder / "manifest.json").read_text())["step"])


def problem_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder; None when it is whole."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
        if manifest["schema"] != SCHEMA:
            return f"schema {manifest['schema']}, this version reads {SCHEMA}"
        if not folder.name.startswith(f"{_PREFIX}{manifest['step']:06d}"):
            return f"manifest.json says step {manifest['step']}"
        return _problem_of_files(folder, manifest["files"])
    except (OSError, ValueError) as error:
        return f"manifest.json: {error}"
    except (KeyError, TypeError, AttributeError) as error:
        return f"manifest.json does not have its form: {error!r}"


def _problem_of_files(folder: Path, files: dict[str, dict[str, Any]]) -> str | None:
    for name, entry in files.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["bytes"] or _digest(file) != entry["sha256"]:
            return f"{name} differs from the manifest"
    return None


def _write_manifest(folder: Path, step: int) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = {str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _digest(path)} for path in files}
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    manifest = folder / "manifest.json"
    with manifest.open("w") as out:
        json.dump({"schema": SCHEMA, "step": step, "files": entries}, out, indent=1)
        out.flush()
        os.fsync(out.fileno())
    _sync_folder(folder)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
