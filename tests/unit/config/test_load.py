"""Files, overlays, presets and overrides: who wins, what goes, what is refused."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from april.config import load
from april.config.load import DEFAULT_COMPONENTS, Layers, find_recipe, parse_override, read_toml, recipe_names
from april.core.errors import RecipeError

load_layers = partial(load.load_layers, defaults={})


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_later_layers_win_and_every_value_knows_its_layer(tmp_path: Path) -> None:
    write(tmp_path, "base.toml", "seed = 1\nsteps = 1\n[batch]\ngroup_size = 2\ngroups_per_step = 2\n")
    recipe = write(tmp_path, "mine.toml", 'base = "base.toml"\nsteps = 2\n[batch]\ngroup_size = 4\n')
    first, second = write(tmp_path, "a.toml", "steps = 3\nname = 'a'\n"), write(tmp_path, "b.toml", "steps = 4\n")
    layers = load_layers(recipe, [first, second], ["batch.group_size=8"])
    assert layers.values == {"seed": 1, "steps": 4, "name": "a", "batch": {"group_size": 8, "groups_per_step": 2}}
    assert layers.origins == {
        "seed": "base.toml",
        "steps": "b.toml",
        "name": "a.toml",
        "batch.group_size": "command line",
        "batch.groups_per_step": "base.toml",
    }
    assert load_layers(recipe, [second, first]).values["steps"] == 3
    assert layers.dropped == {}


def test_the_default_components_are_the_lowest_layer() -> None:
    layers = load.load_layers({}, (), ["schedule.type=sync"])
    assert layers.values["engine"] == DEFAULT_COMPONENTS["engine"]
    assert layers.values["schedule"] == {"type": "sync"}
    assert layers.origins == {"engine.type": "default", "schedule.type": "command line"}
    assert DEFAULT_COMPONENTS["schedule"]["type"] == "april"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("steps=5", {"steps": 5}),
        ("schedule.over_provision=1.5", {"schedule": {"over_provision": 1.5}}),
        ("name=two words", {"name": "two words"}),
        ('name="5"', {"name": "5"}),
        ("name=", {"name": ""}),
        ("a.b.c=true", {"a": {"b": {"c": True}}}),
        ('x={ type = "sync" }', {"x": {"type": "sync"}}),
        ("x=[1, 2]", {"x": [1, 2]}),
        ("x=a=b", {"x": "a=b"}),
    ],
)
def test_an_override_is_a_path_and_a_toml_value_or_a_word(text: str, expected: dict[str, Any]) -> None:
    assert parse_override(text) == expected


@pytest.mark.parametrize("text", ["steps", "=5", "a..b=1", ".a=1", "a.=1"])
def test_an_override_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match=r"path\.to\.key=value"):
        parse_override(text)


def test_a_new_type_drops_the_fields_of_the_former_one_visibly() -> None:
    layers = load_layers(
        {"schedule": {"type": "april", "max_lag_steps": 2, "over_provision": 1.5}, "seed": 3}, (), ["schedule.type=sync"]
    )
    assert layers.values == {"schedule": {"type": "sync"}, "seed": 3}
    assert set(layers.dropped) == {"schedule.max_lag_steps", "schedule.over_provision"}
    assert layers.dropped["schedule.max_lag_steps"] == "command line changed type from 'april' to 'sync'"
    assert layers.origins == {"schedule.type": "command line", "seed": "python"}


def test_the_same_type_keeps_the_fields() -> None:
    layers = load_layers({"schedule": {"type": "april", "max_lag_steps": 2}}, (), ["schedule.type=april"])
    assert layers.values["schedule"] == {"type": "april", "max_lag_steps": 2}
    assert layers.dropped == {}


def test_a_type_deep_inside_drops_its_own_table_only() -> None:
    base = {"a": {"b": {"type": "x", "deep": {"k": 1}}, "c": 2}}
    layers = load_layers(base, (), ['a.b={ type = "y", z = 3 }'])
    assert layers.values == {"a": {"b": {"type": "y", "z": 3}, "c": 2}}
    assert set(layers.dropped) == {"a.b.deep.k"}


def test_lists_are_replaced_and_not_joined() -> None:
    layers = load_layers({"filter": [{"type": "a"}, {"type": "b"}]}, (), ['filter=[{ type = "c" }]'])
    assert layers.values == {"filter": [{"type": "c"}]}
    assert layers.origins == {"filter": "command line"}


def test_a_table_and_a_value_replace_each_other() -> None:
    layers = Layers()
    layers.add({"w": {"tis": {"cap": 2.0, "low": 0.0}}}, "first")
    layers.add({"w": {"tis": False}}, "second")
    assert (layers.values, layers.origins) == ({"w": {"tis": False}}, {"w.tis": "second"})
    layers.add({"w": {"tis": {"cap": 3.0}}}, "third")
    assert (layers.values, layers.origins) == ({"w": {"tis": {"cap": 3.0}}}, {"w.tis.cap": "third"})


def test_a_layer_is_copied() -> None:
    tree: dict[str, Any] = {"a": {"b": [1]}}
    layers = load_layers(tree, (), ["a.c=2"])
    layers.values["a"]["b"].append(2)
    assert tree == {"a": {"b": [1]}}


def test_a_preset_lies_under_the_recipe_with_its_own_origin() -> None:
    tree = {"algorithm": {"preset": "dapo", "bounds": {"type": "constant", "high": 1.4}}}
    layers = load_layers(tree, (), ["algorithm.weights.tis=false"])
    algorithm = layers.values["algorithm"]
    assert "preset" not in algorithm
    assert algorithm["bounds"] == {"type": "constant", "low": 0.8, "high": 1.4}
    assert algorithm["weights"] == {"tis": False}
    assert algorithm["filter"] == [{"type": "zero_variance"}]
    assert layers.origins["algorithm.bounds.high"] == "python"
    assert layers.origins["algorithm.bounds.low"] == "preset dapo"
    assert layers.origins["algorithm.weights.tis"] == "command line"
    assert "algorithm.weights.tis.cap" not in layers.origins
    assert "algorithm.preset" not in layers.origins


def test_a_recipe_can_change_the_type_of_a_part_of_its_preset() -> None:
    layers = load_layers({"algorithm": {"preset": "grpo", "advantage": {"type": "leave_one_out"}}})
    assert layers.values["algorithm"]["advantage"] == {"type": "leave_one_out"}
    assert {"algorithm.advantage.std", "algorithm.advantage.eps"} <= set(layers.dropped)


@pytest.mark.parametrize("preset", recipe_names("algorithm"))
def test_every_shipped_preset_expands(preset: str) -> None:
    layers = load_layers({"algorithm": {"preset": preset}})
    assert "advantage" in layers.values["algorithm"]
    assert set(layers.origins.values()) == {f"preset {preset}"}


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean 'grpo'"):
        load_layers({"algorithm": {"preset": "grp"}})


def test_recipes_in_a_circle_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.toml", 'base = "b.toml"\n')
    write(tmp_path, "b.toml", 'base = "a.toml"\n')
    with pytest.raises(RecipeError, match="circle") as caught:
        load_layers(tmp_path / "a.toml")
    assert caught.value.where == "a.toml" and caught.value.got == "a.toml -> b.toml -> a.toml"
    own = write(tmp_path, "own.toml", 'base = "own.toml"\n')
    with pytest.raises(RecipeError, match="circle"):
        load_layers(own)


def test_one_base_may_be_used_by_two_layers(tmp_path: Path) -> None:
    write(tmp_path, "base.toml", "seed = 1\n")
    recipe, overlay = (
        write(tmp_path, "r.toml", 'base = "base.toml"\nsteps = 2\n'),
        write(tmp_path, "o.toml", 'base = "base.toml"\n'),
    )
    assert load_layers(recipe, [overlay]).values == {"seed": 1, "steps": 2}


@pytest.mark.parametrize("text", ["steps = ", "[batch\n", "steps = 1\nsteps = 2\n", "a = 1\n[a]\n"])
def test_torn_toml_says_the_file_and_the_line(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, "torn.toml", text)
    with pytest.raises(RecipeError, match="not valid TOML") as caught:
        read_toml(path)
    assert caught.value.where == str(path)
    assert "line" in str(caught.value.got) or "end of document" in str(caught.value.got)


def test_bytes_that_are_no_text_are_no_recipe(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="not valid TOML"):
        read_toml(path)


def test_a_missing_file_and_an_unknown_name_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="missing"):
        load_layers(tmp_path / "none.toml")
    with pytest.raises(RecipeError, match="no such recipe"):
        load_layers("quikstart-that-does-not-exist")
    with pytest.raises(RecipeError, match="must be a file"):
        load_layers(tmp_path)
    for name in recipe_names():
        assert find_recipe(name).name == f"{name}.toml"
