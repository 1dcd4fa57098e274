"""What a run ran on: versions, processor, devices, commit."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "april-rl", "torch", "transformers", "tokenizers", "safetensors", "numpy", "pydantic",
    "typer", "rich", "reasoning-gym", "math-verify", "vllm", "ray", "tensorboard",
)  # fmt: skip


def describe_environment(folder: Path | None = None) -> dict[str, Any]:
    """Facts that a later reader needs to reproduce a run, as plain JSON values.

    Args:
        folder: where to ask git for a commit; the package's own folder by default.

    Returns:
        python, platform, cpu (name, cores), threads, packages (installed ones only), git, and torch devices when
        torch is already imported (asking must not import it).
    """
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "cpu_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": _memory_bytes(),
        "threads": {name: os.environ[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ},
        "packages": _versions(),
        "git": _git(folder or Path(__file__).parent),
    }
    if "torch" in sys.modules:
        found["torch"] = _torch_devices(sys.modules["torch"])
    return {key: value for key, value in found.items() if value not in (None, {}, "")}


def _versions() -> dict[str, str]:
    out = {}
    for name in PACKAGES:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return out


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _git(folder: Path) -> dict[str, Any] | None:
    commit = _git_line(folder, "rev-parse", "HEAD")
    if not commit:
        return None
    return {"commit": commit, "changed": bool(_git_line(folder, "status", "--porcelain", "--untracked-files=no"))}


def _git_line(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _torch_devices(torch: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"threads": torch.get_num_threads(), "cuda": torch.version.cuda}
    if torch.cuda.is_available():
        found["devices"] = [
            {"name": torch.cuda.get_device_name(i), "memory_bytes": torch.cuda.get_device_properties(i).total_memory}
            for i in range(torch.cuda.device_count())
        ]
    return found
