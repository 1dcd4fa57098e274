"""What a policy is asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from april.core.errors import DataError

Tokens = npt.NDArray[np.int32]


def frozen_array(values: npt.ArrayLike, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """A read-only one-dimensional copy-if-needed of `values`."""
    array = np.asarray(values, dtype=dtype)
    if array.ndim != 1:
        raise DataError("an array of tokens must have one axis", got=f"shape {array.shape}", expected="shape (T,)")
    if array.flags.writeable:
        array = array.copy()
        array.flags.writeable = False
    return array


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """One problem, tokenised once.

    Attributes:
        id: stable name within its data set.
        token_ids: int32 (P,), what the model reads; never re-tokenised.
        text: the same, for display and for rewards.
        item: what the reward needs to judge an answer (question, answer, metadata).
    """

    id: str
    token_ids: Tokens
    text: str = ""
    item: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_ids", frozen_array(self.token_ids, np.int32))
        if len(self.token_ids) == 0:
            raise DataError("a prompt has no tokens", where=f"prompt {self.id}", expected="at least one token")
