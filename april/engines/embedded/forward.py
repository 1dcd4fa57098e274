"""What the engine needs of a model, and the lean model in that form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from april.core.routes import Routes
from april.models.kernel import Kernel
from april.models.kv import KvBucket
from april.models.kv_rows import KvRows
from april.models.lean_decode import LeanDecoder, PackedStates

TokenRows = Sequence[npt.NDArray[np.int32]]
Lengths = npt.NDArray[np.int64]


class Prefilled(Protocol):
    """KV of sequences that were just computed."""

    def kv_of(self, index: int) -> torch.Tensor:
        """(layers, 2, H_kv, T, d) of one sequence."""
        ...


class Forward(Protocol):
    """A causal LM on weights of its own.

    Attributes:
        dtype, device: of the weights.
        vocab_size, max_positions: limits of the model.
        takes_drafts: whether `decode` accepts `DraftStep` in place of buckets.
        routes: (n, layers, k), experts of the rows of the last `decode`; None where they are not recorded.
    """

    dtype: torch.dtype
    device: torch.device
    vocab_size: int
    max_positions: int
    takes_drafts: bool
    routes: Routes | None

    def bucket(self, capacity: int) -> KvBucket:
        """Empty KV memory for rows of this capacity."""
        ...

    def rows(self, buckets: Sequence[KvBucket], lengths: Lengths) -> Sequence[Any]:
        """What `decode` takes for the occupied rows of these buckets, which hold so many tokens; good until memory moves."""
        ...

    def check(self, weights: Mapping[str, Any]) -> None:
        """Raise `ModelError` for weights that `load` could not take."""
        ...

    def load(self, weights: Mapping[str, Any]) -> None:
        """Copy weights given by Hugging Face names, all or, with an error, none."""
        ...

    def prefill(self, rows: TokenRows) -> Prefilled:
        """KV of these sequences (each of one token or more)."""
        ...

    def prefix_routes(self, token_ids: npt.NDArray[np.int32]) -> Routes | None:
        """(T, layers, k), experts of a sequence that `prefill` has computed under the present weights, where they are known."""
        ...

    def decode(self, token_ids: torch.Tensor, positions: torch.Tensor, longest: int, buckets: Sequence[Any]) -> torch.Tensor:
        """Write the KV of one new token a row and return logits (n, V); takes `rows`, or what stands in for buckets."""
        ...

    def response_logits(self, rows: TokenRows, starts: Sequence[int]) -> list[torch.Tensor]:
        """For each sequence the logits (T - start, V) that its tokens from `start` on were, or would be, drawn from."""
        ...


def packed_ids(rows: TokenRows, device: torch.device) -> torch.Tensor:
    """All rows behind each other, int64 (M,)."""
    return torch.from_numpy(np.concatenate(rows).astype(np.int64)).to(device)


def bucket_rows(buckets: Sequence[KvBucket], lengths: Lengths) -> Sequence[KvBucket]:
    """The buckets, told how many tokens their rows hold."""
    ends = np.cumsum([bucket.size for bucket in buckets])
    for bucket, part in zip(buckets, np.split(lengths, ends[:-1]), strict=True):
        bucket.set_lengths(part.tolist())
    return buckets


class LeanForward:
    """`LeanDecoder` as the engine wants it.

    Args:
        decoder: the model.
        kernel: decodes all rows at once; without it they are decoded bucket by bucket.
    """

    takes_drafts = True
    routes: Routes | None = None

    def __init__(self, decoder: LeanDecoder, kernel: Kernel | None = None) -> None:
        self._decoder, self._kernel = decoder, kernel
        self.dtype, self.device = decoder.dtype, decoder.device
        self.vocab_size, self.max_positions = decoder.shape.vocab_size, decoder.shape.max_positions
        self.decode = decoder.decode
        self.check, self.load = decoder.check, decoder.load

    def bucket(self, capacity: int) -> KvBucket:
        shape = self._decoder.shape
        sizes = shape.num_layers, shape.num_kv_heads, shape.head_dim, capacity
        return KvBucket(*sizes, self.dtype, self.device, clears=self._kernel is None)

    def rows(self, buckets: Sequence[KvBucket], lengths: Lengths) -> Sequence[KvBucket | KvRows]:
        return bucket_rows(buckets, lengths) if self._kernel is None else [KvRows(self._kernel, buckets, lengths)]

    def fix_addresses(self, longest_tokens: int) -> None:
        """From now on weights are loaded into the tensors that hold them, and rows so long need no new tables."""
        self._decoder.fix_addresses(longest_tokens)

    def prefix_routes(self, token_ids: npt.NDArray[np.int32]) -> Routes | None:
        return None

    def prefill(self, rows: TokenRows) -> PackedStates:
        return self._decoder.prefill(packed_ids(rows, self.device), [len(row) for row in rows])

    def response_logits(self, rows: TokenRows, starts: Sequence[int]) -> list[torch.Tensor]:
        states = self._decoder.prefill(packed_ids(rows, self.device), [len(row) for row in rows], keep_kv=False)
        return [
            self._decoder.logits(states, index, start - 1, len(row) - 1)
            for index, (row, start) in enumerate(zip(rows, starts, strict=True))
        ]
