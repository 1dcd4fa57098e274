"""Runs a program on its tests, each in a process of its own with limits on time, memory and output.

The limits end what does not end and what grows without bound. They are no wall: the program runs as this user, who may read
files and open connections, and code that looks for it can report success for itself. Judge code that somebody may have
written against you in a container.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

CHILD = Path(__file__).with_name("program_child.py")
OUTPUT_BYTES = 1 << 24
"""Of each file that a program writes, its standard output among them."""
MAX_REPORT_BYTES = 1 << 14
KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH")
"""All that a program sees of the environment, so that no key is among it."""

Test = str | Mapping[str, str]
"""Python that runs after the program and raises AssertionError where it is wrong; or "input" and the "output" to it."""


@dataclass(frozen=True, slots=True)
class Run:
    """How far a program came, on one test or on all of them.

    Attributes:
        compiled: it is Python.
        ran: it came to its end on each test, without an error of its own and within the limits.
        passed: share of the tests that hold.
        time_s: processor time on all tests, start of the interpreter excluded; where `repeats` say so, the median of each.
    """

    compiled: bool
    ran: bool
    passed: float
    time_s: float


def run_tests(
    source: str, tests: Sequence[Test], *, timeout_s: float = 4.0, memory_bytes: int = 1 << 30, repeats: int = 1
) -> Run:
    """Run a program on its tests.

    Args:
        source: Python.
        tests: at least one.
        timeout_s: for all of it together; tests that it leaves no time for do not hold.
        memory_bytes: address space of the program, the interpreter's part included.
        repeats: runs of each test; more than one steady the time.

    Raises:
        ValueError: no tests, or one of them is not Python.
    """
    if not tests:
        raise ValueError('a program is judged by tests, and the item has none in "tests"')
    for test in tests:
        if isinstance(test, str):
            compile(test, "test.py", "exec")
    deadline_s = time.monotonic() + timeout_s
    runs = []
    for test in tests:
        runs.append(_run_repeated(source, test, deadline_s, memory_bytes, repeats))
        if not runs[-1].compiled:  # nor would it for the other tests
            break
    return Run(
        compiled=runs[0].compiled,
        ran=all(run.ran for run in runs),
        passed=sum(run.passed for run in runs) / len(tests),
        time_s=math.fsum(run.time_s for run in runs),
    )


def _run_repeated(source: str, test: Test, deadline_s: float, memory_bytes: int, repeats: int) -> Run:
    """The first run that does not pass; of runs that all pass, as many as there is time for, the median time."""
    times_s: list[float] = []
    for _ in range(repeats):
        run = _run_once(source, test, deadline_s, memory_bytes)
        if run.passed < 1:
            if times_s and time.monotonic() >= deadline_s:
                break  # it has passed, and there is no time to measure it once more
            return run
        times_s.append(run.time_s)
    return Run(True, True, 1.0, statistics.median(times_s))


def _run_once(source: str, test: Test, deadline_s: float, memory_bytes: int) -> Run:
    if time.monotonic() >= deadline_s:
        return Run(False, False, 0.0, 0.0)
    given = "" if isinstance(test, str) else str(test["input"])
    job = {
        "source": source,
        "test": test if isinstance(test, str) else None,
        "seconds": math.ceil(max(deadline_s - time.monotonic(), 0)) + 1,
        "memory_bytes": memory_bytes,
        "output_bytes": OUTPUT_BYTES,
    }
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="april-program-"))
        job_file, stdin, stdout = (stack.enter_context(_file(text)) for text in (json.dumps(job), given, ""))
        facts = _report(folder, job_file, stdin, stdout, deadline_s)
        printed = _text(stdout)
    if "started" not in facts and time.monotonic() < deadline_s:
        raise OSError(f"the process of a program does not start with {memory_bytes} bytes of memory")
    time_s = facts.get("time_s", 0.0)
    right = isinstance(test, str) or _lines(printed) == _lines(str(test["output"]))
    return Run(
        compiled=bool(facts.get("compiled")),
        ran=bool(facts.get("ran")),
        passed=float(bool(facts.get("passed")) and right),
        time_s=float(time_s) if isinstance(time_s, int | float) else 0.0,
    )


def _report(folder: str, job: IO[bytes], stdin: IO[bytes], stdout: IO[bytes], deadline_s: float) -> dict[str, Any]:
    """What the child says of the program; it and its process group are dead afterwards."""
    ours, theirs = os.pipe()
    process = None
    try:
        process = subprocess.Popen(
            [sys.executable, "-I", "-X", "utf8", str(CHILD), str(job.fileno()), str(theirs)],
            stdin=stdin, stdout=stdout, stderr=subprocess.DEVNULL, pass_fds=(job.fileno(), theirs), cwd=folder,
            env={name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}, start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        theirs = -1
        return _read_report(ours, deadline_s)
    finally:
        os.close(ours)
        if theirs >= 0:
            os.close(theirs)
        if process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # all of it has ended
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _read_report(pipe: int, deadline_s: float) -> dict[str, Any]:
    """The facts that arrive until there is the last one, nobody is left to send it, or the time is over."""
    received, facts = b"", dict[str, Any]()
    while "ran" not in facts and len(received) < MAX_REPORT_BYTES:
        readable, _, _ = select.select([pipe], [], [], max(0.0, deadline_s - time.monotonic()))
        piece = os.read(pipe, MAX_REPORT_BYTES) if readable else b""
        if not piece:
            break
        received += piece
        for line in received.splitlines(keepends=True):
            if line.endswith(b"\n"):
                facts |= _facts(line)
    return facts


def _facts(line: bytes) -> dict[str, Any]:
    """Nothing where the program itself wrote the line."""
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


@contextlib.contextmanager
def _file(text: str) -> Iterator[IO[bytes]]:
    with tempfile.TemporaryFile() as file:
        file.write(text.encode())
        file.seek(0)
        yield file


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _lines(text: str) -> list[str]:
    """Lines without blanks at their ends and without empty ones after the last."""
    return [line.rstrip() for line in text.rstrip().splitlines()]
