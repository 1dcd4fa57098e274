"""KV of samples that do not run: parked ones that may come back, prompts of open groups, finished parents.

It lives in room that running samples leave, the least recently used goes first, and losing it changes time, never tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from april.core.ids import GroupId, SampleId

Key = SampleId | GroupId
"""A sample, or the group whose prompt it is."""


@dataclass(frozen=True)
class Kept:
    """KV of a sequence that begins with `token_ids`.

    Attributes:
        token_ids: int32 (T,).
        kv: (layers, 2, H_kv, T, d).
        mixed: made by older weights; good for the same sample under "keep_kv" only.
    """

    token_ids: npt.NDArray[np.int32]
    kv: torch.Tensor
    mixed: bool = False

    def covers(self, token_ids: npt.NDArray[np.int32]) -> bool:
        """Whether these are the first tokens of the sequence."""
        size = len(token_ids)
        return len(self.token_ids) >= size and np.array_equal(self.token_ids[:size], token_ids)


class KeptKv:
    """Least recently used first; the owner of the memory says how much may stay."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Key, Kept] = OrderedDict()
        self._members: dict[GroupId, list[Key]] = {}
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, key: Key) -> bool:
        return key in self._kept

    def covers(self, key: Key, token_ids: npt.NDArray[np.int32]) -> bool:
        """Whether what this key has begins with these tokens."""
        return key in self._kept and self._kept[key].covers(token_ids)

    def add(self, key: Key, kept: Kept) -> None:
        """Keep this, in place of what the key had."""
        self.drop(key)
        self._kept[key] = kept
        self._members.setdefault(_group(key), []).append(key)
        self.num_tokens += len(kept.token_ids)

    def drop(self, key: Key) -> None:
        """Forget what this key has, if anything."""
        kept = self._kept.pop(key, None)
        if kept is None:
            return
        members = self._members[_group(key)]
        members.remove(key)
        if not members:
            del self._members[_group(key)]
        self.num_tokens -= len(kept.token_ids)

    def shrink(self, num_tokens: int) -> None:
        """Drop the oldest until at most `num_tokens` are left."""
        while self.num_tokens > max(0, num_tokens):
            self.drop(next(iter(self._kept)))

    def age(self) -> None:
        """The weights have changed and KV is kept: what is here now serves its own sample only."""
        for key, kept in list(self._kept.items()):
            if isinstance(key, GroupId):
                self.drop(key)
            else:
                self._kept[key] = replace(kept, mixed=True)

    def take(self, id_: SampleId, token_ids: npt.NDArray[np.int32]) -> Kept | None:
        """A sample's own KV when it covers these tokens; it is no longer kept then."""
        if not self.covers(id_, token_ids):
            return None
        kept = self._kept[id_]
        self.drop(id_)
        return kept

    def of_relative(self, id_: SampleId, token_ids: npt.NDArray[np.int32]) -> Kept | None:
        """KV of another member of the group, or of its prompt, that covers these tokens."""
        for key in self._members.get(id_.group, ()):
            kept = self._kept[key]
            if not kept.mixed and kept.covers(token_ids):
                self._kept.move_to_end(key)
                return kept
        return None


def _group(key: Key) -> GroupId:
    return key.group if isinstance(key, SampleId) else key
