"""Texts with named gaps, filled from an item: prompts, completions that must be right, and the folders of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from april.core.errors import RecipeError


def field_names(item: Mapping[str, Any], limit: int = 24) -> list[str]:
    """The names that a template may use for this item: "question", "metadata[expression]", ..."""
    names: list[str] = []
    for key, value in item.items():
        names.append(str(key))
        if isinstance(value, Mapping):
            names += [f"{key}[{inner}]" for inner in value]
    return names[:limit] + (["..."] if len(names) > limit else [])


def literal(text: str) -> str:
    """The template that stands for a text as it is."""
    return text.replace("{", "{{").replace("}", "}}")


def fill(template: str, item: Mapping[str, Any], where: str) -> str:
    """`template` with the fields of the item, as `str.format` fills it: "{question}", "{metadata[expression]} =".

    Args:
        template: the text with its gaps.
        item: the fields.
        where: recipe path of the template, for messages.

    Raises:
        RecipeError: for a field that the item lacks, or unpaired braces.
    """
    try:
        return template.format(**item)
    except (KeyError, IndexError, AttributeError, TypeError) as error:
        raise RecipeError(
            "a template names a field that is not there",
            where=where,
            got=f"{template!r} ({error})",
            expected="fields among " + ", ".join(field_names(item)),
            hint="write a literal brace twice: {{ or }}",
        ) from error
    except ValueError as error:
        raise RecipeError(
            "a template cannot be read",
            where=where,
            got=f"{template!r} ({error})",
            expected="paired braces around the name of a field",
            hint="write a literal brace twice: {{ or }}",
        ) from error
