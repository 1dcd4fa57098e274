"""Which parameters a model is made of: names and shapes that weights are checked against before any is taken."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from april.core.errors import ModelError

Shapes = Mapping[str, tuple[int, ...]]


def parameter_shapes(module: Any) -> dict[str, tuple[int, ...]]:
    """Shape of each parameter by its Hugging Face name; tied ones have one name."""
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def check_weights(weights: Mapping[str, Any], shapes: Shapes, optional: Collection[str] = ()) -> None:
    """Refuse weights that are not those of a model; further names are ignored.

    Args:
        optional: names that may be missing.

    Raises:
        ModelError: the first parameter that is missing or has another shape.
    """
    for name, shape in shapes.items():
        if name not in weights:
            if name in optional:
                continue
            raise ModelError("a parameter is missing", where=name, expected="the names of the Hugging Face model")
        found = tuple(weights[name].shape)
        if found != shape:
            raise ModelError("a parameter has another shape", where=name, got=str(found), expected=str(shape))
