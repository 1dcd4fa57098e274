"""Which experts the routers of a mixture of experts chose, token by token."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from april.core.errors import DataError

Routes = npt.NDArray[np.unsignedinteger[Any]]
"""uint8 or uint16 (T, layers, k): experts in the pass that drew each token; the largest number where they are unknown."""


def freeze_routes(owner: object, *names: str) -> None:
    """Make these attributes read-only copies-if-needed; None stays.

    Raises:
        DataError: another shape or type.
    """
    for name in names:
        if getattr(owner, name) is None:
            continue
        array = np.asarray(getattr(owner, name))
        if array.ndim != 3 or array.dtype not in (np.uint8, np.uint16):
            raise DataError(
                "routes have another form",
                where=name,
                got=f"{array.dtype} {array.shape}",
                expected="uint8 or uint16 (T, layers, k)",
            )
        if array.flags.writeable:
            array = array.copy()
            array.flags.writeable = False
        object.__setattr__(owner, name, array)


def unknown_routes(num_tokens: int, like: Routes) -> Routes:
    """Routes of tokens whose experts were not recorded."""
    return np.full((num_tokens, *like.shape[1:]), np.iinfo(like.dtype).max, like.dtype)


def joined_routes(before: Routes | None, after: Routes | None, lengths: tuple[int, int], where: object) -> Routes | None:
    """Both in one array; tokens of the side that has none are unknown.

    Args:
        lengths: tokens of both sides.
        where: for messages.

    Raises:
        DataError: the sides come from models of another shape.
    """
    like = after if before is None else before
    if like is None:
        return None
    left = unknown_routes(lengths[0], like) if before is None else before
    right = unknown_routes(lengths[1], like) if after is None else after
    if left.shape[1:] != right.shape[1:] or left.dtype != right.dtype:
        raise DataError(
            "routes of one sample come from different models",
            where=str(where),
            got=f"{right.dtype} {right.shape[1:]}",
            expected=f"{left.dtype} {left.shape[1:]} (layers, experts a token)",
        )
    return np.concatenate([left, right])
