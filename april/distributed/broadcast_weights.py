"""Weights sent to all engines at once over `torch.distributed`.

    controller         holds the store that all meet through; is no member
    trainer, rank 0    write: weights -> flat memory; a thread sends it to whoever asks (`april.distributed.broadcast_sender`)
    engine             reading: asks for a version, is told its group and rank, receives

Who asks is a member: an engine that died does not ask, one that is new or was restarted does. A version is whole on an engine
that has received all of it, and is not there otherwise.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from april.core.errors import ProcessError
from april.core.ids import Version
from april.distributed.broadcast_group import Group, Meeting, first_line, wait_until
from april.distributed.broadcast_sender import NEWEST, TROUBLE, Sender, digest_of
from april.distributed.layout import Layout
from april.distributed.transport import Moved, NotYet, PublishedWeights, Transfers

CONTROLLER = "controller"


class BroadcastWeights(Transfers):
    """See `WeightTransport`.

    Args:
        layout: of the tensors.
        bucket_bytes: sent at once.
        deadline_s: longest wait for a member, and for an answer.
        device: of the memory that is sent from and received in.
        host: address that the processes meet at.
        port: of the store; opened here when left out.
        member: who this process is, for the others.
    """

    name = "broadcast"
    outlives_writer = False

    def __init__(
        self,
        layout: Layout,
        *,
        bucket_bytes: int = 64 << 20,
        deadline_s: float = 30.0,
        device: str = "cpu",
        host: str = "127.0.0.1",
        port: int | None = None,
        member: str = CONTROLLER,
    ) -> None:
        super().__init__()
        self.layout, self._bucket_bytes, self._deadline_s, self._device = layout, bucket_bytes, deadline_s, torch.device(device)
        self._host, self._member = host, member
        self._opened = Meeting(host, port) if port is None else None
        self._port = port if self._opened is None else self._opened.port
        self._connected: Meeting | None = self._opened
        self._sender: Sender | None = None
        self._group: Group | None = None
        self._received: Tensor | None = None
        self._processes: dict[str, int] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return (_attached, (self.layout, self._options() | {"member": self._member}))

    def _options(self) -> dict[str, Any]:
        return {
            "bucket_bytes": self._bucket_bytes,
            "deadline_s": self._deadline_s,
            "device": str(self._device),
            "host": self._host,
            "port": self._port,
        }

    @property
    def _meeting(self) -> Meeting:
        if self._connected is None:
            self._connected = Meeting(self._host, self._port)
        return self._connected

    # -- what there is ------------------------------------------------------------------------------------------------

    def _newest(self) -> tuple[Version, str]:
        version, digest = self._meeting.get(NEWEST) or (-1, "")
        return int(version), str(digest)

    def holds(self, version: Version) -> bool:
        """Whether this is the version that was written last; another one cannot be had any more."""
        return self._newest()[0] == version

    def passed(self, version: Version) -> bool:
        """Whether a newer version was written."""
        return self._newest()[0] > version

    def same(self, weights: Mapping[str, Tensor], version: Version) -> bool:
        """Whether these weights have the digest of the version that was written last."""
        flat = torch.zeros(self.layout.num_bytes, dtype=torch.uint8)
        self.layout.copy(weights, self.layout.views(flat))
        return self._newest() == (version, digest_of(flat))

    # -- writing ------------------------------------------------------------------------------------------------------

    def write(self, weights: Mapping[str, Tensor], version: Version) -> Moved:
        """Copy weights to where they are sent from; from now on they are sent to whoever asks.

        Raises:
            ProcessError: they are not the tensors of the policy, or the version before is still being sent.
        """
        start_s = time.perf_counter()
        if self._sender is None:
            meeting = Meeting(self._host, self._port)
            self._sender = Sender(meeting, self.layout, self._device, self._bucket_bytes, self._deadline_s)
            weakref.finalize(self, self._sender.stop)  # its thread ends before the store does, at the end of the process at last
        self._meeting.put(NEWEST, self._sender.stage(weights, version))
        return Moved(time.perf_counter() - start_s, self.layout.num_bytes)

    # -- reading ------------------------------------------------------------------------------------------------------

    def view(self, version: Version) -> PublishedWeights:
        """The version that was written last; received where its tensors are looked at."""
        if not self.holds(version):
            raise self._missing(version)
        return PublishedWeights(self, version, lambda: self._receive(version), self.layout.num_bytes)

    @contextmanager
    def reading(self, version: Version) -> Iterator[PublishedWeights]:
        """The tensors of a version, received now, together with whoever else wants them.

        Raises:
            NotYet: nobody sends it, or a member was lost in the middle.
        """
        tensors = self._receive(version)
        yield PublishedWeights(self, version, lambda: tensors, self.layout.num_bytes)

    def _receive(self, version: Version) -> dict[str, Tensor]:
        meeting = self._meeting
        number = meeting.count("asked")
        joined = None if self._group is None else self._group.number
        meeting.put(f"ask/{number}", {"member": self._member, "version": version, "group": joined})
        key = f"answer/{number}"
        if not wait_until(lambda: meeting.store.check([key]), self._deadline_s):
            meeting.put(f"withdrawn/{number}", True)
            told = f"nobody sends it for {self._deadline_s:g} s"
            raise self._late(version, f"{told}; the last trouble was: {trouble}" if (trouble := meeting.get(TROUBLE)) else told)
        answer = meeting.take(key)
        if "group" not in answer:
            raise self._late(version, f"version {answer['newest']} took its place")
        if self._received is None:
            self._received = torch.zeros(self.layout.num_bytes, dtype=torch.uint8, device=self._device)
        try:
            group, self._group = self._group, None
            if group is None or group.number != answer["group"]:
                rank, size = int(answer["rank"]), int(answer["size"])
                group = Group(meeting, int(answer["group"]), rank, size, self._device, self._deadline_s / 2)
            group.broadcast(self._received, self._bucket_bytes)
        except RuntimeError as error:
            raise self._late(version, f"a broadcast to {answer['size'] - 1} engines failed: {first_line(error)}") from error
        self._group = group
        return self.layout.views(self._received)

    def _late(self, version: Version, got: str) -> NotYet:
        return NotYet(
            "new weights did not come", where=f"version {version}, {self._member}", got=got, expected="a broadcast of all of it"
        )

    def _missing(self, version: Version) -> ProcessError:
        return ProcessError(
            "a version of the weights is not broadcast",
            where=f"version {version}",
            got=f"the newest is {self._newest()[0]}",
            expected="the version that was written last",
        )

    # -- members ------------------------------------------------------------------------------------------------------

    def reader(self, name: str) -> BroadcastWeights:
        """For the next process of this engine; that is another member than the one before."""
        self._processes[name] = self._processes.get(name, 0) + 1
        return BroadcastWeights(self.layout, **self._options(), member=f"{name} #{self._processes[name]}")

    def gone(self, name: str) -> None:
        """The newest process of this engine is not waited for any more."""
        self._meeting.put(f"gone/{name} #{self._processes.get(name, 0)}", True)

    def close(self) -> None:
        """Stop sending; the store ends with this object."""
        if self._sender is not None:
            self._sender.stop()
        self._group, self._received = None, None


def _attached(layout: Layout, options: dict[str, Any]) -> BroadcastWeights:
    return BroadcastWeights(layout, **options)
