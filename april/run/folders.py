"""Where a run keeps what it writes."""

from __future__ import annotations

from pathlib import Path

from april.config.recipe import Recipe
from april.core.errors import RecipeError
from april.core.template import fill


def run_folder(recipe: Recipe) -> Path:
    """Where a run is kept.

    Raises:
        RecipeError: `out` is empty, or names anything but {name} and {seed}.
    """
    return _filled(recipe, recipe.out, "out")


def weights_folder(recipe: Recipe, run: Path) -> Path:
    """Where weights are published on the disk; in the folder `run`, unless the recipe says.

    Raises:
        RecipeError: `publishing.folder` is empty, or names anything but {name} and {seed}.
    """
    named = recipe.publishing.folder
    return run / "weights" if named is None else _filled(recipe, named, "publishing.folder")


def _filled(recipe: Recipe, template: str, where: str) -> Path:
    name = fill(template, {"name": recipe.name, "seed": recipe.seed}, where)
    if not name.strip():
        raise RecipeError(
            "a folder has no name",
            where=where,
            got=repr(name),
            expected="a path, such as runs/{name}",
            hint=f"leave {where} out, or write . for the working directory",
        )
    return Path(name)
