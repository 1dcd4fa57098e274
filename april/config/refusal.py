"""What pydantic finds wrong with recipe data, as one error that a user can act on."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from typing import Any, Union, get_args, get_origin

from pydantic import ValidationError

from april.config.schema import Config
from april.core.errors import RecipeError, choice

SEE_LIST = "`april list` describes every component and its options"
SEE_CONFIG = "`april config RECIPE` prints every value and where it came from"
REFUSED = "a value cannot be used"
MAX_SHOWN = 200
"""Letters of a refused value that an error shows."""


def refusal(error: ValidationError, model: type[Config], data: object, where: str) -> RecipeError:
    """What to say of data that a config refuses.

    Args:
        error: pydantic's findings.
        model, data: the config, and what it was given.
        where: recipe path of the data; empty for a whole file.
    """
    findings: list[dict[str, Any]] = [{**finding, "loc": _field_path(model, finding["loc"])} for finding in error.errors()]
    # An unknown key first: when it is a misspelt one, it is also why another key is missing.
    first = next((finding for finding in findings if finding["type"] == "extra_forbidden"), findings[0])
    location = first["loc"]
    path = ".".join(part for part in [where, *(str(part) for part in location)] if part)
    num_others = len({finding["loc"] for finding in findings} - {location})
    others = f" (and {num_others} more)" if num_others else ""
    described = _description(model, location)
    if first["type"] == "extra_forbidden":
        return RecipeError("unknown key" + others, where=path, got=location[-1], **_known_keys(model, data, location))
    if first["type"] == "missing":
        return RecipeError("a required key is missing" + others, where=path, got="nothing", expected=described, hint=SEE_LIST)
    got = _shortened(repr(first.get("input")))
    if first["type"] == "value_error":  # a validator's own sentence says what is wrong
        what, expected = first["msg"].removeprefix("Value error, "), described or "values that agree with each other"
        return RecipeError(f"{REFUSED}: {what}{others}", where=path, got=got, expected=expected, hint=SEE_CONFIG)
    wanted = " or ".join(dict.fromkeys(_wanted(finding["msg"]) for finding in findings if finding["loc"] == location))
    expected = f"{wanted} ({described})" if described else wanted
    return RecipeError(REFUSED + others, where=path, got=got, expected=expected, hint=SEE_CONFIG)


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 4] + " ..."


def _wanted(message: str) -> str:
    """What pydantic asks for, without what it says of the input."""
    return message.removeprefix("Input should be ").partition(", unable to parse")[0]


def _field_path(model: type[Config], location: tuple[Any, ...]) -> tuple[Any, ...]:
    """The path of a finding, without pydantic's names for the members of a union."""
    for index, part in enumerate(location):
        field = _model_at(model, location[:index]).model_fields.get(part)
        if field is not None and len({*get_args(field.annotation)} - {type(None)}) > 1 and _is_union(field.annotation):
            return location[: index + 1] + location[index + 2 :]
    return location


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def _known_keys(model: type[Config], data: object, location: tuple[Any, ...]) -> dict[str, str]:
    """`expected` and `hint` for an unknown key; a key of that very name in another section is what was meant."""
    unknown = str(location[-1])
    known = set(_model_at(model, location[:-1]).model_fields) - {"type"}
    found = choice(unknown, known, SEE_LIST) if known else {"expected": "no options", "hint": f"leave {unknown} out"}
    elsewhere = _elsewhere(model, data, unknown) if len(location) == 1 else []
    return found | ({"hint": "did you mean " + " or ".join(map(repr, elsewhere)) + "?"} if elsewhere else {})


def _elsewhere(model: type[Config], data: object, key: str) -> list[str]:
    """Dotted paths of the fields of a name, below what the data make without it; none where they make nothing."""
    if not isinstance(data, Mapping):
        return []
    try:
        whole = model.model_validate({name: value for name, value in data.items() if name != key})
    except (ValidationError, RecipeError):
        return []
    return [path for path in _paths(whole, "") if path.endswith(f".{key}")]


def _paths(value: object, path: str) -> Iterator[str]:
    """The dotted paths of all fields of a config."""
    inner: Mapping[str, object] = value if isinstance(value, Mapping) else {}
    if isinstance(value, Config):
        inner = {name: getattr(value, name) for name in type(value).model_fields}
    yield path
    for name, part in inner.items():
        yield from _paths(part, f"{path}.{name}" if path else str(name))


def _model_at(model: Any, location: tuple[Any, ...]) -> Any:
    """The config that a path leads to, as far as it can be followed."""
    for part in location:
        field = getattr(model, "model_fields", {}).get(part)
        annotation = field.annotation if field is not None else None
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        inner = next((c for c in candidates if isinstance(c, type) and issubclass(c, Config)), None)
        if inner is not None:
            model = inner
    return model


def _description(model: type[Config], location: tuple[Any, ...]) -> str | None:
    field = _model_at(model, location[:-1]).model_fields.get(str(location[-1])) if location else None
    return field.description if field is not None else None
