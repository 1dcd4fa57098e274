"""The fault matrix: each part of a run is hurt once under each schedule, and the run ends as if nothing had been.

All cases are run by `make faults`; sixteen of them, chosen pairwise, are slow tests.
"""

from __future__ import annotations

import importlib.util
import subprocess
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from april.core.event import Event
from tests.integration.fault_helpers import (
    ENGINES,
    EXPECTED,
    FAULTS,
    LONGEST_S,
    OPTIONS,
    SCHEDULES,
    Case,
    Hurt,
    pairwise,
    within,
)
from tests.integration.ray_helpers import kill_node, on, two_nodes
from tests.integration.test_async_processes import APRIL, BOUNDED, SYNC, Witness, check_whole, log_updates, recipe_for

COMMON = ("engine.process=child", "engine.steps_per_poll=1", "engine.report_every_tokens=4", "evaluation.modes=[]")
TABLES = {"sync": SYNC, "april": APRIL, "bounded_async": BOUNDED}
ALL: list[Case] = [(engine, fault, schedule) for engine in ENGINES for fault in FAULTS for schedule in SCHEDULES]
SIXTEEN, _ = pairwise((ENGINES, FAULTS, SCHEDULES), 16)
NO_RAY = importlib.util.find_spec("ray") is None
NO_VLLM = importlib.util.find_spec("vllm") is None


def case(engine: str, fault: str, schedule: str) -> Any:
    marks = [pytest.mark.faults]
    marks += [pytest.mark.slow] if (engine, fault, schedule) in SIXTEEN else []
    if engine == "vllm":
        marks.append(pytest.mark.skipif(NO_VLLM, reason="the extra april-rl[vllm] is not installed"))
        marks.append(pytest.mark.filterwarnings("ignore"))
    if fault == "kill_node":
        marks.append(pytest.mark.skipif(NO_RAY, reason="the extra april-rl[ray] is not installed"))
        marks.append(pytest.mark.filterwarnings("ignore"))
    return pytest.param(engine, fault, schedule, marks=marks, id=f"{engine}-{fault}-{schedule}")


@pytest.mark.parametrize(("engine", "fault", "schedule"), [case(*each) for each in ALL])
def test_a_fault_costs_time_and_no_sample(tmp_path: Path, engine: str, fault: str, schedule: str) -> None:
    folder = tmp_path / "run"
    if fault != "kill_node":
        hurt = Hurt(fault)
        run, witness = hurt_once(folder, hurt, engine, schedule, ())
    else:
        with two_nodes() as (cluster, node):
            hurt = Hurt(fault, kill_node=(node.node_id, partial(kill_node, cluster, node)))
            run, witness = hurt_once(folder, hurt, engine, schedule, on(cluster))
    assert hurt.done, "nothing was hurt, so this shows nothing"
    assert EXPECTED[fault] in hurt.told(run), "the loss says what happened"
    check_whole(folder)
    if fault in ("kill_engine", "hang_engine", "corrupt_reply", "kill_node"):
        assert witness.lost and run.parts.engine.num_restarts >= 1


def hurt_once(folder: Path, hurt: Hurt, engine: str, schedule: str, places: tuple[str, ...]) -> tuple[Any, Witness]:
    """Run to the end, with the fault."""
    from april.run.loop import Run

    fault = hurt.fault
    folder.mkdir()
    kind = ("engine.type=vllm", "engine.max_running=24", "engine.kv_tokens=8192") if engine == "vllm" else ()
    options = (*kind, *COMMON, *OPTIONS.get(fault, ()), *places)  # another type drops the options of the one before
    run = Run(recipe_for(folder, *TABLES[schedule], *options), quiet=None)
    witness = _Watching(run, hurt)
    log_updates(run, folder)
    hurt.prepare(run)
    with within(LONGEST_S):
        run.run()
    return run, witness


class _Watching(Witness):
    """A witness that also hands events to the fault."""

    def __init__(self, run: Any, hurt: Hurt) -> None:
        super().__init__(run)
        self._run, self._hurt = run, hurt

    def on_event(self, event: Event) -> None:
        super().on_event(event)
        self._hurt.on_event(self._run, event, self.num_finished)


def test_sixteen_cases_hold_every_pair_but_five() -> None:
    """7 faults x 3 schedules are 21 pairs, so sixteen rows cannot hold all of them; twenty-one do."""
    assert len(SIXTEEN) == 16 and set(SIXTEEN) <= set(ALL)
    assert pairwise((ENGINES, FAULTS, SCHEDULES), 16)[1] == 5
    rows, left = pairwise((ENGINES, FAULTS, SCHEDULES), 99)
    assert (len(rows), left) == (21, 0)


def test_a_case_that_does_not_end_is_ended_by_an_alarm() -> None:
    with pytest.raises(TimeoutError, match=r"still going on after 0.05 s"), within(0.05):
        threading.Event().wait()


def test_make_faults_installs_what_its_cases_need(tmp_path: Path) -> None:
    """Without the extras 24 of the 42 cases would be skipped."""
    root = Path(__file__).parents[2]
    steps = subprocess.run(
        ["make", "--dry-run", "faults", f"VENV={tmp_path}"], cwd=root, capture_output=True, text=True, check=True
    ).stdout
    assert "'.[dev,vllm,ray]'" in steps and "faults and not gpu" in steps
    assert sum(engine == "vllm" or fault == "kill_node" for engine, fault, _ in ALL) == 24
