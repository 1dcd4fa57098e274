"""Typed recipes: what is refused and how; the registry."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import Field, ValidationError

from april import registry
from april.algorithms.specs.objectives import ValueLoss
from april.config.load import load_layers, recipe_names
from april.config.recipe import Recipe
from april.config.resolve import resolve
from april.config.schema import Config
from april.core.errors import RecipeError
from april.rollout.schedules.april import AprilConfig, AprilSchedule
from april.rollout.schedules.sync import SyncConfig

PARTS = {"schedule": "sync", "engine": "embedded"}
TASK = {"type": "items", "items": [{"question": "1+1", "answer": "2"}]}


def refused(value: Any) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        registry.validate(Recipe, {"task": TASK} | PARTS | value, "")
    return caught.value


def test_a_recipe_needs_a_task_only() -> None:
    recipe = registry.validate(Recipe, load_layers({"task": TASK}).values, "")
    assert isinstance(recipe, Recipe)
    assert isinstance(recipe.schedule, AprilConfig)
    with pytest.raises(RecipeError, match="a required key is missing") as caught:
        registry.validate(Recipe, load_layers({}).values, "")
    assert caught.value.where == "task"


def test_a_recipe_survives_its_own_dump() -> None:
    """What `run/recipe.toml` holds is the same run."""
    recipe = registry.validate(Recipe, {"task": TASK, "batch": {"group_size": 3}} | PARTS, "")
    again = registry.validate(Recipe, recipe.model_dump(mode="json"), "")
    assert again == recipe
    assert again.schedule == SyncConfig()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("value", "where", "hint"),
    [
        ({"stepps": 3}, "stepps", "did you mean 'steps'?"),
        ({"batch": {"groupsize": 3}}, "batch.groupsize", "did you mean 'group_size'?"),
        ({"schedule": {"type": "april", "max_lag_step": 1}}, "schedule.max_lag_step", None),
        ({"schedule": {"type": "sync", "over_provision": 2}}, "schedule.over_provision", None),
    ],
)
def test_an_unknown_key_names_the_nearest(value: dict[str, Any], where: str, hint: str | None) -> None:
    error = refused(value)
    assert error.where == where
    if hint:
        assert error.hint == hint


@pytest.mark.parametrize("name", ["aprill", "synk"])
def test_an_unknown_type_names_the_nearest(name: str) -> None:
    error = refused({"schedule": {"type": name}})
    assert (error.where, error.got) == ("schedule.type", name)
    assert "did you mean" in str(error.hint)


@pytest.mark.parametrize("value", [3, [], {"max_lag_steps": 1}, {"type": ["april"]}, {"type": 3}, None])
def test_a_component_without_a_type_is_refused(value: Any) -> None:
    assert str(refused({"schedule": value}).where).startswith("schedule")


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"steps": 0}, "steps"),
        ({"sampling": {"temperature": 0}}, "sampling.temperature"),
        ({"sampling": {"temperature": float("nan")}}, "sampling.temperature"),
        ({"schedule": {"type": "april", "max_lag_steps": -1}}, "schedule.max_lag_steps"),
        ({"schedule": {"type": "april", "max_lag_steps": 1, "over_provision": 0.9}}, "schedule.over_provision"),
        ({"batch": {"group_size": "many"}}, "batch.group_size"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_path(value: dict[str, Any], where: str) -> None:
    assert refused(value).where == where


def test_a_bound_on_lag_is_required() -> None:
    """Invariant 24: nobody runs ahead without having said how far."""
    error = refused({"schedule": {"type": "april"}})
    assert (error.where, error.what) == ("schedule.max_lag_steps", "a required key is missing")


def test_configs_are_frozen() -> None:
    config = AprilConfig(max_lag_steps=1)
    with pytest.raises(ValidationError):
        config.max_lag_steps = 5  # type: ignore[misc]


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_is_valid(name: str) -> None:
    recipe = registry.validate(Recipe, load_layers(name).values, "")
    assert isinstance(recipe, Recipe)


@pytest.mark.parametrize("kind", sorted(registry.KINDS))
def test_every_registered_config_loads_and_describes_its_fields(kind: str) -> None:
    for name in registry.names(kind):
        model = registry.config_class(kind, name, kind)
        assert issubclass(model, Config)
        assert model.__doc__
        undescribed = [key for key, field in model.model_fields.items() if key != "type" and not field.description]
        assert undescribed == [], f"{kind} {name}"


def test_a_component_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.KINDS, "schedule", dict(registry.KINDS["schedule"]))

    class MineConfig(Config):
        """Mine."""

        type: str = "mine"
        depth: int = Field(1, description="how deep")

    registry.register("schedule", "mine", MineConfig, AprilSchedule)
    registry.register("schedule", "mine", MineConfig, AprilSchedule)
    assert registry.parse("schedule", {"type": "mine", "depth": 4}, "schedule") == MineConfig(depth=4)
    assert registry.builder("schedule", "mine") is AprilSchedule
    assert "mine" in registry.names("schedule")
    with pytest.raises(RecipeError, match="two components have one name"):
        registry.register("schedule", "mine", SyncConfig, AprilSchedule)
    with pytest.raises(RecipeError, match="did you mean 'schedule'"):
        registry.register("shedule", "x", MineConfig, AprilSchedule)


def test_a_recipe_that_names_no_algorithm_gets_grpo_with_its_correction() -> None:
    task = {"type": "reasoning_gym", "name": "chain_sum"}
    plain = resolve({"task": task})
    assert plain.recipe.algorithm.weights["tis"].cap == 2.0 and plain.origin("algorithm.weights.tis.cap") == "preset grpo"
    assert resolve({"task": task, "algorithm": {"surrogate": "clip"}}).recipe.algorithm.weights == {}
    assert resolve(plain.values()).recipe == plain.recipe


def test_false_takes_an_optional_number_away_and_a_dump_says_so() -> None:
    value_loss = ValueLoss(clip=False)  # type: ignore[arg-type]
    assert value_loss.clip is None and ValueLoss().clip == 0.2
    given = {"task": TASK, "algorithm": {"preset": "ppo", "objectives": {"value": {"clip": False}}}}
    once = resolve(given)
    assert once.values()["algorithm"]["objectives"]["value"]["clip"] is False
    assert resolve(once.values()).values() == once.values()
