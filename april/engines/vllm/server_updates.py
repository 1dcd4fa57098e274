"""New weights for a server: the file that holds them, and the calls that make it serve them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from april.core.errors import EngineError
from april.core.ids import Version
from april.engines.base import UpdateMode, Weights
from april.engines.vllm.client import Step
from april.engines.vllm.files import WeightFiles, named_once


class _Update(NamedTuple):
    version: Version
    mode: UpdateMode
    path: str


class Updates:
    """At most one update is being made, and one waits for its time; a newer one takes its place.

    Args:
        files: where weights are written; the files are removed again.
        tied: names of tensors -> the names under which those are sent.
    """

    def __init__(self, files: WeightFiles, tied: Mapping[str, str]) -> None:
        self._files, self._tied = files, dict(tied)
        self._next: _Update | None = None
        self._now: _Update | None = None

    @property
    def waits(self) -> bool:
        """Whether an update could be begun, as far as updates go."""
        return self._next is not None and self._now is None

    @property
    def running(self) -> bool:
        """Whether the server is being updated."""
        return self._now is not None

    @property
    def holds_back(self) -> bool:
        """Whether nothing new may be sent to the server."""
        return self._next is not None or self._now is not None

    @property
    def mode(self) -> UpdateMode | None:
        """Of the update that waits."""
        return None if self._next is None else self._next.mode

    def pending(self) -> list[str]:
        """What is waited for."""
        return [
            f"weights of version {update.version} ({update.mode})" for update in (self._now, self._next) if update is not None
        ]

    def wanted(self, weights: Weights, version: Version, mode: UpdateMode) -> None:
        """Take these weights, which may change as soon as this returns."""
        path = self._files.write(named_once(weights, self._tied), version)
        former, self._next = self._next, _Update(version, mode, path)
        if former is not None:
            self._files.remove(former.path)

    def begin(self) -> list[Step]:
        """The calls that make the server serve what waits.

        Raises:
            EngineError: nothing waits, or an update is being made.
        """
        if self._next is None or self._now is not None:
            raise EngineError("there is no update to begin", got=self.pending())
        self._now, self._next = self._next, None
        keep = self._now.mode == "keep_kv"
        return [
            ("/pause", {"mode": "keep" if keep else "wait", "clear_cache": "false" if keep else "true"}, None),
            ("/start_weight_update", {}, None),
            ("/update_weights", {}, {"update_info": {"file": self._now.path, "aliases": self._tied}}),
            ("/finish_weight_update", {}, {"weight_version": str(self._now.version)}),
            ("/resume", {}, None),
        ]

    def done(self) -> Version:
        """The server serves the update that was begun; returns its version.

        Raises:
            EngineError: none was.
        """
        if self._now is None:
            raise EngineError("no update was begun", got=self.pending())
        update, self._now = self._now, None
        self._files.remove(update.path)
        return update.version

    def close(self) -> None:
        """Remove all files."""
        self._next = self._now = None
        self._files.close()
