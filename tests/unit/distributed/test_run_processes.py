"""Who computes where, and with how many threads."""

from __future__ import annotations

from pathlib import Path

import pytest

from april.config.recipe import Recipe
from april.config.resolve import resolve
from april.run import processes
from april.run.processes import any_child, in_child, share_weights, threads_of


def recipe_of(*overrides: str) -> Recipe:
    return resolve("quickstart", overrides=list(overrides)).recipe


@pytest.fixture(autouse=True)
def _eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes.os, "sched_getaffinity", lambda _pid: set(range(8)), raising=False)


@pytest.mark.parametrize(
    ("overrides", "trainer", "engine", "controller"),
    [
        ((), 1, 1, 1),
        (("model.threads=0",), 8, 8, 8),
        (("model.threads=0", "training.process=child"), 4, 4, 4),
        (("model.threads=3", "training.process=child"), 3, 3, 3),
        (("model.threads=0", "training.process=child", "training.threads=6", "engine.threads=2"), 6, 2, 4),
    ],
)
def test_two_busy_processes_do_not_take_all_cores_each(
    overrides: tuple[str, ...], trainer: int, engine: int, controller: int
) -> None:
    recipe = recipe_of(*overrides)
    assert (threads_of(recipe, "trainer"), threads_of(recipe, "engine"), threads_of(recipe)) == (trainer, engine, controller)


def test_everything_is_in_one_process_unless_the_recipe_says_otherwise() -> None:
    assert not any_child(recipe_of())
    child = recipe_of("engine.process=child")
    assert any_child(child) and in_child(child, "engine") and not in_child(child, "trainer")
    assert share_weights(recipe_of(), None, Path("run")) is None, "no shared memory where nobody shares it"  # type: ignore[arg-type]
