"""The base of every typed option."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError


class Config(BaseModel):
    """Frozen options; an unknown key is an error. Field descriptions are the help text of `april list`."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse booleans where numbers are meant; `false` takes an optional number away, as it does any other part."""
        if info.field_name not in _number_fields(cls) or not any(isinstance(leaf, bool) for leaf in _leaves(value)):
            return value
        if value is False and type(None) in get_args(cls.model_fields[info.field_name].annotation):
            return None
        raise PydanticCustomError("number_type", "Input should be a number, not true or false")


@functools.cache
def _number_fields(model: type[BaseModel]) -> frozenset[str]:
    """The fields that hold numbers, or lists or tables of them, and never a boolean."""
    types = {name: set(_types(field.annotation)) for name, field in model.model_fields.items()}
    return frozenset(name for name, found in types.items() if found & {int, float} and not found & {bool, Any})


def _types(annotation: Any) -> Iterator[Any]:
    """The types that an annotation is made of."""
    yield annotation
    for inner in get_args(annotation):
        yield from _types(inner)


def _leaves(value: Any) -> Iterator[Any]:
    """The values in a value, however deep."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value
