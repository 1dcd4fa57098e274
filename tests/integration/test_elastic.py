"""Engines join a real run and leave it between its steps, each in a process of its own; the samples notice nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from april.cli.engines import engines_command
from april.observe.status import read_status, status_lines
from april.run.loop import Run
from tests.integration.ray_helpers import on, two_nodes
from tests.integration.test_async_pool import POOL
from tests.integration.test_async_processes import (
    BOUNDED,
    SYNC,
    Witness,
    check_whole,
    log_updates,
    recipe_for,
    run_witnessed,
)

pytestmark = pytest.mark.slow


def run_changed(folder: Path, change: Callable[[Run, int], None], *overrides: str) -> tuple[Run, Witness]:
    """Run to the end; `change` is called after each step with the number of steps that are done."""
    torch.set_num_threads(1)
    folder.mkdir()
    run = Run(recipe_for(folder, *POOL, *overrides), quiet=None, on_step=lambda row: change(run, row["step"] + 1))
    witness = Witness(run)
    log_updates(run, folder)
    run.run()
    return run, witness


def join_then_leave(names: list[list[str]]) -> Callable[[Run, int], None]:
    """A third engine joins after the first step, the first one leaves after the second."""

    def change(run: Run, num_done: int) -> None:
        pool: Any = run.parts.engine
        names.append(list(pool.engines))
        if num_done == 1:
            name = run.add_engine()
            assert run.engines.loading[name].caps.max_running > 0, "waits until it is loaded"
        if num_done == 2:
            run.remove_engine("embedded 0")

    return change


@pytest.mark.parametrize("transport", ["shared_memory", "broadcast"])
def test_a_synchronous_run_is_the_same_with_engines_that_come_and_go(tmp_path: Path, transport: str) -> None:
    """A broadcast, which waits for all who take part, waits for none that has left."""
    _, here = run_witnessed(tmp_path / "here", *SYNC)
    names: list[list[str]] = []
    options = ("engine.process=child", f"publishing.transport={transport}")
    run, there = run_changed(tmp_path / "there", join_then_leave(names), *SYNC, *options)
    assert names == [["embedded 0", "embedded 1"], ["embedded 0", "embedded 1", "embedded 2"], ["embedded 1", "embedded 2"]]
    assert there.tokens == here.tokens and there.lost == []
    check_whole(tmp_path / "there")
    generated = {name: engine.load().generated_tokens for name, engine in run.parts.engine.engines.items()}  # type: ignore[attr-defined]
    assert generated["embedded 2"] > 0, "the one that joined has worked, on the weights of its step"


def test_samples_of_an_engine_that_is_told_to_leave_go_on_elsewhere_with_their_tokens(tmp_path: Path) -> None:
    """By the command, as from another terminal; the schedule has samples in the engines at all times."""
    folder, held, shown = tmp_path / "run", list[int](), list[str]()

    def change(run: Run, num_done: int) -> None:
        pool: Any = run.parts.engine
        if num_done == 1:
            leave = pool.leave
            pool.leave = lambda name, **options: (held.append(len(pool._members[name].open)), leave(name, **options))
            run.status.write()
            engines_command(folder, 1, ["embedded 0"], False, False)
        if num_done == 2:
            run.status.write()
            shown.extend(status_lines(read_status(folder)))

    run, witness = run_changed(folder, change, *BOUNDED, "engine.process=child")
    assert held and held[0] > 0, "it had samples"
    assert witness.lost == [], "moved, not lost"
    check_whole(folder)
    assert "embedded 0" not in run.parts.engine.engines  # type: ignore[attr-defined]
    assert any("embedded 2: " in line for line in shown), "being loaded, or serving"


@pytest.mark.filterwarnings("ignore")
def test_actors_join_in_places_of_their_own_and_give_them_back(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra april-rl[ray] is not installed")
    names: list[list[str]] = []
    groups: list[int] = []

    def change(run: Run, num_done: int) -> None:
        join_then_leave(names)(run, num_done)
        if num_done == 2:
            groups.append(len(run.parts.cluster._more))  # type: ignore[union-attr]
            run.remove_engine("embedded 2")
            run.engines.turn()
            groups.append(len(run.parts.cluster._more))  # type: ignore[union-attr]

    with two_nodes() as (cluster, _):
        _, witness = run_changed(tmp_path / "run", change, *SYNC, *on(cluster))
    assert names[1] == ["embedded 0", "embedded 1", "embedded 2"] and names[2] == ["embedded 1"]
    assert groups == [1, 0] and witness.lost == []
    check_whole(tmp_path / "run")
