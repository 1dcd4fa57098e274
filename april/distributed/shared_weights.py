"""Weights in memory that several processes share: written once, read in place, never half.

    header   slot 0: sequence, version | slot 1: sequence, version
    slot 0   all tensors of an even version, one after the other
    slot 1   all tensors of an odd version

A writer makes the slot's sequence odd, copies, sets the version and makes the sequence even again. A reader looks at both
before and after. The version that is served stays untouched while the next one is written; a third is not written before
the second is served. The memory has no name: it is gone with the last process that holds it, however that ends.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from april.core.errors import ProcessError, ResourceError
from april.core.ids import Version
from april.distributed.layout import Layout
from april.distributed.transport import Moved, NotYet, Overwritten, PublishedWeights, Transfers

_NUM_SLOTS = 2
_HEADER_BYTES = 4096
_SEQUENCE, _VERSION = 0, 1


class WeightBuffer(Transfers):
    """See `WeightTransport`: two slots of shared memory for weights of one layout. Sent to a child when that is started.

    Args:
        layout: of the tensors.
        fd: of the memory, owned by the buffer; new memory when left out.

    Raises:
        ResourceError: there is not enough memory.
    """

    name = "shared_memory"
    outlives_writer = True

    def __init__(self, layout: Layout, fd: int | None = None) -> None:
        super().__init__()
        self.layout = layout
        size = _HEADER_BYTES + _NUM_SLOTS * layout.num_bytes
        self._fd = _new_memory(size) if fd is None else fd
        weakref.finalize(self, os.close, self._fd)
        self._memory = mmap.mmap(self._fd, size)
        self._header: npt.NDArray[np.int64] = np.frombuffer(self._memory, np.int64, 2 * _NUM_SLOTS).reshape(_NUM_SLOTS, 2)
        if fd is None:
            self._header[:, _VERSION] = -1
        whole = torch.frombuffer(self._memory, dtype=torch.uint8)
        starts = [_HEADER_BYTES + slot * layout.num_bytes for slot in range(_NUM_SLOTS)]
        self._slots = [layout.views(whole[start : start + layout.num_bytes]) for start in starts]

    def __reduce__(self) -> tuple[Any, ...]:
        return (_attached, (self.layout, DupFd(self._fd)))

    def holds(self, version: Version) -> bool:
        """Whether this version lies there whole."""
        sequence, held = self._header[version % _NUM_SLOTS].tolist()
        return bool(held == version and sequence % 2 == 0)

    def passed(self, version: Version) -> bool:
        """Whether a newer version lies, or is being written, where this one would be."""
        sequence, held = self._header[version % _NUM_SLOTS].tolist()
        other = int(self._header[(version + 1) % _NUM_SLOTS, _VERSION])
        return bool(held > version or (sequence % 2 == 1 and other > version))

    @torch.no_grad()
    def write(self, weights: Mapping[str, Tensor], version: Version) -> Moved:
        """Copy weights into the slot of their version."""
        start_s = time.perf_counter()
        header, slot = self._header[version % _NUM_SLOTS], self._slots[version % _NUM_SLOTS]
        self.layout.check(weights)
        header[_SEQUENCE] += 1 + header[_SEQUENCE] % 2  # odd from here on, also after a writer that died in the middle
        header[_VERSION] = -1
        for name, tensor in weights.items():
            slot[name].copy_(tensor)
        header[_VERSION] = version
        header[_SEQUENCE] += 1
        return Moved(time.perf_counter() - start_s, self.layout.num_bytes)

    def same(self, weights: Mapping[str, Tensor], version: Version) -> bool:
        """Whether these weights are those of a version that lies there, bit for bit."""
        held = self.view(version)
        return weights.keys() == held.keys() and all(torch.equal(tensor.cpu(), held[name]) for name, tensor in weights.items())

    def view(self, version: Version) -> PublishedWeights:
        """The tensors of a version, not copied.

        Raises:
            ProcessError: the version is not there, or not whole.
        """
        if not self.holds(version):
            raise ProcessError(
                "a version of the weights is not in shared memory",
                where=f"version {version}",
                got=f"versions {[int(v) for v in self._header[:, _VERSION]]}, sequences {self._header[:, _SEQUENCE].tolist()}",
                expected="a version that was written whole",
            )
        slot = self._slots[version % _NUM_SLOTS]
        return PublishedWeights(self, version, lambda: slot, self.layout.num_bytes)

    @contextmanager
    def reading(self, version: Version) -> Iterator[PublishedWeights]:
        """The tensors of a version for a reader that copies them inside the body.

        Raises:
            NotYet: the version was passed.
            ProcessError: it was never there.
            Overwritten: it was passed inside the body.
        """
        header = self._header[version % _NUM_SLOTS]
        before = int(header[_SEQUENCE])
        try:
            weights = self.view(version)
        except ProcessError as error:
            raise (NotYet(error.what, got=error.got) if self.passed(version) else error) from None
        yield weights
        if int(header[_SEQUENCE]) != before or not self.holds(version):
            raise Overwritten(f"version {version} of the weights was written over while it was read")

    def reader(self, name: str) -> WeightBuffer:
        """Every process holds the same memory."""
        return self

    def gone(self, name: str) -> None:
        """Nobody waits for a reader."""

    def close(self) -> None:
        """The memory goes with the last process that holds it."""


def _new_memory(size: int) -> int:
    """Shared memory without a name, as a file descriptor."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("april-weights")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    try:
        os.ftruncate(fd, size)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, size)
    except OSError as error:
        os.close(fd)
        raise ResourceError(
            "there is too little memory to share the weights",
            got=str(error),
            expected=f"{size / 2**20:.0f} MiB",
            hint='keep trainer and engine in one process (training.process = "main", engine.process = "main")',
        ) from error
    return fd


def _attached(layout: Layout, duplicate: Any) -> WeightBuffer:
    return WeightBuffer(layout, duplicate.detach())
