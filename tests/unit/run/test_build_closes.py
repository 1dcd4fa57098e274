"""A run that cannot be made, or whose end fails in a part, leaves no part behind."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from april.config.resolve import Resolved, resolve
from april.core.clock import WallClock
from april.core.errors import EngineError, ResourceError
from april.run import build as building
from april.run import loop
from april.run.processes import engines_of

ALL = ["reward", "trainer", "engine", "transport", "cluster"]
"""The newest first."""


class Part:
    """Notes that it was closed; may refuse."""

    def __init__(self, name: str, closed: list[str], refuses: bool = False) -> None:
        self.name, self._closed, self._refuses = name, closed, refuses

    def close(self) -> None:
        self._closed.append(self.name)
        if self._refuses:
            raise ResourceError(f"the {self.name} does not end")


@pytest.fixture
def resolved(tmp_path: Path) -> Resolved:
    return resolve("quickstart", overrides=["engine.process=child", "training.process=child", f"out={tmp_path}/run"])


def with_parts(monkeypatch: pytest.MonkeyPatch, refuses: str = "") -> tuple[list[str], list[str]]:
    """Parts that compute nothing, in place of the real ones; returns what was started and what was closed."""
    started, closed = list[str](), list[str]()

    def starts(name: str) -> Any:
        def start(*_arguments: Any, **_options: Any) -> Part:
            started.append(name)
            return Part(name, closed, name == refuses)

        return start

    for where, name in (
        ("cluster_of", "cluster"),
        ("share_weights", "transport"),
        ("remote_engine", "engine"),
        ("remote_trainer", "trainer"),
        ("RewardRunner", "reward"),
    ):
        monkeypatch.setattr(building, where, starts(name))
    monkeypatch.setattr(building, "start_worker_of", lambda _recipe, _cluster: None)
    monkeypatch.setattr(Part, "spawn", lambda self, role, index: None, raising=False)
    return started, closed


def refuse(*_arguments: Any, **_options: Any) -> Any:
    raise EngineError("no")


@pytest.mark.parametrize(
    ("fails", "closed"),
    [("remote_trainer", ALL[2:]), ("RewardRunner", ALL[1:]), ("Driver", ALL)],
)
def test_what_was_started_is_closed_when_a_later_part_cannot_be_made(
    resolved: Resolved, monkeypatch: pytest.MonkeyPatch, fails: str, closed: list[str]
) -> None:
    _, seen = with_parts(monkeypatch)
    monkeypatch.setattr(building, fails, refuse)
    with pytest.raises(EngineError, match="no"):
        building.build(resolved)
    assert seen == closed


def test_nothing_is_started_where_there_is_no_room_for_checkpoints(resolved: Resolved, monkeypatch: pytest.MonkeyPatch) -> None:
    started, _ = with_parts(monkeypatch)
    monkeypatch.setattr(building, "check_disk", refuse)
    with pytest.raises(EngineError, match="no"):
        building.build(resolved)
    assert started == []


def test_the_end_of_a_run_goes_on_behind_a_part_that_refuses(resolved: Resolved, monkeypatch: pytest.MonkeyPatch) -> None:
    _, closed = with_parts(monkeypatch, refuses="engine")
    monkeypatch.setattr(building, "Driver", SimpleNamespace)
    parts = building.build(resolved)
    with pytest.raises(ResourceError, match="the engine does not end"):
        parts.close()
    assert closed == ALL
    parts.close()
    assert closed == ALL, "once is enough"


def test_a_run_that_cannot_begin_closes_its_parts(resolved: Resolved, monkeypatch: pytest.MonkeyPatch) -> None:
    _, closed = with_parts(monkeypatch)
    monkeypatch.setattr(building, "Driver", lambda **options: SimpleNamespace(emitted_steps=0, **options))
    monkeypatch.setattr(loop, "Telemetry", refuse)
    with pytest.raises(EngineError, match="no"):
        loop.Run(resolved, quiet=None)
    assert closed == ALL


def test_the_first_of_two_engines_is_closed_when_the_second_cannot_be_made() -> None:
    closed = list[str]()
    recipe = resolve("quickstart", overrides=["engine.process=child", "engine.replicas=2"]).recipe

    def make(name: str) -> Any:
        return refuse() if name.endswith("1") else Part(name, closed)

    with pytest.raises(EngineError, match="no"):
        engines_of(recipe, make, WallClock())
    assert closed == ["embedded 0"]
