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
from dataclasses import dataclass
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from april.core.errors import ProcessError, ResourceError
from april.core.ids import Version
from april.core.metric import Mean, Metrics

_ALIGNMENT = 64
_SECONDS = {"write": "weights_write_s", "read": "weights_read_s"}
_NUM_SLOTS = 2
_HEADER_BYTES = 4096
_SEQUENCE, _VERSION = 0, 1


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where a tensor lies in a slot: byte offset, shape and type."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the tensors of one set of weights lie.

    Attributes:
        places: by name.
        num_bytes: of one slot.
    """

    places: Mapping[str, TensorPlace]
    num_bytes: int

    @staticmethod
    def of(weights: Mapping[str, Tensor]) -> Layout:
        """The layout of tensors of these shapes and types."""
        places, at = {}, 0
        for name, tensor in weights.items():
            places[name] = TensorPlace(at, tuple(tensor.shape), tensor.dtype)
            at += -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
        return Layout(places, max(at, _ALIGNMENT))


class SharedView(dict[str, Tensor]):
    """The tensors of one version where they lie; another process that holds the buffer needs only the version."""

    def __init__(self, buffer: WeightBuffer, version: Version, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self.buffer, self.version = buffer, version


class WeightBuffer:
    """Two slots of shared memory for weights of one layout. Sent to a child when the child is started.

    Args:
        layout: of the tensors.
        fd: of the memory, owned by the buffer; new memory when left out.

    Raises:
        ResourceError: there is not enough memory.
    """

    def __init__(self, layout: Layout, fd: int | None = None) -> None:
        self.layout = layout
        size = _HEADER_BYTES + _NUM_SLOTS * layout.num_bytes
        self._fd = _new_memory(size) if fd is None else fd
        weakref.finalize(self, os.close, self._fd)
        self._memory = mmap.mmap(self._fd, size)
        self._header: npt.NDArray[np.int64] = np.frombuffer(self._memory, np.int64, 2 * _NUM_SLOTS).reshape(_NUM_SLOTS, 2)
        if fd is None:
            self._header[:, _VERSION] = -1
        self._slots = [self._tensors(_HEADER_BYTES + slot * layout.num_bytes) for slot in range(_NUM_SLOTS)]
        self._seconds: dict[str, list[float]] = {"write": [], "read": []}

    def __reduce__(self) -> tuple[Any, ...]:
        return (_attached, (self.layout, DupFd(self._fd)))

    def _tensors(self, start: int) -> dict[str, Tensor]:
        return {name: self._tensor(place, start + place.offset) for name, place in self.layout.places.items()}

    def _tensor(self, place: TensorPlace, offset: int) -> Tensor:
        count = int(np.prod(place.shape, dtype=np.int64))
        if count == 0:
            return torch.empty(place.shape, dtype=place.dtype)
        return torch.frombuffer(self._memory, dtype=place.dtype, count=count, offset=offset).reshape(place.shape)

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
    def write(self, weights: Mapping[str, Tensor], version: Version) -> float:
        """Copy weights into the slot of their version; returns the seconds it took."""
        start_s = time.perf_counter()
        header, slot = self._header[version % _NUM_SLOTS], self._slots[version % _NUM_SLOTS]
        if weights.keys() != slot.keys():
            raise ProcessError(
                "weights do not fit the shared memory",
                where="weights",
                got=f"{len(weights)} tensors, first other name {next(iter(weights.keys() ^ slot.keys()))}",
                expected=f"the {len(slot)} tensors of the policy",
            )
        header[_SEQUENCE] += 1 + header[_SEQUENCE] % 2  # odd from here on, also after a writer that died in the middle
        header[_VERSION] = -1
        for name, tensor in weights.items():
            slot[name].copy_(tensor)
        header[_VERSION] = version
        header[_SEQUENCE] += 1
        return time.perf_counter() - start_s

    def view(self, version: Version) -> SharedView:
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
        return SharedView(self, version, self._slots[version % _NUM_SLOTS])

    @contextmanager
    def reading(self, version: Version) -> Iterator[SharedView]:
        """The tensors of a version for a reader that copies them inside the body.

        Raises:
            ProcessError: the version is not there, or was overwritten meanwhile.
        """
        header = self._header[version % _NUM_SLOTS]
        before = int(header[_SEQUENCE])
        yield self.view(version)
        if int(header[_SEQUENCE]) != before or not self.holds(version):
            raise ProcessError(
                "weights changed while they were read", where=f"version {version}", expected="a version that is served stays"
            )

    def took(self, action: str, seconds: float) -> None:
        """Note the time of a "write" or "read", in whatever process it was."""
        self._seconds[action].append(seconds)

    def take_metrics(self) -> Metrics:
        """Bytes of one version, and mean seconds of the transfers noted since the last call."""
        metrics: Metrics = {"weights_bytes": Mean(float(self.layout.num_bytes), 1)}
        for action, seconds in self._seconds.items():
            if seconds:
                metrics[_SECONDS[action]] = Mean(sum(seconds), len(seconds))
            seconds.clear()
        return metrics


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
