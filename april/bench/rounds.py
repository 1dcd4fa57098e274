"""Running one case: probe the machine, warm up, let the engines take turns, probe again."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from april.bench import procfs
from april.bench.arithmetic import probe_rows
from april.bench.case import APRIL, Case, Effort, EngineRecord, Record
from april.bench.child import Child, ChildFailed
from april.bench.summary import best_probe, summarise

_WARM_UP_TOKENS = 8
_WARM_UP_ROUND = 1_000_000
_COPY_BYTES = (1 << 22, 1 << 29)

Say = Callable[[str], None]


def run_case(case: Case, children: Mapping[str, Child], probe: Child, effort: Effort, say: Say) -> Record:
    """Probe, warm up, let the engines take turns, probe again.

    Raises:
        ChildFailed: when April itself fails; a peer that fails is recorded instead.
    """
    rows = probe_rows(case.num_requests)
    num_bytes = int(np.clip(case.kv_bytes, *_COPY_BYTES))
    ask = {"model": case.shape.name, "rows": rows, "num_bytes": num_bytes, "threads": effort.threads, "budget_s": effort.probe_s}
    say(f"{case.name}: probing the machine")
    before = probe.ask("probe", **ask)
    records = {name: EngineRecord() for name in children}
    _warm_up(case, children, records, say)
    for index in range(effort.rounds):
        order = list(children) if index % 2 == 0 else list(children)[::-1]
        for name in order:
            record = records[name]
            if record.failed is None and (index == 0 or record.spent_s() < effort.engine_s):
                _guarded(name, record, partial(_round, case, children[name], index))
                say(_round_line(case, name, record, index, effort.rounds))
    overhead = children[APRIL].ask("overhead", prompts=case.prompts(_WARM_UP_ROUND))
    probed = best_probe(before, probe.ask("probe", **ask))
    return summarise(case, records, probed, overhead)


def _guarded(name: str, record: EngineRecord, measure: Callable[[], Record], keep: bool = True) -> None:
    """Measure, and keep the result or the reason why there is none."""
    try:
        done = measure()
    except ChildFailed as error:
        if name == APRIL:
            raise
        record.failed = f"{error.what}: {error.got}"
        return
    if keep:
        record.rounds.append(done)


def _warm_up(case: Case, children: Mapping[str, Child], records: Mapping[str, EngineRecord], say: Say) -> None:
    limits = np.minimum(case.lengths, _WARM_UP_TOKENS).tolist()
    for name, child in children.items():
        say(f"{case.name}: warming up {name}")
        arguments = {"prompts": case.prompts(_WARM_UP_ROUND), "max_new_tokens": limits, "batch_rows": case.batch_rows}
        _guarded(name, records[name], partial(child.ask, "generate", **arguments), keep=False)


def _round(case: Case, child: Child, index: int) -> Record:
    """One measurement: only the first token of each request, then everything."""
    prompts, rows, num = case.prompts(index), case.batch_rows, case.num_requests
    first = child.ask("generate", prompts=case.prompts(_WARM_UP_ROUND + 1 + index), max_new_tokens=[1] * num, batch_rows=rows)
    watch = Watch(child)
    full = child.ask("generate", prompts=prompts, max_new_tokens=case.lengths.tolist(), batch_rows=rows)
    return {**full, "prefill_wall_s": first["wall_s"], **watch.stop(full["wall_s"])}


class Watch:
    """Peak memory of a child, and what others did on the machine while it worked."""

    def __init__(self, child: Child) -> None:
        self._pids = child.tree() if procfs.available() else []
        procfs.reset_peak_memory(self._pids)
        self._own_s = procfs.cpu_s(self._pids)
        self._busy_s = procfs.machine_busy_s() if self._pids else 0.0

    def stop(self, wall_s: float) -> Record:
        """Peak bytes, and the share of all the machine's cores that other processes used; None where unknown."""
        if not self._pids:
            return {"peak_rss_bytes": None, "foreign_cpu_fraction": None}
        foreign_s = (procfs.machine_busy_s() - self._busy_s) - (procfs.cpu_s(self._pids) - self._own_s)
        fraction = max(0.0, foreign_s) / (wall_s * (os.cpu_count() or 1))
        return {"peak_rss_bytes": procfs.peak_memory_bytes(self._pids), "foreign_cpu_fraction": fraction}


def _round_line(case: Case, name: str, record: EngineRecord, index: int, rounds: int) -> str:
    head = f"{case.name}: round {index + 1}/{rounds} {name:<24}"
    if record.failed is not None:
        return f"{head} failed: {record.failed}"
    return f"{head} {int(case.lengths.sum()) / record.rounds[-1]['wall_s']:9.0f} tokens/s"
