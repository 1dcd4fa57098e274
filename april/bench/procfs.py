"""What Linux tells about processes and the machine; on other systems the answers are None."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

_PROC = Path("/proc")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def available() -> bool:
    """Whether this system has /proc as Linux does."""
    return (_PROC / "self" / "stat").exists() and (_PROC / "stat").exists()


def _fields(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on (the name before it may hold spaces); empty when the process is gone."""
    try:
        return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def tree(root: int) -> list[int]:
    """This process and all its descendants."""
    parents: dict[int, list[int]] = {}
    for entry in _PROC.iterdir():
        if entry.name.isdigit() and (fields := _fields(int(entry.name))):
            parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found, waiting = [], [root]
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        waiting += parents.get(pid, [])
    return found


def cpu_s(pids: Iterable[int]) -> float:
    """CPU seconds that these processes have used, with their children that have ended."""
    return sum(sum(int(value) for value in fields[11:15]) for pid in pids if (fields := _fields(pid))) / _TICKS_PER_S


def machine_busy_s() -> float:
    """CPU seconds that anybody has used on this machine since it started (idle and waiting for disks excluded)."""
    for line in (_PROC / "stat").read_text().splitlines():
        if line.startswith("cpu "):
            user, nice, system, _idle, _iowait, irq, softirq, steal = (int(value) for value in line.split()[1:9])
            return (user + nice + system + irq + softirq + steal) / _TICKS_PER_S
    return 0.0


def reset_peak_memory(pids: Iterable[int]) -> None:
    """Let the peak of resident memory start again from what is resident now."""
    for pid in pids:
        with contextlib.suppress(OSError):
            (_PROC / str(pid) / "clear_refs").write_text("5")


def peak_memory_bytes(pids: Iterable[int]) -> int:
    """Largest resident memory of each process, summed; pages that they share count twice."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in (_PROC / str(pid) / "status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    total += 1024 * int(line.split()[1])
    return total
