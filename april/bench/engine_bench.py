"""`april bench engine`: April's embedded engine against the engines a user could take instead, on this machine, in one run.

for each model:  write random weights -> open every engine in a process of its own
    for each case:  probe the machine -> warm up -> rounds in alternating order -> probe again
"""

from __future__ import annotations

import math
import os
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from april import __version__
from april.bench import procfs
from april.bench.case import APRIL, LONG_TAILED_BATCH_ROWS, Case, Effort, Record
from april.bench.child import Child, ChildFailed
from april.bench.peers.base import Setup
from april.bench.rounds import Say, run_case
from april.bench.shapes import MAX_POSITIONS, WEIGHT_SEED, BenchShape, shape_named
from april.bench.worker import PEERS, PROBE
from april.bench.workload import KINDS, Kind, WorkloadOptions
from april.core.errors import DataError, nearest

FORMAT = 1
_BLOCK_TOKENS = 128  # vLLM's KV blocks on a CPU


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """What `april bench engine` measures.

    Attributes:
        models: names of shapes.
        workloads: kinds of lengths.
        requests: how many requests are generated together.
        peers: engines to compare with.
        workload: how lengths and prompts are made.
        effort: rounds, seconds and threads.
        pythons: interpreter of a peer, where it is not this one.
        engine: options of April's engine that are not its defaults.
        limit_s: an engine that does not answer for so long is ended.
    """

    models: tuple[str, ...] = ("3m",)
    workloads: tuple[Kind, ...] = ("fixed", "lognormal")
    requests: tuple[int, ...] = (256,)
    peers: tuple[str, ...] = tuple(name for name in PEERS if name != APRIL)
    workload: WorkloadOptions = field(default_factory=WorkloadOptions)
    effort: Effort = field(default_factory=Effort)
    pythons: Mapping[str, str] = field(default_factory=dict)
    engine: Mapping[str, Any] = field(default_factory=dict)
    limit_s: float = 1200.0

    def __post_init__(self) -> None:
        for option, values, known in (("--workload", self.workloads, KINDS), ("--peer", self.peers, PEERS)):
            for value in values:
                if value not in known or value == APRIL:
                    hint = nearest(value, set(known) - {APRIL})
                    raise DataError(f"an unknown name for {option}", where=option, got=value, hint=hint)
        for option, number in (("--requests", min(self.requests, default=0)), ("--rounds", self.effort.rounds)):
            if number < 1:
                raise DataError("a number is too small", where=option, got=number, expected="at least 1")
        longest = self.workload.prompt_tokens + max(self.workload.fixed_tokens, self.workload.cap_tokens)
        if longest > MAX_POSITIONS:
            raise DataError("requests do not fit the models", got=f"{longest} tokens", expected=f"<= {MAX_POSITIONS}")

    def cases(self, shape: BenchShape) -> list[Case]:
        """All cases of one model."""
        return [Case(shape, kind, num, self.workload) for kind in self.workloads for num in self.requests]


def run_engine_bench(options: BenchOptions, logs: Path, say: Say) -> Record:
    """Measure everything that is asked for.

    Args:
        logs: folder for what the engines print.
        say: told about progress, line by line.

    Returns:
        The content of results.json.
    """
    shapes = [shape_named(name) for name in options.models]
    cases = {shape.name: options.cases(shape) for shape in shapes}
    result: Record = {
        "format": FORMAT,
        "machine": describe_machine(),
        "settings": _settings(options),
        "engines": {},
        "models": {shape.name: {"parameters": shape.num_parameters, "shape": shape.describe()} for shape in shapes},
        "cases": [],
    }
    for shape in shapes:
        with tempfile.TemporaryDirectory(prefix="april-bench-") as folder:
            _run_model(cases[shape.name], folder, options, logs, say, result)
    return result


def _settings(options: BenchOptions) -> Record:
    workload = asdict(options.workload)
    if options.workload.trace is not None:
        workload["trace"] = Path(options.workload.trace).name
    return {
        "workload": workload,
        "effort": asdict(options.effort),
        "engine": dict(options.engine),
        "static_batch_rows_long_tailed": LONG_TAILED_BATCH_ROWS,
        "weight_seed": WEIGHT_SEED,
        "dtype": "float32",
        "temperature": 1.0,
    }


def _run_model(cases: Sequence[Case], folder: str, options: BenchOptions, logs: Path, say: Say, result: Record) -> None:
    """All cases of one model."""
    shape, threads = cases[0].shape, options.effort.threads
    children: dict[str, Child] = {}
    probe = Child(PROBE, sys.executable, threads, logs / "probe.log", options.limit_s)
    try:
        say(f"{shape.name}: making random weights ({shape.describe()})")
        result["machine"] |= probe.ask("make", model=shape.name, folder=folder)
        setup = replace(make_setup(folder, cases, threads), engine=dict(options.engine))
        for name in (APRIL, *options.peers):
            child = Child(name, options.pythons.get(name, sys.executable), threads, logs / f"{name}.log", options.limit_s)
            children[name] = child
            say(f"{shape.name}: opening {name}")
            result["engines"][name] = opened = _open(child, setup)
            if "version" not in opened:
                say(f"{shape.name}: {name} is skipped: {opened['skipped']}")
                children.pop(name).close()
        for case in cases:
            result["cases"].append(run_case(case, children, probe, options.effort, say))
    except BaseException:
        # Nobody waits for a generation whose result is not wanted any more.
        for child in (probe, *children.values()):
            child.kill()
        raise
    for child in (probe, *children.values()):
        child.close()


def _open(child: Child, setup: Setup) -> Record:
    """The engine's version, or why it is skipped; April is never skipped."""
    try:
        reply = child.ask("open", setup=asdict(setup))
    except ChildFailed as error:
        if child.name == APRIL:
            raise
        return {"skipped": f"{error.what}: {error.got}"}
    if "missing" not in reply:
        return reply
    if child.name == APRIL:
        raise DataError("April's engine cannot be imported", got=reply["missing"])
    return {"skipped": f"not installed ({reply['missing']})"}


def make_setup(folder: str, cases: Sequence[Case], threads: int) -> Setup:
    """Room for the largest of these cases of one model."""
    longest = max(int(case.lengths.max()) + case.options.prompt_tokens for case in cases)
    kv_bytes = max(
        sum(-(-(int(new) + case.options.prompt_tokens) // _BLOCK_TOKENS) for new in case.lengths)
        * _BLOCK_TOKENS
        * case.shape.kv_bytes_per_token
        for case in cases
    )
    return Setup(
        folder=folder,
        threads=threads,
        max_rows=max(case.num_requests for case in cases),
        max_tokens=longest,
        kv_gib=max(1, math.ceil(kv_bytes / 2**30)),
    )


def describe_machine() -> Record:
    """What the numbers depend on, and how busy the machine was before."""
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    load: Any = list(os.getloadavg()) if hasattr(os, "getloadavg") else None
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "april": __version__,
        "load_average": load,
        "watched": procfs.available(),
    }


def describe_software() -> Record:
    """`describe_machine`, with the torch of this process."""
    import torch

    return describe_machine() | {"torch": torch.__version__}
