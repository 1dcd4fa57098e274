"""Sequences of prompt and response tokens, packed end to end for a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from april.core.errors import DataError
from april.core.routes import Routes
from april.models.routing import packed_routes


@dataclass(frozen=True)
class PackedSequences:
    """S sequences end to end, prompt and response each, ready for the model.

    Attributes:
        token_ids: int64 (M,), all tokens of all sequences.
        lengths: tokens of each sequence, S of them.
        prompt_lengths: prompt tokens of each sequence.
        rows: int64 (N,), the position in `token_ids` whose hidden state predicts each response token.
        prompt_numbers: for each sequence a number that says which of them have equal prompts; empty when all differ.
        routes: int64 (M, layers, k), experts that a mixture of experts has to use, -1 where its routers decide; None: everywhere.
    """

    token_ids: Tensor
    lengths: tuple[int, ...]
    prompt_lengths: tuple[int, ...]
    rows: Tensor
    prompt_numbers: tuple[int, ...] = ()
    routes: Tensor | None = None

    @staticmethod
    def of(
        prompts: Sequence[npt.NDArray[np.int32]],
        responses: Sequence[npt.NDArray[np.int32]],
        routes: Sequence[tuple[Routes | None, Routes]] | None = None,
    ) -> PackedSequences:
        """Pack prompts and their responses; neither may be empty. `routes` are as for `packed_routes`."""
        for index, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            if len(prompt) == 0 or len(response) == 0:
                raise DataError(
                    "a sequence needs a prompt and a response",
                    where=f"sequence {index}",
                    got=f"{len(prompt)} + {len(response)} tokens",
                )
        pairs = list(zip(prompts, responses, strict=True))
        pieces = [piece for pair in pairs for piece in pair]
        ids = np.concatenate(pieces) if pieces else np.zeros(0, np.int32)
        lengths = [len(prompt) + len(response) for prompt, response in pairs]
        ends = np.cumsum(lengths) if lengths else np.zeros(0, np.int64)
        rows = [np.arange(end - len(response), end) - 1 for end, (_, response) in zip(ends, pairs, strict=True)]
        packed_rows = np.concatenate(rows) if rows else np.zeros(0, np.int64)
        return PackedSequences(
            token_ids=torch.from_numpy(ids.astype(np.int64)),
            lengths=tuple(lengths),
            prompt_lengths=tuple(len(prompt) for prompt in prompts),
            rows=torch.from_numpy(packed_rows.astype(np.int64)),
            prompt_numbers=_numbered(prompts),
            routes=None if routes is None else packed_routes(routes, lengths),
        )

    @property
    def targets(self) -> Tensor:
        """int64 (N,): the response tokens."""
        return self.token_ids[self.rows + 1]

    def to(self, device: torch.device) -> PackedSequences:
        """The same on another device."""
        routes = None if self.routes is None else self.routes.to(device)
        return replace(self, token_ids=self.token_ids.to(device), rows=self.rows.to(device), routes=routes)


def _numbered(prompts: Sequence[npt.NDArray[np.int32]]) -> tuple[int, ...]:
    numbers: dict[bytes, int] = {}
    found = tuple(numbers.setdefault(prompt.tobytes(), len(numbers)) for prompt in prompts)
    return found if len(numbers) < len(found) else ()
