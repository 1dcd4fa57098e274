"""The typed description of a comparison: arms of one recipe, each run with the same seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from april.config.load import find_recipe, read_toml, recipe_names
from april.config.refusal import refusal
from april.config.schema import Config
from april.core.errors import RecipeError, choice

FOLDER = "comparison"
SEE_COMPARISONS = "`april list comparison` names those that come with April, to start from"


class Comparison(Config):
    """Arms of one recipe: same seeds, same steps, one after the other in turn."""

    recipe: str = Field(description="what all arms have in common: a recipe of April or a TOML file")
    seeds: int = Field(3, ge=1, description="runs of each arm, with seeds 0, 1, ...")
    overrides: tuple[str, ...] = Field((), description="overrides of all arms, such as steps=20")
    baseline: str | None = Field(None, description="the arm that speeds and paired differences are taken against; else the last")
    measures: tuple[str, ...] = Field((), description="keys of metrics.jsonl whose mean over the steps is shown, too")
    times: bool = Field(True, description="whether the page shows speeds and times; false: the arms are about what is learned")
    arms: dict[str, tuple[str, ...]] = Field(min_length=1, description="name -> overrides of that arm")

    @property
    def against(self) -> str:
        """The baseline's name."""
        return self.baseline if self.baseline is not None else list(self.arms)[-1]


def find_comparison(name: str) -> Comparison | None:
    """A comparison that comes with April, or a TOML file with `[arms]`; None when the name means a plain recipe.

    Raises:
        RecipeError: unknown keys, or a baseline that is no arm.
    """
    path = Path(name)
    if name in recipe_names(FOLDER):
        path = find_recipe(name, folder=FOLDER)
    elif path.suffix != ".toml" or not path.is_file() or "arms" not in read_toml(path):
        return None
    return parse_comparison(read_toml(path), str(path))


def parse_comparison(tree: dict[str, Any], where: str) -> Comparison:
    """A comparison from the data of its file.

    Raises:
        RecipeError: unknown keys, or a baseline that is no arm.
    """
    try:
        comparison = Comparison.model_validate(tree)
    except ValidationError as error:
        refused = refusal(error, Comparison, tree, "")
        hint = refused.hint if "did you mean" in str(refused.hint) else SEE_COMPARISONS
        raise RecipeError(
            refused.what, where=f"{where}: {refused.where}", got=refused.got, expected=refused.expected, hint=hint
        ) from None
    if comparison.against not in comparison.arms:
        raise RecipeError(
            "the baseline is no arm",
            where=f"{where}: baseline",
            got=comparison.against,
            **choice(comparison.against, comparison.arms, "name one of the arms"),
        )
    return comparison
