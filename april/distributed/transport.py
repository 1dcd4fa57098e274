"""How weights get from the process that trains to those that generate: what every transport does for its users.

    trainer's process   write(weights, version)
    controller          view(version): a name for those weights, handed from the trainer to the engines; no tensor is moved
    engine's process    reading(version): the tensors, whole or not at all

A transport is made once, in the controller, and sent to a process when that is started. A third version is not written before
the second is served; who asks late for the first finds that it was passed, and is told of a newer one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from torch import Tensor

from april.core.errors import ProcessError
from april.core.ids import Version
from april.core.metric import Mean, Metrics

_KEYS = {"write": ("weights_bytes", "weights_write_s"), "read": ("weights_read_bytes", "weights_read_s")}


class Moved(NamedTuple):
    """What one write or read took."""

    seconds: float
    num_bytes: int


class NotYet(ProcessError):
    """A version cannot be had at the moment, and may be later; what is served stays."""


class Overwritten(ConnectionError):
    """A version was written over while it was read: what the reader has of it is of no use, and it must begin with another."""


class WeightTransport(Protocol):
    """Moves weights between processes; every version is whole for its reader, or not there.

    Attributes:
        name: as a recipe calls it.
        outlives_writer: whether a version can still be read when the process that wrote it is gone.
    """

    name: str
    outlives_writer: bool

    def write(self, weights: Mapping[str, Tensor], version: Version) -> Moved:
        """Publish a version, in the process that has the weights; they may change as soon as this returns.

        Raises:
            ProcessError: they are not the tensors that the transport is for.
        """
        ...

    def holds(self, version: Version) -> bool:
        """Whether this version was written whole and can be read."""
        ...

    def passed(self, version: Version) -> bool:
        """Whether a newer version took its place, so that a reader need not ask for this one any more."""
        ...

    def same(self, weights: Mapping[str, Tensor], version: Version) -> bool:
        """Whether these weights are those of a version that was written, bit for bit."""
        ...

    def view(self, version: Version) -> PublishedWeights:
        """A version by name; where its tensors are looked at, they are read.

        Raises:
            ProcessError: the version is not there, or not whole.
        """
        ...

    def reading(self, version: Version) -> AbstractContextManager[PublishedWeights]:
        """The tensors of a version for a reader that copies them inside the body.

        Raises:
            NotYet: the version cannot be had now, or was passed; asking again later may help.
            ProcessError: it is not there, or is damaged.
            Overwritten: it was there, and was written over inside the body.
        """
        ...

    def reader(self, name: str) -> WeightTransport:
        """What is sent to the process of an engine of this name, each time that one is started."""
        ...

    def gone(self, name: str) -> None:
        """The process of this engine has ended: nobody needs to wait for it."""
        ...

    def took(self, action: str, moved: Moved) -> None:
        """Note a "write" or "read", in whatever process it was."""
        ...

    def take_metrics(self) -> Metrics:
        """What was noted since the last call: see `Transfers`."""
        ...

    def close(self) -> None:
        """The run is over; what only this transport needs is removed."""
        ...


class PublishedWeights(Mapping[str, Tensor]):
    """The tensors of one version; another process that has the transport needs only the version.

    Args:
        transport: where they are.
        version: of the weights.
        load: gives the tensors; called once, by the first look at them.
        num_bytes: that this process had to move for them.
    """

    def __init__(
        self, transport: WeightTransport, version: Version, load: Callable[[], Mapping[str, Tensor]], num_bytes: int = 0
    ) -> None:
        self.transport, self.version, self.num_bytes = transport, version, num_bytes
        self._load = load
        self._tensors: Mapping[str, Tensor] | None = None

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """All of them."""
        if self._tensors is None:
            self._tensors = self._load()
        return self._tensors

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


class Transfers:
    """Writes and reads since the last look, as metrics.

    `weights_bytes` and `weights_write_s` are of one write, `weights_read_bytes` and `weights_read_s` of one read by one
    engine, its own copying included.
    """

    def __init__(self) -> None:
        self._moved: dict[str, list[Moved]] = {"write": [], "read": []}

    def took(self, action: str, moved: Moved) -> None:
        """Note a "write" or "read"."""
        self._moved[action].append(moved)

    def take_metrics(self) -> Metrics:
        """Means over what was noted since the last call."""
        metrics: Metrics = {}
        for action, (num_bytes, seconds) in _KEYS.items():
            moved = self._moved[action]
            if moved:
                metrics[num_bytes] = Mean(float(sum(one.num_bytes for one in moved)), len(moved))
                metrics[seconds] = Mean(sum(one.seconds for one in moved), len(moved))
            moved.clear()
        return metrics
