"""Engines that are asked to join and leave: who may, in which order, and that one that fails costs nothing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from april.config.resolve import resolve
from april.core.clock import VirtualClock
from april.core.errors import AprilError, EngineError, ProcessError, RecipeError, ResourceError
from april.engines.pool import EnginePool
from april.engines.scripted import Reply, ScriptedEngine
from april.run import elastic
from april.run.elastic import ElasticEngines, check_elastic
from april.run.requests import ask, take
from tests.integration.command_helpers import Call, caller

CHILDREN = ("engine.process=child", "engine.replicas=2")
CLOCK = VirtualClock()


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Call:
    return caller(capfd)


class Loading(ScriptedEngine):
    """An engine in an imagined process that is loaded when a test says so."""

    def __init__(self) -> None:
        super().__init__(lambda _sample: Reply((7, 0)), CLOCK)
        self.pid: int | None = 4711
        self.loaded, self.closed = False, False
        self.all_losses: list[str] = []
        self.fails: AprilError | None = None

    def poll(self) -> Any:
        if self.fails is not None:
            raise self.fails
        return super().poll()

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> dict[str, Loading]:
    made: dict[str, Loading] = {}

    def start(_recipe: Any, _clock: Any, _transport: Any, name: str, _spawn: Any) -> Loading:
        made[name] = Loading()
        return made[name]

    monkeypatch.setattr(elastic, "remote_engine", start)
    return made


def elastic_run(folder: Path, notes: list[str]) -> tuple[ElasticEngines, EnginePool]:
    pool = EnginePool({f"embedded {i}": ScriptedEngine(lambda _s: Reply((7, 0)), CLOCK) for i in range(2)}, CLOCK)
    parts: Any = SimpleNamespace(
        recipe=resolve("quickstart", overrides=list(CHILDREN)).recipe,
        folder=folder,
        clock=CLOCK,
        engine=pool,
        driver=SimpleNamespace(version=0),
        transport=SimpleNamespace(holds=lambda _version: False),
        cluster=None,
    )
    return ElasticEngines(parts, notes.append), pool


def test_requests_come_in_order_and_once(tmp_path: Path) -> None:
    assert take(tmp_path) == []
    for number in (1, 2, 3):
        path = ask(tmp_path, {"add": number, "remove": [], "finish": False})
    assert path.is_file()
    assert [request["add"] for request in take(tmp_path)] == [1, 2, 3] and take(tmp_path) == [] and not path.exists()


def test_what_was_asked_joins_when_it_is_loaded_and_leaves(tmp_path: Path, started: dict[str, Loading]) -> None:
    notes: list[str] = []
    ask(tmp_path, {"add": 5, "remove": [], "finish": False})
    engines, pool = elastic_run(tmp_path, notes)
    engines.turn()
    assert not started, "what was asked of a run before this one is not done"
    ask(tmp_path, {"add": 1, "remove": [], "finish": False})
    engines.turn()
    assert list(started) == ["embedded 2"] and list(pool.engines) == ["embedded 0", "embedded 1"]
    assert [(one["name"], one["process"], one["state"]) for one in engines.describe()] == [("embedded 2", 4711, "being loaded")]
    started["embedded 2"].loaded = True
    ask(tmp_path, {"add": 1, "remove": ["embedded 0"], "finish": False})
    engines.turn()
    assert list(pool.engines) == ["embedded 1", "embedded 2"] and list(engines.loading) == ["embedded 3"]
    engines.remove("embedded 3")
    assert started["embedded 3"].closed and not engines.loading
    engines.add()
    engines.close()
    assert started["embedded 4"].closed, "a name is never used twice"
    assert notes[1:3] == ["engine embedded 3 is started, and joins when it is loaded", "engine embedded 0 leaves"]


def test_what_cannot_be_done_is_told_and_the_run_goes_on(tmp_path: Path, started: dict[str, Loading]) -> None:
    notes: list[str] = []
    engines, pool = elastic_run(tmp_path, notes)
    for name in ("embedded 9", "embedded 0", "embedded 1"):
        ask(tmp_path, {"add": 0, "remove": [name], "finish": False})
    engines.turn()
    assert [note for note in notes if note.startswith("not done")] == [
        "not done: a pool has no such engine (embedded 9)",
        "not done: the last engine of a pool cannot leave it (embedded 1)",
    ]
    engines.add(), engines.add()
    started["embedded 2"].fails = ProcessError("the embedded 2 process did not start", got="no memory")
    started["embedded 3"].pid, started["embedded 3"].all_losses = None, ["its node died"]
    engines.turn()
    assert notes[-2:] == [
        "engine embedded 2 does not join: the embedded 2 process did not start (no memory)",
        "engine embedded 3 does not join: the embedded 3 process was lost (its node died)",
    ]
    assert not engines.loading and list(pool.engines) == ["embedded 1"] and started["embedded 2"].closed
    with pytest.raises(EngineError, match="no such engine"):
        engines.remove("embedded 2")


def test_files_that_hold_no_request_end_no_run(tmp_path: Path, started: dict[str, Loading]) -> None:
    notes: list[str] = []
    engines, _ = elastic_run(tmp_path, notes)
    for content in ("", "[]", '{"add": 1}', '{"add": "1", "remove": [], "finish": false}'):
        ask(tmp_path, {}).write_text(content)
    ask(tmp_path, {"add": 1, "remove": [], "finish": False})
    engines.turn()
    assert [note.startswith("not a request: ") for note in notes] == [True] * 4 + [False] and list(started) == ["embedded 2"]
    assert take(tmp_path) == [], "each is looked at once"


def test_an_engine_that_cannot_join_ends_no_run(tmp_path: Path, started: dict[str, Loading]) -> None:
    notes: list[str] = []
    engines, pool = elastic_run(tmp_path, notes)
    engines.add()
    started["embedded 2"].fails = ResourceError("there is no such device", got="cuda:3")  # its own words, from its process
    engines.turn()
    assert notes[-1] == "engine embedded 2 does not join: there is no such device (cuda:3)" and len(pool.engines) == 2


@pytest.mark.parametrize(
    ("overrides", "got"),
    [
        (("engine.replicas=2",), 'engine.process = "main"'),
        (("engine.process=child",), "engine.replicas = 1"),
        (("backend=ray", "engine.replicas=2", "placement.devices=shared"), "has the devices of a rank"),
    ],
)
def test_engines_of_other_runs_cannot_come_and_go(overrides: tuple[str, ...], got: str) -> None:
    with pytest.raises(RecipeError, match=got):
        check_elastic(resolve("quickstart", overrides=list(overrides)).recipe)
    check_elastic(resolve("quickstart", overrides=["backend=ray", "engine.replicas=2"]).recipe)


def test_the_command_asks_only_what_the_run_can_do(tmp_path: Path, call: Call) -> None:
    from april.observe.status import StatusWriter

    (tmp_path / "recipe.toml").write_text(resolve("quickstart", overrides=list(CHILDREN)).to_toml())
    status = StatusWriter(tmp_path, lambda: {"engines": [{"name": "embedded 0"}, {"name": "embedded 1"}]})
    status.write()
    assert "nothing is asked for" in call("engines", tmp_path).err
    called = call("engines", tmp_path, "--remove", "embedded 2")
    assert called.code == 2 and "embedded 2" in called.err and "embedded 0, embedded 1" in called.err
    assert "there is nobody to finish" in call("engines", tmp_path, "--add", 1, "--finish").err
    called = call("engines", tmp_path, "--remove", "embedded 0", "--remove", "embedded 1")
    assert called.code == 2 and "the last engine cannot leave" in called.err
    assert take(tmp_path) == []
    assert call("engines", tmp_path, "--add", 2, "--remove", "embedded 0", "--finish", "--json").code == 0
    assert take(tmp_path) == [{"add": 2, "remove": ["embedded 0"], "finish": True}]
    status.write("finished")
    assert "the run does not go on" in call("engines", tmp_path, "--add", 1).err
