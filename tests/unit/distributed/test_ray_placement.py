"""The placement table, and what is asked of Ray; no Ray is needed."""

from __future__ import annotations

import pickle
import time

import pytest

from april.config.placement import PlacementConfig
from april.config.resolve import resolve
from april.core import clock
from april.core.clock import Origin, WallClock, origin_here
from april.core.errors import RecipeError
from april.distributed.child import with_end
from april.distributed.ray_cluster import groups_of
from april.run.checks import check_recipe
from april.run.processes import any_child, in_child, threads_of


def placed(**tables: object) -> PlacementConfig:
    return PlacementConfig.model_validate(tables)


def test_each_role_is_a_group_with_a_bundle_for_each_process() -> None:
    table = placed(engine={"gpus": 2, "strategy": "spread"}, trainer={"cpus": 4, "gpus": 1, "resources": {"fast": 1}})
    assert groups_of(table, {"trainer": 2, "engine": 3, "reward": 0}) == [
        (("trainer",), [{"CPU": 4.0, "GPU": 1.0, "fast": 1.0}] * 2, "pack"),
        (("engine",), [{"CPU": 1.0, "GPU": 2.0}] * 3, "spread"),
    ]


def test_shared_devices_are_one_group_of_rank_and_engine_pairs() -> None:
    table = placed(devices="shared", trainer={"gpus": 1, "cpus": 2, "strategy": "strict_pack"}, engine={"gpus": 1})
    assert groups_of(table, {"trainer": 2, "engine": 3, "reward": 1}) == [
        (("trainer", "engine"), [{"CPU": 3.0, "GPU": 1.0}] * 3, "strict_pack"),
        (("reward",), [{"CPU": 1.0}], "pack"),
    ]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("placement.engine.gpus=1",), "placement has no effect without Ray"),
        (("backend=ray", "placement.engine.gpus=1.5"), "more than one GPU are whole ones"),
        (("backend=ray", "placement.devices=shared", "placement.engine.gpus=1"), "to be equal, 0 or 1"),
        (("backend=ray", "placement.engine.strategy=near"), "spread"),
        (("backend=rays",), "ray"),
    ],
)
def test_a_table_that_cannot_be_is_refused(overrides: tuple[str, ...], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        check_recipe(resolve("quickstart", overrides=list(overrides)).recipe)


@pytest.mark.parametrize("schedule", ["one_step", "bounded_async", "windowed", "multi_version", "rolling"])
def test_schedules_that_generate_in_updates_are_refused_on_shared_devices_before_anything_starts(schedule: str) -> None:
    def checked(*overrides: str) -> object:
        return check_recipe(resolve("quickstart", overrides=[f"schedule.type={schedule}", "backend=ray", *overrides]).recipe)

    with pytest.raises(RecipeError, match=f"share devices .*\n.*placement.devices, schedule.type\n.*shared, {schedule}"):
        checked("placement.devices=shared")
    assert checked("placement.devices=split")
    if schedule != "one_step":
        assert checked("placement.devices=shared", "schedule.max_lag_steps=0")


def test_on_ray_every_part_has_an_actor_and_the_threads_of_its_place() -> None:
    recipe = resolve("quickstart", overrides=["backend=ray", "model.threads=0", "placement.trainer.cpus=4"]).recipe
    assert any_child(recipe) and in_child(recipe, "trainer") and in_child(recipe, "engine")
    assert (threads_of(recipe, "trainer"), threads_of(recipe, "engine")) == (4, 1)
    told = resolve("quickstart", overrides=["backend=ray", "engine.threads=3"]).recipe
    assert threads_of(told, "engine") == 3


def test_a_clock_sent_to_another_machine_shows_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    origin = WallClock(12.5).origin_s
    assert isinstance(origin, Origin) and pickle.loads(pickle.dumps(origin)) == 12.5
    sent = pickle.dumps(WallClock().origin_s)
    skew_s = 1000.0
    counter = time.perf_counter
    monkeypatch.setattr(clock, "machine", lambda: "another")
    monkeypatch.setattr(clock.time, "perf_counter", lambda: counter() + skew_s)
    there = WallClock(pickle.loads(sent))
    assert abs(there.now()) < 5.0, "the seconds since the origin, not those of another counter"
    assert origin_here(7.0, time.time() - 3.0, "another") == 7.0, "its own seconds need no translation"


@pytest.mark.parametrize(
    ("reason", "ended", "told"),
    [
        ("closed the connection", "ended by SIGKILL", "closed the connection (ended by SIGKILL)"),
        ("was killed: it said nothing for 8 s", "ended by SIGKILL", "was killed: it said nothing for 8 s"),
        ("its node died (10.0.0.3)", "", "its node died (10.0.0.3)"),
        ("was killed: silent", "Ray has not placed its actor", "was killed: silent (Ray has not placed its actor)"),
    ],
)
def test_the_end_of_a_process_is_told_where_it_says_more(reason: str, ended: str, told: str) -> None:
    assert with_end(reason, ended) == told
