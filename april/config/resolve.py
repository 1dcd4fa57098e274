"""From a recipe's layers to its typed, complete form, and back to text with the origin of every value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from april import registry
from april.config.load import Layers, load_layers
from april.config.recipe import Recipe


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
        return self.recipe.model_dump(mode="json", exclude_none=True)

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
    validated = registry.validate(Recipe, layers.values, "")
    return Resolved(validated, layers)  # type: ignore[arg-type]


def explain(resolved: Resolved) -> list[tuple[str, str, str]]:
    """(path, value, origin) of every value, and of those that a change of type took away."""
    rows = [(path, _shown(value), resolved.origin(path)) for path, value in _flat(resolved.values(), "")]
    return rows + [(path, "(dropped)", why) for path, why in sorted(resolved.layers.dropped.items())]


def _flat(tree: Mapping[str, Any], path: str) -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in tree.items():
        here = f"{path}.{key}" if path else key
        rows += _flat(value, here) if isinstance(value, Mapping) and value else [(here, value)]
    return rows


def _shown(value: Any) -> str:
    return tomli_w.dumps({"v": value}).removeprefix("v = ").strip() if not isinstance(value, Mapping) else "{}"
