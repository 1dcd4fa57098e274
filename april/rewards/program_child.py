"""Runs one program under limits and reports how far it came.

A script of its own, which `program_run` starts; of the standard library only.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import types
from typing import Any


def main(job_fd: int, report_fd: int) -> None:
    """Read the job, run it, write a line of JSON after compiling and one at the end; no last line: the program was killed.

    The program's own input and output are this process's. Once the job is read, nothing that it could open holds the test.
    """
    os.set_inheritable(report_fd, False)
    with os.fdopen(job_fd, encoding="utf-8") as file:
        job = json.load(file)
    set_limits(job["seconds"], job["memory_bytes"], job["output_bytes"])

    def report(**facts: Any) -> None:
        os.write(report_fd, (json.dumps(facts) + "\n").encode())

    report(started=True)
    try:
        program = compile(job["source"], "program.py", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
        report(compiled=False, ran=False, passed=False, time_s=0.0)
        return
    report(compiled=True)
    start_s = cpu_s()
    ran, passed = outcome(program, job["test"])
    report(ran=ran, passed=passed, time_s=cpu_s() - start_s)
    os._exit(0)  # whatever threads the program left


def outcome(program: types.CodeType, test: str | None) -> tuple[bool, bool]:
    """(the program came to its end, its test holds); without a test the end is all that is asked for."""
    # A test asks for what the program defines; what it does as a script is none of the test's business.
    module = types.ModuleType("__main__" if test is None else "program")
    sys.modules[module.__name__] = module
    sys.argv[:] = ["program.py"]
    try:
        exec(program, module.__dict__)
        sys.stdout.flush()
    except SystemExit as end:
        left = test is None and end.code in (None, 0)
        return left, left and flushed()
    except BaseException:
        return False, False
    try:
        exec(compile(test or "", "test.py", "exec"), module.__dict__)
    except AssertionError:
        return True, False
    except BaseException:
        return False, False
    return True, True


def flushed() -> bool:
    """Whether all output could be written."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        return False
    return True


def set_limits(seconds: int, memory_bytes: int, output_bytes: int) -> None:
    """Processor time, address space and size of files; and an end by the clock, should nobody be left to kill this process."""
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (output_bytes, output_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.alarm(seconds)


def cpu_s() -> float:
    """Processor time of this process and of the children that it waited for."""
    usages = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
