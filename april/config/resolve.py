"""From a recipe's layers to its typed, complete form, and back to text with the origin of every value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from april import registry
from april.config.load import Layers, add_default_algorithm, load_layers
from april.config.recipe import Recipe
from april.config.schema import Config
from april.core.errors import RecipeError


@dataclass(frozen=True, slots=True)
class Resolved:
    """A recipe that is complete and valid.

    Attributes:
        recipe: the typed recipe.
        layers: what was given, and where.
    """

    recipe: Recipe
    layers: Layers

    def values(self) -> dict[str, Any]:
        """All values, defaults included, as plain data; unset optional values are left out."""
        return _plain(self.recipe, self.recipe.model_dump(mode="json"))

    def origin(self, path: str) -> str:
        """Which layer set a value; "default" where none did."""
        return self.layers.origins.get(path, "default")

    def to_toml(self) -> str:
        """The complete recipe as TOML; resolving it again gives the same recipe."""
        return tomli_w.dumps(self.values())


def resolve(
    recipe: str | Path | Mapping[str, Any], overlays: Sequence[str | Path] = (), overrides: Sequence[str] = ()
) -> Resolved:
    """Read, merge and validate a recipe.

    Raises:
        RecipeError: for anything that cannot be understood, with its path and the nearest known name.
    """
    layers = load_layers(recipe, overlays, overrides)
    add_default_algorithm(layers)
    try:
        validated = registry.validate(Recipe, layers.values, "")
    except RecipeError as error:
        raise _with_origin(error, layers) from None
    return Resolved(validated, layers)  # type: ignore[arg-type]


def _with_origin(error: RecipeError, layers: Layers) -> RecipeError:
    """The same error, with the layer that set the value beside its path."""
    path = str(error.where)
    origins = {origin for key, origin in layers.origins.items() if f"{path}.".startswith(f"{key}.") or key.startswith(f"{path}.")}
    if len(origins) != 1 or "default" in origins:
        return error
    origin = origins.pop()
    where = f"{path} (from {'the command line' if origin == 'command line' else origin})"
    return type(error)(error.what, where=where, got=error.got, expected=error.expected, hint=error.hint)


def _plain(model: Config, tree: dict[str, Any]) -> dict[str, Any]:
    """Dumped values without None: left out where that is the default, else `false`, which takes a part away."""
    out = {}
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if value is not None:
            out[name] = _plain_inner(value, tree[name])
        elif field.get_default(call_default_factory=True) is not None:
            out[name] = False
    return out


def _plain_inner(value: Any, tree: Any) -> Any:
    if isinstance(value, Config):
        return _plain(value, tree)
    if isinstance(value, Mapping):
        return {key: _plain_inner(value[key], inner) for key, inner in tree.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [_plain_inner(item, inner) for item, inner in zip(value, tree, strict=True)]
    return tree


def explain(resolved: Resolved) -> list[tuple[str, str, str]]:
    """(path, value, origin) of every value, and of those that a change of type took away."""
    rows = [(path, _shown(value), resolved.origin(path)) for path, value in flat(resolved.values(), "")]
    return rows + [(path, "(dropped)", why) for path, why in sorted(resolved.layers.dropped.items())]


def flat(tree: Mapping[str, Any], path: str = "") -> list[tuple[str, Any]]:
    """(dotted path, value) of all leaves of nested tables."""
    rows: list[tuple[str, Any]] = []
    for key, value in tree.items():
        here = f"{path}.{key}" if path else key
        rows += flat(value, here) if isinstance(value, Mapping) and value else [(here, value)]
    return rows


def changes(past: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """What differs between the values of two recipes, one line a value; not the folder, which does not change a run."""
    before, after = dict(flat(past)), dict(flat(present))
    changed = [key for key in {**before, **after} if before.get(key) != after.get(key) and key != "out"]
    return [f"{key}: {before.get(key, 'unset')} -> {after.get(key, 'unset')}" for key in changed]


def _shown(value: Any) -> str:
    """A value as TOML on one line."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_shown(inner)}" for key, inner in value.items()) + " }" if value else "{}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_shown(item) for item in value) + "]"
    return tomli_w.dumps({"v": value}).removeprefix("v = ").strip()
