"""From files and the command line to one tree of values, each with its origin.

    base recipes  <  the recipe file  <  overlays, left to right  <  dotted overrides

Tables merge key by key, arrays are replaced. Where a later layer changes a component's `type`, the former type's fields go.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from april.core.errors import RecipeError, choice, nearest

Tree = dict[str, Any]

DEFAULT_COMPONENTS: Tree = {"schedule": {"type": "april", "max_lag_steps": 2}, "engine": {"type": "embedded"}}
"""The lowest layer, so that `schedule.over_provision=2` alone means something."""

DEFAULT_ALGORITHM: Tree = {"algorithm": {"preset": "grpo"}}
"""For a recipe that says nothing about the algorithm; it corrects the stale tokens of the default schedule."""


@dataclass(slots=True)
class Layers:
    """A tree of values and where each of them came from.

    Attributes:
        values: nested tables.
        origins: dotted path of each leaf -> the layer that set it.
        dropped: dotted path -> why a value of an earlier layer is gone.
    """

    values: Tree = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)

    def add(self, tree: Mapping[str, Any], origin: str) -> None:
        """Lay a tree over what is there."""
        self._merge(self.values, tree, origin, "")

    def _merge(self, into: Tree, tree: Mapping[str, Any], origin: str, path: str) -> None:
        if "type" in tree and "type" in into and tree["type"] != into["type"]:
            self._drop(into, path, f"{origin} changed type from {into['type']!r} to {tree['type']!r}")
        for key, value in tree.items():
            here = f"{path}.{key}" if path else key
            if isinstance(value, Mapping) and isinstance(into.get(key), dict):
                self._merge(into[key], value, origin, here)
                continue
            self._forget(here)
            into[key] = _copied(value)
            for leaf in _leaves(value, here):
                self.origins[leaf] = origin

    def _drop(self, table: Tree, path: str, why: str) -> None:
        for key in [key for key in table if key != "type"]:
            here = f"{path}.{key}" if path else key
            for leaf in _leaves(table[key], here):
                self.dropped[leaf] = why
            self._forget(here)
            del table[key]

    def _forget(self, path: str) -> None:
        for known in [known for known in self.origins if known == path or known.startswith(f"{path}.")]:
            del self.origins[known]


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(inner) for key, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, list) else value


def _leaves(value: Any, path: str) -> Iterable[str]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}")
    else:
        yield path


def recipe_names(folder: str = "run") -> list[str]:
    """The recipes that come with April."""
    root = files("april") / "recipes" / folder
    return sorted(entry.name.removesuffix(".toml") for entry in root.iterdir() if entry.name.endswith(".toml"))


def read_toml(path: Path, kind: str = "recipes") -> Tree:
    """A TOML file.

    Args:
        path: of the file.
        kind: what it holds, as `april list` calls it.

    Raises:
        RecipeError: when it is missing or malformed; says the line.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(
            "a recipe file is missing",
            where=str(path),
            got="no such file",
            expected="a TOML file, or the name of one that comes with April",
            hint=f"check the path, or see `april list {kind}`",
        ) from None
    except IsADirectoryError:
        inside = path / "recipe.toml"
        raise RecipeError(
            "a recipe must be a file",
            where=str(path),
            got="a folder" if inside.exists() else "a folder without recipe.toml",
            expected="a TOML file, or a run's folder",
            hint=f"a run's recipe is {inside}" if inside.exists() else "check the path: no run was begun there",
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(
            "a recipe is not valid TOML", where=str(path), got=error, expected="TOML 1.0", hint="correct that line of the file"
        ) from None


def find_recipe(name: str, beside: Path | None = None, folder: str = "run") -> Path:
    """The file of a recipe: a path, a file beside the recipe that names it, or a recipe that comes with April."""
    path = Path(name)
    for candidate in (beside / path if beside else path, path):
        if candidate.suffix == ".toml" or candidate.exists():
            if candidate.exists() or candidate is path:
                return candidate
            continue
    packaged = Path(str(files("april") / "recipes" / folder / f"{name}.toml"))
    if packaged.exists():
        return packaged
    raise RecipeError(
        "there is no such recipe",
        where="RECIPE",
        got=name,
        expected="a TOML file or a recipe of April",
        hint="check the path: there is no such folder" if path.name != name else nearest(name, recipe_names(folder)),
    )


def parse_override(text: str) -> Tree:
    """A dotted override such as `schedule.over_provision=2` as a tree; the value is TOML, or else a plain string.

    Raises:
        RecipeError: when there is no `=` or the path is empty.
    """
    path, equals, raw = text.partition("=")
    keys = [key.strip() for key in path.split(".")]
    if not equals or not all(keys):
        raise RecipeError(
            "an override has the form path.to.key=value",
            where="command line",
            got=text,
            expected="such as schedule.over_provision=2",
            hint="strings need no quotes; other files go after --overlay",
        )
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw
    for key in reversed(keys):
        value = {key: value}
    return value  # type: ignore[no-any-return]


def load_layers(
    recipe: str | Path | Mapping[str, Any],
    overlays: Sequence[str | Path] = (),
    overrides: Sequence[str] = (),
    *,
    defaults: Mapping[str, Any] = DEFAULT_COMPONENTS,
    folder: str = "run",
) -> Layers:
    """Stack a recipe, overlays and overrides.

    Args:
        recipe: a packaged name, a TOML file, or a tree.
        overlays: further TOML files, each laid over the former.
        overrides: dotted assignments, strongest.
        defaults: the lowest layer.
        folder: of April's own recipes that a name may mean.
    """
    layers = Layers()
    layers.add(defaults, "default")
    if isinstance(recipe, Mapping):
        _add_with_bases(layers, recipe, "python", None, ())
    else:
        _add_file(layers, find_recipe(str(recipe), folder=folder), ())
    for overlay in overlays:
        _add_file(layers, find_recipe(str(overlay)), ())
    for override in overrides:
        layers.add(parse_override(override), "command line")
    _expand_preset(layers)
    return layers


def add_default_algorithm(layers: Layers) -> None:
    """Give a recipe that says nothing about the algorithm the default one."""
    if "algorithm" not in layers.values:
        layers.add(DEFAULT_ALGORITHM, "default")
        _expand_preset(layers)


def _add_file(layers: Layers, path: Path, seen: tuple[Path, ...]) -> None:
    if path.resolve() in seen:
        raise RecipeError(
            "recipes are based on each other in a circle",
            where=path.name,
            got=" -> ".join(p.name for p in (*seen, path)),
            expected="a chain of bases that ends",
            hint="remove one of these `base` keys",
        )
    _add_with_bases(layers, read_toml(path), path.name, path.parent, (*seen, path.resolve()))


def _add_with_bases(layers: Layers, tree: Mapping[str, Any], origin: str, beside: Path | None, seen: tuple[Path, ...]) -> None:
    rest = {key: value for key, value in tree.items() if key != "base"}
    if "base" in tree:
        _add_file(layers, find_recipe(str(tree["base"]), beside), seen)
    layers.add(rest, origin)


def read_preset(name: str) -> tuple[Tree, Tree]:
    """The algorithm of a preset, and what it says of other parts of a recipe.

    Raises:
        RecipeError: there is no such preset.
    """
    path = Path(str(files("april") / "recipes" / "algorithm" / f"{name}.toml"))
    if not path.exists():
        raise RecipeError(
            "unknown preset", where="algorithm.preset", got=name, **choice(name, recipe_names("algorithm"), "leave it out")
        )
    tree = read_toml(path)
    return tree, tree.pop("recipe", {})


def _expand_preset(layers: Layers) -> None:
    """Lay the named algorithm preset under what the recipe says; its table `recipe` speaks of other parts than the algorithm."""
    algorithm = layers.values.get("algorithm")
    if not isinstance(algorithm, dict) or "preset" not in algorithm:
        return
    name = algorithm.pop("preset")
    layers.origins.pop("algorithm.preset", None)
    (tree, others), preset, stronger = read_preset(str(name)), Layers(), dict(layers.origins)
    preset.add({**others, "algorithm": tree}, f"preset {name}")
    preset.add({key: layers.values[key] for key in preset.values if key in layers.values}, "recipe")
    layers.values |= preset.values
    layers.dropped |= preset.dropped
    layers.origins = {**layers.origins, **{key: stronger.get(key, origin) for key, origin in preset.origins.items()}}
