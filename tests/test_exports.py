"""What April promises by name: its exports, and every registered component with its options."""

from __future__ import annotations

import importlib.metadata
import inspect
import subprocess
import sys
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from pydantic import Field

import april
from april import registry
from april.algorithms.atoms import function_of
from april.algorithms.atoms import register as register_atom
from april.algorithms.losses.pairs import LOSSES
from april.algorithms.spec import SLOTS, Atom
from april.config.recipe import Recipe
from april.config.schema import Config
from april.core.errors import RecipeError

COMPONENTS = [(kind, name) for kind in registry.KINDS for name in registry.names(kind)]
ATOMS = [(slot, name) for slot, atoms in SLOTS.items() for name in atoms]


@pytest.mark.parametrize("name", [name for name in april.__all__ if name != "__version__"])
def test_every_export_is_there_and_says_what_it_is(name: str) -> None:
    exported = getattr(april, name)
    assert inspect.getdoc(exported) and name in dir(april)


def test_exports_are_complete_and_nothing_else_is_there() -> None:
    assert sorted(april.__all__) == sorted([*april._HOMES, "__version__"])
    assert april.__version__ == importlib.metadata.version("april-rl")
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = april.trian  # type: ignore[attr-defined]


def test_importing_april_imports_nothing_heavy() -> None:
    code = "import sys, april\nprint([m for m in ('torch', 'transformers', 'numpy', 'pydantic') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def undescribed(model: type[Config]) -> list[str]:
    """Options without a description."""
    return [name for name, field in model.model_fields.items() if name != "type" and not (field.description or "").strip()]


@pytest.mark.parametrize(("kind", "name"), COMPONENTS)
def test_every_component_imports_and_explains_itself(kind: str, name: str) -> None:
    config = registry.config_class(kind, name, kind)
    assert (config.__doc__ or "").strip().splitlines()[0] and undescribed(config) == []
    assert callable(registry.builder(kind, name))
    assert config.model_fields["type"].default == name


@pytest.mark.parametrize(("slot", "name"), ATOMS)
def test_every_atom_imports_and_explains_itself(slot: str, name: str) -> None:
    config = SLOTS[slot][name].config
    assert (config.__doc__ or "").strip().splitlines()[0] and undescribed(config) == []
    required = [field.annotation for field in config.model_fields.values() if field.is_required()]
    fields = {name: field.annotation for name, field in config.model_fields.items() if field.is_required()}
    options = {name: {"part.a": 1.0} if "dict" in str(kind) else 1 for name, kind in fields.items()}
    atom = config(**options)
    function = function_of(slot, atom)
    assert inspect.getdoc(function) and len(required) == len(options)
    accepted = set(inspect.signature(function).parameters)
    if "kind" in atom.options() and "options" in accepted:  # one function for many losses, which passes options on
        accepted |= set(inspect.signature(LOSSES[atom.options()["kind"]]).parameters)
    assert set(atom.options()) <= accepted, "every option reaches the function"


def sections(model: type[Config]) -> list[type[Config]]:
    """A config and the configs within it."""
    inner = [field.annotation for field in model.model_fields.values()]
    return [model, *(kind for kind in inner if inspect.isclass(kind) and issubclass(kind, Config) and kind is not Config)]


def test_every_key_of_a_recipe_is_described() -> None:
    from april.algorithms.spec import AlgorithmConfig
    from april.training.config import SupervisedConfig, TrainerConfig

    described = {
        "model",
        "task",
        "prompt",
        "scoring",
        "sampling",
        "batch",
        "algorithm",
        "training",
        "evaluation",
        "checkpoint",
        "observe",
        "limits",
    }
    assert set(undescribed(Recipe)) <= described, "sections may be described by their class"
    inner = [*sections(Recipe)[1:], AlgorithmConfig, TrainerConfig, SupervisedConfig]
    assert len(inner) > 8 and {model.__name__: undescribed(model) for model in inner if undescribed(model)} == {}
    assert all((model.__doc__ or "").strip() for model in inner)


class Silent(Config):
    """Without a description."""

    type: str = "silent"
    option: int = 1


def test_the_search_for_descriptions_can_fail() -> None:
    assert undescribed(Silent) == ["option"]


def test_a_name_can_be_registered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.KINDS, "reward", dict(registry.KINDS["reward"]))
    registry.register("reward", "silent", Silent, "somewhere:build")
    registry.register("reward", "silent", Silent, "somewhere:build")
    with pytest.raises(RecipeError, match="two components have one name"):
        registry.register("reward", "silent", Silent, "elsewhere:build")
    with pytest.raises(RecipeError, match="two components have one name"):
        registry.register("reward", "exact", Silent, "somewhere:build")
    with pytest.raises(RecipeError, match="no such kind"):
        registry.register("rewards", "silent", Silent, "somewhere:build")
    assert registry.config_class("reward", "silent", "reward") is Silent


def test_an_atom_can_be_registered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SLOTS, "adjust", dict(SLOTS["adjust"]))

    class Other(Atom):
        """Another whitening."""

        type: str = Field("whiten", description="name")

    with pytest.raises(RecipeError, match="two atoms have one name"):
        register_atom("adjust", "whiten", Other, "somewhere:whiten")
    with pytest.raises(RecipeError, match="no such slot"):
        register_atom("adjusts", "whiten", Other, "somewhere:whiten")
    assert SLOTS["adjust"]["whiten"].config is not Other


class Plugin(Silent):
    """From another package."""

    builder: ClassVar[str] = "operator:itemgetter"


class Point(SimpleNamespace):
    """An entry point of another package."""

    def load(self) -> Any:
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


def install(monkeypatch: pytest.MonkeyPatch, name: str, found: Any) -> None:
    point = Point(name=name, value="april_extra.rewards:Plugin", dist=SimpleNamespace(name="april-extra"), found=found)
    monkeypatch.setitem(registry.KINDS, "reward", dict(registry.KINDS["reward"]))
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [point] if group == "april.reward" else [])
    monkeypatch.setattr(registry, "load", lambda target: Plugin if target == point.value else target)


def test_a_plug_in_is_found_by_its_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "extra", Plugin)
    assert "extra" in registry.names("reward")
    assert registry.config_class("reward", "extra", "reward") is Plugin
    assert registry.builder("reward", "extra") == "operator:itemgetter"


def test_a_broken_plug_in_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "extra", ImportError("No module named 'vanished'"))
    with pytest.raises(RecipeError) as error:
        registry.names("reward")
    assert "april-extra: april.reward extra" in str(error.value) and "vanished" in str(error.value)
    install(monkeypatch, "extra", Silent)
    with pytest.raises(RecipeError, match="april-extra") as error:
        registry.names("reward")
    assert "builder" in str(error.value)


def test_a_plug_in_cannot_take_a_name_of_april(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "exact", Plugin)
    with pytest.raises(RecipeError, match="two components have one name") as error:
        registry.names("reward")
    assert "april-extra" in str(error.value)
